"""Reconciliation: recount the raw input and compare it with the tables and the published marts, to the row and the nano."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any

from spark_jobs.audit.checkpoints import is_of_kafka
from spark_jobs.audit.compare import Difference, HourSums
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
from spark_jobs.corrections.run import Run, correcting, groups_of_hours, writing
from spark_jobs.corrections.write_ahead import TableChange, append_once, carry_out, write_ahead
from spark_jobs.lake.duck import translate_duckdb_errors
from spark_jobs.lake.retirements import read_retirements, recountable_from
from spark_jobs.lake.tables import BATCH_LEDGER, RAW_TABLES, RECONCILIATIONS, STREAMS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step
from spark_jobs.units import NO_HOUR, HourRange, hour_moment, hour_number, to_micros

RECORDS_AT_ONCE = 1_500_000  # per comparison, to bound its memory
_PATIENCE_SECONDS = 20.0  # twice the time between two batches of raw records
_HOURS_AT_ONCE = 6  # repaired at a time, because an ingest waits meanwhile


@dataclass(frozen=True)
class HourResult(HourSums):
    """A recounted hour with its differences."""

    differences: list[Difference] = field(default_factory=list)


@dataclass(frozen=True)
class Waiting:
    """A batch that was left out because ``raw_table`` lacks its offsets [first_offset, end_offset) of ``source``.

    ``hours`` are the hours in which the batch has records, by the ledger; none if the ledger does not have the batch.
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
    """A reconciliation. ``versions`` are those of the compared tables; ``waiting`` are the batches that were left out.

    Hours before ``recountable_from`` were not recounted, because their raw input is retired (None: all were).
    """

    run_id: str
    hours: list[HourResult]
    differences: list[Difference]
    versions: dict[str, int]
    seconds: float
    waiting: list[Waiting] = field(default_factory=list)
    recountable_from: datetime | None = None

    @property
    def remaining(self) -> list[Difference]:
        """The differences that were not repaired."""
        return [found for found in self.differences if not found.is_repaired]


@dataclass(frozen=True)
class Comparison:
    """One comparison of some hours at pinned versions."""

    findings: list[Difference]
    sums: list[HourSums]
    versions: dict[str, int]
    waiting: list[Waiting]


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
    """Recount ``hours`` (None: all hours) and compare; with ``repair`` correct each difference once.

    With ``hours``, waits up to ``patience_seconds`` for their raw records; the report names the batches that still lack some and
    were left out. An ingest may run meanwhile: it waits only while hours are corrected. Does not build marts, so their differences
    stay unrepaired. Raises TableCorruptionError if a table cannot be read.
    """
    started = time.monotonic()
    ensure_tables(settings)
    say = progress or (lambda _: None)
    run_id = run_id or uuid.uuid4().hex
    with correcting(settings):
        now = now or datetime.now(UTC)
        wanted = None if hours is None else {hour_number(hour) for hour in hours}
        while True:
            compared = {stream: compare_hours(settings, wanted, now, say, stream) for stream in STREAMS}
            waiting = [batch for each in compared.values() for batch in each.waiting]
            if not waiting or hours is None or time.monotonic() - started >= patience_seconds:
                break
            say("waiting for raw records")
            time.sleep(1.0)
        remaining: list[Difference] = []
        repaired: list[Difference] = []
        kind = attrgetter("hour", "layer", "cause", "campaign_id")
        for stream, each in compared.items():
            left, done = _repair(settings, stream, each, run_id, now, say) if repair else (each.findings, [])
            tried = set(map(kind, done))
            remaining += [replace(one, cause=f"{one.cause}_after_repair") if kind(one) in tried else one for one in left]
            repaired += done
        remaining += check_marts(settings, hours)
        versions = {name: version for stream in reversed(STREAMS) for name, version in compared[stream].versions.items()}
        results = _hour_results([sums for each in compared.values() for sums in each.sums], [*repaired, *remaining])
        right = [_no_difference(result) for result in results if not result.differences]
        rows = _reconciliation_rows(run_id, [*map(asdict, remaining), *right], versions, now)
        append_once(settings, RECONCILIATIONS, rows, Step.RECONCILIATIONS, f"reconcile:{run_id}:{hours or 'all'}")
    seconds = time.monotonic() - started
    return ReconcileReport(run_id, results, [*repaired, *remaining], versions, seconds, waiting, recountable_from(settings))


def check_marts(settings: Settings, hours: HourRange | None) -> list[Difference]:
    """Return the differences of the published marts from the table versions that they name. Layer marts, cause mart_differs."""
    return compare_marts(settings, None if hours is None else [hour_number(hour) for hour in hours])


# --- comparing


@contextmanager
def recounting(
    settings: Settings, missed_as: str, now: datetime, say: Callable[[str], None] = lambda _: None, stream: str = "events"
) -> Iterator[Recount]:
    """Open a recount of the current inputs. Raises TableCorruptionError if a table or a parsed file cannot be read."""
    inputs = current_inputs(settings, missed_as, now, say, stream)
    with open_database(inputs.snapshot) as database:
        yield OrdersRecount(database, inputs) if stream == "orders" else EventsRecount(database, inputs)


def _compare(recount: Recount, hours: Collection[int]) -> tuple[list[Difference], list[HourSums]]:
    comparison = EventsComparison(recount) if isinstance(recount, EventsRecount) else OrdersComparison(recount)
    return comparison.run(hours)


def compare_hours(
    settings: Settings, hours: set[int] | None, now: datetime, say: Callable[[str], None], stream: str = "events"
) -> Comparison:
    """Recount and compare hours (numbers since the epoch; None: all hours with a record) of a stream."""
    findings: list[Difference] = []
    sums: list[HourSums] = []
    with recounting(settings, "missed", now, say, stream) as recount:
        records = recount.records_by_hour(hours)
        wanted = recount.all_hours() if hours is None else hours
        since = recountable_from(settings)
        if since is not None:
            wanted = {hour for hour in wanted if hour == NO_HOUR or hour >= hour_number(since)}
        done = 0
        for group in groups_of_hours(wanted, records, RECORDS_AT_ONCE):
            say(f"comparing hours of {stream}: {done} of {len(wanted)}")
            group_findings, group_sums = _compare(recount, group)
            findings += group_findings
            sums += group_sums
            done += len(group)
        if hours is None:
            findings += _missing_without_rows(recount)
        waiting = _waiting(recount, hours)
    inputs = recount.inputs
    if hours is None:  # all entries in use are known, and the corrections lock keeps other recounts out
        prune(settings, stream, [entry.raw for entry in inputs.entries])
    return Comparison(findings, sums, inputs.versions, waiting)


def _waiting(recount: Recount, hours: set[int] | None) -> list[Waiting]:
    """Return the batches that wait for raw records and may have some in ``hours`` (None: in any hour)."""
    inputs = recount.inputs
    if not inputs.waiting:
        return []
    hours_of: dict[tuple[str, int], set[int]] = {}
    for query, batch, hour in recount.database.rows(
        f"""
        select _query_id, _batch_id, hour_of(epoch_us(event_hour)) from {recount.database.scan(BATCH_LEDGER)}
        where stream = '{inputs.stream}' and source = 'kafka' and offered != 0
        """
    ):
        hours_of.setdefault((query, batch), set()).add(hour)
    raw_table = RAW_TABLES[inputs.stream].name
    found = []
    for one in inputs.waiting:
        plan = inputs.plans[one.batch]
        own = hours_of.get((plan.query_id, plan.batch_id), set())
        if inputs.states[one.batch] is BatchState.WAITING and (hours is None or not own or own & hours):
            moments = [moment for hour in sorted(own) if (moment := hour_moment(hour)) is not None]
            found.append(Waiting(plan.query_id, plan.batch_id, one.name, one.start, one.end, moments, raw_table))
    return found


def _missing_without_rows(recount: Recount) -> list[Difference]:
    """Find files and offsets that are gone or have changed, and of which no row is left that names the hours."""
    empty = {(b, file.name) for b, plan in enumerate(recount.inputs.plans) for file in plan.files if not file.size}
    retired = read_retirements(recount.inputs.snapshot.lake, recount.inputs.stream)
    with_rows = set(recount.database.values("select distinct o from trusted"))
    absent = [
        found
        for o, found in enumerate(recount.inputs.occurrences)
        if found.entry is None
        and not found.is_waiting
        and o not in with_rows
        and (found.batch, found.name) not in empty
        and not retired.covers(found.name, found.start, found.end)
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
    return [Difference(None, layer, "raw_missing", None, len(absent), 0, 0, 0, 0, False, detail)]


def current_inputs(settings: Settings, missed_as: str, now: datetime, say: Callable[[str], None], stream: str = "events") -> Inputs:
    """Read the inputs of a recount of a stream as they are now."""
    with translate_duckdb_errors(settings.home_path):
        return read_inputs(
            settings,
            stream,
            missed_as=missed_as,
            now_us=to_micros(now),
            progress=lambda done, total: say(f"parsing: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"),
        )


# --- repairing


def is_correctable(found: Difference) -> bool:
    """Return whether a repair can correct a difference. It cannot where the raw input is missing."""
    return found.cause != "raw_missing"


def _repair(
    settings: Settings, stream: str, compared: Comparison, run_id: str, now: datetime, say: Callable[[str], None]
) -> tuple[list[Difference], list[Difference]]:
    """Correct what a comparison of a stream found. Returns the findings that remain and those that were corrected."""
    findings = compared.findings
    wrong = sorted({found.hour for found in findings if is_correctable(found)})
    if not wrong:
        return findings, []
    repaired: list[Difference] = []
    for start in range(0, len(wrong), _HOURS_AT_ONCE):
        say(f"repairing {len(wrong) - start} hours")
        run = Run(run_id, "repair", "recount differs from the tables", now)
        repaired += _repair_hours(settings, stream, wrong[start : start + _HOURS_AT_ONCE], run)
    again = {*wrong, *(found.hour for found in repaired)}
    remaining = compare_hours(settings, again, now, say, stream).findings
    return [*(found for found in findings if found.hour not in again), *remaining], repaired


def _repair_hours(settings: Settings, stream: str, hours: list[int], run: Run) -> list[Difference]:
    """Compare ``hours`` again while nobody else writes, and correct them. Returns what was corrected."""
    with writing(settings):
        with recounting(settings, run.token, run.now, stream=stream) as recount:
            findings, _ = _compare(recount, whole_batches(recount, hours))
            findings = [found for found in findings if is_correctable(found)]
            if not findings:
                return []
            repaired = [replace(found, is_repaired=True) for found in findings]
            rows = _reconciliation_rows(run.run_id, list(map(asdict, repaired)), recount.inputs.versions, run.now)
            correction = decide(recount, run, TableChange.append(RECONCILIATIONS, rows))
        write_ahead(settings, correction)
        carry_out(settings, correction)
    return repaired


def whole_batches(recount: Recount, hours: Collection[int]) -> set[int]:
    """Return ``hours`` and all hours of the batches in them that the ledger lacks, because a batch is only completed as a whole."""
    found = set(hours)
    for number, state in enumerate(recount.inputs.states):
        if state in (BatchState.UNFINISHED, BatchState.UNBOOKED, BatchState.MISSED):
            own = recount.hours_of_batch(number)
            if own & found:
                found |= own
    return found


# --- reporting


def _reconciliation_rows(
    run_id: str, differences: list[dict[str, Any]], versions: dict[str, int], now: datetime
) -> list[dict[str, Any]]:
    """Return differences as rows of `reconciliations`."""
    return [{**found, "run_id": run_id, "delta_versions": json.dumps(versions), "run_at": now} for found in differences]


def _no_difference(result: HourResult) -> dict[str, Any]:
    return {
        "event_hour": result.hour,
        "cause": "none",
        "rows_different": 0,
        "rows_expected": result.events_expected,
        "rows_found": result.events_found,
        "nanos_expected": result.nanos_expected,
        "nanos_found": result.nanos_found,
        "is_repaired": False,
    }


def _hour_results(sums: list[HourSums], differences: list[Difference]) -> list[HourResult]:
    """Return the hours in order, each with its differences. ``sums`` may have an hour twice: its events and its orders."""
    totals: dict[datetime, Counter[str]] = {}
    for each in sums:
        counts = asdict(each)
        totals.setdefault(counts.pop("hour"), Counter()).update(counts)
    return [
        HourResult(hour, differences=[found for found in differences if found.event_hour == hour], **total)
        for hour, total in sorted(totals.items())
    ]
