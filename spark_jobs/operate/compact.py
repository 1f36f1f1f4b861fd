"""Merges small data files into few, without a Spark session, while an ingest may run.

Compaction rewrites closed hours of `events` in Z-order (docs/decisions/0005 has the measurement). In the other tables it merges
small files, whether or not a day has ended. Each rewrite is one commit with ``dataChange: false``. The job checks it: it counts and
hashes the partition's rows at the versions before and after that commit.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

import duckdb

from spark_jobs.config import Settings
from spark_jobs.errors import BusyError, CommitConflictError, TableCorruptionError
from spark_jobs.lake.duck import literal
from spark_jobs.lake.lake import Lake, Partition, Snapshot
from spark_jobs.lake.locks import REWRITE, exclusive
from spark_jobs.lake.reading import TableFile
from spark_jobs.lake.rewrite import COMPACTED_SUFFIX, rearrange, take_back, version_of_run
from spark_jobs.lake.tables import EVENTS, HOUR_RULES, NAMES, TABLES, Table
from spark_jobs.lake.torn import mend_tables
from spark_jobs.operate.watermark import Closing, read_closing, require_closed
from spark_jobs.units import HourRange

Z_ORDER = ("campaign_id", "user_id")
LATE_FILES = 4  # a compacted hour with this many other files is compacted again,
LATE_SHARE = 0.1  # or if these have more than this share of its bytes
LOOSE_FILES = 32  # a partition that still gets rows may have this many files more than it needs
_ATTEMPTS = 6
# replaced as a whole or rarely written: nothing to gain
_LEFT_ALONE = ("campaigns", NAMES.name, "hour_closings", HOUR_RULES.name)


@dataclass(frozen=True)
class TableCompaction:
    """One rewritten partition (None: all of the table).

    ``content_hash`` covers all rows and columns, in any order; it was the same at ``version_before`` and ``version_after``.
    """

    table: str
    partition: str | None
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    rows: int
    content_hash: str
    version_before: int
    version_after: int
    seconds: float


@dataclass(frozen=True)
class CompactReport:
    """The rewritten partitions."""

    tables: list[TableCompaction] = field(default_factory=list)
    seconds: float = 0.0


def compact(
    settings: Settings, hours: HourRange | None, *, progress: Callable[[str], None] | None = None, now: datetime | None = None
) -> CompactReport:
    """Compact the closed hours of ``hours`` (None: all) that need it, and other tables with too many small files.

    An ingest may run meanwhile: neither waits for the other. Raises UsageError for an open hour and for a lakehouse that is not on
    a local path, BusyError if it does not get the lock or a table in time, TableCorruptionError if the rows differ afterwards (it
    undoes that rewrite).
    """
    started = time.monotonic()
    if hours is not None:
        require_closed(settings, hours)
    mend_tables(settings)
    closing, today = read_closing(settings), (now or datetime.now(UTC)).date()
    lake = Lake(settings)
    done: list[TableCompaction] = []
    run = _Compaction(lake, hours, closing, today)
    work = list(run.work())
    if work:
        with lake.database(memory="1GB") as database:
            for table, partition in work:
                if progress is not None:
                    progress(f"{table.name} {_name(partition) or ''}".rstrip())
                made = run.rewrite(database, table, partition)
                done += [made] if made else []
    return CompactReport(done, time.monotonic() - started)


@dataclass(frozen=True)
class _Compaction:
    """One call: finds the partitions that need compaction, and rewrites them."""

    lake: Lake
    hours: HourRange | None
    closing: Closing
    today: date

    def work(self) -> Iterator[tuple[Table, Partition]]:
        """Yield the partitions that need compaction: hours of `events` in their order, then the other tables."""
        for table in TABLES.values():
            if table.name in _LEFT_ALONE or not self.lake.exists(table):
                continue
            days = [] if self.hours is None or table is not EVENTS else [("event_date", {str(hour.date()) for hour in self.hours})]
            found = self.lake.pin(table).partitions(table, *days)
            for partition, files in sorted(found.items(), key=lambda item: [value.zfill(2) for _, value in item[0]]):
                if self._needs(table, partition, files):
                    yield table, partition

    def rewrite(self, database: duckdb.DuckDBPyConnection, table: Table, partition: Partition) -> TableCompaction | None:
        """Rewrite one partition; None if it no longer needs it."""
        started = time.monotonic()
        target, z_order = self.lake.settings.compacted_file_bytes, Z_ORDER if table is EVENTS else ()
        with exclusive(self.lake.settings, REWRITE):
            for attempt in range(_ATTEMPTS):
                snapshot = self.lake.pin(table)
                if not self._needs(table, partition, _files(snapshot, table, partition)):
                    return None  # another process has compacted it
                run_id = str(uuid.uuid4())
                try:
                    if not rearrange(self.lake, table, snapshot.version(table), partition, target, run_id, z_order=z_order):
                        return None
                    break
                except CommitConflictError:  # each batch of orders merges into `orders`
                    time.sleep(0.2 * (attempt + 1))
            else:
                raise BusyError(
                    f"table {table.name} was changed {_ATTEMPTS} times while it was being compacted",
                    hint="nothing is lost; try again",
                )
            return self._proved(database, table, partition, version_of_run(self.lake, table, run_id), started)

    def _needs(self, table: Table, partition: Partition, files: list[TableFile]) -> bool:
        """Return whether a partition needs compaction. After that it does not, until more rows come."""
        target = self.lake.settings.compacted_file_bytes
        if table is EVENTS:
            hour = _hour(partition)
            if not self.closing.is_closed(hour) or not (self.hours is None or self.hours.start <= hour < self.hours.end):
                return False
            return _has_loose_rows(files)
        needed = -(-sum(file.size for file in files) // target)
        return len(files) > needed + (0 if self._is_past(table, partition) else LOOSE_FILES)

    def _is_past(self, table: Table, partition: Partition) -> bool:
        """Return whether a day will probably get no more rows."""
        if not partition:
            return False
        day = date.fromisoformat(partition[0][1])
        if table.partition_by == ("event_date",):
            return self.closing.is_closed(datetime(day.year, day.month, day.day, 23, tzinfo=UTC))
        return day < self.today - timedelta(days=1)  # by ingestion: a batch may last over midnight

    def _proved(
        self, database: duckdb.DuckDBPyConnection, table: Table, partition: Partition, version: int, started: float
    ) -> TableCompaction:
        """Report the compaction of ``version``; if the rows differ, undo it and raise TableCorruptionError."""
        snapshots = [self.lake.at({table.name: each}) for each in (version - 1, version)]
        before, after = (_files(snapshot, table, partition) for snapshot in snapshots)
        held_before, held_after = (content_of(database, snapshot, table, partition) for snapshot in snapshots)
        if held_before != held_after:
            take_back(self.lake, table, version)
            raise TableCorruptionError(
                f"version {version} of {table.name} ({_name(partition) or 'all'}) holds {held_after[0]} rows with hash "
                f"{held_after[1]}, version {version - 1} held {held_before[0]} with {held_before[1]}",
                hint=f"that version is taken back; if rows are still wrong, restore version {version - 1} while no ingest runs, "
                "see docs/runbooks/compaction.md",
            )
        return TableCompaction(
            table=table.name,
            partition=_name(partition),
            files_before=len(before),
            files_after=len(after),
            bytes_before=sum(file.size for file in before),
            bytes_after=sum(file.size for file in after),
            rows=held_after[0],
            content_hash=held_after[1],
            version_before=version - 1,
            version_after=version,
            seconds=time.monotonic() - started,
        )


def content_of(database: duckdb.DuckDBPyConnection, snapshot: Snapshot, table: Table, partition: Partition) -> tuple[int, str]:
    """Count the rows of a partition and hash their content: sum and exclusive or of the rows' hashes, as hexadecimal digits."""
    names = ", ".join(f'"{name}"' for name in snapshot.columns(table))
    where = " and ".join(f"{name} = {literal(value)}" for name, value in partition) or "true"
    rows, total, combined = database.sql(
        f"""
        select count(*), coalesce(sum(hash({names})), 0), coalesce(bit_xor(hash({names})), 0)
        from {snapshot.scan(table)} where {where}
        """
    ).fetchall()[0]
    return int(rows), f"{int(total) % 2**64:016x}{int(combined):016x}"


def _files(snapshot: Snapshot, table: Table, partition: Partition) -> list[TableFile]:
    return snapshot.files(table, *((name, [value]) for name, value in partition))


def _has_loose_rows(files: list[TableFile]) -> bool:
    """Return whether an hour has too many files that no compaction wrote."""
    loose = [file.size for file in files if not file.path.endswith(COMPACTED_SUFFIX)]
    if len(files) == 1 or not loose:
        return False
    never_compacted = len(loose) == len(files)
    return never_compacted or len(loose) >= LATE_FILES or sum(loose) > LATE_SHARE * sum(file.size for file in files)


def _hour(partition: Partition) -> datetime:
    day, hour = (value for _, value in partition)
    return datetime.fromisoformat(day).replace(hour=int(hour), tzinfo=UTC)


def _name(partition: Partition) -> str | None:
    return "/".join(f"{name}={value}" for name, value in partition) or None
