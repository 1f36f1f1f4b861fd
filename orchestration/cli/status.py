"""The command ``adtally status``, and its report as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer
from rich.console import RenderableType
from rich.text import Text

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, Panel, examples
from orchestration.cli.output import show
from orchestration.cli.tables import RecordTable, table
from spark_jobs.texts import duration

if TYPE_CHECKING:
    from spark_jobs.ingest.kafka.topics import TopicSource
    from spark_jobs.operate.rejects import ReasonCount
    from spark_jobs.operate.status import SourceStatus, Status
    from spark_jobs.publish.progress import TopicStatus

app = typer.Typer()

OUTCOMES = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")


@app.command(
    rich_help_panel=Panel.ASK,
    epilog=examples(
        "adtally status",
        "adtally status --json | jq .conservation_holds",
        "adtally status > /dev/null || echo 'the books do not balance'",
    ),
)
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show what each source offered and what became of it, the lag, the tables, and whether the conservation law holds.

    Exit status 1 where it does not hold. Reads the tables without starting Spark.
    """
    from spark_jobs.operate.status import read_status

    found = read_status(settings_of(context))
    show(found, status_tables, as_json=as_json, wraps=True)
    if not found.conservation_holds:
        raise typer.Exit(1)


def size(count: float) -> str:
    """Return a number of bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def publications_table(found: list[TopicStatus]) -> RecordTable:
    """Make the table of how far each topic is published."""
    shown = table("Published", "topic", "table", "cluster", "up to version", "of", "versions behind", "behind", "messages", left=3)
    for each in found:
        numbers = ("-" if number is None else f"{number:,}" for number in (each.version, each.table_version, each.versions_behind))
        total = "-" if each.total_records is None else f"{each.total_records:,}"
        shown.add_row(each.topic, each.table, each.cluster, *numbers, duration(each.seconds_behind), total)
    return shown


def topics_table(found: list[TopicSource]) -> RecordTable:
    """Make the table of how far each topic is read and copied, in offsets over all its partitions."""
    columns = ("offsets read", "wait", "wait to be copied", "gaps", "offsets given up", "state")
    shown = table("Topics", "stream", "cluster", "topic", *columns, left=3, texts=["state"])
    for each in found:
        numbers = (sum(each.read_to.values()), each.lag, each.copy_lag, each.gaps, each.lost_offsets)
        texts = ("-" if number is None else f"{number:,}" for number in numbers)
        shown.add_row(each.stream, each.cluster, each.topic, *texts, "answers" if each.problem is None else "DOES NOT ANSWER")
    return shown


def reasons_table(counts: list[ReasonCount]) -> RecordTable:
    """Make the table of rejected records by reason."""
    shown = table("Rejected or in conflict, by reason (adtally rejects)", "stream", "reason", "records", "newest ingested", left=2)
    for each in counts:
        shown.add_row(each.stream, each.reason, f"{each.records:,}", f"{each.newest_at:%Y-%m-%d %H:%M:%S}")
    return shown


def _lag(source: SourceStatus) -> str:
    """Return how old the newest receipt is; a collector whose clock is ahead has no lag."""
    ahead = source.clock_ahead_seconds
    return duration(source.lag_seconds) + (f" (clock ahead by {duration(ahead)})" if ahead and ahead > 1 else "")


def status_tables(status: Status) -> Iterator[RenderableType]:
    """Make the tables of sources, tables and files, and say whether the conservation law holds."""
    if status.sources:
        sources = table("Sources", "stream", "region", *OUTCOMES, "lag", "batch", "last ingested", left=2)
        for row in status.sources:
            sources.add_row(
                row.stream,
                f"{row.region} (kafka)" if row.source == "kafka" else row.region,
                *(f"{getattr(row, name):,}" for name in OUTCOMES),
                _lag(row),
                str(row.last_batch_id),
                f"{row.last_ingested_at:%Y-%m-%d %H:%M:%S}" if row.last_ingested_at else "-",
            )
        yield sources
    if status.rejects:
        yield reasons_table(status.rejects)
    if status.waiting:
        waiting = table("Files that wait", "stream", "region", "oldest", "waiting since", "files", left=3)
        for each in status.waiting:
            waiting.add_row(each.stream, each.region, each.oldest, f"{each.waiting_since:%Y-%m-%d %H:%M:%S}", f"{each.files:,}")
        yield waiting
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
        files = table("Files that could not be read", "file", "reasons", "ingested", left=2)
        for file in status.quarantined_files:
            files.add_row(file.source_file, ", ".join(file.reason_codes), f"{file.ingested_at:%Y-%m-%d %H:%M:%S}")
        yield files
    if status.ignored:
        ignored = table("Files that nothing reads (docs/runbooks/ignored-files.md)", "source", "why", "such as", "files", left=3)
        for left in status.ignored:
            ignored.add_row(left.source, left.meaning, ", ".join(left.examples), f"{left.files:,}")
        yield ignored
    for trouble in dict.fromkeys(each.problem for each in status.topics if each.problem):
        yield Text(trouble, style="yellow")
    for problem in status.problems:
        yield Text(problem, style="red")
    if status.conservation_holds:
        yield Text("offered = accepted + duplicate + conflict + rejected: holds", style="green")
    else:
        yield Text("offered = accepted + duplicate + conflict + rejected: DOES NOT HOLD", style="bold red")
