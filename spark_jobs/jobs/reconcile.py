"""Reconciliation: recount the raw input and compare it with the tables and the published marts, to the row and the nano."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb

from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError, UsageError
from spark_jobs.hours import HourRange
from spark_jobs.recount.compare import Comparison, Finding, HourSums
from spark_jobs.recount.marts import compare_marts
from spark_jobs.recount.truth import NO_HOUR, Inputs, Recount, Rules, read_inputs
from spark_jobs.sinks.delta import ensure_tables

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RECORDS_AT_ONCE = 1_500_000  # what one comparison holds; more hours than that take turns


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
    """An hour that was recounted: its accepted events and their spend by the recount and in `events`, and its differences."""

    hour: datetime
    events_expected: int
    events_found: int
    nanos_expected: int
    nanos_found: int
    differences: list[Difference] = field(default_factory=list)


@dataclass(frozen=True)
class ReconcileReport:
    """A reconciliation. ``versions`` are those of the Delta tables that were compared."""

    run_id: str
    hours: list[HourResult]
    differences: list[Difference]
    versions: dict[str, int]
    seconds: float

    @property
    def remaining(self) -> list[Difference]:
        """The differences that were not repaired."""
        return [found for found in self.differences if not found.is_repaired]


def hour_number(moment: datetime) -> int:
    """Hours since the epoch."""
    return (moment - _EPOCH) // timedelta(hours=1)


def hour_moment(hour: int) -> datetime | None:
    """The inverse of ``hour_number``; None for NO_HOUR."""
    return None if hour == NO_HOUR else _EPOCH + timedelta(hours=hour)


@contextmanager
def recounting(settings: Settings, inputs: Inputs, rules: dict[int, Rules] | None = None) -> Iterator[Recount]:
    """A recount over ``inputs``. Raises TableCorruptionError where a table or what was parsed cannot be read."""
    settings.scratch_path.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="recount-", dir=settings.scratch_path) as spill, told_plainly(settings):
        recount = Recount(settings, inputs, Path(spill), rules)
        try:
            yield recount
        finally:
            recount.close()


@contextmanager
def told_plainly(settings: Settings) -> Iterator[None]:
    """DuckDB's errors as ours."""
    try:
        yield
    except duckdb.Error as error:
        raise TableCorruptionError(
            f"{settings.home_path} cannot be recounted: {' '.join(str(error).split())[:300]}",
            hint="restore the file that the message names; what lies under recount/ may be deleted",
        ) from error


def require_local(settings: Settings) -> None:
    """Raises UsageError for a lakehouse that is not a local path."""
    if "://" in settings.lakehouse_uri:
        raise UsageError(
            f"the recount reads a lakehouse on a local path, not {settings.lakehouse_uri}", hint="set ADTALLY_LAKEHOUSE"
        )


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


def hours_held(recount: Recount) -> set[int]:
    """All hours of which the raw input or a table has a record."""
    found = recount.rows(
        f"""
        select distinct hour_of(epoch_us(event_hour)) from {recount.scan("batch_ledger")}
            where stream = 'events' and (offered != 0 or accepted != 0)
        union select distinct epoch(event_date)::bigint // 3600 + event_hour from {recount.scan("events")}
        union select distinct hour_of(epoch_us(event_minute)) from {recount.scan("minute_metrics")}
        union select distinct hour_of(epoch_us(record_time)) from {recount.scan("rejected_events")}
        """
    )
    return {hour for (hour,) in found} | set(recount.records_by_hour())


def check_marts(settings: Settings, hours: HourRange | None) -> list[Difference]:
    """What the published marts have other than the table versions that they name give. Layer marts, cause mart_differs."""
    settings.scratch_path.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="recount-", dir=settings.scratch_path) as spill, told_plainly(settings):
        found = compare_marts(settings, Path(spill), None if hours is None else [hour_number(hour) for hour in hours])
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
) -> ReconcileReport:
    """Recount ``hours`` (None: everything) and compare. An ingest may go on meanwhile."""
    started = time.monotonic()
    require_local(settings)
    ensure_tables(settings)
    say = progress or (lambda _: None)
    inputs = read_inputs(settings, progress=lambda done, total: say(f"parsing {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"))
    findings: list[Finding] = []
    sums: list[HourSums] = []
    with recounting(settings, inputs) as recount:
        records = recount.records_by_hour()
        wanted = hours_held(recount) if hours is None else {hour_number(hour) for hour in hours}
        for group in chunks(records, wanted):
            say(f"comparing {len(group)} hours")
            found, held = Comparison(recount).run(group)
            findings += found
            sums += held
    differences = [difference(found) for found in findings] + check_marts(settings, hours)
    return ReconcileReport(
        run_id or uuid.uuid4().hex, hour_results(sums, differences), differences, inputs.versions, time.monotonic() - started
    )


def hour_results(sums: list[HourSums], differences: list[Difference]) -> list[HourResult]:
    """The hours, each with its differences."""
    made = []
    for held in sums:
        hour = hour_moment(held.hour)
        if hour is not None:
            own = [found for found in differences if found.event_hour == hour]
            numbers = (held.events_expected, held.events_found, held.nanos_expected, held.nanos_found)
            made.append(HourResult(hour, *numbers, own))
    return made
