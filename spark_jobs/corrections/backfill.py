"""Backfill: judge closed hours again by today's limits, prices and rules of invalid traffic, and restate what differs.

Published increments stay; further increments bring their sums to the new values. A backfill refuses hours that differ from the
recount by their own rules, so that a restatement shows only what the rules changed. Table `hour_rules` stores the rules of each
hour for later recounts.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime, timedelta

import pyarrow as pa

from spark_jobs.audit.compare_events import EventsComparison
from spark_jobs.audit.database import open_database
from spark_jobs.audit.engine import Recount
from spark_jobs.audit.inputs import BatchState, Inputs, Rules, todays_rules
from spark_jobs.audit.recount_events import FILES_VERSION, EventsRecount
from spark_jobs.config import Settings
from spark_jobs.corrections.decide import decide
from spark_jobs.corrections.reconcile import (
    RECORDS_AT_ONCE,
    compare_hours,
    current_inputs,
    is_correctable,
    recounting,
    whole_batches,
)
from spark_jobs.corrections.run import Run, correcting, groups_of_hours, writing
from spark_jobs.corrections.write_ahead import TableChange, carry_out, write_ahead
from spark_jobs.errors import AdtallyError, RawBehindError, UsageError
from spark_jobs.ingest.campaigns import Campaign, load_campaigns, read_campaigns
from spark_jobs.lake.landing_view import refresh_landing
from spark_jobs.lake.retirements import recountable_from
from spark_jobs.lake.tables import EVENTS, HOUR_RULES
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.watermark import require_closed
from spark_jobs.traffic.review import ReviewedHour, review_anew
from spark_jobs.units import HOUR_US, HourRange, from_micros, hour_moment, hour_number

CAUSE = "rules_changed"
_HOURS_AT_ONCE = 6


@dataclass(frozen=True)
class Restated:
    """What a backfill changes of a UTC day, campaign and currency: ``rows`` of `events`, and the sums of the increments.

    ``impressions`` and ``clicks`` are differences. The spend is that of all increments in the hours asked, in nanos.
    """

    event_date: date
    campaign_id: str
    currency: str
    rows: int
    impressions: int
    clicks: int
    spend_nanos_before: int
    spend_nanos_after: int


@dataclass(frozen=True)
class BackfillReport:
    """A backfill, or with ``dry_run`` what it would do.

    ``changes`` are those of limits and prices. ``reviewed`` are the hours that the rules of invalid traffic changed, including
    later hours that look back to the range; empty for a dry run.
    """

    run_id: str
    dry_run: bool
    changes: list[Restated]
    hours_changed: int
    seconds: float
    reviewed: list[ReviewedHour] = field(default_factory=list)


@dataclass(frozen=True)
class _Today:
    """Today's rules without the version of `events`. ``prices`` is set if no version of `campaigns` has these prices."""

    campaigns_version: int
    prices: pa.Table | None
    price_list: list[Campaign]

    def rules(self, inputs: Inputs) -> Rules:
        """Return the rules, for all batches that have ended."""
        pending = [p.version for p, state in zip(inputs.plans, inputs.states, strict=True) if state is BatchState.PENDING]
        last = min(pending, default=inputs.versions[EVENTS.name] + 1) - 1
        return replace(todays_rules(inputs.snapshot), campaigns_version=self.campaigns_version, events_version=last)

    def digest(self, rules: Rules) -> str:
        """Return the SHA-256 of the limits and the price list."""
        limits = {name: getattr(rules, name) for name in ("earliest_us", "future_skew_us", "hour_grace_us")}
        text = json.dumps([limits, [asdict(campaign) for campaign in self.price_list]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def backfill(
    settings: Settings,
    hours: HourRange,
    *,
    dry_run: bool = False,
    run_id: str | None = None,
    reason: str = "backfill",
    progress: Callable[[str], None] | None = None,
    now: datetime | None = None,
) -> BackfillReport:
    """Judge ``hours`` again by today's rules and restate what differs; with ``dry_run`` only report it.

    An ingest and other backfills may run meanwhile: they wait for each other. A second run changes nothing. Raises UsageError for
    an hour that is not closed, AdtallyError for an hour that differs from the recount by its own rules, RawBehindError if the raw
    copy of a topic lacks records.
    """
    started = time.monotonic()
    require_closed(settings, hours)
    since = recountable_from(settings)
    if since is not None and hours.start < since:
        raise UsageError(
            f"hours before {since:%Y-%m-%dT%HZ} cannot be recomputed: their raw input is retired",
            hint=f"choose --from {since:%Y-%m-%dT%H:00:00Z} or later; docs/raw-retention.md",
        )
    ensure_tables(settings)
    say = progress or (lambda _: None)
    run_id = run_id or uuid.uuid4().hex
    wanted = {hour_number(hour) for hour in hours}
    changes: dict[tuple[date, str, str], Restated] = {}
    changed = 0
    with correcting(settings, is_dry=dry_run):
        now = now or datetime.now(UTC)
        _require_no_difference(settings, wanted, now, say)
        today = _today(settings, dry_run=dry_run)
        for group in _groups(settings, wanted, now):
            say(f"judging {len(group)} of {len(wanted)} hours by today's rules")
            with nullcontext() if dry_run else writing(settings):
                found, number = _restate(settings, set(group), wanted, today, Run(run_id, "backfill", reason, now), dry_run=dry_run)
            changed += number
            for change in found:
                key = (change.event_date, change.campaign_id, change.currency)
                changes[key] = _sum(changes[key], change) if key in changes else change
        reviewed = [] if dry_run else review_anew(settings, wanted, Run(run_id, "review", reason, now), say)
    ordered = [changes[key] for key in sorted(changes)]
    return BackfillReport(run_id, dry_run, ordered, changed, time.monotonic() - started, reviewed)


def _require_no_difference(settings: Settings, hours: set[int], now: datetime, say: Callable[[str], None]) -> None:
    compared = compare_hours(settings, hours, now, say)
    if compared.waiting:
        one = compared.waiting[0]
        raise RawBehindError(
            f"raw_events lacks offsets {one.first_offset} to {one.end_offset - 1} of {one.source} yet",
            hint="run adtally ingest, which copies them",
        )
    wrong = [found for found in compared.findings if is_correctable(found)]
    if wrong:
        hour = hour_moment(min(found.hour for found in wrong))
        raise AdtallyError(
            f"hour {hour:%Y-%m-%dT%HZ} differs from the recount by the rules that it was ingested with ({wrong[0].cause})",
            hint="run adtally reconcile --repair first",
        )


def _today(settings: Settings, *, dry_run: bool) -> _Today:
    """Load today's prices into table `campaigns`; a dry run only reads them."""
    refresh_landing(settings)
    listed = read_campaigns(settings.landing_path)
    if not dry_run or not listed:  # without a file the table stays as it is
        with nullcontext() if dry_run else writing(settings):
            return _Today(load_campaigns(settings) or 0, None, listed)
    prices = pa.table(
        {
            "campaign_id": pa.array([c.campaign_id for c in listed], pa.string()),
            "billing_model": pa.array([c.billing_model for c in listed], pa.string()),
            "from_us": pa.array([c.valid_from_us for c in listed], pa.int64()),
            "to_us": pa.array([2**62 if c.valid_to_us is None else c.valid_to_us for c in listed], pa.int64()),
        }
    )
    return _Today(FILES_VERSION, prices, listed)


def _groups(settings: Settings, hours: set[int], now: datetime) -> list[list[int]]:
    with recounting(settings, "missed", now) as recount:
        records = recount.records_by_hour(hours)
    groups = groups_of_hours(hours, records, RECORDS_AT_ONCE)
    return [group[at : at + _HOURS_AT_ONCE] for group in groups for at in range(0, len(group), _HOURS_AT_ONCE)]


def _restate(
    settings: Settings, group: set[int], wanted: set[int], today: _Today, run: Run, *, dry_run: bool
) -> tuple[list[Restated], int]:
    """Restate the hours of ``group``, a part of ``wanted``. Returns what changes, and in how many hours."""
    inputs = current_inputs(settings, run.token, run.now, lambda _: None)
    rules = today.rules(inputs)
    run = replace(run, rule_set=today.digest(rules))
    with open_database(inputs.snapshot) as database:
        recount = EventsRecount(database, inputs, dict.fromkeys(wanted, rules), today.prices)
        comparison = EventsComparison(recount, cause=CAUSE)
        hours = whole_batches(recount, group)
        while True:
            findings = [found for found in comparison.run(hours)[0] if is_correctable(found)]
            further = _hours_of_same_ids(recount) - hours - wanted
            if not further:
                break
            hours |= further  # where a record takes the place of one that is no longer valid, or loses its place
        if not findings:
            return [], 0
        changed = {found.hour for found in findings}
        changes = _changes(recount)
        if not dry_run:
            correction = decide(recount, run, _hour_rules(recount, sorted(changed & group), rules, run))
            write_ahead(settings, correction)
            carry_out(settings, correction)
    return changes, len(changed)


def _hours_of_same_ids(recount: Recount) -> set[int]:
    """Return the hours in which other records have the ids of the events that change."""
    hours = recount.database.values(
        """
        select distinct hour from others where is_ok
            and record_id in (select record_id from events_lost union select event_id from events_over)
        """
    )
    return set(hours)


def _changes(recount: Recount) -> list[Restated]:
    day = f"(hour * {HOUR_US} // {24 * HOUR_US})"
    found = recount.database.rows(
        f"""
        with changed as (
            select {day} as day, campaign_id, currency, count(distinct id) as rows from (
                select hour, campaign_id, currency, record_id as id from events_lost
                union all select hour, campaign_id, currency, event_id from events_over
            ) group by all
        ), delta as (
            select {day} as day, campaign_id, currency, sum(impressions) as impressions, sum(clicks) as clicks,
                sum(spend_nanos) as spend_nanos
            from metrics_delta group by all
        ), held as (
            select {day} as day, campaign_id, currency, sum(spend_nanos) as spend_nanos
            from found_metrics group by all
        )
        select day, campaign_id, currency, coalesce(rows, 0)::bigint, coalesce(impressions, 0)::bigint, coalesce(clicks, 0)::bigint,
            coalesce(held.spend_nanos, 0)::hugeint, (coalesce(held.spend_nanos, 0) + coalesce(delta.spend_nanos, 0))::hugeint
        from changed full join delta using (day, campaign_id, currency) left join held using (day, campaign_id, currency)
        """
    )
    return [Restated(date(1970, 1, 1) + timedelta(days=day), *rest) for day, *rest in found]


def _sum(one: Restated, other: Restated) -> Restated:
    names = ("rows", "impressions", "clicks", "spend_nanos_before", "spend_nanos_after")
    return replace(one, **{name: getattr(one, name) + getattr(other, name) for name in names})


def _hour_rules(recount: Recount, hours: list[int], rules: Rules, run: Run) -> TableChange:
    # The newest set_at wins, so it must be later than all others even if the clock was set back or a run waited for another.
    (before,) = recount.database.values(f"select epoch_us(max(set_at)) from {recount.database.scan(HOUR_RULES)}")
    set_at = run.now if before is None else max(run.now, from_micros(before + 1))
    row = {**asdict(rules), "run_id": run.run_id, "rule_set": run.rule_set, "set_at": set_at}
    return TableChange.append(HOUR_RULES, [{**row, "event_hour": hour_moment(hour)} for hour in hours])
