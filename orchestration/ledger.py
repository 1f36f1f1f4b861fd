"""What the batch ledger says per event hour, read from its Delta versions without Spark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from typing import Any

import duckdb

from spark_jobs.config import Settings
from spark_jobs.lake.duck import connect_delta
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import BATCH_LEDGER, MINUTE_METRICS
from spark_jobs.units import HOUR

LONGEST_GAP = timedelta(days=31)
"""A longer time without a record is no row of empty hours, but a time in which nothing was sent."""

_COUNTS = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")
_SUMS = ", ".join(f"coalesce(sum({name}), 0)::hugeint as {name}" for name in _COUNTS)


@dataclass(frozen=True)
class Cell:
    """Sums of ledger rows of one stream and event hour (None: records without a readable time).

    ``lag_seconds``: the longest between a batch's newest receipt and its ingestion, None where it received nothing new.
    """

    stream: str
    hour: datetime | None
    rows: int
    batches: int
    corrections: int
    lag_seconds: float | None
    offered: int
    accepted: int
    duplicate: int
    conflict: int
    rejected: int
    late: int


@cache
def _lake() -> duckdb.DuckDBPyConnection:
    """This process's DuckDB for the ledger: loading the extension takes longer than a tick of a sensor."""
    return connect_delta({"threads": 1, "memory_limit": "512MB"})


class Ledger:
    """The ledger of a home, read through a DuckDB that the process keeps."""

    def __init__(self, settings: Settings, connection: duckdb.DuckDBPyConnection) -> None:
        self._settings = settings
        self._uri = settings.table_uri(BATCH_LEDGER.name)
        self._log = DeltaLog(self._uri)
        self._lake = connection

    @classmethod
    @contextmanager
    def open(cls, settings: Settings) -> Iterator[Ledger]:
        """The ledger of ``settings``, until the end of the context."""
        with _lake().cursor() as cursor:
            yield cls(settings, cursor)

    def added(self, after: int, until: int) -> list[Cell]:
        """What the versions beyond ``after`` up to ``until`` added; all of version ``until`` where their files or log are gone."""
        files = self._files_added(after, until) if after >= 0 else None
        if files is None:
            return self._cells(self._scan(until))
        if not files:
            return []
        try:
            return self._cells(f"read_parquet([{', '.join(_text(file) for file in files)}])")
        except duckdb.IOException:  # compacted and vacuumed since
            return self._cells(self._scan(until))

    def totals(self, version: int, hours: Iterable[datetime]) -> dict[tuple[str, datetime], Cell]:
        """(stream, hour) -> all that the ledger holds of it at ``version``."""
        wanted = [f"timestamptz '{hour.isoformat()}'" for hour in hours]
        if not wanted:
            return {}
        cells = self._cells(self._scan(version), where=f"event_hour in ({', '.join(wanted)})")
        return {(cell.stream, cell.hour): cell for cell in cells if cell.hour is not None}

    def increments(self, hours: Iterable[datetime]) -> dict[datetime, int]:
        """Hour -> rows of minute_metrics, as it is now."""
        days = sorted({hour.date() for hour in hours})
        uri = self._settings.table_uri(MINUTE_METRICS.name)
        if not days or not DeltaLog(uri).exists():
            return {}
        listed = ", ".join(f"date '{day}'" for day in days)
        found = self._lake.execute(
            f"select date_trunc('hour', event_minute) as hour, count(*) from delta_scan({_text(uri)}) "
            f"where event_date in ({listed}) group by hour"
        ).fetchall()
        return {hour.astimezone(UTC): rows for hour, rows in found}

    def held_hours(self, version: int, until: datetime) -> list[datetime]:
        """The hours until ``until`` with an accepted record, ascending."""
        found = self._lake.execute(
            f"select distinct event_hour from {self._scan(version)} where accepted > 0 and _run_id is null "
            f"and event_hour <= timestamptz '{until.isoformat()}' order by 1"
        )
        return [hour.astimezone(UTC) for (hour,) in found.fetchall()]

    def hours(self, version: int, start: datetime, end: datetime) -> list[datetime]:
        """The hours from ``start`` until before ``end`` with rows at ``version``, and the empty ones between them.

        Times without a record that are longer than LONGEST_GAP are left out.
        """
        found = self._lake.execute(
            f"select distinct event_hour from {self._scan(version)} where event_hour < timestamptz '{end.isoformat()}' order by 1"
        ).fetchall()
        held = [hour.astimezone(UTC) for (hour,) in found if hour is not None]
        filled: list[datetime] = []
        for hour, following in pairwise([*held, end]):
            until = following if following - hour <= LONGEST_GAP else hour + HOUR
            while hour < until:
                if hour >= start:
                    filled.append(hour)
                hour += HOUR
        return filled

    def _files_added(self, after: int, until: int) -> list[str] | None:
        """Data files that the commits added; None where the log no longer has one of them."""
        files: list[str] = []
        for version in range(after + 1, until + 1):
            commit = self._log.commit(version)
            if commit is None:
                return None
            files += [f"{self._uri}/{action['path']}" for action in commit.data_added]
        return files

    def _cells(self, source: str, where: str = "true") -> list[Cell]:
        found = self._lake.execute(
            f"""
            select stream, event_hour, count(*), count(distinct (_query_id, _batch_id)), count(distinct _run_id),
                greatest(max(epoch(ingested_at) - epoch(max_received_at)), if(max(max_received_at) is null, null, 0)), {_SUMS}
            from {source} where {where} group by stream, event_hour order by event_hour nulls first, stream
            """
        ).fetchall()
        return [Cell(stream, hour.astimezone(UTC) if hour else None, *rest) for stream, hour, *rest in found]

    def _scan(self, version: int) -> str:
        return f"delta_scan({_text(self._uri)}, version = {version})"


def _text(value: Any) -> str:
    return "'" + str(value).replace("'", "''") + "'"
