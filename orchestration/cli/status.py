"""The report of ``adtally status`` as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from spark_jobs.jobs.status import Status
    from spark_jobs.jobs.topics import TopicSource
    from spark_jobs.publish.progress import TopicStatus

OUTCOMES = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")


def table(title: str, *columns: str, left: int = 1) -> Table:
    """An empty table; the first ``left`` columns are text, the others numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", no_wrap=index >= left)
    return made


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them, to two units."""
    if seconds is None:
        return "-"
    whole = int(max(seconds, 0))
    for size, big, small, part in ((86_400, "d", "h", 3600), (3600, "h", "min", 60), (60, "min", "s", 1)):
        if whole >= size:
            return f"{whole // size} {big} {whole % size // part} {small}"
    return f"{seconds:.1f} s"


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def publications_table(found: list[TopicStatus]) -> Table:
    """How far each topic is published."""
    shown = table("Published", "topic", "table", "cluster", "up to version", "of", "versions behind", "behind", "messages", left=3)
    for each in found:
        numbers = ("-" if number is None else f"{number:,}" for number in (each.version, each.table_version, each.versions_behind))
        total = "-" if each.total_records is None else f"{each.total_records:,}"
        shown.add_row(escape(each.topic), each.table, each.cluster, *numbers, duration(each.seconds_behind), total)
    return shown


def topics_table(found: list[TopicSource]) -> Table:
    """How far each topic is read and copied, in offsets over all its partitions."""
    columns = ("offsets read", "wait", "wait to be copied", "gaps", "offsets given up", "state")
    shown = table("Topics", "stream", "cluster", "topic", *columns, left=3)
    for each in found:
        numbers = (sum(each.read_to.values()), each.lag, each.copy_lag, each.gaps, each.lost_offsets)
        texts = ("-" if number is None else f"{number:,}" for number in numbers)
        shown.add_row(
            each.stream, each.cluster, escape(each.topic), *texts, "answers" if each.problem is None else "DOES NOT ANSWER"
        )
    return shown


def status_tables(status: Status) -> Iterator[RenderableType]:
    """Sources, tables, quarantined files, and the verdict."""
    if status.sources:
        sources = table("Sources", "stream", "region", *OUTCOMES, "lag", "batch", "last ingested", left=2)
        for row in status.sources:
            sources.add_row(
                row.stream,
                f"{row.region} (kafka)" if row.source == "kafka" else row.region,
                *(f"{getattr(row, name):,}" for name in OUTCOMES),
                duration(row.lag_seconds),
                str(row.last_batch_id),
                f"{row.last_ingested_at:%Y-%m-%d %H:%M:%S}" if row.last_ingested_at else "-",
            )
        yield sources
    if status.topics:
        yield topics_table(status.topics)
    if status.tables:
        tables = table("Tables", "table", "version", "rows", "files", "size")
        for entry in status.tables:
            tables.add_row(entry.name, str(entry.version), f"{entry.rows:,}", f"{entry.files:,}", size(entry.bytes))
        yield tables
    if status.publications:
        yield publications_table(status.publications)
    if status.quarantined_files:
        files = table("Files that could not be read", "file", "reasons", "ingested", left=3)
        for file in status.quarantined_files:
            files.add_row(escape(file.source_file), ", ".join(file.reason_codes), f"{file.ingested_at:%Y-%m-%d %H:%M:%S}")
        yield files
    for trouble in dict.fromkeys(each.problem for each in status.topics if each.problem):
        yield Text(trouble, style="yellow")
    for problem in status.problems:
        yield Text(problem, style="red")
    if status.conservation_holds:
        yield Text("offered = accepted + duplicate + conflict + rejected: holds", style="green")
    else:
        yield Text("offered = accepted + duplicate + conflict + rejected: DOES NOT HOLD", style="bold red")
