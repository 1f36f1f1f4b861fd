"""The recount: what the raw input comes to, told by code that shares nothing with the ingest.

Every line of every planned file, every record of every planned range of Kafka's offsets (an occurrence: a file that two batches
took counts twice) is judged by the limits of its batch, or by the rules that a backfill has set for its hour. Then, of the valid
records with one id, in whatever hour, the first is accepted (order of the batches, then of the files or ranges, then of lines or
offsets); the others are duplicates if all their fields but received_at and region agree, else conflicts. All of it is SQL over the
parsed files, restricted to the hours asked: of the rest of the history only the hashes of the ids are read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from xxhash import xxh3_64_intdigest

from spark_jobs.audit.landing import LandedFile, RunningQuery, landed_files, missed_files, read_query
from spark_jobs.audit.plans import BatchPlan, PlannedFile, PlannedRange, read_plans
from spark_jobs.audit.raw import RawTable, Span, TopicQuery, both, is_of_kafka, minus, read_queries
from spark_jobs.audit.store import ParsedFile, RawChunk, RawFile, ensure_parsed
from spark_jobs.audit.traffic import TrafficJudge
from spark_jobs.config import Settings
from spark_jobs.lake.duck import connect_delta, delta_scan, keep_table, literal
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import (
    BATCH_LEDGER,
    CAMPAIGNS,
    EVENTS,
    HOUR_RULES,
    MINUTE_METRICS,
    ORDERS,
    RAW_TABLES,
    REJECTED_EVENTS,
    REJECTED_ORDERS,
    RULE_SETS,
    TRAFFIC_REVIEWS,
    Table,
)
from spark_jobs.units import HOUR_US, NO_HOUR

FILES_VERSION = -1
"""Stands for a version of `campaigns`: the price list as its files say it now."""

ACCEPTED: dict[str, Table] = {"events": EVENTS, "orders": ORDERS}
"""The table of each stream whose commits hold the plans of its batches."""

# The ledger first: a batch that stands in it is whole in what is pinned behind it.
PINNED: dict[str, tuple[Table, ...]] = {
    "events": (BATCH_LEDGER, EVENTS, REJECTED_EVENTS, MINUTE_METRICS, CAMPAIGNS, HOUR_RULES, TRAFFIC_REVIEWS, RULE_SETS),
    "orders": (BATCH_LEDGER, ORDERS, REJECTED_ORDERS),
}
_MEMORY = "1200MB"
_NO_END = 2**62
_PAYLOAD = (
    *("event_type", "time_us", "campaign_id", "ad_id", "store_id", "user_id", "impression_id", "placement"),
    *("price_micros", "currency", "user_agent"),
)
_RECORD = ("line", "is_valid", "record_id", "id_hash", "received_us", *_PAYLOAD)


@dataclass(frozen=True)
class Rules:
    """By what records are judged in place of the rules of their batches: microseconds, and a version of `campaigns`.

    Holds for batches up to version ``events_version`` of `events`.
    """

    campaigns_version: int
    earliest_us: int
    future_skew_us: int
    hour_grace_us: int
    events_version: int


@dataclass(frozen=True)
class Occurrence:
    """What a batch (by its number) took: a landing file, or offsets [start, end) of a Kafka partition that lie in one parsed chunk.

    ``entry`` None: it is not there as it was planned. Then it ``is_waiting`` where the query that keeps Kafka's raw records will
    come to it, else it is gone.
    """

    batch: int
    name: str
    start: int = 0
    end: int = _NO_END
    entry: ParsedFile | None = None
    is_waiting: bool = False


@dataclass(frozen=True)
class Inputs:
    """What a recount is made of, at one moment: versions of the tables, plans of the batches, and what those took."""

    stream: str
    versions: dict[str, int]
    plans: list[BatchPlan]
    states: list[str]  # of each plan: booked, waiting (for raw records), pending, unfinished, unbooked or missed
    lost: frozenset[int]  # plans made anew from rows, by number
    occurrences: list[Occurrence]  # in the order of reading
    lacking: frozenset[int] = frozenset()  # batches of which the raw table has fewer records than they were offered, by number

    @cached_property
    def gone(self) -> list[Occurrence]:
        """What was planned and is not there any more."""
        return [found for found in self.occurrences if found.entry is None and not found.is_waiting]

    @cached_property
    def waiting(self) -> list[Occurrence]:
        """What the raw table does not have yet."""
        return [found for found in self.occurrences if found.is_waiting]

    @cached_property
    def entries(self) -> list[ParsedFile]:
        """The parsed form of all that is there, each once."""
        return list({found.entry.parquet: found.entry for found in self.occurrences if found.entry is not None}.values())


def read_inputs(
    settings: Settings,
    stream: str,
    *,
    missed_as: str,
    now_us: int,
    progress: Callable[[int, int], None] | None = None,
) -> Inputs:
    """Pin the tables, read the plans, and parse what the store does not have.

    What was missed is taken for a batch of its own behind all others, with query id ``missed_as`` and today's rules.
    ``progress(done, total)`` is told of bytes.
    """
    # how far the queries are is read first: what they have ended stands in the versions that are pinned after that
    query, topics = read_query(settings, stream), read_queries(settings, stream)
    versions = {table.name: DeltaLog(settings.table_uri(table.name)).latest_version() or 0 for table in PINNED[stream]}
    accepted = ACCEPTED[stream]
    plans = list(read_plans(settings, versions[accepted.name], accepted).batches)
    offered = _offered(settings, stream, versions[BATCH_LEDGER.name])
    for plan in plans:
        if (plan.query_id, plan.batch_id) in offered:  # of what a batch set aside no record is read
            offered[plan.query_id, plan.batch_id] -= len(plan.set_aside)
    landed = landed_files(settings, stream)
    known = {(plan.query_id, plan.batch_id) for plan in plans}
    without = sorted(offered.keys() - known)
    made = _plans_of_rows(settings, stream, versions, without, landed) if without else []
    lost = frozenset(range(len(made)))
    plans = made + plans
    states = _states(settings, stream, plans, offered, query, topics)
    ranges = _Ranges(settings, stream, plans, offered, {} if lost else topics)
    missing = [] if lost else missed_files(landed, {file.name for plan in plans for file in plan.files}, query)
    there = [
        found.raw
        for number, plan in enumerate(plans)
        for file in plan.files
        if not plan.is_set_aside(file.name) and (found := _as_planned(landed, file, is_lost=number in lost)) is not None
    ]
    parsed: dict[RawFile | RawChunk, ParsedFile] = {}
    wanted: list[RawFile | RawChunk] = [*there, *(file.raw for file in missing), *ranges.chunks]
    for entry in ensure_parsed(settings, stream, list(dict.fromkeys(wanted)), progress):
        parsed[entry.raw] = entry
    missed = ranges.missed(parsed)
    if missing or missed:
        files = tuple(sorted(PlannedFile(file.raw.mtime_ms, file.name, file.raw.size) for file in missing))
        rules = rules_of(settings, versions)
        limits = (now_us, rules.earliest_us, rules.future_skew_us, rules.hour_grace_us, rules.campaigns_version)
        plans.append(BatchPlan(missed_as, 0, versions[accepted.name] + 1, *limits, files, ranges=missed))
        states.append("missed")
    occurrences = []
    for number, plan in enumerate(plans):
        for file in plan.files:
            if plan.is_set_aside(file.name):
                continue
            found = _as_planned(landed, file, is_lost=number in lost)
            # without an entry: changed or vanished, maybe while it was to be parsed
            occurrences.append(Occurrence(number, file.name, entry=None if found is None else parsed.get(found.raw)))
        of_ranges = list(ranges.occurrences(number, plan, parsed))
        if any(found.is_waiting for found in of_ranges) and states[number] != "pending":
            states[number] = "waiting"
        occurrences += of_ranges
    if ranges.version is not None:
        versions[RAW_TABLES[stream].name] = ranges.version
    lacking = _lacking(plans, states, offered, [found for found in occurrences if is_of_kafka(found.name)])
    return Inputs(stream, versions, plans, states, lost, occurrences, lacking - lost)


def _states(
    settings: Settings,
    stream: str,
    plans: list[BatchPlan],
    offered: dict[tuple[str, int], int],
    query: RunningQuery,
    topics: dict[str, TopicQuery],
) -> list[str]:
    done = {query.query_id: query.done} | {topic.query_id: topic.done for topic in topics.values()}
    newer = (topic.query_id for topic in read_queries(settings, stream).values())
    running = {*done, read_query(settings, stream).query_id, *newer}
    last = {plan.query_id: plan.batch_id for plan in plans}
    unbooked = [plan for plan in plans if (plan.query_id, plan.batch_id) not in offered]
    later = _offered(settings, stream, None) if unbooked else offered
    states = []
    for plan in plans:
        identity = (plan.query_id, plan.batch_id)
        if identity in offered:
            states.append("booked")
        elif identity in later:  # ended while the versions were pinned
            states.append("pending")
        elif plan.batch_id < last[plan.query_id] or plan.batch_id in done.get(plan.query_id, ()):
            states.append("unbooked")
        else:
            states.append("pending" if plan.query_id in running else "unfinished")
    return states


def _as_planned(landed: dict[str, LandedFile], file: PlannedFile, *, is_lost: bool) -> LandedFile | None:
    """The landing file that a plan means, None if there is none in that state."""
    found = landed.get(file.name)
    if found is not None and (is_lost or (found.raw.mtime_ms, found.raw.size) == (file.modified_ms, file.size)):
        return found
    return None


class _Ranges:
    """The planned ranges of Kafka's offsets against what the raw table has. ``chunks`` are to be parsed."""

    def __init__(
        self,
        settings: Settings,
        stream: str,
        plans: list[BatchPlan],
        offered: dict[tuple[str, int], int],
        topics: dict[str, TopicQuery],
    ) -> None:
        self._offered = offered
        planned: dict[str, list[Span]] = {}
        for plan in plans:
            for part in plan.ranges:
                planned.setdefault(part.name, []).append((part.start, part.end))
        ends = {name: end for topic in topics.values() for name, end in topic.end.items()}
        self.chunks: list[RawChunk] = []
        self.version: int | None = None
        self._held: dict[str, list[Span]] = {}
        self._left: dict[str, list[Span]] = {}  # what the running query went past though no batch has it
        self._of_name: dict[str, list[RawChunk]] = {}
        if not planned and not ends:
            return
        self._raw = RawTable(settings, RAW_TABLES[stream])
        self.version = self._raw.version
        for name in sorted({*planned, *ends}):
            spans = sorted(planned.get(name, ()))
            held = self._held[name] = self._raw.held(name, from_offset=spans[0][0] if spans else 0)
            left = [part for gap in minus((0, ends.get(name, 0)), spans) for part in both(gap, held)]
            self._left[name] = left
            self._of_name[name] = list(self._raw.chunks(name, sorted([*spans, *left]), held))
            self.chunks += self._of_name[name]

    def missed(self, parsed: dict[RawFile | RawChunk, ParsedFile]) -> tuple[PlannedRange, ...]:
        """Ranges that hold a record and that no batch took."""
        return tuple(
            PlannedRange(name, *span)
            for name, spans in self._left.items()
            for span in spans
            if any(_count(entry, *part) for entry, part in self._parts(name, span, parsed))
        )

    def occurrences(self, number: int, plan: BatchPlan, parsed: dict[RawFile | RawChunk, ParsedFile]) -> Iterator[Occurrence]:
        """What there is of a plan's ranges, and what is not, in the order of reading."""
        found: list[Occurrence] = []
        for name, span in _read_ranges(plan):
            held = self._held.get(name, [])
            found += [Occurrence(number, name, *at, entry) for entry, at in self._parts(name, span, parsed)]
            found += [Occurrence(number, name, *rest, is_waiting=self._raw.is_behind(name, rest[0])) for rest in minus(span, held)]
        if any(one.entry is None for one in found) and not any(one.is_waiting for one in found):
            here = [one for one in found if one.entry is not None]
            # where no record is missing, what seems to be gone is a hole in the offsets
            if sum(_count(one.entry, one.start, one.end) for one in here if one.entry) >= self._offered.get(
                (plan.query_id, plan.batch_id), _NO_END
            ):
                found = here
        yield from sorted(found, key=lambda one: (one.name, one.start))

    def _parts(self, name: str, span: Span, parsed: dict[RawFile | RawChunk, ParsedFile]) -> Iterator[tuple[ParsedFile, Span]]:
        """The parsed chunks that have an offset of ``span``, with which."""
        chunks = self._of_name.get(name, [])
        first = bisect_right(chunks, span[0], key=lambda chunk: chunk.end)
        for chunk in chunks[first:]:
            if chunk.start >= span[1]:
                return
            yield parsed[chunk], (max(span[0], chunk.start), min(span[1], chunk.end))


def _read_ranges(plan: BatchPlan) -> Iterator[tuple[str, Span]]:
    """The offsets that a batch read: its ranges without what it set aside."""
    for part in plan.ranges:
        aside = sorted((one.start, one.end) for one in plan.set_aside if one.name == part.name)
        for span in minus((part.start, part.end), aside):
            yield part.name, span


def _lacking(
    plans: list[BatchPlan], states: list[str], offered: dict[tuple[str, int], int], occurrences: list[Occurrence]
) -> frozenset[int]:
    """Batches whose ranges all are there, and in them fewer records than the batch was offered: somebody has taken some away.

    Batch by batch only where all records together are too few: to count those of a batch they have to be read.
    """
    absent = {found.batch for found in occurrences if found.entry is None}
    whole = [found for found in occurrences if states[found.batch] == "booked" and found.batch not in absent]
    numbers = sorted({found.batch for found in whole})
    wanted = {number: offered[plans[number].query_id, plans[number].batch_id] for number in numbers}
    by_entry: dict[Path, list[tuple[ParsedFile, Occurrence]]] = {}
    for found in whole:
        if found.entry is not None:
            by_entry.setdefault(found.entry.parquet, []).append((found.entry, found))
    if sum(map(_count_all, by_entry.values())) >= sum(wanted.values()):
        return frozenset()
    held = dict.fromkeys(numbers, 0)
    for taken in by_entry.values():
        for (_, found), count in zip(taken, _counts(taken), strict=True):
            held[found.batch] += count
    return frozenset(number for number in numbers if held[number] < wanted[number])


def _count_all(taken: list[tuple[ParsedFile, Occurrence]]) -> int:
    """How many records of one chunk were taken, each time that they were."""
    entry, spans = taken[0][0], sorted((found.start, found.end) for _, found in taken)
    joined = all(before[1] == after[0] for before, after in pairwise(spans))
    if joined and isinstance(entry.raw, RawChunk) and (spans[0][0], spans[-1][1]) == (entry.raw.start, entry.raw.end):
        return entry.records
    return sum(_counts(taken))


def _counts(taken: list[tuple[ParsedFile, Occurrence]]) -> list[int]:
    """How many records of one chunk each occurrence has."""
    lines = pq.read_table(taken[0][0].parquet, columns=["line"])["line"].to_numpy()  # ascending
    ends = np.searchsorted(lines, [(found.start, found.end) for _, found in taken])
    return [int(end - start) for start, end in ends]


def _count(entry: ParsedFile, start: int, end: int) -> int:
    """How many records of a chunk lie at offsets [start, end)."""
    if isinstance(entry.raw, RawChunk) and start <= entry.raw.start and end >= entry.raw.end:
        return entry.records
    return _counts([(entry, Occurrence(0, entry.name, start, end))])[0]


def listed(paths: Iterable[str]) -> str:
    """Paths as a list of SQL, in order."""
    return f"[{', '.join(map(literal, sorted(paths)))}]"


def occurring(files: Iterable[str]) -> str:
    """SQL for the records (``r``) of parsed files, once for each of the `occurrences` that has them."""
    return f"""
        read_parquet({listed(files)}, filename = true) r
        join occurrences on parquet = filename and line >= first_line and line < end_line
    """


def scan(settings: Settings, name: str, version: int | None) -> str:
    """SQL that reads a table at a version, None: at its newest."""
    return delta_scan(settings.table_uri(name), version)


def _offered(settings: Settings, stream: str, version: int | None) -> dict[tuple[str, int], int]:
    """The batches of a stream that the ledger holds, with how many records they were offered."""
    held = DeltaTable(settings.table_uri(BATCH_LEDGER.name), version=version)
    rows = held.to_pyarrow_table(columns=["stream", "_query_id", "_batch_id", "offered"])
    sums = rows.filter(pc.equal(rows["stream"], stream)).group_by(["_query_id", "_batch_id"]).aggregate([("offered", "sum")])
    names = (sums[name].to_pylist() for name in ("_query_id", "_batch_id", "offered_sum"))
    return {(query, batch): offered or 0 for query, batch, offered in zip(*names, strict=True)}


def _plans_of_rows(
    settings: Settings, stream: str, versions: dict[str, int], batches: list[tuple[str, int]], landed: dict[str, LandedFile]
) -> list[BatchPlan]:
    """Plans of batches whose own are gone: the files and offsets that their rows name, today's limits, the newest prices.

    A row of `orders` names the last batch that changed the order, not the one whose file it names, so such plans of orders have
    no files: their rows stand for themselves.
    """
    rows_of_events = (
        f"""
        select _query_id, _batch_id, ingested_at, source_file, source_line, rule_set
        from {scan(settings, EVENTS.name, versions["events"])}
        union all
        select _query_id, _batch_id, ingested_at, source_file, source_line, null
        from {scan(settings, REJECTED_EVENTS.name, versions["rejected_events"])}
        union all
    """
        if stream == "events"
        else ""
    )
    with connect_delta() as lake:
        lake.register("wanted", pa.table({"_query_id": [q for q, _ in batches], "_batch_id": [b for _, b in batches]}))
        found = lake.execute(
            f"""
            select _query_id, _batch_id, min(ingested_us), list((source_file, first, last)) filter (source_file is not null),
                mode(rule_set)
            from (
                select _query_id, _batch_id, epoch_us(min(ingested_at)) as ingested_us, source_file, min(source_line) as first,
                    max(source_line) as last, mode(rule_set) as rule_set
                from (
                    {rows_of_events}
                    select _query_id, _batch_id, ingested_at, null::varchar as source_file, null::bigint as source_line,
                        null::varchar as rule_set
                    from {scan(settings, BATCH_LEDGER.name, versions["batch_ledger"])} where stream = '{stream}'
                ) semi join wanted using (_query_id, _batch_id) group by _query_id, _batch_id, source_file
            ) group by _query_id, _batch_id order by 3, 1, 2
            """
        ).fetchall()
    rules = rules_of(settings, versions)
    made = []
    for number, (query_id, batch_id, ingested_us, places, rule_set) in enumerate(found):
        names = [name for name, _, _ in places or () if not is_of_kafka(name)]
        ranges = [PlannedRange(name, first, last + 1) for name, first, last in places or () if is_of_kafka(name)]
        raws = {name: landed[name].raw for name in names if name in landed}
        gone = [PlannedFile(0, name, 0) for name in names if name not in landed]
        planned = sorted([*gone, *(PlannedFile(raw.mtime_ms, name, raw.size) for name, raw in raws.items())])
        limits = (ingested_us, rules.earliest_us, rules.future_skew_us, rules.hour_grace_us, rules.campaigns_version)
        made.append(BatchPlan(query_id, batch_id, number - len(found), *limits, tuple(planned), rule_set, tuple(sorted(ranges))))
    return made


def rules_of(settings: Settings, versions: dict[str, int]) -> Rules:
    """Today's rules: the limits of the settings and the newest prices (of orders: none)."""
    micros = settings.earliest_event_time.timestamp() * 1_000_000
    return Rules(
        campaigns_version=versions.get(CAMPAIGNS.name, 0),
        earliest_us=round(micros),
        future_skew_us=round(settings.future_skew.total_seconds() * 1_000_000),
        hour_grace_us=round(settings.hour_grace.total_seconds() * 1_000_000),
        events_version=versions.get(EVENTS.name, 0),
    )


def _span_columns(occurrences: list[Occurrence]) -> dict[str, pa.Array]:
    return {
        "b": pa.array([found.batch for found in occurrences], pa.int64()),
        "name": pa.array([found.name for found in occurrences], pa.string()),
        "first_line": pa.array([found.start for found in occurrences], pa.int64()),
        "end_line": pa.array([found.end for found in occurrences], pa.int64()),
    }


class Recount:
    """The recount of ``inputs`` in a DuckDB of its own. ``count`` makes table `outcomes` of the hours that it is asked for.

    Tables: `batches` (b, identity, limits, state), `occurrences` (o, in the order of reading), `outcomes` (a row a record).
    ``rules`` override those of the hours (numbers since the epoch) that they name; ``prices`` (campaign_id, billing_model, from_us,
    to_us) are those of version FILES_VERSION, which table `campaigns` does not hold.
    """

    def __init__(
        self,
        settings: Settings,
        inputs: Inputs,
        spill: Path,
        rules: dict[int, Rules] | None = None,
        prices: pa.Table | None = None,
    ) -> None:
        self.settings = settings
        self.inputs = inputs
        self._spill = spill
        self.lake: duckdb.DuckDBPyConnection = connect_delta({"temp_directory": str(spill), "memory_limit": _MEMORY})
        self.lake.execute("set preserve_insertion_order = false")
        self.lake.execute(
            f"create macro hour_of(us) as coalesce((us - ((us % {HOUR_US}) + {HOUR_US}) % {HOUR_US}) // {HOUR_US}, {NO_HOUR})"
        )
        self._load_batches()
        self._load_stream(rules or {}, prices)

    def _load_stream(self, rules: dict[int, Rules], prices: pa.Table | None) -> None:
        self._load_rules(rules)
        self._load_prices(prices)
        self._load_trusted()
        self._traffic = TrafficJudge(self)

    def close(self) -> None:
        """Give the memory back."""
        self.lake.close()

    def scan(self, name: str) -> str:
        """SQL that reads a table at its pinned version."""
        held = scan(self.settings, name, self.inputs.versions[name])
        if name in (
            REJECTED_EVENTS.name,
            REJECTED_ORDERS.name,
        ):  # one of an older version has no column `records` before the next ingest adds it
            return f"(from {held} union all by name select null::bigint as records where false)"
        return held

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        return self.lake.execute(sql).fetchall()

    # --- what is asked once

    def _load_batches(self) -> None:
        plans, inputs = self.inputs.plans, self.inputs
        partial = {found.batch for found in inputs.gone} | set(inputs.lost)
        batches = pa.table(
            {
                "b": pa.array(range(len(plans)), pa.int64()),
                "query_id": pa.array([plan.query_id for plan in plans], pa.string()),
                **{
                    name: pa.array([getattr(plan, name) for plan in plans], pa.int64())
                    for name in (
                        *("batch_id", "version", "ingested_us", "earliest_us", "future_skew_us", "hour_grace_us"),
                        "campaigns_version",
                    )
                },
                "rule_set": pa.array([plan.rule_set for plan in plans], pa.string()),
                "rejects_kept": pa.array([plan.rejects_kept for plan in plans], pa.int64()),
                "state": pa.array(inputs.states, pa.string()),
                "is_left_out": pa.array([state in ("pending", "waiting") for state in inputs.states], pa.bool_()),
                "is_partial": pa.array([number in partial for number in range(len(plans))], pa.bool_()),
            }
        )
        here = [(o, found, found.entry) for o, found in enumerate(inputs.occurrences) if found.entry is not None]
        occurrences = pa.table(
            {
                "o": pa.array([o for o, _, _ in here], pa.int64()),
                **_span_columns([found for _, found, _ in here]),
                "region": pa.array([entry.region for _, _, entry in here], pa.string()),
                "parquet": pa.array([str(entry.parquet) for _, _, entry in here], pa.string()),
            }
        )
        absent = [(o, found) for o, found in enumerate(inputs.occurrences) if found.entry is None]
        gone = pa.table(
            {
                "o": pa.array([o for o, _ in absent], pa.int64()),
                **_span_columns([found for _, found in absent]),
            }
        )
        for name, table in (("batches", batches), ("occurrences", occurrences), ("absent", gone)):
            self.keep(name, table)

    def keep(self, name: str, table: pa.Table) -> None:
        """Hold an Arrow table as a table of this DuckDB."""
        keep_table(self.lake, name, table, self._spill)

    def _load_rules(self, rules: dict[int, Rules]) -> None:
        self.lake.execute(
            f"""
            create temp table hour_rules as
            select hour_of(epoch_us(event_hour)) as hour, arg_max(campaigns_version, set_at) as campaigns_version,
                arg_max(earliest_us, set_at) as earliest_us, arg_max(future_skew_us, set_at) as future_skew_us,
                arg_max(hour_grace_us, set_at) as hour_grace_us, arg_max(events_version, set_at) as events_version
            from {self.scan(HOUR_RULES.name)} group by all
            """
        )
        for hour, rule in rules.items():
            self.lake.execute(f"delete from hour_rules where hour = {hour}")
            self.lake.execute(
                "insert into hour_rules values (?, ?, ?, ?, ?, ?)",
                [hour, rule.campaigns_version, rule.earliest_us, rule.future_skew_us, rule.hour_grace_us, rule.events_version],
            )

    def _load_prices(self, prices: pa.Table | None) -> None:
        self.lake.execute(
            "create temp table prices (version bigint, campaign_id varchar, billing_model varchar, from_us bigint, to_us bigint)"
        )
        if prices is not None:
            self.keep("given_prices", prices)
            self.lake.execute(
                f"insert into prices select {FILES_VERSION}, campaign_id, billing_model, from_us, to_us from given_prices"
            )
        used = "select campaigns_version from batches union select campaigns_version from hour_rules"
        for (version,) in self.rows(f"select * from ({used}) where campaigns_version != {FILES_VERSION}"):
            self.lake.execute(
                f"""
                insert into prices select {version}, campaign_id, billing_model, epoch_us(valid_from),
                    coalesce(epoch_us(valid_to), {2**62}) from {scan(self.settings, CAMPAIGNS.name, version)}
                """
            )

    def _load_trusted(self) -> None:
        """Rows of raw input that is not there stand for what they say themselves: nothing is taken back because it is gone."""
        place = """
            join batches on _query_id = query_id and _batch_id = batch_id
            join absent on absent.b = batches.b and name = source_file and source_line >= first_line and source_line < end_line
        """
        numbers = {found.batch for found in (*self.inputs.gone, *self.inputs.waiting)}
        self.lake.execute(f"create temp table trusted as {self._rows_as_they_are('absent', place, numbers)}")
        self._trust_unbacked()
        self._trust_what_was_set_aside()
        ids = [name for (name,) in self.rows("select distinct record_id from trusted where is_valid")]
        hashes = [xxh3_64_intdigest(name.encode()) for name in ids]
        self.keep("trusted_ids", pa.table({"record_id": pa.array(ids, pa.string()), "id_hash": pa.array(hashes, pa.uint64())}))
        self.lake.execute("update trusted set id_hash = i.id_hash from trusted_ids i where i.record_id = trusted.record_id")

    def _rows_as_they_are(self, place: str, joins: str, numbers: Collection[int]) -> str:
        """SQL for rows of events and rejects of some batches as records; ``joins`` finds their places in table ``place``."""
        plans = [self.inputs.plans[number] for number in numbers]
        # by which Delta's statistics skip the files of the others
        low, high = (pick((plan.batch_id for plan in plans), default=-1) for pick in (min, max))
        events, rejects = (
            f"(from {self.scan(table.name)} where _batch_id >= {low} and _batch_id <= {high})"
            for table in (EVENTS, REJECTED_EVENTS)
        )
        return f"""
            select o, {place}.b as b, name, e.region, source_line as line, true as is_valid, event_id as record_id,
                null::ubigint as id_hash, epoch_us(received_at) as received_us, event_type, epoch_us(event_time) as time_us,
                campaign_id, ad_id, store_id, user_id, impression_id, placement, price_micros, currency, user_agent,
                'accepted' as outcome, billing_model, is_late,
                coalesce(spend_nanos, 0) + coalesce(invalid_spend_nanos, 0) as spend_nanos,
                invalid_traffic_rule, invalid_traffic_rules, e.rule_set, null::varchar[] as reasons, null::bigint as records
            from {events} e {joins}
            union all by name
            select o, {place}.b as b, name, e.region, source_line as line, false as is_valid, record_id,
                epoch_us(record_time) as time_us, outcome, reason_codes as reasons, records
            from {rejects} e {joins}
        """

    def _trust_what_was_set_aside(self) -> None:
        """What a batch did not read is one rejected record, as its plan says; o is negative: there is no occurrence."""
        self._keep_set_aside()
        self.lake.execute(
            """
            insert into trusted by name
            select *, false as is_valid, 'rejected' as outcome, null::bigint as records from set_aside
            """
        )

    def _keep_set_aside(self) -> None:
        """Table `set_aside`: what the batches did not read, by their plans."""
        found = [(number, one) for number, plan in enumerate(self.inputs.plans) for one in plan.set_aside]
        rows = pa.table(
            {
                "o": pa.array([-1 - at for at in range(len(found))], pa.int64()),
                "b": pa.array([number for number, _ in found], pa.int64()),
                "name": pa.array([one.name for _, one in found], pa.string()),
                "region": pa.array([one.name.split("/")[1] for _, one in found], pa.string()),
                "line": pa.array([one.start for _, one in found], pa.int64()),
                "reasons": pa.array([[one.reason] for _, one in found], pa.list_(pa.string())),
            }
        )
        self.keep("set_aside", rows)

    def _trust_unbacked(self) -> None:
        """Rows of batches that lack raw records: those whose place has none stand for themselves, for theirs was taken away."""
        lacking = [found for found in self.inputs.occurrences if found.batch in self.inputs.lacking and found.entry is not None]
        if not lacking:
            return
        files = {str(found.entry.parquet) for found in lacking if found.entry is not None}
        numbers = ", ".join(str(number) for number in sorted(self.inputs.lacking))
        place = f"""
            join batches on _query_id = query_id and _batch_id = batch_id and batches.b in ({numbers})
            join occurrences on occurrences.b = batches.b and name = source_file and source_line >= first_line
                and source_line < end_line
            anti join (select filename, line from read_parquet({listed(files)}, filename = true)) r
                on r.filename = parquet and r.line = source_line
        """
        self.lake.execute(
            f"""
            insert into trusted by name {self._rows_as_they_are("occurrences", place, self.inputs.lacking)};
            update batches set is_partial = true where b in ({numbers}) and b in (select b from trusted)
            """
        )

    def all_files(self) -> list[str]:
        """What the store has of all planned files and ranges."""
        return sorted(str(entry.parquet) for entry in self.inputs.entries)

    def records_by_hour(self, hours: Collection[int] | None = None) -> dict[int, int]:
        """How many records each hour (of ``hours``, None: of all) has in the parsed files, however often they were taken."""
        files = self.all_files() if hours is None else self._files_of(hours)
        if not files:
            return {}
        where = "true" if hours is None else self.within("time_us", hours)
        found = self.rows(
            f"select hour_of(time_us) as hour, count(*) from read_parquet({listed(files)}) where {where} group by hour"
        )
        return {hour: records for hour, records in found if hours is None or hour in hours}

    def hours_held(self) -> set[int]:
        """All hours of which the raw input or a table has a record."""
        found = self.rows(
            f"""
            select distinct hour_of(epoch_us(event_hour)) from {self.scan("batch_ledger")}
                where stream = 'events' and (offered != 0 or accepted != 0)
            union select distinct epoch(event_date)::bigint // 3600 + event_hour from {self.scan("events")}
            union select distinct hour_of(epoch_us(event_minute)) from {self.scan("minute_metrics")}
            union select distinct hour_of(epoch_us(record_time)) from {self.scan("rejected_events")}
            """
        )
        return {hour for (hour,) in found} | set(self.records_by_hour()) | self._hours_set_aside()

    def _hours_set_aside(self) -> set[int]:
        return {NO_HOUR} if any(plan.set_aside for plan in self.inputs.plans) else set()

    def hours_of_batch(self, number: int) -> set[int]:
        """The hours that the records of a batch lie in."""
        files = {str(found.entry.parquet) for found in self.inputs.occurrences if found.batch == number and found.entry}
        if not files:
            return set()
        found = self.rows(f"select distinct hour_of(r.time_us) from {occurring(files)} where b = {number}")
        return {hour for (hour,) in found}

    # --- what is asked for hours

    def _files_of(self, hours: Collection[int]) -> list[str]:
        known = [hour for hour in hours if hour != NO_HOUR]
        low, high = (min(known) * HOUR_US, (max(known) + 1) * HOUR_US) if known else (0, 0)
        return sorted(
            {
                str(entry.parquet)
                for entry in self.inputs.entries
                if (entry.min_us is not None and entry.max_us is not None and entry.min_us < high and entry.max_us >= low)
                or (NO_HOUR in hours and entry.has_unknown_time)
            }
        )

    def count(self, hours: Collection[int]) -> None:
        """Make table `outcomes`: each record of ``hours`` with its outcome, its price and whether it is late.

        Columns: o, b, name, region, line, hour, record_id, received_us (never null of a valid record), the payload, outcome
        (accepted, duplicate, conflict, rejected), reasons (of a rejected one), records (of one that stands for more),
        holder_o and holder_line (the record that holds the id), billing_model, spend_nanos, invalid_spend_nanos, is_late,
        invalid_traffic_rule, invalid_traffic_rules, rule_set.
        """
        asked, hours = hours, self._traffic.wide(hours)
        self.keep("hours", pa.table({"hour": pa.array(sorted(hours), pa.int64())}))
        self._judge("judged", self._files_of(hours), self.within("time_us", hours), "r.hour in (from hours)")
        self.lake.execute("create or replace temp table ids as select distinct id_hash from judged where is_ok")
        files = self.all_files()
        elsewhere = "hour_of(time_us) not in (from hours) and id_hash in (from ids)"
        raw = f"union all select id_hash from {occurring(files)}"
        self.lake.execute(
            f"""
            create or replace temp table suspects as select id_hash from (
                select id_hash from judged where is_ok
                {f"{raw} where is_valid and {elsewhere}" if files else ""}
                union all select id_hash from trusted where {elsewhere}
            ) group by id_hash having count(*) > 1
            """
        )
        self._judge("others", files, "r.id_hash in (from suspects)", "r.hour not in (from hours) and r.id_hash in (from suspects)")
        self._decide()
        self._traffic.judge(asked)
        self._mark()
        self.keep("hours", pa.table({"hour": pa.array(sorted(asked), pa.int64())}))
        self.lake.execute("insert into others by name select * from judged where hour not in (from hours)")

    @staticmethod
    def within(column: str, hours: Collection[int]) -> str:
        """A condition that bounds a column of microseconds, for statistics to prune by; exact only with the hour beside it."""
        known = [hour for hour in hours if hour != NO_HOUR]
        bounds = f"{column} >= {min(known) * HOUR_US} and {column} < {(max(known) + 1) * HOUR_US}" if known else "false"
        return f"(({bounds}) or {column} is null)" if NO_HOUR in hours else f"({bounds})"

    def _judge(self, target: str, files: list[str], pushed: str, where: str) -> None:
        """Records by the limits that hold for them, with the rules that they are priced by."""
        columns = ", ".join(f"r.{name}" for name in _RECORD)
        if files:
            source = f"""
                select o, b, name, coalesce(r.region, occurrences.region) as region, {columns},
                    null as outcome, hour_of(r.time_us) as hour, null as billing_model, null::bigint
                    as spend_nanos, null::boolean as is_late, null as invalid_traffic_rule,
                    null::varchar[] as invalid_traffic_rules, null as rule_set, r.reasons, null::bigint as records
                from {occurring(files)} where {pushed}
                union all by name
            """
        else:
            source = ""
        self.lake.execute(
            f"""
            create or replace temp table {target} as
            select r.* exclude (received_us) replace (if(outcome is not null, r.reasons, list_concat(
                    coalesce(r.reasons, []),
                    if(time_us < coalesce(h.earliest_us, batches.earliest_us), ['event_time_out_of_range'], []),
                    if(time_us > coalesce(r.received_us, ingested_us) + coalesce(h.future_skew_us, batches.future_skew_us),
                        ['event_time_in_future'], [])
                )) as reasons),
                coalesce(r.received_us, ingested_us) as received_us,
                outcome is not null as is_trusted,
                case when outcome is not null then outcome = 'accepted'
                    else is_valid and time_us >= coalesce(h.earliest_us, batches.earliest_us)
                        and time_us <= coalesce(r.received_us, ingested_us) + coalesce(h.future_skew_us, batches.future_skew_us)
                end as is_ok,
                coalesce(h.hour_grace_us, batches.hour_grace_us) as grace_us,
                coalesce(h.campaigns_version, batches.campaigns_version) as price_version
            from (
                {source} select *, hour_of(time_us) as hour from trusted
            ) r join batches using (b) left join hour_rules h on h.hour = r.hour and batches.version <= h.events_version
            where {where}
            """
        )

    def _decide(self) -> None:
        same = " and ".join(f"r.{name} is not distinct from first.{name}" for name in _PAYLOAD)
        ranked = ", ".join(("o", "line", "record_id", "is_trusted", "outcome", *_PAYLOAD))
        self.lake.execute(
            f"""
            create or replace temp table ranked as
            select {ranked} from judged where is_ok and id_hash in (from suspects)
            union all select {ranked} from others where is_ok
            """
        )
        self.lake.execute(
            f"""
            create or replace temp table settled as
            select r.o, r.line, first.o as holder_o, first.line as holder_line, case
                when r.o = first.o and r.line = first.line then 'accepted' when {same} then 'duplicate' else 'conflict' end as told
            from ranked r join (
                select * from ranked qualify row_number() over (partition by record_id order by o, line) = 1
            ) first using (record_id)
            """
        )
        self.lake.execute(
            f"""
            create or replace temp table counted as
            select r.o, r.b, r.name, r.region, r.line, r.hour, r.record_id, r.received_us, {", ".join(f"r.{n}" for n in _PAYLOAD)},
                case when is_trusted then outcome when not is_ok then 'rejected' else coalesce(told, 'accepted') end as outcome,
                is_trusted, is_valid, r.reasons, r.records, holder_o, holder_line,
                r.invalid_traffic_rule, r.invalid_traffic_rules, r.rule_set,
                case when is_trusted then r.billing_model else prices.billing_model end as billing_model,
                case when is_trusted then r.spend_nanos
                    when event_type = 'click' and prices.billing_model = 'cpc' then price_micros * 1000
                    when event_type = 'impression' and prices.billing_model = 'cpm' then price_micros else 0 end as spend_nanos,
                case when is_trusted then r.is_late else r.received_us >= (r.hour + 1) * {HOUR_US} + grace_us end as is_late
            from judged r left join settled using (o, line)
                left join prices on prices.version = price_version and prices.campaign_id = r.campaign_id
                    and r.time_us >= from_us and r.time_us < to_us
            """
        )

    def _mark(self) -> None:
        """Table `outcomes`: what was counted of the hours asked, with the marks of invalid traffic and what is billed."""
        rule = "if(c.is_trusted, c.invalid_traffic_rule, marks.rule)"
        self.lake.execute(
            f"""
            create or replace temp table outcomes as
            select c.* replace (
                    {rule} as invalid_traffic_rule,
                    if(c.is_trusted, c.invalid_traffic_rules, marks.rules) as invalid_traffic_rules,
                    case when c.is_trusted then c.rule_set when outcome != 'accepted' then null
                        when batches.version <= h.events_version then h.rule_set else batches.rule_set end as rule_set,
                    if({rule} is null, spend_nanos, 0) as spend_nanos
                ), if({rule} is null, 0, spend_nanos) as invalid_spend_nanos
            from counted c join batches using (b) left join marks using (o, line) left join rule_of_hour h on h.hour = c.hour
            where c.hour in (from asked);
            drop view accepted;
            drop table counted
            """
        )
