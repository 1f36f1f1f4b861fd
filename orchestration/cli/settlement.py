"""The commands ``adtally review``, ``attribute`` and ``bill``, which an ingest also runs at its end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import typer
from rich.console import RenderableType

from orchestration.cli.context import settings_of
from orchestration.cli.maintenance_tables import SHOWN, hour_text
from orchestration.cli.options import From, Json, Panel, To, examples, hour_range
from orchestration.cli.output import say, show, with_spinner
from orchestration.cli.tables import RecordTable, rest_line
from spark_jobs.texts import counted, duration, money

if TYPE_CHECKING:
    from spark_jobs.attribution.job import AttributionReport
    from spark_jobs.billing.job import BillingReport
    from spark_jobs.config import Settings
    from spark_jobs.traffic.review import ReviewReport

app = typer.Typer()


@app.command(
    rich_help_panel=Panel.TAKE_IN,
    epilog=examples(
        "adtally review                                            every hour whose review is missing or out of date",
        "adtally review --from 2025-06-02T08:00:00Z --to 2025-06-02T12:00:00Z",
    ),
)
def review(context: typer.Context, start: From = None, end: To = None, as_json: Json = False) -> None:
    """Judge whole hours for invalid traffic by the rules of HOME/rules/invalid_traffic.toml, and restate what changes.

    `adtally ingest` does this at its end. Dagster does it for hours that close, and again for hours with late records.
    """
    from spark_jobs.traffic.review import review as run

    hours = hour_range(start, end)
    report = with_spinner("reviewing", partial(run, settings_of(context), hours))
    show(report, review_table(report), as_json=as_json)


@app.command(
    rich_help_panel=Panel.TAKE_IN,
    epilog=examples(
        "adtally attribute                                         the orders concerned by what came since",
        "adtally attribute --from 2025-06-01 --to 2025-06-08       orders of these hours, anew by today's rules",
    ),
)
def attribute(context: typer.Context, start: From = None, end: To = None, as_json: Json = False) -> None:
    """Credit orders to the clicks before them, in every model and lookback window.

    A range selects orders by their time. Orders whose credits do not change keep their revision.
    """
    from spark_jobs.attribution.job import attribute as run

    hours = hour_range(start, end)
    report = with_spinner("attributing", partial(run, settings_of(context), hours))
    show(report, [attribution_text(report)], as_json=as_json)


@app.command(rich_help_panel=Panel.TAKE_IN, epilog=examples("adtally bill", "adtally bill --json | jq '.lines[].amount_micros'"))
def bill(context: typer.Context, as_json: Json = False) -> None:
    """Post charges of days that closed, and credits or adjustments of closed days that changed since.

    The ledger only grows; its lines sum to the spend of each day and campaign, rounded once.
    """
    from spark_jobs.billing.job import bill as run

    report = with_spinner("billing", partial(run, settings_of(context)))
    show(report, billing_table(report), as_json=as_json)


def settle_at_end(settings: Settings) -> None:
    """Review, credit and bill what an ingest wrote. Print a line on standard error for each that changed something."""
    from spark_jobs.operate.settle import settle

    done = with_spinner("settling", partial(settle, settings))
    if done.review.hours:
        changed = sum(found.changed for found in done.review.hours)
        hours = counted(len(done.review.hours), "hour")
        say(f"reviewed {hours} for invalid traffic, {counted(changed, 'mark')} changed", stderr=True)
    if done.attribution.orders:
        say(attribution_text(done.attribution), stderr=True)
    if done.billing.lines:
        lines = counted(len(done.billing.lines), "billing line")
        say(f"{lines} of {counted(done.billing.days, 'closed day')}", stderr=True)


def review_table(report: ReviewReport) -> Iterator[RenderableType]:
    """Make the table of hours whose marks changed, and the sums."""
    changed = [hour for hour in report.hours if hour.changed]
    if changed:
        yield RecordTable("Hours whose marks changed", "hour", "events", "invalid", "marks changed").with_rows(
            (hour_text(hour.event_hour), hour.events, hour.invalid, hour.changed) for hour in changed[:SHOWN]
        )
    yield from rest_line(len(changed), SHOWN, "hour")
    if not report.hours:
        yield "every hour's review is up to date"
        return
    events, invalid = (sum(getattr(hour, name) for hour in report.hours) for name in ("events", "invalid"))
    yield f"{counted(len(report.hours), 'hour')} reviewed, {invalid:,} of {events:,} events invalid, {duration(report.seconds)}"


def attribution_text(report: AttributionReport) -> str:
    """Return the report of an attribution on one line."""
    if not report.orders:
        return "no order is concerned by what came since"
    return (
        f"{counted(report.orders, 'order')}: {report.credited:,} credited to {counted(report.touches, 'touch')}, "
        f"{report.unattributed:,} without a touch, {report.cancelled:,} cancelled; "
        f"{counted(report.revisions, 'new revision')}, {duration(report.seconds)}"
    )


def billing_table(report: BillingReport) -> Iterator[RenderableType]:
    """Make the table of posted lines, and the sums."""
    if not report.lines:
        yield "nothing to bill: no closed day has changed"
        return
    shown = RecordTable("Posted", "day", "campaign", "store", "type", "reason", "amount", "currency", left=5)
    for line in report.lines[:SHOWN]:
        names = (line.event_date, line.campaign_id, line.store_id, line.line_type, line.reason)
        shown.add_row(*names, money(line.amount_micros * 1000, line.currency), line.currency)
    yield shown
    yield from rest_line(len(report.lines), SHOWN, "line")
    yield f"{counted(len(report.lines), 'line')} of {counted(report.days, 'closed day')}, {duration(report.seconds)}"
