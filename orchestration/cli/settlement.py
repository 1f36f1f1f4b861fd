"""Commands for money and credit: review, attribute, bill; and what an ingest does of them at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer
from rich.console import RenderableType

from orchestration.cli.maintenance import From, Json, To
from orchestration.cli.maintenance_tables import SHOWN, hour_text
from orchestration.cli.options import examples, hour_range
from orchestration.cli.tables import table
from spark_jobs.lake.roots import is_local
from spark_jobs.texts import counted, duration, money

if TYPE_CHECKING:
    from spark_jobs.attribution.job import AttributionReport
    from spark_jobs.billing.job import BillingReport
    from spark_jobs.config import Settings
    from spark_jobs.traffic.review import ReviewReport


def add_commands(app: typer.Typer, settings: Callable[[], Settings]) -> None:
    """Put the commands into ``app``; ``settings`` gives those of the installation that the user named."""

    @app.command(
        epilog=examples(
            "adtally review                                            every hour whose review is missing or out of date",
            "adtally review --from 2025-06-02T08:00:00Z --to 2025-06-02T12:00:00Z",
        )
    )
    def review(start: From = None, end: To = None, as_json: Json = False) -> None:
        """Judge whole hours for invalid traffic by the rules of HOME/rules/invalid_traffic.toml, and restate what changes.

        `adtally ingest` does it at its end; Dagster does it for hours that close, and again where something came late.
        """
        from orchestration.cli.output import console, print_json, status_line
        from spark_jobs.traffic.review import review as run

        chosen = hour_range(start, end)
        shown = console(stderr=True)
        with shown.status("reviewing") as status:
            report = run(settings(), chosen, progress=status_line(status, shown.width))
        if as_json:
            print_json(report)
            return
        for part in review_table(report):
            console().print(part, soft_wrap=True)

    @app.command(
        epilog=examples(
            "adtally attribute                                         the orders concerned by what came since",
            "adtally attribute --from 2025-06-01 --to 2025-06-08       orders of these hours, anew by today's rules",
        )
    )
    def attribute(start: From = None, end: To = None, as_json: Json = False) -> None:
        """Credit orders to the clicks before them, in every model and lookback window.

        A range is that of the orders' times. Orders whose credits come out the same keep their revision.
        """
        from orchestration.cli.output import console, print_json, status_line
        from spark_jobs.attribution.job import attribute as run

        chosen = hour_range(start, end)
        shown = console(stderr=True)
        with shown.status("attributing") as status:
            report = run(settings(), chosen, progress=status_line(status, shown.width))
        if as_json:
            print_json(report)
            return
        console().print(attribution_text(report), soft_wrap=True)

    @app.command(epilog=examples("adtally bill", "adtally bill --json | jq '.lines[].amount_micros'"))
    def bill(as_json: Json = False) -> None:
        """Post charges of days that closed, and credits or adjustments of closed days that changed since.

        The ledger only grows; its lines sum to the spend of each day and campaign, rounded once.
        """
        from orchestration.cli.output import console, print_json, status_line
        from spark_jobs.billing.job import bill as run

        shown = console(stderr=True)
        with shown.status("billing") as status:
            report = run(settings(), progress=status_line(status, shown.width))
        if as_json:
            print_json(report)
            return
        for part in billing_table(report):
            console().print(part, soft_wrap=True)


def settle_at_end(settings: Settings) -> None:
    """Review, credit and bill what an ingest brought; a line for each that found something on standard error.

    On an object store nothing of it is done, which is said.
    """
    from orchestration.cli.output import console, status_line
    from spark_jobs.operate.settle import settle

    shown = console(stderr=True)
    if not is_local(settings.lakehouse_uri):
        shown.print(
            f"not settled: reviews, credits and bills read a lakehouse in a local path, not {settings.lakehouse_uri}",
            soft_wrap=True,
        )
        return
    with shown.status("settling") as status:
        done = settle(settings, progress=status_line(status, shown.width))
    if done.review.hours:
        changed = sum(found.changed for found in done.review.hours)
        hours = counted(len(done.review.hours), "hour")
        shown.print(f"reviewed {hours} for invalid traffic, {counted(changed, 'mark')} changed", soft_wrap=True)
    if done.attribution.orders:
        shown.print(attribution_text(done.attribution), soft_wrap=True)
    if done.billing.lines:
        shown.print(
            f"{counted(len(done.billing.lines), 'billing line')} of {counted(done.billing.days, 'closed day')}", soft_wrap=True
        )


def review_table(report: ReviewReport) -> Iterator[RenderableType]:
    """The hours in which marks changed, and the sums."""
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
    """An AttributionReport on one line."""
    if not report.orders:
        return "no order is concerned by what came since"
    return (
        f"{counted(report.orders, 'order')}: {report.credited:,} credited to {counted(report.touches, 'touch')}, "
        f"{report.unattributed:,} without a touch, {report.cancelled:,} cancelled; "
        f"{counted(report.revisions, 'new revision')}, {duration(report.seconds)}"
    )


def billing_table(report: BillingReport) -> Iterator[RenderableType]:
    """The lines that were posted."""
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
