"""A run that corrects tables: who it is, the locks that it holds, and how one that was killed is finished."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.corrections.write_ahead import carry_out, forget, is_overtaken, unfinished_corrections
from spark_jobs.errors import BusyError
from spark_jobs.lake.locks import CORRECTIONS, REWRITE, WRITE_EVENTS, WRITE_ORDERS, exclusive
from spark_jobs.lake.tables import Table
from spark_jobs.units import to_micros


@dataclass(frozen=True)
class Run:
    """A correction in the making: one of those of a run. ``kind`` is 'repair', 'backfill' or 'review'.

    ``token`` is the correction's own.
    """

    run_id: str
    kind: str
    reason: str
    now: datetime
    rule_set: str | None = None
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def now_us(self) -> int:
        """``now`` in microseconds since the epoch."""
        return to_micros(self.now)


@contextmanager
def correcting(settings: Settings) -> Iterator[None]:
    """Held by whoever reconciles or backfills: one at a time, the others wait. What a killed one has left is finished first."""
    with exclusive(settings, CORRECTIONS):
        _finish(settings)
        yield


def finish_corrections(settings: Settings) -> None:
    """Finish or discard what a killed correction has left, before its tables are read. Does not wait for one that is alive."""
    if not _has_any(settings):
        return
    with suppress(BusyError), exclusive(settings, CORRECTIONS, patience_seconds=0):
        _finish(settings)


def _has_any(settings: Settings) -> bool:
    return settings.corrections_path.exists() and any(settings.corrections_path.iterdir())


def _finish(settings: Settings) -> None:
    if not _has_any(settings):
        return
    with writing(settings):
        for correction in list(unfinished_corrections(settings)):
            if is_overtaken(settings, correction):
                forget(settings, correction)
            else:
                carry_out(settings, correction)


@contextmanager
def writing(settings: Settings) -> Iterator[None]:
    """Nobody else writes the tables of events meanwhile: a batch of an ingest waits, or is waited for."""
    with exclusive(settings, REWRITE, WRITE_EVENTS, WRITE_ORDERS):  # both streams write the ledger
        yield


def table_rows(table: Table, columns: dict[str, Any], count: int) -> pa.Table:
    """Rows of ``table``; a column that is one value holds it everywhere, one that lacks is null. Times are microseconds."""
    made = []
    for spec in table.schema:
        value = columns.get(spec.name)
        if not isinstance(value, pa.Array | pa.ChunkedArray):
            value = pa.nulls(count, spec.type) if value is None else pa.repeat(pa.scalar(value), count)
        made.append(value.cast(spec.type) if not pa.types.is_timestamp(spec.type) else value.cast(pa.int64()).cast(spec.type))
    return pa.Table.from_arrays(made, schema=table.schema)
