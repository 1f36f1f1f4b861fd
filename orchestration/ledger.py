"""Reads the batch ledger's sums per event hour from its Delta versions, without Spark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import duckdb

from spark_jobs.config import Settings
from spark_jobs.lake.duck import delta_cursor
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER, MINUTE_METRICS
from spark_jobs.units import HOUR, HourRange

LONGEST_GAP = timedelta(days=31)
"""After a longer time without a record, the hours in between do not count as empty."""

_COUNTS = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")
_SUMS = ", ".join(f"coalesce(sum({name}), 0)::hugeint as {name}" for name in _COUNTS)


@dataclass(frozen=True)
class Cell:
    """Sums of ledger rows of one stream and event hour (None: records without a readable time).

    ``lag_seconds``: the longest time from a batch's newest receipt to its ingestion; None if it received nothing new.
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


class Ledger:
    """The ledger of a home, read through a DuckDB that the process keeps."""

    def __init__(self, lake: Lake, database: duckdb.DuckDBPyConnection) -> None:
        self._lake, self._database = lake, database

    @classmethod
    @contextmanager
    def open(cls, settings: Settings) -> Iterator[Ledger]:
        """Yield the ledger of ``settings``."""
        with delta_cursor(settings.lakehouse_uri, threads=1, memory_limit="512MB") as cursor:
            yield cls(Lake(settings), cursor)

    def added(self, after: int, until: int) -> list[Cell]:
        """Return the sums of the rows that the versions after ``after`` through ``until`` added.

        If their files or commits are gone, returns the sums of all rows at ``until``.
        """
        commits = self._lake.log(BATCH_LEDGER).commits(after, until) if after >= 0 else None
        if commits is None:
            return self._cells(self._scan(until))
        paths = [path for commit in commits for path in commit.added_paths]
        if not paths:
            return []
        try:
            return self._cells(self._lake.scan_files(BATCH_LEDGER, paths))
        except duckdb.Error:  # compacted and vacuumed since, or damaged and taken out by fsck
            return self._cells(self._scan(until))

    def totals(self, version: int, hours: Iterable[datetime]) -> dict[tuple[str, datetime], Cell]:
        """Return (stream, hour) -> the sums of all its rows at ``version``."""
        wanted = [f"timestamptz '{hour.isoformat()}'" for hour in hours]
        if not wanted:
            return {}
        cells = self._cells(self._scan(version), where=f"event_hour in ({', '.join(wanted)})")
        return {(cell.stream, cell.hour): cell for cell in cells if cell.hour is not None}

    def increments(self, hours: Iterable[datetime]) -> dict[datetime, int]:
        """Return hour -> number of rows in the newest version of minute_metrics."""
        days = sorted({hour.date() for hour in hours})
        if not days or not self._lake.exists(MINUTE_METRICS):
            return {}
        listed = ", ".join(f"date '{day}'" for day in days)
        found = self._database.execute(
            f"select date_trunc('hour', event_minute) as hour, count(*) from {self._lake.scan(MINUTE_METRICS)} "
            f"where event_date in ({listed}) group by hour"
        ).fetchall()
        return {hour.astimezone(UTC): rows for hour, rows in found}

    def accepted_hours(self, version: int, until: datetime) -> list[datetime]:
        """Return the hours through ``until`` with an accepted record, ascending."""
        found = self._database.execute(
            f"select distinct event_hour from {self._scan(version)} where accepted > 0 and _run_id is null "
            f"and event_hour <= timestamptz '{until.isoformat()}' order by 1"
        )
        return [hour.astimezone(UTC) for (hour,) in found.fetchall()]

    def hours(self, version: int, start: datetime, end: datetime) -> list[datetime]:
        """Return the hours from ``start`` to before ``end`` with rows at ``version``, and the empty ones between them.

        Leaves out times without a record that are longer than LONGEST_GAP.
        """
        found = self._database.execute(
            f"select distinct event_hour from {self._scan(version)} where event_hour < timestamptz '{end.isoformat()}' order by 1"
        ).fetchall()
        filled = [hour.astimezone(UTC) for (hour,) in found if hour is not None]
        hours: list[datetime] = []
        for hour, following in pairwise([*filled, end]):
            until = following if following - hour <= LONGEST_GAP else hour + HOUR
            hours += HourRange(hour, until)
        return [hour for hour in hours if hour >= start]

    def _cells(self, source: str, where: str = "true") -> list[Cell]:
        found = self._database.execute(
            f"""
            select stream, event_hour, count(*), count(distinct (_query_id, _batch_id)), count(distinct _run_id),
                greatest(max(epoch(ingested_at) - epoch(max_received_at)), if(max(max_received_at) is null, null, 0)), {_SUMS}
            from {source} where {where} group by stream, event_hour order by event_hour nulls first, stream
            """
        ).fetchall()
        return [Cell(stream, hour.astimezone(UTC) if hour else None, *rest) for stream, hour, *rest in found]

    def _scan(self, version: int) -> str:
        return self._lake.scan(BATCH_LEDGER, version)
