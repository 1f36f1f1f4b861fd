"""Tables and lines that the maintenance commands print."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from orchestration.cli.status import region_text
from orchestration.cli.tables import RecordTable, rest_line
from spark_jobs.texts import counted, duration, file_size, money

if TYPE_CHECKING:
    from spark_jobs.corrections.backfill import BackfillReport
    from spark_jobs.corrections.reconcile import ReconcileReport
    from spark_jobs.operate.compact import CompactReport
    from spark_jobs.operate.fsck import FsckReport
    from spark_jobs.operate.retire import RetireReport
    from spark_jobs.operate.vacuum import VacuumReport
    from spark_jobs.operate.watermark import Closing

SHOWN = 40
_KEPT = "versions kept for readers"


def hour_text(hour: datetime | None) -> str:
    """Return an hour in the form that the commands accept."""
    return "unknown" if hour is None else f"{hour:%Y-%m-%dT%HZ}"


def reconciliation_table(report: ReconcileReport) -> Iterator[RenderableType]:
    """Make the table of differences, and the verdict."""
    if report.differences:
        figures = ("rows", "expected", "found", "spend found - expected", "repaired")
        shown = RecordTable("Differences", "hour", "layer", "cause", "campaign", *figures, left=4)
        for found in report.differences[:SHOWN]:
            names = (hour_text(found.event_hour), found.layer, found.cause, found.campaign_id or None)
            spend = money(found.nanos_found - found.nanos_expected, None)
            repaired = "yes" if found.is_repaired else "no"
            shown.add_row(*names, found.rows_different, found.rows_expected, found.rows_found, spend, repaired)
        yield shown
    yield from rest_line(len(report.differences), SHOWN, "difference")
    for waiting in report.waiting[:SHOWN]:
        span = f"offsets {waiting.first_offset} to {waiting.end_offset - 1} of {waiting.source}"
        yield Text(f"left out: batch {waiting.batch_id}, because {waiting.raw_table} lacks {span} yet", style="yellow")
    yield from recountable_line(report.recountable_from)
    events = sum(hour.events_expected for hour in report.hours)
    orders = sum(hour.orders_expected for hour in report.hours)
    recount = f"recount of {counted(len(report.hours), 'hour')}, {counted(events, 'accepted event')}, {counted(orders, 'order')}"
    recount += f", in {duration(report.seconds)}"
    if report.waiting:
        batches = len({(waiting.query_id, waiting.batch_id) for waiting in report.waiting})
        recount += f", without {counted(batches, 'batch')} without all raw records yet"
    if report.remaining:
        yield Text(f"{recount}: {counted(len(report.remaining), 'difference')} left", style="bold red")
    elif report.differences:
        yield Text(f"{recount}: {counted(len(report.differences), 'difference')}, all repaired by {report.run_id}", style="yellow")
    else:
        yield Text(f"{recount}: equal to the row and the nano", style="green")


def backfill_table(report: BackfillReport) -> Iterator[RenderableType]:
    """Make the table of changes by day and campaign, and the verdict."""
    if report.changes:
        title = "What would change" if report.dry_run else f"Restated by {report.run_id}"
        columns = ("day", "campaign", "currency", "rows", "impressions", "clicks", "spend before", "spend after")
        shown = RecordTable(title, *columns, left=3)
        for change in report.changes:
            counts = (change.rows, f"{change.impressions:+,}", f"{change.clicks:+,}")
            spend = (money(nanos, change.currency) for nanos in (change.spend_nanos_before, change.spend_nanos_after))
            shown.add_row(change.event_date, change.campaign_id, change.currency, *counts, *spend)
        yield shown
    verb = "would change" if report.dry_run else "changed"
    yield Text(f"{counted(report.hours_changed, 'hour')} {verb}, in {duration(report.seconds)}")


def compaction_table(report: CompactReport) -> Iterator[RenderableType]:
    """Make the table of files before and after, by table."""
    if not report.tables:
        yield Text("nothing to compact: the closed hours have as few files as they should")
        return
    columns = ("table", "partitions", "rows", "files before", "files after", "size before", "size after")
    shown = RecordTable("Compacted", *columns)
    for name, group in itertools.groupby(sorted(report.tables, key=lambda part: part.table), key=lambda part: part.table):
        parts = list(group)
        rows, files_before, files_after, bytes_before, bytes_after = (
            sum(getattr(part, measure) for part in parts)
            for measure in ("rows", "files_before", "files_after", "bytes_before", "bytes_after")
        )
        shown.add_row(name, len(parts), rows, files_before, files_after, file_size(bytes_before), file_size(bytes_after))
    shown.caption = f"rows and content are the same before and after; {duration(report.seconds)}"
    shown.caption_justify = "left"
    yield shown


def vacuum_table(report: VacuumReport) -> Iterator[RenderableType]:
    """Make the table of deleted files and bytes, by table."""
    title = "Would be deleted" if report.dry_run else "Deleted"
    yield RecordTable(title, "table", "files", "size", _KEPT, texts=[_KEPT]).with_rows(
        (entry.table, entry.files, file_size(entry.bytes), runs(entry.kept_versions) or None) for entry in report.tables
    )

    yield from retired_lines(report.raw, dry_run=report.dry_run)


def retired_lines(raw: RetireReport, *, dry_run: bool) -> Iterator[RenderableType]:
    """Say which raw input was retired, and since when a recount can speak; nothing if all raw input is kept."""
    if raw.files or raw.raw_days or raw.waiting:
        verb = "would be " if dry_run else ""
        where = f"archived to {raw.archive}" if raw.archive else "dropped"
        days = f" and {', '.join(raw.raw_days)}" if raw.raw_days else ""
        line = f"raw input: {counted(raw.files, 'landing file')} ({file_size(raw.bytes)}){days} {verb}{where}"
        yield line + (
            f"; {counted(raw.waiting, 'old file')} still needed: not recounted, not billed or set aside" if raw.waiting else ""
        )
    yield from recountable_line(raw.recountable_from)


def recountable_line(since: datetime | None) -> Iterator[RenderableType]:
    """Say from which hour on a recount can speak; nothing if it can speak of all."""
    if since is not None:
        yield Text(f"recounts speak from {hour_text(since)} on: the raw input of earlier hours is retired", style="yellow")


def runs(numbers: list[int]) -> str:
    """Return whole numbers in order, with neighbours as a range: '3, 5-9, 12'."""
    found = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        found.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(found)


def fsck_table(report: FsckReport) -> Iterator[RenderableType]:
    """Return a few lines for each finding, and the verdict."""
    for found in report.findings[:SHOWN]:
        repaired, colour = ("repaired ", "yellow") if found.is_repaired else ("", "red")
        yield Text(f"{repaired}{found.kind} in {found.place}", style=f"bold {colour}")
        yield Text(f"  {found.detail}")
        if not found.is_repaired:
            yield Text(f"  what to do: {found.way_out}")
    yield from rest_line(len(report.findings), SHOWN, "finding")
    read = f"{report.tables} tables, {report.commits:,} commits, {report.files:,} data files, {file_size(report.bytes)}"
    for name in report.left_out:
        yield Text(f"left out while an ingest runs: {name}", style="yellow")
    yield Text(f"read {read} in {report.seconds:.1f} s")
    if report.remaining:
        hint = "; adtally fsck --repair repairs" if any(found.can_repair for found in report.remaining) else ""
        yield Text(f"{len(report.remaining)} findings remain{hint}", style="bold red")
    elif report.findings:
        yield Text(f"all {len(report.findings)} findings are repaired", style="yellow")
    else:
        yield Text("everything is whole", style="green")


def closing_tables(closing: Closing) -> Iterator[RenderableType]:
    """Make the table of sources, and say up to which time hours are closed."""
    if closing.sources:
        shown = RecordTable("Sources", "stream", "region", "progress", "behind", "state", left=2)
        newest = max((source.progress_at for source in closing.sources if source.progress_at), default=None)
        for source in closing.sources:
            behind = (newest - source.progress_at).total_seconds() if newest and source.progress_at else None
            states = {"retired": source.is_retired, "silent": source.is_silent, "awaited": source.is_awaited, "running": True}
            state = next(name for name, is_so in states.items() if is_so)
            shown.add_row(source.stream, region_text(source), source.progress_at, duration(behind), state)
        yield shown
    if closing.closed_through is None:
        yield Text("no hour is closed yet")
    else:
        yield Text(f"closed: every hour that ends at or before {closing.closed_through:%Y-%m-%dT%H:%MZ}", style="green")
    if closing.by_hand_through is not None:
        yield Text(f"closed by hand through {closing.by_hand_through:%Y-%m-%dT%H:%MZ}")
