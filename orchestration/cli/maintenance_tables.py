"""What the maintenance commands print for a person."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orchestration.cli.status import duration, size, table

if TYPE_CHECKING:
    from spark_jobs.jobs.backfill import BackfillReport
    from spark_jobs.jobs.closing import Closing
    from spark_jobs.jobs.compact import CompactReport
    from spark_jobs.jobs.reconcile import ReconcileReport
    from spark_jobs.jobs.vacuum import VacuumReport

SHOWN = 40


def money(nanos: int) -> str:
    """Nanos as whole units with all their digits, so that nothing is rounded away."""
    sign = "-" if nanos < 0 else ""
    units, rest = divmod(abs(nanos), 10**9)
    return f"{sign}{units:,}.{rest:09d}"


def hour_text(hour: datetime | None) -> str:
    """An hour as its commands take it."""
    return "unknown" if hour is None else f"{hour:%Y-%m-%dT%HZ}"


def reconciliation_table(report: ReconcileReport) -> Iterator[RenderableType]:
    """The differences, and the verdict."""
    if report.differences:
        shown = table(
            "Differences",
            "hour",
            "layer",
            "cause",
            "campaign",
            "rows",
            "expected",
            "found",
            "spend found - expected",
            "repaired",
            left=4,
        )
        for found in report.differences[:SHOWN]:
            shown.add_row(
                hour_text(found.event_hour),
                found.layer,
                found.cause,
                escape(found.campaign_id or "-"),
                f"{found.rows_different:,}",
                f"{found.rows_expected:,}",
                f"{found.rows_found:,}",
                money(found.nanos_found - found.nanos_expected),
                "yes" if found.is_repaired else "no",
            )
        yield shown
        if len(report.differences) > SHOWN:
            yield Text(f"and {len(report.differences) - SHOWN} more; --json prints all")
    for left in report.waiting[:SHOWN]:
        span = f"offsets {left.first_offset} to {left.end_offset - 1} of {left.source}"
        yield Text(f"left out: batch {left.batch_id}, for raw_events lacks {span} yet", style="yellow")
    events = sum(hour.events_expected for hour in report.hours)
    counted = f"{len(report.hours)} hours, {events:,} accepted events, in {report.seconds:.1f} s"
    if report.waiting:
        counted += f", without {len({(left.query_id, left.batch_id) for left in report.waiting})} batches that wait for raw records"
    if report.remaining:
        yield Text(f"recount of {counted}: {len(report.remaining)} differences remain", style="bold red")
    elif report.differences:
        yield Text(f"recount of {counted}: {len(report.differences)} differences, all repaired by {report.run_id}", style="yellow")
    else:
        yield Text(f"recount of {counted}: equal to the row and the nano", style="green")


def backfill_table(report: BackfillReport) -> Iterator[RenderableType]:
    """What changes per day and campaign."""
    if report.changes:
        title = "What would change" if report.dry_run else f"Restated by {report.run_id}"
        shown = table(title, "day", "campaign", "currency", "rows", "impressions", "clicks", "spend before", "spend after", left=3)
        for change in report.changes:
            shown.add_row(
                f"{change.event_date:%Y-%m-%d}",
                escape(change.campaign_id),
                change.currency,
                f"{change.rows:,}",
                f"{change.impressions:+,}",
                f"{change.clicks:+,}",
                money(change.spend_nanos_before),
                money(change.spend_nanos_after),
            )
        yield shown
    said = "would change" if report.dry_run else "changed"
    yield Text(f"{report.hours_changed} hours {said}, in {report.seconds:.1f} s")


def compaction_table(report: CompactReport) -> RenderableType:
    """Files before and after, by table."""
    if not report.tables:
        return Text("nothing to compact: the closed hours lie in as few files as they should")
    shown = table("Compacted", "table", "partitions", "rows", "files before", "after", "bytes before", "after")
    for name, parts in itertools.groupby(sorted(report.tables, key=lambda part: part.table), key=lambda part: part.table):
        held = list(parts)
        shown.add_row(
            name,
            f"{len(held):,}",
            f"{sum(part.rows for part in held):,}",
            f"{sum(part.files_before for part in held):,}",
            f"{sum(part.files_after for part in held):,}",
            size(sum(part.bytes_before for part in held)),
            size(sum(part.bytes_after for part in held)),
        )
    shown.caption = f"rows and content are the same before and after; {report.seconds:.1f} s"
    shown.caption_justify = "left"
    return shown


def vacuum_table(report: VacuumReport) -> RenderableType:
    """Files and bytes by table."""
    shown = table("Would be deleted" if report.dry_run else "Deleted", "table", "files", "size", "versions kept for readers")
    for entry in report.tables:
        kept = ", ".join(map(str, entry.kept_versions)) or "-"
        shown.add_row(entry.table, f"{entry.files:,}", size(entry.bytes), kept)
    return shown


def closing_tables(closing: Closing) -> Iterator[RenderableType]:
    """Sources, and the verdict."""
    if closing.sources:
        yield _sources(closing)
    if closing.closed_through is None:
        yield Text("no hour is closed yet")
    else:
        yield Text(f"closed: every hour that ends at or before {closing.closed_through:%Y-%m-%dT%H:%MZ}", style="green")
    if closing.by_hand_through is not None:
        yield Text(f"closed by hand through {closing.by_hand_through:%Y-%m-%dT%H:%MZ}")


def _sources(closing: Closing) -> Table:
    shown = table("Sources", "stream", "region", "progress", "behind", "state", left=2)
    newest = max((source.progress_at for source in closing.sources if source.progress_at), default=None)
    for source in closing.sources:
        behind = (newest - source.progress_at).total_seconds() if newest and source.progress_at else None
        state = "retired" if source.is_retired else "silent" if source.is_silent else "awaited" if source.is_awaited else "running"
        progress = f"{source.progress_at:%Y-%m-%d %H:%M:%S}" if source.progress_at else "-"
        region = f"{source.region} (kafka)" if source.source == "kafka" else source.region
        shown.add_row(source.stream, region, progress, duration(behind), state)
    return shown
