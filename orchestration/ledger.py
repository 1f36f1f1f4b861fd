"""The batch ledger's sums per event hour, read from its Delta versions without Spark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise

import duckdb

from spark_jobs.config import Settings
from spark_jobs.lake.duck import connect_delta
from spark_jobs.lake.lake import Lake
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
def _database() -> duckdb.DuckDBPyConnection:
    """This process's DuckDB for the ledger: loading the extension takes longer than a tick of a sensor."""
    return connect_delta({"threads": 1, "memory_limit": "512MB"})


class Ledger:
    """The ledger of a home, read through a DuckDB that the process keeps."""

    def __init__(self, lake: Lake, database: duckdb.DuckDBPyConnection) -> None:
        self._lake = lake
        self._database = database

    @classmethod
    @contextmanager
    def open(cls, settings: Settings) -> Iterator[Ledger]:
        """The ledger of ``settings``, until the end of the context."""
        with _database().cursor() as cursor:
            yield cls(Lake(settings), cursor)

    def added(self, after: int, until: int) -> list[Cell]:
        """Sum what the versions beyond ``after`` up to ``until`` added; all of ``until`` if their files or commits are gone."""
        commits = self._lake.log(BATCH_LEDGER).commits(after, until) if after >= 0 else None
        if commits is None:
            return self._cells(self._scan(until))
        paths = [path for commit in commits for path in commit.added_paths]
        if not paths:
            return []
        try:
            return self._cells(self._lake.scan_files(BATCH_LEDGER, paths))
        except duckdb.IOException:  # compacted and vacuumed since
            return self._cells(self._scan(until))

    def totals(self, version: int, hours: Iterable[datetime]) -> dict[tuple[str, datetime], Cell]:
        """(stream, hour) -> the sums of all its rows at ``version``."""
        wanted = [f"timestamptz '{hour.isoformat()}'" for hour in hours]
        if not wanted:
            return {}
        cells = self._cells(self._scan(version), where=f"event_hour in ({', '.join(wanted)})")
        return {(cell.stream, cell.hour): cell for cell in cells if cell.hour is not None}

    def increments(self, hours: Iterable[datetime]) -> dict[datetime, int]:
        """Hour -> rows of minute_metrics, as it is now."""
        days = sorted({hour.date() for hour in hours})
        if not days or not self._lake.exists(MINUTE_METRICS):
            return {}
        listed = ", ".join(f"date '{day}'" for day in days)
        found = self._database.execute(
            f"select date_trunc('hour', event_minute) as hour, count(*) from {self._lake.scan(MINUTE_METRICS)} "
            f"where event_date in ({listed}) group by hour"
        ).fetchall()
        return {hour.astimezone(UTC): rows for hour, rows in found}

    def held_hours(self, version: int, until: datetime) -> list[datetime]:
        """The hours until ``until`` with an accepted record, ascending."""
        found = self._database.execute(
            f"select distinct event_hour from {self._scan(version)} where accepted > 0 and _run_id is null "
            f"and event_hour <= timestamptz '{until.isoformat()}' order by 1"
        )
        return [hour.astimezone(UTC) for (hour,) in found.fetchall()]

    def hours(self, version: int, start: datetime, end: datetime) -> list[datetime]:
        """The hours from ``start`` until before ``end`` with rows at ``version``, and the empty ones between them.

        Times without a record that are longer than LONGEST_GAP are left out.
        """
        found = self._database.execute(
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
