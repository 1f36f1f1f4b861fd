"""Reads the contents of the lakehouse, and checks that the tables agree with each other, without Spark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import duckdb
import numpy as np

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.files.backlog import IgnoredFiles, WaitingFiles, finished_plans, read_landing, unaccounted_files
from spark_jobs.ingest.in_force import campaign_file_problems, rule_file_problems
from spark_jobs.ingest.kafka.topics import TopicSource, read_topic_sources
from spark_jobs.ingest.names import names_file_problems
from spark_jobs.ingest.quarantine import QUARANTINE_REASONS
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read
from spark_jobs.lake.lake import Lake, Snapshot
from spark_jobs.lake.tables import (
    BATCH_LEDGER,
    EVENTS,
    MINUTE_METRICS,
    ORDERS,
    REJECTED_EVENTS,
    REJECTED_ORDERS,
    REJECTED_TABLES,
    RELEASES,
    STREAMS,
    TABLES,
    Table,
)
from spark_jobs.operate.checked_batches import Unchecked, everything, read_unchecked, remember_checked
from spark_jobs.operate.rejects import OLDER, ReasonCount, counts_sql
from spark_jobs.publish.progress import TopicStatus, read_publications
from spark_jobs.texts import counted, printable
from spark_jobs.units import HOUR_US

FILE_REASONS = ("empty_gzip", "truncated_gzip", "corrupt_gzip", "unreadable_file", *QUARANTINE_REASONS)
NOTHING_INGESTED = "nothing ingested yet: run adtally ingest"
# The ledger first: its batches are complete in the tables that are pinned after it, even if an ingest runs meanwhile.
_READ = (BATCH_LEDGER, EVENTS, MINUTE_METRICS, REJECTED_EVENTS, ORDERS, REJECTED_ORDERS)
_OF_BATCHES = tuple(table.name for table in _READ[1:] if table is not ORDERS)  # an order has only the batch of its latest record
_REJECTED = tuple(table.name for table in REJECTED_TABLES.values())
_PROBLEMS_SHOWN = 20
_IDS_PER_PASS = 32_000_000
_MEMORY = "1GB"  # more is spilled: an ingest may need the rest


@dataclass(frozen=True)
class SourceStatus:
    """Sums of one stream, source ('files' or 'kafka') and region. ``lag_seconds``: newest ingestion less newest receipt.

    If a collector's clock is fast, its receipts are later than their ingestion: ``clock_ahead_seconds`` is then the difference, and
    the lag is 0.
    """

    stream: str
    source: str
    region: str
    offered: int
    accepted: int
    duplicate: int
    conflict: int
    rejected: int
    late: int
    lag_seconds: float | None
    last_batch_id: int
    last_ingested_at: datetime | None
    clock_ahead_seconds: float | None = None


@dataclass(frozen=True)
class TableStatus:
    """The size of a Delta table at the version that was read."""

    name: str
    version: int
    rows: int
    files: int
    bytes: int


@dataclass(frozen=True)
class QuarantinedFile:
    """A landing file that could not be read to its end, or was set aside, and is not released."""

    source_file: str
    reason_codes: list[str]
    ingested_at: datetime


@dataclass(frozen=True)
class Status:
    """The whole report. ``problems`` are one line each; ``conservation_holds`` is false if tables contradict the ledger.

    ``waiting`` and ``ignored`` are the unread files in the landing folder, by source; ``publications`` the published positions and
    ``topics`` the read positions of the topics in kafka.toml.
    """

    sources: list[SourceStatus] = field(default_factory=list)
    tables: list[TableStatus] = field(default_factory=list)
    quarantined_files: list[QuarantinedFile] = field(default_factory=list)
    conservation_holds: bool = True
    problems: list[str] = field(default_factory=list)
    publications: list[TopicStatus] = field(default_factory=list)
    topics: list[TopicSource] = field(default_factory=list)
    waiting: list[WaitingFiles] = field(default_factory=list)
    ignored: list[IgnoredFiles] = field(default_factory=list)
    rejects: list[ReasonCount] = field(default_factory=list)


def read_status(settings: Settings, *, check_all: bool = False) -> Status:
    """Read the lakehouse of ``settings``; an ingest may run meanwhile. If nothing was ingested, a problem says so.

    Checks what was added or changed since the last check; with ``check_all`` all batches.

    Raises MachineError if DuckDB's delta extension is missing, TableCorruptionError if a table cannot be read.
    """
    lake = Lake(settings)
    snapshot = lake.pin(*_READ, *(table for table in TABLES.values() if table not in _READ))
    if not snapshot.versions:
        return _with_landing(settings, Status(problems=[NOTHING_INGESTED], topics=read_topic_sources(settings)), {})[0]
    unchecked = everything(snapshot) if check_all else read_unchecked(snapshot)
    with lake.database(memory=_MEMORY) as database:
        whole, records = _Reader(database, snapshot).status(unchecked)
    of_files = [*campaign_file_problems(settings), *rule_file_problems(settings), *names_file_problems(settings)]
    publications, topics = read_publications(settings), read_topic_sources(settings)
    whole = replace(whole, problems=[*whole.problems, *of_files], publications=publications, topics=topics)
    whole, planned = _with_landing(settings, whole, unchecked.planned)
    if records is not None and planned is not None and whole.conservation_holds:
        remember_checked(snapshot, records, planned)
    return whole


def _with_landing(settings: Settings, status: Status, checked: Mapping[str, datetime]) -> tuple[Status, dict[str, datetime] | None]:
    """Add the landing folder's unread files, and the files that a checkpoint calls read although no batch has them.

    Files of batches that were planned before ``checked``, by stream, have been looked for. Returns the newest plans too, None if a
    checkpoint cannot be read.
    """
    try:
        plans = {stream: found for stream in STREAMS if (found := finished_plans(settings, stream))}
        # Spark deletes old plans: if that of a batch after the last check may be gone, all files are looked for
        since = {stream: checked[stream] for stream in checked if stream in plans and plans[stream][0] <= checked[stream]}
        unaccounted, landing = read_unaccounted(settings, since), read_landing(settings)
    except AdtallyError as error:
        return replace(status, problems=[*status.problems, str(error)]), None
    others = [problem for problem in status.problems if not (unaccounted and problem == NOTHING_INGESTED)]
    whole = replace(
        status,
        problems=[*unaccounted, *others],
        conservation_holds=status.conservation_holds and not unaccounted,
        waiting=landing.waiting,
        ignored=landing.ignored,
    )
    return whole, {stream: newest for stream, (_, newest) in plans.items()}


def read_unaccounted(settings: Settings, since: Mapping[str, datetime]) -> list[str]:
    """Return a line a stream for files that its checkpoint calls read although no batch has them; see `unaccounted_files`."""
    return [
        f"{stream}: no batch has taken {counted(len(names), 'file')} that the checkpoint calls read, such as "
        f"{printable(names[0])}: adtally reconcile --repair brings them in"
        for stream in STREAMS
        if (names := unaccounted_files(settings, stream, since.get(stream)))
    ]


def read_recent_problems(settings: Settings, since: datetime) -> tuple[int, list[str]]:
    """Count the batches that were ingested at ``since`` or later, and list the contradictions among their rows, a line each.

    Reads only data files with rows of these batches. Raises as `read_status`.
    """
    lake = Lake(settings)
    snapshot = lake.pin(*_READ)
    if BATCH_LEDGER not in snapshot:
        return 0, []
    with lake.database(memory=_MEMORY) as database:
        return _Reader(database, snapshot).recent_problems(since)


@dataclass(frozen=True)
class _Reader:
    """Reads the tables, each at a fixed version."""

    database: duckdb.DuckDBPyConnection
    snapshot: Snapshot

    def status(self, unchecked: Unchecked) -> tuple[Status, int | None]:
        """See `read_status`. Returns the number of records of all orders too, None if something is wrong or unfinished."""
        self._load_ledger("")
        self._load_others("")
        tables = self._tables()
        lost = self._lost()
        if lost:
            if not any(table.rows for table in tables):
                return Status(tables=tables, problems=[NOTHING_INGESTED]), None
            return Status(tables=tables, conservation_holds=False, problems=lost), None
        try:
            first, records = self._first_batches(unchecked), self._load_orders(unchecked)
        except duckdb.Error:  # a file of the commits since the last check was vacuumed, or damaged and taken out by fsck
            unchecked = everything(self.snapshot)
            first, records = self._first_batches(unchecked), self._load_orders(unchecked)
        self._choose_batches(first)
        for sql in (_BATCHES, _OF_CLUSTERS, _CELLS):
            self.database.execute(sql)
        never, unfinished = self._unbooked()
        broken = [*never, *self._ledger_rows(), *self._cells(), *self._unique(first), *self._orders(records)]
        more = [f"and {len(broken) - _PROBLEMS_SHOWN} more contradictions"] if len(broken) > _PROBLEMS_SHOWN else []
        problems = [*broken[:_PROBLEMS_SHOWN], *more, *unfinished]
        sources = self._sources()
        if not sources and not problems:
            problems.append(NOTHING_INGESTED)
        status = Status(sources, tables, self._quarantined(), not broken, problems, rejects=self._rejects())
        return status, None if broken or unfinished else records

    def recent_problems(self, since: datetime) -> tuple[int, list[str]]:
        """See `read_recent_problems`."""
        key = "(stream, _query_id, _batch_id)"
        ledger = self.snapshot.scan(BATCH_LEDGER)
        recent = f"select {key} from {ledger} where _run_id is null and ingested_at >= timestamptz '{since}'"
        self._load_ledger(f"where {key} in ({recent})")
        self.database.execute(_BATCHES)
        self.database.execute(_OF_CLUSTERS)
        batches, low, high = self._rows("select count(*), min(_batch_id), max(_batch_id) from batches")[0]
        lost = self._lost() if batches else []
        if lost or not batches:
            return batches, lost
        self._load_others(f"where _batch_id between {low} and {high}")  # Delta's statistics skip the other files
        self._choose_batches(dict.fromkeys(STREAMS, 0))
        self.database.execute(_CELLS)
        return batches, [*self._ledger_rows(), *self._cells()]

    def _load_ledger(self, where: str) -> None:
        # whole hours since the epoch; date_trunc would use the calendar of a time zone and take seven times as long
        hours = f"(epoch_us(t) - (epoch_us(t) % {HOUR_US} + {HOUR_US}) % {HOUR_US}) // {HOUR_US}"
        self.database.execute(f"create macro hour_of(t) as {hours}")
        hour = "select * replace (hour_of(event_hour) as event_hour)"
        if BATCH_LEDGER in self.snapshot:
            self.database.execute(f"create temp table batch_ledger as {hour} from {self.snapshot.scan(BATCH_LEDGER)} {where}")

    def _load_others(self, where: str) -> None:
        views = []
        for table in _READ[1:]:
            if table in self.snapshot and table is not ORDERS:
                older = OLDER if table.name in _REJECTED else ""
                scan = self.snapshot.attach(self.database, table)
                views.append(f"create temp view {table.name} as select * from {scan} {where} {older}")
        self.database.execute("; ".join(views))

    def _first_batches(self, unchecked: Unchecked) -> dict[str, int]:
        """Return the smallest unchecked batch of each stream."""
        added = self._files(BATCH_LEDGER, unchecked.ledger_added)
        of_ledger = dict(self._rows(f"select stream, min(_batch_id) from {added} group by stream"))
        return {stream: min(batch, of_ledger.get(stream, batch)) for stream, batch in unchecked.first_batch.items()}

    def _load_orders(self, unchecked: Unchecked) -> int:
        """Count the changed orders by batch; return the number of records (placed and cancelled) of all orders."""
        added, removed = (self._files(ORDERS, paths) for paths in (unchecked.orders_added, unchecked.orders_removed))
        self.database.execute(
            f"""
            create or replace temp table changed_orders as
            select _query_id, _batch_id, count(*) as orders, {_RECORDS_OF_ORDERS} as records from {added} group by all
            """
        )
        change = f"(select sum(records) from changed_orders), (select {_RECORDS_OF_ORDERS} from {removed})"
        more, less = self._rows(f"select {change}")[0]
        return unchecked.records + int(more or 0) - int(less or 0)

    def _choose_batches(self, first: dict[str, int]) -> None:
        """Make views of the rows of each stream's batches from ``first`` on; Delta's statistics skip the files of the others."""
        of_ledger = " or ".join(f"stream = '{stream}' and _batch_id >= {batch}" for stream, batch in first.items())
        views = [f"create temp view chosen_{BATCH_LEDGER.name} as from {BATCH_LEDGER.name} where {of_ledger}"]
        for name in _OF_BATCHES:
            batch = first["orders" if name == REJECTED_ORDERS.name else "events"]
            where = f"where _batch_id >= {batch}" if batch else ""
            views.append(f"create temp view chosen_{name} as from {name} {where}")
        self.database.execute("; ".join(views))

    def _lost(self) -> list[str]:
        return [f"table {table.name} is missing, but others hold rows" for table in _READ if table not in self.snapshot]

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self.database.execute(sql).fetchall()

    def _files(self, table: Table, paths: list[str]) -> str:
        """Return SQL that reads data files."""
        return self.snapshot.lake.scan_files(table, paths) if paths else f"(from {self.snapshot.scan(table)} limit 0)"

    def _tables(self) -> list[TableStatus]:
        found = []
        for table in TABLES.values():
            if table in self.snapshot:
                size = self.snapshot.size(table)
                # another tool may have written files without statistics
                rows = self._rows(f"select count(*) from {self.snapshot.scan(table)}")[0][0] if size.rows is None else size.rows
                found.append(TableStatus(table.name, self.snapshot.version(table), rows, size.files, size.bytes))
        return found

    def _sources(self) -> list[SourceStatus]:
        found = self._rows(
            """
            select stream, source, region, sum(offered)::bigint, sum(accepted)::bigint, sum(duplicate)::bigint,
                sum(conflict)::bigint, sum(rejected)::bigint, sum(late)::bigint,
                if(max(max_received_at) is null, null, greatest(epoch(max(ingested_at)) - epoch(max(max_received_at)), 0)),
                arg_max(_batch_id, (ingested_at, _batch_id)), max(ingested_at),
                if(max(max_received_at) is null, null, greatest(epoch(max(max_received_at)) - epoch(max(ingested_at)), 0))
            from batch_ledger group by stream, source, region order by stream, source, region
            """
        )
        return [SourceStatus(*row) for row in found]

    def _rejects(self) -> list[ReasonCount]:
        """Count records rejected or in conflict by stream and reason, the largest count first."""
        counts = " union all ".join(counts_sql(table.name, stream) for stream, table in REJECTED_TABLES.items())
        return [ReasonCount(*row) for row in self._rows(f"from ({counts}) order by records desc, stream, reason")]

    def _quarantined(self) -> list[QuarantinedFile]:
        columns = "source_file, reason_codes, ingested_at, _query_id, _batch_id"
        rejected = f"select {columns} from rejected_events union all select {columns} from rejected_orders"
        released = ""
        if RELEASES in self.snapshot:
            released = f"anti join {self.snapshot.scan(RELEASES)} using (source_file, _query_id, _batch_id)"
        where = f"where list_has_any(reason_codes, {list(FILE_REASONS)}) order by ingested_at, source_file"
        found = self._rows(f"select source_file, reason_codes, ingested_at from ({rejected}) {released} {where}")
        return [QuarantinedFile(*row) for row in found]

    def _ledger_rows(self) -> list[str]:
        """Check the ledger itself: each row adds up and exists once."""
        ledger = "batch_ledger join batches using (stream, _query_id, _batch_id)"
        wrong_sums = self._rows(
            f"""
            select {_PLACE}, offered, accepted, duplicate, conflict, rejected from {ledger}
            where offered is distinct from accepted + duplicate + conflict + rejected order by {_PLACE_ORDER}
            """
        )
        repeated = self._rows(
            f"""
            select {_PLACE}, count(*) as rows from {ledger}
            group by stream, _query_id, _batch_id, _run_id, source, region, event_hour, query having rows > 1
            order by {_PLACE_ORDER}
            """
        )
        return [
            *(
                f"{place}: {offered} offered, but {accepted} accepted + {duplicate} duplicate + {conflict} conflict + "
                f"{rejected} rejected"
                for place, offered, accepted, duplicate, conflict, rejected in wrong_sums
            ),
            *(f"{place}: {rows} rows in batch_ledger instead of one" for place, rows in repeated),
        ]

    def _cells(self) -> list[str]:
        """Compare the ledger's sums of each batch, region and hour with the rows of the other tables."""
        problems = []
        for measure, held_in in _MEASURES.items():
            for stream, tables in held_in.items():
                differs = " or ".join(f"{measure} != {column}" for column in tables.values())
                for place, booked, *held in self._rows(
                    f"""
                    select {_PLACE}, {measure}, {", ".join(tables.values())}
                    from cells join batches using (stream, _query_id, _batch_id)
                    where stream = '{stream}' and ({differs})
                    order by {_PLACE_ORDER}
                    """
                ):
                    others = ", ".join(f"{number} in {table}" for table, number in zip(tables, held, strict=True))
                    problems.append(f"{place}: {measure} is {booked} in batch_ledger, {others}")
        return problems

    def _unique(self, first: dict[str, int]) -> list[str]:
        """Find ids that more than one row of events has, by the newest batch that has them.

        Looks at the hours in which unchecked batches have events: an event that was accepted twice is in one hour.
        """
        rows = "events"
        if first["events"]:
            hours = set(self._rows("select distinct event_date, event_hour from chosen_events"))
            rows = self._files(EVENTS, self.snapshot.paths_in(EVENTS, hours))
        if not self._has_suspect_ids(rows):
            return []
        repeated = f"select event_id, max(_batch_id) as batch from {rows} group by event_id having count(*) > 1"
        return [
            f"batch {batch} of events: ids that stand more than once in events: {ids}, such as {name}"
            for batch, ids, name in self._rows(
                f"select batch, count(*), min(event_id) from ({repeated}) group by batch order by batch"
            )
        ]

    def _has_suspect_ids(self, rows: str) -> bool:
        """Return whether two ids of ``rows`` have the same hash. Sorting numbers takes a third of the time of counting ids."""
        passes = self._rows(f"select count(*) from {rows}")[0][0] // _IDS_PER_PASS + 1
        for number in range(passes):
            some = f"select hash(event_id) as hashed from {rows} where hash(event_id) % {passes} = {number}"
            hashed = np.asarray(self.database.execute(some).fetchnumpy()["hashed"])
            hashed.sort()
            if np.any(hashed[1:] == hashed[:-1]):
                return True
        return False

    def _orders(self, held: int) -> list[str]:
        """Compare the sums of all orders: an order has only the batch of its latest record."""
        booked, unbooked = self._rows(
            """
            select (select coalesce(sum(accepted), 0)::bigint from batch_ledger where stream = 'orders'),
                (select count(*) from changed_orders o anti join batches on batches.stream = 'orders'
                    and o._query_id = batches._query_id and o._batch_id = batches._batch_id)
            """
        )[0]
        # a batch that is not in the ledger yet may have added any number of orders
        if held == booked or (unbooked and held > booked):
            return []
        return [f"orders of all batches: accepted is {booked} in batch_ledger, {held} in orders (placed and cancelled)"]

    def _unbooked(self) -> tuple[list[str], list[str]]:
        """Find batches with rows that are not in the ledger: those that no ingest will finish, and those that the next one will."""
        found = self._rows(
            """
            with held as (
                select stream, _query_id, _batch_id, held + counted + kept_conflict + kept_rejected as rows from cells
                union all select 'orders', _query_id, _batch_id, orders from changed_orders
            ), numbered as (
                select stream, _query_id, _batch_id, sum(rows)::bigint as rows,
                    _batch_id = max(_batch_id) over (partition by stream, _query_id) as is_last
                from held group by stream, _query_id, _batch_id
            )
            from numbered anti join batches using (stream, _query_id, _batch_id) order by all
            """
        )
        if not found:
            return [], []
        ledger = self.snapshot.lake.scan(BATCH_LEDGER, self.snapshot.lake.version(BATCH_LEDGER))
        booked = set(self._rows(f"select distinct stream, _query_id, _batch_id from {ledger}"))
        never, unfinished = [], []
        for stream, query, batch, rows, is_last in found:
            if (stream, query, batch) in booked:  # finished while the tables were read
                continue
            if not is_last:
                never.append(f"batch {batch} of {stream}: {rows} rows in the tables, but none in batch_ledger")
            elif query not in self._running_queries(stream):
                never.append(f"batch {batch} of {stream} is incomplete, and its checkpoint is gone: no ingest will finish it")
            else:
                unfinished.append(f"batch {batch} of {stream} is incomplete; it will be finished by the next ingest")
        return never, unfinished

    def _running_queries(self, stream: str) -> set[str]:
        """Return the ids of the queries with a checkpoint of ``stream``: that of files, and those of topics."""
        checkpoints = checkpoints_to_read(self.snapshot.lake.settings)
        found = set()
        for folder in (checkpoints / stream, *checkpoints.glob(f"{stream}-*")):
            with suppress(OSError, ValueError, KeyError):
                found.add(str(json.loads((folder / "metadata").read_text("utf-8"))["id"]))
        return found


# A place in the ledger for people; it names the query only if batches of several have the same number.
_PLACE = f"""
    'batch ' || _batch_id || ' of ' || stream || query || ', ' || region || ', hour '
    || coalesce(strftime(make_timestamp(event_hour * {HOUR_US}), '%Y-%m-%dT%HZ'), 'unknown')
"""
_PLACE_ORDER = "stream, query, _batch_id, region, event_hour"

# measure of the ledger -> stream -> table to compare with -> its column of `cells`
_MEASURES = {
    "accepted": {"events": {"events": "held", "minute_metrics": "counted"}},
    "spend_nanos": {"events": {"events": "held_nanos", "minute_metrics": "counted_nanos"}},
    "conflict": {"events": {"rejected_events": "kept_conflict"}, "orders": {"rejected_orders": "kept_conflict"}},
    "rejected": {"events": {"rejected_events": "kept_rejected"}, "orders": {"rejected_orders": "kept_rejected"}},
}
_SUMMED = sorted({*_MEASURES, *(name for held in _MEASURES.values() for tables in held.values() for name in tables.values())})

_BATCHES = """
create temp table batches as
select stream, _query_id, _batch_id,
    case when count(*) over (partition by stream, _batch_id) > 1 then ' (query ' || left(_query_id, 8) || ')' else '' end as query
from (select distinct stream, _query_id, _batch_id from batch_ledger)
"""

# The ledger books a batch of a topic by its cluster, while its records may name other regions: it is compared as a whole.
_OF_CLUSTERS = """
create temp table of_clusters as
select stream, _query_id, _batch_id, string_agg(distinct region, ', ' order by region) as clusters
from batch_ledger group by all having bool_or(source = 'kafka')
"""

_RECORDS_OF_ORDERS = "sum(has_placed::int + (cancelled_at is not null)::int)"
_KEPT = """
    sum(coalesce(records, 1)) filter (outcome = 'conflict') as kept_conflict,
    sum(coalesce(records, 1)) filter (outcome = 'rejected') as kept_rejected
"""
_CELLS = f"""
create temp table cells as
select stream, _query_id, _batch_id, coalesce(clusters, region) as region, event_hour,
    {", ".join(f"coalesce(sum({name}), 0)::hugeint as {name}" for name in _SUMMED)}
from (
    from chosen_batch_ledger
    union all by name
    select 'events' as stream, _query_id, _batch_id, region, hour_of(event_time) as event_hour,
        count(*) as held, sum(spend_nanos) as held_nanos
    from chosen_events group by all
    union all by name
    select 'events' as stream, _query_id, _batch_id, region, hour_of(event_minute) as event_hour,
        sum(impressions + clicks + invalid_impressions + invalid_clicks) as counted, sum(spend_nanos) as counted_nanos
    from chosen_minute_metrics group by all
    union all by name
    select 'events' as stream, _query_id, _batch_id, region, hour_of(record_time) as event_hour, {_KEPT}
    from chosen_rejected_events group by all
    union all by name
    select 'orders' as stream, _query_id, _batch_id, region, hour_of(record_time) as event_hour, {_KEPT}
    from chosen_rejected_orders group by all
) left join of_clusters using (stream, _query_id, _batch_id)
group by stream, _query_id, _batch_id, coalesce(clusters, region), event_hour
"""
