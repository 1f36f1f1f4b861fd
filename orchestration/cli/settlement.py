"""Commands for money and credit: review, attribute, bill; and what an ingest does of them at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer
from rich.console import RenderableType

from orchestration.cli.context import settings_of
from orchestration.cli.maintenance_tables import SHOWN, hour_text
from orchestration.cli.options import From, Json, Panel, To, examples, hour_range
from orchestration.cli.output import run_and_show, say, with_spinner
from orchestration.cli.tables import table
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

    `adtally ingest` does it at its end; Dagster does it for hours that close, and again where something came late.
    """
    from spark_jobs.traffic.review import review as run

    chosen = hour_range(start, end)
    run_and_show("reviewing", lambda progress: run(settings_of(context), chosen, progress=progress), review_table, as_json=as_json)


@app.command(
    rich_help_panel=Panel.TAKE_IN,
    epilog=examples(
        "adtally attribute                                         the orders concerned by what came since",
        "adtally attribute --from 2025-06-01 --to 2025-06-08       orders of these hours, anew by today's rules",
    ),
)
def attribute(context: typer.Context, start: From = None, end: To = None, as_json: Json = False) -> None:
    """Credit orders to the clicks before them, in every model and lookback window.

    A range is that of the orders' times. Orders whose credits come out the same keep their revision.
    """
    from spark_jobs.attribution.job import attribute as run

    chosen = hour_range(start, end)
    run_and_show(
        "attributing",
        lambda progress: run(settings_of(context), chosen, progress=progress),
        lambda found: [attribution_text(found)],
        as_json=as_json,
    )


@app.command(rich_help_panel=Panel.TAKE_IN, epilog=examples("adtally bill", "adtally bill --json | jq '.lines[].amount_micros'"))
def bill(context: typer.Context, as_json: Json = False) -> None:
    """Post charges of days that closed, and credits or adjustments of closed days that changed since.

    The ledger only grows; its lines sum to the spend of each day and campaign, rounded once.
    """
    from spark_jobs.billing.job import bill as run

    run_and_show("billing", lambda progress: run(settings_of(context), progress=progress), billing_table, as_json=as_json)


def settle_at_end(settings: Settings) -> None:
    """Review, credit and bill what an ingest wrote. Print a line on standard error for each that changed something.

    With tables on an object store it does nothing and says so.
    """
    from spark_jobs.lake.roots import is_local
    from spark_jobs.operate.settle import settle

    if not is_local(settings.lakehouse_uri):
        say(f"not settled: reviews, credits and bills read a lakehouse in a local path, not {settings.lakehouse_uri}", stderr=True)
        return
    done = with_spinner("settling", lambda progress: settle(settings, progress=progress))
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
    changed = [found for found in report.hours if found.changed]
    if changed:
        shown = table("Hours whose marks changed", "hour", "events", "invalid", "marks changed")
        for found in changed[:SHOWN]:
            figures = (f"{count:,}" for count in (found.events, found.invalid, found.changed))
            shown.add_row(hour_text(found.event_hour), *figures)
        yield shown
    if len(changed) > SHOWN:
        yield f"and {counted(len(changed) - SHOWN, 'more hour')}"
    if not report.hours:
        yield "every hour's review is up to date"
        return
    events, invalid = (sum(getattr(found, name) for found in report.hours) for name in ("events", "invalid"))
    yield f"{counted(len(report.hours), 'hour')} reviewed, {invalid:,} of {events:,} events invalid, {duration(report.seconds)}"


def attribution_text(report: AttributionReport) -> str:
    """Return a report on one line."""
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
    shown = table("Posted", "day", "campaign", "store", "type", "reason", "amount", "currency", left=5)
    for line in report.lines[:SHOWN]:
        names = (str(line.event_date), line.campaign_id, line.store_id, line.line_type, line.reason)
        shown.add_row(*names, money(line.amount_micros * 1000, line.currency), line.currency)
    yield shown
    if len(report.lines) > SHOWN:
        yield f"and {counted(len(report.lines) - SHOWN, 'more line')}"
    yield f"{counted(len(report.lines), 'line')} of {counted(report.days, 'closed day')}, {duration(report.seconds)}"
