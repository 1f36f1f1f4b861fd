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
from orchestration.cli.tables import RecordTable
from spark_jobs.texts import duration, file_size

if TYPE_CHECKING:
    from spark_jobs.ingest.kafka.topics import TopicSource
    from spark_jobs.operate.rejects import ReasonCount
    from spark_jobs.operate.status import SourceStatus, Status
    from spark_jobs.operate.watermark import SourceProgress
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

    Exit status 1 if it does not hold. Reads the tables without starting Spark.
    """
    from spark_jobs.operate.status import read_status

    found = read_status(settings_of(context))
    show(found, status_tables(found), as_json=as_json)
    if not found.conservation_holds:
        raise typer.Exit(1)


def region_text(source: SourceStatus | SourceProgress) -> str:
    """Return the region of a source, marked if its records come from Kafka."""
    return f"{source.region} (kafka)" if source.source == "kafka" else source.region


def publications_table(found: list[TopicStatus]) -> RecordTable:
    """Make the table of how far each topic is published."""
    columns = ("topic", "table", "cluster", "up to version", "of", "versions behind", "behind", "messages")
    shown = RecordTable("Published", *columns, left=3)
    for topic in found:
        versions = (topic.version, topic.table_version, topic.versions_behind)
        shown.add_row(topic.topic, topic.table, topic.cluster, *versions, duration(topic.seconds_behind), topic.total_records)
    return shown


def topics_table(found: list[TopicSource]) -> RecordTable:
    """Make the table of how far each topic is read and copied, in offsets over all its partitions."""
    columns = ("offsets read", "wait", "wait to be copied", "gaps", "offsets given up", "state")
    shown = RecordTable("Topics", "stream", "cluster", "topic", *columns, left=3, texts=["state"])
    for topic in found:
        offsets = (sum(topic.read_to.values()), topic.lag, topic.copy_lag, topic.gaps, topic.lost_offsets)
        state = "answers" if topic.problem is None else "DOES NOT ANSWER"
        shown.add_row(topic.stream, topic.cluster, topic.topic, *offsets, state)
    return shown


def reasons_table(counts: list[ReasonCount]) -> RecordTable:
    """Make the table of rejected records by reason."""
    title = "Rejected or in conflict, by reason (adtally rejects)"
    return RecordTable(title, "stream", "reason", "records", "newest ingested", left=2).with_rows(
        (count.stream, count.reason, count.records, count.newest_at) for count in counts
    )


def _lag(source: SourceStatus) -> str:
    """Return the age of the newest receipt. A collector whose clock is ahead has no lag."""
    ahead = source.clock_ahead_seconds
    return duration(source.lag_seconds) + (f" (clock ahead by {duration(ahead)})" if ahead and ahead > 1 else "")


def _sources_table(sources: list[SourceStatus]) -> RecordTable:
    shown = RecordTable("Sources", "stream", "region", *OUTCOMES, "lag", "batch", "last ingested", left=2)
    for source in sources:
        counts = (getattr(source, name) for name in OUTCOMES)
        times = (_lag(source), str(source.last_batch_id), source.last_ingested_at)
        shown.add_row(source.stream, region_text(source), *counts, *times)
    return shown


def status_tables(status: Status) -> Iterator[RenderableType]:
    """Make the tables of sources, tables and files, and say whether the conservation law holds."""
    waiting = RecordTable("Files that wait", "stream", "region", "oldest", "waiting since", "files", left=3).with_rows(
        (files.stream, files.region, files.oldest, files.waiting_since, files.files) for files in status.waiting
    )
    tables = RecordTable("Tables", "table", "version", "rows", "files", "size").with_rows(
        (table.name, str(table.version), table.rows, table.files, file_size(table.bytes)) for table in status.tables
    )
    quarantined = RecordTable("Files that could not be read", "file", "reasons", "ingested", left=2).with_rows(
        (file.source_file, ", ".join(file.reason_codes), file.ingested_at) for file in status.quarantined_files
    )
    ignored = RecordTable("Files that nothing reads (docs/runbooks/ignored-files.md)", "source", "why", "such as", "files", left=3)
    ignored.with_rows((files.source, files.meaning, ", ".join(files.examples), files.files) for files in status.ignored)
    parts = (_sources_table(status.sources), reasons_table(status.rejects), waiting, topics_table(status.topics))
    yield from filter(lambda table: table.rows, (*parts, tables, publications_table(status.publications), quarantined, ignored))
    for trouble in dict.fromkeys(topic.problem for topic in status.topics if topic.problem):
        yield Text(trouble, style="yellow")
    for problem in status.problems:
        yield Text(problem, style="red")
    verdict, style = ("holds", "green") if status.conservation_holds else ("DOES NOT HOLD", "bold red")
    yield Text(f"offered = accepted + duplicate + conflict + rejected: {verdict}", style=style)
