"""Reconciliation: recount the raw input and compare it with the tables and the published marts, to the row and the nano."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from spark_jobs.audit.checkpoints import is_of_kafka
from spark_jobs.audit.compare import Finding, HourSums, StreamComparison
from spark_jobs.audit.compare_events import EventsComparison
from spark_jobs.audit.compare_orders import ORDERS_LEDGER_LAYER, OrdersComparison
from spark_jobs.audit.database import open_database
from spark_jobs.audit.engine import Recount
from spark_jobs.audit.inputs import BatchState, Inputs, read_inputs
from spark_jobs.audit.marts import compare_marts
from spark_jobs.audit.recount_events import EventsRecount
from spark_jobs.audit.recount_orders import OrdersRecount
from spark_jobs.audit.store import prune
from spark_jobs.config import Settings
from spark_jobs.corrections.decide import decide
from spark_jobs.corrections.run import Run, correcting, writing
from spark_jobs.corrections.write_ahead import TableChange, append_once, carry_out, write_ahead
from spark_jobs.lake.duck import translate_duckdb_errors
from spark_jobs.lake.roots import require_local
from spark_jobs.lake.tables import BATCH_LEDGER, RAW_TABLES, RECONCILIATIONS, STREAMS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step
from spark_jobs.units import NO_HOUR, HourRange, hour_moment, hour_number, to_micros

_RECORDS_AT_ONCE = 1_500_000  # what one comparison holds; more hours than that take turns
_PATIENCE_SECONDS = 20.0  # twice what lies between two batches of raw records
_HOURS_AT_ONCE = 6  # put right in one go, for which an ingest waits


@dataclass(frozen=True)
class Difference:
    """What differs in one hour (None: records without a readable time), layer and campaign, and why (``cause``).

    Rows are those concerned, by the recount and as found, nanos their spend. ``detail`` is a sentence with an example.
    """

    event_hour: datetime | None
    layer: str
    cause: str
    campaign_id: str | None
    rows_different: int
    rows_expected: int
    rows_found: int
    nanos_expected: int
    nanos_found: int
    is_repaired: bool
    detail: str


@dataclass(frozen=True)
class HourResult:
    """An hour that was recounted: its accepted events, their spend, and the orders placed in it, by the recount and in the tables;
    and its differences."""

    hour: datetime
    events_expected: int
    events_found: int
    nanos_expected: int
    nanos_found: int
    differences: list[Difference] = field(default_factory=list)
    orders_expected: int = 0
    orders_found: int = 0


@dataclass(frozen=True)
class Waiting:
    """What is left out because ``raw_table`` does not have it yet: offsets [first_offset, end_offset) of ``source``.

    ``hours`` are those in which the batch has records, by the ledger; none: it is not in the ledger.
    """

    query_id: str
    batch_id: int
    source: str
    first_offset: int
    end_offset: int
    hours: list[datetime]
    raw_table: str = "raw_events"


@dataclass(frozen=True)
class ReconcileReport:
    """A reconciliation. ``versions`` are those of the Delta tables that were compared, ``waiting`` is what was left out of it."""

    run_id: str
    hours: list[HourResult]
    differences: list[Difference]
    versions: dict[str, int]
    seconds: float
    waiting: list[Waiting] = field(default_factory=list)

    @property
    def remaining(self) -> list[Difference]:
        """The differences that were not repaired."""
        return [found for found in self.differences if not found.is_repaired]


@contextmanager
def recounting(inputs: Inputs) -> Iterator[Recount]:
    """Open a recount of ``inputs``. Raises TableCorruptionError where a table or a parsed file cannot be read."""
    with open_database(inputs.snapshot) as database:
        yield OrdersRecount(database, inputs) if inputs.stream == "orders" else EventsRecount(database, inputs)


def chunks(records: dict[int, int], hours: Collection[int]) -> Iterator[list[int]]:
    """``hours`` in groups of about _RECORDS_AT_ONCE records."""
    group: list[int] = []
    held = 0
    for hour in sorted(hours):
        if group and held + records.get(hour, 0) > _RECORDS_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(hour)
        held += records.get(hour, 0)
    if group:
        yield group


def comparison_of(recount: Recount) -> StreamComparison:
    """Return the comparison of a recount with its tables."""
    return EventsComparison(recount) if isinstance(recount, EventsRecount) else OrdersComparison(recount)


def check_marts(settings: Settings, hours: HourRange | None) -> list[Difference]:
    """Return the differences of the published marts from the table versions that they name. Layer marts, cause mart_differs."""
    found = compare_marts(settings, None if hours is None else [hour_number(hour) for hour in hours])
    return [difference(finding) for finding in found]


def difference(found: Finding, *, is_repaired: bool = False) -> Difference:
    """A finding as it is reported."""
    return Difference(
        event_hour=hour_moment(found.hour),
        layer=found.layer,
        cause=found.cause,
        campaign_id=found.campaign_id,
        rows_different=found.rows_different,
        rows_expected=found.rows_expected,
        rows_found=found.rows_found,
        nanos_expected=found.nanos_expected,
        nanos_found=found.nanos_found,
        is_repaired=is_repaired,
        detail=found.detail,
    )


def reconcile(
    settings: Settings,
    hours: HourRange | None,
    *,
    repair: bool = False,
    run_id: str | None = None,
    progress: Callable[[str], None] | None = None,
    now: datetime | None = None,
    patience_seconds: float = _PATIENCE_SECONDS,
) -> ReconcileReport:
    """Recount ``hours`` (None: everything) and compare; with ``repair`` put right what differs, each difference once.

    Where hours are named, Kafka's raw records of them are waited for up to ``patience_seconds``; batches that still lack some are
    left out, and named in the report. An ingest may go on meanwhile: it waits only while some hours are put right. Marts are not
    built here: theirs are reported as not repaired. Raises UsageError for a lakehouse that is not a local path,
    TableCorruptionError where a table cannot be read.
    """
    started = time.monotonic()
    require_local(settings, "the recount")
    ensure_tables(settings)
    say = progress or (lambda _: None)
    run_id = run_id or uuid.uuid4().hex
    with correcting(settings):
        now = now or datetime.now(UTC)
        wanted = None if hours is None else {hour_number(hour) for hour in hours}
        passes = {stream: compare_hours(settings, wanted, now, say, stream) for stream in STREAMS}
        while any(each.waiting for each in passes.values()) and hours is not None and time.monotonic() - started < patience_seconds:
            say("waiting for raw records")
            time.sleep(1.0)
            passes = {stream: compare_hours(settings, wanted, now, say, stream) for stream in STREAMS}
        findings, repaired = [], []
        for stream, each in passes.items():
            left, done = _put_right(settings, stream, each, run_id, now, say) if repair else (each.findings, [])
            findings += left
            repaired += done
        sums = [held for each in passes.values() for held in each.sums]
        versions = {name: version for stream in reversed(STREAMS) for name, version in passes[stream].versions.items()}
        waiting = [left for each in passes.values() for left in each.waiting]
        tried = {(found.hour, found.layer, found.cause, found.campaign_id) for found in repaired}
        findings = [
            replace(found, cause=f"{found.cause}_after_repair")
            if (found.hour, found.layer, found.cause, found.campaign_id) in tried
            else found
            for found in findings
        ]
        remaining = [difference(found) for found in findings] + check_marts(settings, hours)
        differences = [difference(found, is_repaired=True) for found in repaired] + remaining
        results = hour_results(sums, differences)
        rows = reconciliation_rows(run_id, remaining, versions, now)
        rows += [_no_difference(run_id, result, versions, now) for result in results if not result.differences]
        token = f"reconcile:{run_id}:{hours or 'all'}"
        table = pa.Table.from_pylist(rows, RECONCILIATIONS.schema)
        append_once(settings, RECONCILIATIONS, table, Step.RECONCILIATIONS, token)
    return ReconcileReport(run_id, results, differences, versions, time.monotonic() - started, waiting)


def _put_right(
    settings: Settings, stream: str, found_first: Pass, run_id: str, now: datetime, say: Callable[[str], None]
) -> tuple[list[Finding], list[Finding]]:
    """Put right what a comparison of a stream has found; returns what is left after that, and what was put right."""
    findings, repaired = found_first.findings, []
    wrong = sorted({found.hour for found in findings if is_correctable(found)})
    if not wrong:
        return findings, []
    for start in range(0, len(wrong), _HOURS_AT_ONCE):
        group = wrong[start : start + _HOURS_AT_ONCE]
        say(f"repairing {len(wrong) - start} hours")
        repaired += _repair(settings, stream, group, Run(run_id, "repair", "recount differs from the tables", now))
    again = {*wrong, *(found.hour for found in repaired)}
    findings = [found for found in findings if found.hour not in again]
    findings += compare_hours(settings, again, now, say, stream).findings
    return findings, repaired


@dataclass(frozen=True)
class Pass:
    """One comparison of some hours at pinned versions."""

    findings: list[Finding]
    sums: list[HourSums]
    versions: dict[str, int]
    waiting: list[Waiting]


def compare_hours(
    settings: Settings, hours: set[int] | None, now: datetime, say: Callable[[str], None], stream: str = "events"
) -> Pass:
    """Recount and compare hours (numbers since the epoch; None: all of which there is a record) of a stream."""
    inputs = current_inputs(settings, "missed", now, say, stream)
    findings: list[Finding] = []
    sums: list[HourSums] = []
    with recounting(inputs) as recount:
        records = recount.records_by_hour(hours)
        wanted = recount.all_hours() if hours is None else hours
        done = 0
        for group in chunks(records, wanted):
            say(f"comparing hours of {stream}: {done} of {len(wanted)}")
            found, held = comparison_of(recount).run(group)
            findings += found
            sums += held
            done += len(group)
        if hours is None:
            findings += gone_without_rows(recount)
        waiting = _waiting(recount, hours)
    if hours is None:  # all entries in use are known, and the lock of corrections keeps other recounts away
        prune(settings, stream, [entry.raw for entry in inputs.entries])
    return Pass(findings, sums, inputs.versions, waiting)


def _waiting(recount: Recount, hours: set[int] | None) -> list[Waiting]:
    """What waits for raw records and may have some in ``hours`` (None: in any)."""
    inputs = recount.inputs
    if not inputs.waiting:
        return []
    held: dict[tuple[str, int], set[int]] = {}
    for query, batch, hour in recount.database.rows(
        f"""
        select _query_id, _batch_id, hour_of(epoch_us(event_hour)) from {recount.database.scan(BATCH_LEDGER)}
        where stream = '{inputs.stream}' and source = 'kafka' and offered != 0
        """
    ):
        held.setdefault((query, batch), set()).add(hour)
    found = []
    for one in inputs.waiting:
        plan = inputs.plans[one.batch]
        own = held.get((plan.query_id, plan.batch_id), set())
        if inputs.states[one.batch] is BatchState.WAITING and (hours is None or not own or own & hours):
            moments = [moment for hour in sorted(own) if (moment := hour_moment(hour)) is not None]
            raw_table = RAW_TABLES[inputs.stream].name
            found.append(Waiting(plan.query_id, plan.batch_id, one.name, one.start, one.end, moments, raw_table))
    return found


def gone_without_rows(recount: Recount) -> list[Finding]:
    """Files, and ranges of Kafka's offsets, that are gone or have changed and of which no row is left to tell the hours."""
    empty = {(b, file.name) for b, plan in enumerate(recount.inputs.plans) for file in plan.files if not file.size}
    told = {o for (o,) in recount.database.rows("select distinct o from trusted")}
    absent = [
        found
        for o, found in enumerate(recount.inputs.occurrences)
        if found.entry is None and not found.is_waiting and o not in told and (found.batch, found.name) not in empty
    ]
    if not absent:
        return []
    first = absent[0]
    detail = (
        f"{RAW_TABLES[recount.inputs.stream].name} lacks offsets {first.start} to {first.end - 1} of {first.name}"
        if is_of_kafka(first.name)
        else f"{first.name} is gone or has changed since it was read"
    )
    layer = ORDERS_LEDGER_LAYER if recount.inputs.stream == "orders" else BATCH_LEDGER.name
    return [Finding(NO_HOUR, layer, "raw_missing", None, len(absent), 0, 0, 0, 0, detail)]


def current_inputs(settings: Settings, missed_as: str, now: datetime, say: Callable[[str], None], stream: str = "events") -> Inputs:
    """What there is to recount of a stream now."""
    with translate_duckdb_errors(settings.home_path):
        return read_inputs(
            settings,
            stream,
            missed_as=missed_as,
            now_us=to_micros(now),
            progress=lambda done, total: say(f"parsing: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"),
        )


def is_correctable(found: Finding) -> bool:
    """Whether the tables can be put right: not where the raw input is what is missing."""
    return found.cause != "raw_missing"


def _repair(settings: Settings, stream: str, hours: list[int], run: Run) -> list[Finding]:
    """Compare ``hours`` again while nobody else writes, and put them right; what was found."""
    with writing(settings):
        inputs = current_inputs(settings, run.token, run.now, lambda _: None, stream)
        with recounting(inputs) as recount:
            findings, _ = comparison_of(recount).run(whole_batches(recount, hours))
            findings = [found for found in findings if is_correctable(found)]
            if not findings:
                return []
            correction = decide(recount, run)
        rows = reconciliation_rows(
            run.run_id, [difference(found, is_repaired=True) for found in findings], inputs.versions, run.now
        )
        told = TableChange(
            RECONCILIATIONS, RECONCILIATIONS.schema.empty_table(), pa.Table.from_pylist(rows, RECONCILIATIONS.schema)
        )
        correction = replace(correction, changes=[*correction.changes, told])
        write_ahead(settings, correction)
        carry_out(settings, correction)
    return findings


def whole_batches(recount: Recount, hours: Collection[int]) -> set[int]:
    """``hours``, and all hours of a batch that has one of them and is not in the ledger: it becomes complete, or stays as it is."""
    found = set(hours)
    for number, state in enumerate(recount.inputs.states):
        if state in (BatchState.UNFINISHED, BatchState.UNBOOKED, BatchState.MISSED):
            own = recount.hours_of_batch(number)
            if own & found:
                found |= own
    return found


def reconciliation_rows(
    run_id: str, differences: list[Difference], versions: dict[str, int], now: datetime
) -> list[dict[str, Any]]:
    """Differences as rows of `reconciliations`."""
    return [{**asdict(found), "run_id": run_id, "delta_versions": json.dumps(versions), "run_at": now} for found in differences]


def _no_difference(run_id: str, result: HourResult, versions: dict[str, int], now: datetime) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "event_hour": result.hour,
        "cause": "none",
        "rows_different": 0,
        "rows_expected": result.events_expected,
        "rows_found": result.events_found,
        "nanos_expected": result.nanos_expected,
        "nanos_found": result.nanos_found,
        "is_repaired": False,
        "delta_versions": json.dumps(versions),
        "run_at": now,
    }


def hour_results(sums: list[HourSums], differences: list[Difference]) -> list[HourResult]:
    """The hours, each with its differences. An hour may stand in ``sums`` twice, with its events and with its orders."""
    names = [spec.name for spec in fields(HourSums)][1:]
    totals: dict[int, Counter[str]] = {}
    for held in sums:
        totals.setdefault(held.hour, Counter()).update({name: getattr(held, name) for name in names})
    made = []
    for number, total in sorted(totals.items()):
        hour = hour_moment(number)
        if hour is not None:
            own = [found for found in differences if found.event_hour == hour]
            made.append(HourResult(hour, differences=own, **{name: total[name] for name in names}))
    return made
