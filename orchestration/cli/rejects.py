"""The command ``adtally rejects``: the rejected records and the conflicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, Panel, examples, moment
from orchestration.cli.output import show
from orchestration.cli.status import reasons_table
from orchestration.cli.tables import RecordTable
from spark_jobs.texts import counted, printable

if TYPE_CHECKING:
    from spark_jobs.operate.rejects import Reject, RejectReport

app = typer.Typer()

_RAW_SHOWN = 300


@app.command(
    rich_help_panel=Panel.ASK,
    epilog=examples(
        "adtally rejects",
        "adtally rejects --reason event_time_in_future --since 2025-06-02T08:00:00Z",
        "adtally rejects --reason conflict --file eu-west/part-7",
        "adtally rejects --limit 1000 --json | jq -r '.rejects[].raw'",
    ),
)
def rejects(
    context: typer.Context,
    reason: Annotated[str | None, typer.Option(help="Only this reason, as the first table names it, or conflict.")] = None,
    since: Annotated[str | None, typer.Option(metavar="T", help="Only records ingested at or after this time.")] = None,
    file: Annotated[str | None, typer.Option(help="Only landing files or topics whose name has this part.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Records to show, the newest first. Counts are of all.")] = 20,
    as_json: Json = False,
) -> None:
    """Show rejected records and conflicts: how many by reason, then each with its place, its reasons and its raw text.

    A conflict is a record whose id an earlier record has with another payload. A record with two reasons counts in both.
    """
    from spark_jobs.operate.rejects import read_rejects

    chosen = None if since is None else moment(since, "--since")
    found = read_rejects(settings_of(context), reason=reason, since=chosen, file=file, limit=limit)
    show(found, reject_tables(found), as_json=as_json)


def reject_tables(found: RejectReport) -> Iterator[RenderableType]:
    """Make the tables of counts by reason and of the newest records, and say how many more there are."""
    if not found.records:
        yield Text("nothing is rejected or in conflict", style="green")
        return
    yield reasons_table(found.counts)
    if found.rejects:
        yield _records_table(found.rejects)
    shown = sum(reject.records for reject in found.rejects)
    more = "" if shown >= found.records else f", {shown:,} of them shown: --limit shows more, --json all of each"
    yield Text(f"{counted(found.records, 'record')} rejected or in conflict{more}")


def _records_table(rejects: list[Reject]) -> RecordTable:
    from spark_jobs.ingest.contract.parse import decode_raw

    shown = RecordTable("The newest", "place", "reasons", "records", "id", "ingested", "raw", texts=["reasons", "id", "raw"])
    for reject in rejects:
        raw = None
        if reject.raw is not None:
            raw = printable(decode_raw(reject.raw, reject.raw_encoding or "").decode("utf-8", "backslashreplace"))
            if len(raw) > _RAW_SHOWN:
                raw = f"{raw[:_RAW_SHOWN]} ... ({reject.raw_size_bytes:,} bytes; --json has all that is kept)"
        record_id = printable(reject.record_id) if reject.record_id else None
        shown.add_row(printable(reject.place), ", ".join(reject.reasons), reject.records, record_id, reject.ingested_at, raw)
    return shown
