"""A run that corrects tables: its identity, its locks, the rows that it adds, and what a killed run left."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.config import Settings
from spark_jobs.corrections.write_ahead import (
    TableChange,
    carry_out,
    has_unfinished,
    is_outdated,
    remove_correction,
    unfinished_corrections,
)
from spark_jobs.erasure.job import finish_erasures
from spark_jobs.errors import BusyError
from spark_jobs.ingest.event_columns import INCREMENT_SCHEMA, increment_columns
from spark_jobs.lake.acts import Act, act_info, complete_audit_log
from spark_jobs.lake.locks import CORRECTIONS, REWRITE, WRITE_EVENTS, WRITE_ORDERS, exclusive
from spark_jobs.lake.stamp import constant
from spark_jobs.lake.tables import MINUTE_METRICS, RESTATEMENTS, TRAFFIC_REVIEWS, Table
from spark_jobs.units import to_micros


@dataclass(frozen=True)
class Run:
    """The run that decides a correction. ``kind`` is 'repair', 'backfill' or 'review'; ``token`` names the one correction."""

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

    def act(self, changes: Iterable[TableChange]) -> dict[str, str]:
        """Return the entry of a correction in the audit log; empty if it only notes that nothing has changed."""
        found = {change.table.name: [change.remove.num_rows, change.add.num_rows] for change in changes if not change.is_empty}
        if not found.keys() - {TRAFFIC_REVIEWS.name}:
            return {}
        arguments = {"correction": self.token, "rows_removed_and_added": found}
        return act_info(Act(self.kind), reason=self.reason, arguments=arguments, now=self.now, run_id=self.run_id)


@contextmanager
def correcting(settings: Settings, *, is_dry: bool = False) -> Iterator[None]:
    """Hold the corrections lock, after finishing what a killed run left. Waits for other runs that correct.

    At the end the audit log gets the entries that it lacks, unless the run ``is_dry``.
    """
    finish_erasures(settings)
    with exclusive(settings, CORRECTIONS):
        _finish(settings)
        yield
        if not is_dry:
            complete_audit_log(settings)


def finish_corrections(settings: Settings) -> None:
    """Finish or discard what a killed run left, before its tables are read. Does nothing while another run corrects."""
    with suppress(BusyError):
        finish_erasures(settings, patience_seconds=0)
    if has_unfinished(settings):
        with suppress(BusyError), exclusive(settings, CORRECTIONS, patience_seconds=0):
            _finish(settings)


def _finish(settings: Settings) -> None:
    if not has_unfinished(settings):
        return
    with writing(settings):
        for correction in list(unfinished_corrections(settings)):
            if is_outdated(settings, correction):
                remove_correction(settings, correction)
            else:
                carry_out(settings, correction)


@contextmanager
def writing(settings: Settings) -> Iterator[None]:
    """Hold the rewrite lock and the write locks of both streams, which share the ledger. A batch of an ingest waits meanwhile."""
    with exclusive(settings, REWRITE, WRITE_EVENTS, WRITE_ORDERS):
        yield


def groups_of_hours(
    hours: Iterable[int], counts: Mapping[int, int], most: int, *, gap_hours: float = math.inf
) -> Iterator[list[int]]:
    """Yield ``hours`` in order, in groups of at most ``most`` records by the ``counts``. A longer gap also ends a group."""
    group: list[int] = []
    total = 0
    for hour in sorted(hours):
        total += counts.get(hour, 0)
        if group and (total > most or hour - group[-1] > gap_hours):
            yield group
            group, total = [], counts.get(hour, 0)
        group.append(hour)
    if group:
        yield group


def table_rows(table: Table, rows: pa.Table, **columns: object) -> pa.Table:
    """Return ``rows`` as rows of ``table``. ``columns`` replace or add columns: arrays, or single values that fill their column.

    Missing columns are null. Times are microseconds.
    """
    made = []
    for spec in table.schema:
        value = columns.get(spec.name, rows[spec.name] if spec.name in rows.column_names else None)
        if not isinstance(value, pa.Array | pa.ChunkedArray):
            value = constant(value, rows.num_rows, spec.type)
        made.append(value.cast(pa.int64()).cast(spec.type) if pa.types.is_timestamp(spec.type) else value.cast(spec.type))
    return pa.Table.from_arrays(made, schema=table.schema)


def increment_rows(sums: pa.Table, run: Run, present: pa.Array | None = None) -> pa.Table:
    """Return rows of `minute_metrics` that add ``sums`` (INCREMENT_SCHEMA, _query_id, _batch_id) to what the batches wrote.

    A row that a batch should have written gets the record_uuid of the batch; a row that adds to one in the table, a record_uuid of
    the run. ``present`` has the record_uuids in the table (None: all rows add).
    """
    parts = [MINUTE_METRICS.schema.empty_table()]
    sums = sums.filter(pc.and_(sums["_query_id"].is_valid(), sums["_batch_id"].is_valid()))
    sums = sums.sort_by([("_query_id", "ascending"), ("_batch_id", "ascending")])
    start = 0
    for (query_id, batch_id), group in groupby(zip(sums["_query_id"].to_pylist(), sums["_batch_id"].to_pylist(), strict=True)):
        count = len(list(group))
        own = sums.slice(start, count).select(INCREMENT_SCHEMA.names).cast(INCREMENT_SCHEMA)
        start += count
        identity = {"_query_id": query_id, "_batch_id": batch_id, "_run_id": run.run_id}
        if present is not None:
            named = increment_columns(own, query_id, batch_id)
            is_present = pc.is_in(named["record_uuid"], value_set=present)
            parts.append(table_rows(MINUTE_METRICS, named.filter(pc.invert(is_present)), **identity))
            own = own.filter(is_present)
        parts.append(table_rows(MINUTE_METRICS, increment_columns(own, f"{run.token}:{query_id}", batch_id), **identity))
    return pa.concat_tables(parts)


def restate(rows: pa.Table, run: Run) -> TableChange:
    """Return the rows of `restatements` for changes of increments: event_hour, region, campaign_id, currency, cause, measures."""
    reason = {"run_id": run.run_id, "kind": run.kind, "reason": run.reason, "rule_set": run.rule_set, "restated_at": run.now_us}
    return TableChange.append(RESTATEMENTS, table_rows(RESTATEMENTS, rows, **reason))
