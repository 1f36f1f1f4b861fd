"""Find the inputs of a recount: pinned tables, the plans of batches, and which of the planned input is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.audit.checkpoints import FileQuery, TopicQuery, is_of_kafka, read_file_query, read_topic_queries
from spark_jobs.audit.landing import LandedFile, landed_files, missed_files
from spark_jobs.audit.occurrences import BatchKey, Occurrence, PlannedRanges, batches_lacking_records
from spark_jobs.audit.plans import BatchPlan, PlannedFile, PlannedRange, read_plans
from spark_jobs.audit.store import ParsedFile, RawChunk, RawFile, ensure_parsed
from spark_jobs.config import Settings
from spark_jobs.lake.lake import Lake, Snapshot
from spark_jobs.lake.replaced_files import ReplacedFiles
from spark_jobs.lake.tables import (
    BATCH_LEDGER,
    CAMPAIGNS,
    EVENTS,
    HOUR_RULES,
    MINUTE_METRICS,
    ORDERS,
    REJECTED_EVENTS,
    REJECTED_ORDERS,
    RULE_SETS,
    TRAFFIC_REVIEWS,
    Table,
)
from spark_jobs.units import to_micros

ACCEPTED: dict[str, Table] = {"events": EVENTS, "orders": ORDERS}
"""The table of each stream whose commits store the plans of its batches."""

# The ledger first: see Lake.pin.
_PINNED: dict[str, tuple[Table, ...]] = {
    "events": (BATCH_LEDGER, EVENTS, REJECTED_EVENTS, MINUTE_METRICS, CAMPAIGNS, HOUR_RULES, TRAFFIC_REVIEWS, RULE_SETS),
    "orders": (BATCH_LEDGER, ORDERS, REJECTED_ORDERS),
}


class BatchState(StrEnum):
    """What a recount knows about a batch."""

    BOOKED = "booked"  # the pinned ledger has it
    WAITING = "waiting"  # the raw copy does not have all of its records yet
    PENDING = "pending"  # a running query has yet to finish it, or finished it while the versions were pinned
    UNFINISHED = "unfinished"  # it was killed, and the query that would finish it has no checkpoint any more
    UNBOOKED = "unbooked"  # it has finished, but the ledger does not have it
    MISSED = "missed"  # not a batch: input that no batch took


LEFT_OUT = (BatchState.PENDING, BatchState.WAITING)
"""Batches in these states are left out of a comparison, on both sides."""


@dataclass(frozen=True)
class Rules:
    """Limits (microseconds) and a version of `campaigns` that replace those of the batches.

    They apply to batches up to version ``events_version`` of `events`.
    """

    campaigns_version: int
    earliest_us: int
    future_skew_us: int
    hour_grace_us: int
    events_version: int

    def of_plan(self, ingested_us: int) -> tuple[int, int, int, int, int]:
        """Return the limits and the prices of a plan, in the order of BatchPlan."""
        return ingested_us, self.earliest_us, self.future_skew_us, self.hour_grace_us, self.campaigns_version


@dataclass(frozen=True)
class Inputs:
    """The inputs of a recount at one moment.

    A batch's number is its place in ``plans`` and in ``states``. ``occurrences`` are in the order of reading. The plans of ``lost``
    batches were made from rows. For ``lacking`` batches the raw copy has fewer records than the batch was offered.
    """

    stream: str
    snapshot: Snapshot
    plans: list[BatchPlan]
    states: list[BatchState]
    lost: frozenset[int]
    occurrences: list[Occurrence]
    lacking: frozenset[int] = frozenset()

    @property
    def versions(self) -> dict[str, int]:
        """The pinned versions by table name."""
        return self.snapshot.versions

    @cached_property
    def gone(self) -> list[Occurrence]:
        """What was planned and is no longer there."""
        return [found for found in self.occurrences if found.entry is None and not found.is_waiting]

    @cached_property
    def waiting(self) -> list[Occurrence]:
        """What the raw copy does not have yet."""
        return [found for found in self.occurrences if found.is_waiting]

    @cached_property
    def entries(self) -> list[ParsedFile]:
        """The entries of everything that is there, each once."""
        return list({found.entry.parquet: found.entry for found in self.occurrences if found.entry is not None}.values())


def read_inputs(
    settings: Settings, stream: str, *, missed_as: str, now_us: int, progress: Callable[[int, int], None] | None = None
) -> Inputs:
    """Pin the tables, read the plans, and parse what the store does not have.

    Input that no batch took becomes one batch after all others, with query id ``missed_as`` and today's rules. Calls
    ``progress(done, total)`` with bytes.
    """
    # The checkpoints first: the pinned versions have every batch that these call finished.
    file_query, topics = read_file_query(settings, stream), read_topic_queries(settings, stream)
    accepted = ACCEPTED[stream]
    snapshot = Lake(settings).pin(*_PINNED[stream])
    plans = read_plans(settings, snapshot.version(accepted), accepted)
    offered = _offered(snapshot, stream)
    for plan in plans:
        if (plan.query_id, plan.batch_id) in offered:  # nothing is read of what a batch set aside
            offered[plan.query_id, plan.batch_id] -= len(plan.set_aside)
    landed = landed_files(settings, stream)
    replaced = ReplacedFiles(settings)
    without = sorted(offered.keys() - {(plan.query_id, plan.batch_id) for plan in plans})
    made = _plans_from_rows(snapshot, stream, without, landed)
    lost = frozenset(range(len(made)))
    plans = made + plans
    states = _states(settings, stream, plans, offered, file_query, topics)
    ranges = PlannedRanges(settings, stream, snapshot, plans, offered, {} if lost else topics)
    missed = [] if lost else missed_files(landed, {file.name for plan in plans for file in plan.files}, file_query, replaced)
    files = {
        (number, file.name): _as_planned(landed, replaced, file, is_lost=number in lost)
        for number, plan in enumerate(plans)
        for file in plan.files
        if not plan.is_set_aside(file.name)
    }
    wanted: list[RawFile | RawChunk] = [*(found.raw for found in (*files.values(), *missed) if found is not None), *ranges.chunks]
    # A file that has changed or vanished meanwhile has no entry.
    parsed = {entry.raw: entry for entry in ensure_parsed(settings, stream, wanted, progress)}
    missed_ranges = ranges.missed(parsed)
    if missed or missed_ranges:
        files |= {(len(plans), file.name): file for file in missed}
        planned = tuple(sorted(PlannedFile(file.raw.mtime_ms, file.name, file.raw.size) for file in missed))
        limits = todays_rules(snapshot).of_plan(now_us)
        plans.append(BatchPlan(missed_as, 0, snapshot.version(accepted) + 1, *limits, planned, ranges=missed_ranges))
        states.append(BatchState.MISSED)
    occurrences = []
    for number, plan in enumerate(plans):
        for file in plan.files:
            if not plan.is_set_aside(file.name):
                found = files[number, file.name]
                occurrences.append(Occurrence(number, file.name, entry=parsed.get(found.raw) if found else None))
        of_ranges = ranges.occurrences(number, plan, parsed)
        if any(found.is_waiting for found in of_ranges) and states[number] is not BatchState.PENDING:
            states[number] = BatchState.WAITING
        occurrences += of_ranges
    of_topics = [found for found in occurrences if is_of_kafka(found.name)]
    whole = {found.batch for found in of_topics} - {found.batch for found in of_topics if found.entry is None}
    wanted_records = {b: offered[plans[b].query_id, plans[b].batch_id] for b in whole if states[b] is BatchState.BOOKED}
    lacking = batches_lacking_records(wanted_records, of_topics)
    return Inputs(stream, ranges.snapshot, plans, states, lost, occurrences, lacking - lost)


def _states(
    settings: Settings,
    stream: str,
    plans: list[BatchPlan],
    offered: dict[BatchKey, int],
    file_query: FileQuery,
    topics: dict[str, TopicQuery],
) -> list[BatchState]:
    done = {file_query.query_id: file_query.done} | {topic.query_id: topic.done for topic in topics.values()}
    newer = (topic.query_id for topic in read_topic_queries(settings, stream).values())
    running = {*done, read_file_query(settings, stream).query_id, *newer}
    last = {plan.query_id: plan.batch_id for plan in plans}
    is_complete = all((plan.query_id, plan.batch_id) in offered for plan in plans)
    later = offered if is_complete else _offered(Lake(settings).pin(BATCH_LEDGER), stream)

    def state(plan: BatchPlan) -> BatchState:
        key = (plan.query_id, plan.batch_id)
        if key in offered:
            return BatchState.BOOKED
        if key in later:
            return BatchState.PENDING
        if plan.batch_id < last[plan.query_id] or plan.batch_id in done.get(plan.query_id, ()):
            return BatchState.UNBOOKED
        return BatchState.PENDING if plan.query_id in running else BatchState.UNFINISHED

    return [state(plan) for plan in plans]


def _as_planned(landed: dict[str, LandedFile], replaced: ReplacedFiles, file: PlannedFile, *, is_lost: bool) -> LandedFile | None:
    """Return the landing file of a plan; None if none is in the planned state. A plan made from rows knows no state.

    An erasure may have replaced the file since.
    """
    found = landed.get(file.name)
    planned = replaced.present(file.name, file.modified_ms, file.size)
    is_planned = found is not None and (is_lost or (found.raw.mtime_ms, found.raw.size) == planned)
    return found if is_planned else None


def _offered(snapshot: Snapshot, stream: str) -> dict[BatchKey, int]:
    """Return the batches of a stream in the ledger, with the number of records that each was offered."""
    rows = snapshot.rows(BATCH_LEDGER, "stream", "_query_id", "_batch_id", "offered")
    sums = rows.filter(pc.equal(rows["stream"], stream)).group_by(["_query_id", "_batch_id"]).aggregate([("offered", "sum")])
    names = (sums[name].to_pylist() for name in ("_query_id", "_batch_id", "offered_sum"))
    return {(query, batch): offered or 0 for query, batch, offered in zip(*names, strict=True)}


def _plans_from_rows(snapshot: Snapshot, stream: str, batches: list[BatchKey], landed: dict[str, LandedFile]) -> list[BatchPlan]:
    """Make plans for batches without one: the files and offsets of their rows, today's limits, the newest prices.

    A row of `orders` names the batch that changed the order last, not the batch that read its file, so plans for orders have no
    files.
    """
    if not batches:
        return []
    rows_of_events = (
        f"""
        select _query_id, _batch_id, ingested_at, source_file, source_line, rule_set from {snapshot.scan(EVENTS)}
        union all
        select _query_id, _batch_id, ingested_at, source_file, source_line, null from {snapshot.scan(REJECTED_EVENTS)}
        union all
    """
        if stream == "events"
        else ""
    )
    with snapshot.lake.database() as database:
        database.register("wanted", pa.table({"_query_id": [q for q, _ in batches], "_batch_id": [b for _, b in batches]}))
        found = database.execute(
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
                    from {snapshot.scan(BATCH_LEDGER)} where stream = '{stream}'
                ) semi join wanted using (_query_id, _batch_id) group by _query_id, _batch_id, source_file
            ) group by _query_id, _batch_id order by 3, 1, 2
            """
        ).fetchall()
    rules = todays_rules(snapshot)
    made = []
    for number, (query_id, batch_id, ingested_us, places, rule_set) in enumerate(found):
        ranges = sorted(PlannedRange(name, first, last + 1) for name, first, last in places or () if is_of_kafka(name))
        files = []
        for name, _, _ in places or ():
            if not is_of_kafka(name):
                raw = landed[name].raw if name in landed else None
                files.append(PlannedFile(raw.mtime_ms, name, raw.size) if raw else PlannedFile(0, name, 0))
        version = number - len(found)  # before all known batches
        limits = rules.of_plan(ingested_us)
        made.append(BatchPlan(query_id, batch_id, version, *limits, tuple(sorted(files)), rule_set, tuple(ranges)))
    return made


def todays_rules(snapshot: Snapshot) -> Rules:
    """Return today's rules: the limits of the settings, and the newest pinned prices (0 for orders, which have none)."""
    settings = snapshot.lake.settings
    return Rules(
        campaigns_version=snapshot.versions.get(CAMPAIGNS.name, 0),
        earliest_us=to_micros(settings.earliest_event_time),
        future_skew_us=round(settings.future_skew.total_seconds() * 1_000_000),
        hour_grace_us=round(settings.hour_grace.total_seconds() * 1_000_000),
        events_version=snapshot.versions.get(EVENTS.name, 0),
    )
