"""The tables and lines that the maintenance commands print."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from orchestration.cli.status import size
from orchestration.cli.tables import RecordTable, table
from spark_jobs.texts import counted, duration, money

if TYPE_CHECKING:
    from spark_jobs.corrections.backfill import BackfillReport
    from spark_jobs.corrections.reconcile import ReconcileReport
    from spark_jobs.operate.compact import CompactReport
    from spark_jobs.operate.fsck import FsckReport
    from spark_jobs.operate.vacuum import VacuumReport
    from spark_jobs.operate.watermark import Closing

SHOWN = 40
_KEPT = "versions kept for readers"


def hour_text(hour: datetime | None) -> str:
    """Return an hour as the commands accept it."""
    return "unknown" if hour is None else f"{hour:%Y-%m-%dT%HZ}"


def reconciliation_table(report: ReconcileReport) -> Iterator[RenderableType]:
    """Make the table of differences, and the verdict."""
    if report.differences:
        figures = ("rows", "expected", "found", "spend found - expected", "repaired")
        shown = table("Differences", "hour", "layer", "cause", "campaign", *figures, left=4)
        for found in report.differences[:SHOWN]:
            shown.add_row(
                hour_text(found.event_hour),
                found.layer,
                found.cause,
                found.campaign_id or "-",
                f"{found.rows_different:,}",
                f"{found.rows_expected:,}",
                f"{found.rows_found:,}",
                money(found.nanos_found - found.nanos_expected, None),
                "yes" if found.is_repaired else "no",
            )
        yield shown
        if len(report.differences) > SHOWN:
            yield Text(f"and {len(report.differences) - SHOWN} more; --json prints all")
    for left in report.waiting[:SHOWN]:
        span = f"offsets {left.first_offset} to {left.end_offset - 1} of {left.source}"
        yield Text(f"left out: batch {left.batch_id}, for {left.raw_table} lacks {span} yet", style="yellow")
    events = sum(hour.events_expected for hour in report.hours)
    orders = sum(hour.orders_expected for hour in report.hours)
    looked_at = f"{counted(len(report.hours), 'hour')}, {counted(events, 'accepted event')}, {counted(orders, 'order')}"
    looked_at += f", in {duration(report.seconds)}"
    if report.waiting:
        batches = len({(left.query_id, left.batch_id) for left in report.waiting})
        looked_at += f", without {counted(batches, 'batch')} without all raw records yet"
    if report.remaining:
        yield Text(f"recount of {looked_at}: {counted(len(report.remaining), 'difference')} left", style="bold red")
    elif report.differences:
        yield Text(
            f"recount of {looked_at}: {counted(len(report.differences), 'difference')}, all repaired by {report.run_id}",
            style="yellow",
        )
    else:
        yield Text(f"recount of {looked_at}: equal to the row and the nano", style="green")


def backfill_table(report: BackfillReport) -> Iterator[RenderableType]:
    """Make the table of changes by day and campaign, and the verdict."""
    if report.changes:
        title = "What would change" if report.dry_run else f"Restated by {report.run_id}"
        shown = table(title, "day", "campaign", "currency", "rows", "impressions", "clicks", "spend before", "spend after", left=3)
        for change in report.changes:
            shown.add_row(
                f"{change.event_date:%Y-%m-%d}",
                change.campaign_id,
                change.currency,
                f"{change.rows:,}",
                f"{change.impressions:+,}",
                f"{change.clicks:+,}",
                money(change.spend_nanos_before, change.currency),
                money(change.spend_nanos_after, change.currency),
            )
        yield shown
    said = "would change" if report.dry_run else "changed"
    yield Text(f"{counted(report.hours_changed, 'hour')} {said}, in {duration(report.seconds)}")


def compaction_table(report: CompactReport) -> RenderableType:
    """Make the table of files before and after, by table."""
    if not report.tables:
        return Text("nothing to compact: the closed hours lie in as few files as they should")
    shown = table("Compacted", "table", "partitions", "rows", "files before", "files after", "size before", "size after")
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
    shown.caption = f"rows and content are the same before and after; {duration(report.seconds)}"
    shown.caption_justify = "left"
    return shown


def vacuum_table(report: VacuumReport) -> RenderableType:
    """Make the table of deleted files and bytes, by table."""
    shown = table("Would be deleted" if report.dry_run else "Deleted", "table", "files", "size", _KEPT, texts=[_KEPT])
    for entry in report.tables:
        shown.add_row(entry.table, f"{entry.files:,}", size(entry.bytes), runs(entry.kept_versions) or "-")
    return shown


def runs(numbers: list[int]) -> str:
    """Return whole numbers in order, neighbours as a range: '3, 5-9, 12'."""
    found = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), key=lambda each: each[1] - each[0]):
        members = [number for _, number in run]
        found.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(found)


def fsck_table(report: FsckReport) -> Iterator[RenderableType]:
    """Return a few lines for each finding, and the verdict."""
    for found in report.findings[:SHOWN]:
        colour = "yellow" if found.is_repaired else "red"
        yield Text(f"{'repaired ' if found.is_repaired else ''}{found.kind} in {found.place}", style=f"bold {colour}")
        yield Text(f"  {found.detail}")
        if not found.is_repaired:
            yield Text(f"  what to do: {found.way_out}")
    if len(report.findings) > SHOWN:
        yield Text(f"and {len(report.findings) - SHOWN} more; --json prints all")
    read = f"{report.tables} tables, {report.commits:,} commits, {report.files:,} data files, {size(report.bytes)}"
    for name in report.left_out:
        yield Text(f"left out while an ingest runs: {name}", style="yellow")
    yield Text(f"read {read} in {report.seconds:.1f} s")
    if report.remaining:
        can_help = any(found.can_repair for found in report.remaining)
        yield Text(
            f"{len(report.remaining)} findings remain" + ("; adtally fsck --repair repairs" if can_help else ""), style="bold red"
        )
    elif report.findings:
        yield Text(f"all {len(report.findings)} findings are repaired", style="yellow")
    else:
        yield Text("everything is whole", style="green")


def closing_tables(closing: Closing) -> Iterator[RenderableType]:
    """Make the table of sources, and say how far hours are closed."""
    if closing.sources:
        yield _sources(closing)
    if closing.closed_through is None:
        yield Text("no hour is closed yet")
    else:
        yield Text(f"closed: every hour that ends at or before {closing.closed_through:%Y-%m-%dT%H:%MZ}", style="green")
    if closing.by_hand_through is not None:
        yield Text(f"closed by hand through {closing.by_hand_through:%Y-%m-%dT%H:%MZ}")


def _sources(closing: Closing) -> RecordTable:
    shown = table("Sources", "stream", "region", "progress", "behind", "state", left=2)
    newest = max((source.progress_at for source in closing.sources if source.progress_at), default=None)
    for source in closing.sources:
        behind = (newest - source.progress_at).total_seconds() if newest and source.progress_at else None
        state = "retired" if source.is_retired else "silent" if source.is_silent else "awaited" if source.is_awaited else "running"
        progress = f"{source.progress_at:%Y-%m-%d %H:%M:%S}" if source.progress_at else "-"
        region = f"{source.region} (kafka)" if source.source == "kafka" else source.region
        shown.add_row(source.stream, region, progress, duration(behind), state)
    return shown
