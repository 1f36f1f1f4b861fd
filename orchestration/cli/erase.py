"""The command ``adtally erase``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from orchestration.cli.context import settings_of
from orchestration.cli.options import DryRun, Json, Panel, examples
from orchestration.cli.output import show, with_spinner
from orchestration.cli.tables import RecordTable
from spark_jobs.errors import UsageError
from spark_jobs.texts import counted, file_size

if TYPE_CHECKING:
    from spark_jobs.config import Settings
    from spark_jobs.erasure.job import Preview, Receipt

app = typer.Typer()


@app.command(
    rich_help_panel=Panel.CHECK,
    epilog=examples(
        "adtally erase --user u-4711 --dry-run        where the id is, and what would be rewritten",
        "adtally erase --user u-4711 --yes            now",
        "adtally erase --file ids.txt --queue         with the next run of the queue, all in one rewrite",
        "adtally erase                                the queue, and what a killed erasure left",
    ),
)
def erase(
    context: typer.Context,
    user: Annotated[list[str] | None, typer.Option("--user", metavar="ID", help="The id of a person; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="IDS", help="A file with an id a line.", dir_okay=False)] = None,
    queue: Annotated[bool, typer.Option("--queue", help="Only queue: the asset erased_people, or a later erase, does it.")] = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Erase people: a random token replaces their id in the input, the tables, old versions, indexes, marts and lists.

    No total changes, and no later record brings an id back. At the end adtally reads everything that is left, compares the totals,
    recounts, and writes a receipt. What is gone cannot be brought back. docs/erasure.md explains it.
    """
    from orchestration.erasure import carry_out_erasures
    from spark_jobs.erasure.job import preview, queue_erasure, queued_erasures, read_ids, receipt_file, unproven_runs
    from spark_jobs.erasure.retention import retention_problems

    settings = settings_of(context)
    ids = [*(user or ()), *(read_ids(file) if file is not None else ())]
    if queue and not dry_run:
        if not ids:
            raise UsageError("nobody is named", hint="--user ID or --file IDS")
        added = queue_erasure(settings, ids, datetime.now(UTC))
        waiting = queued_erasures(settings)
        due = min(one.due_at(settings) for one in waiting)
        line = f"{counted(added, 'request')} added; {len(waiting)} in the queue, the first is due at {due:%Y-%m-%d %H:%M}Z"
        show({"added": added, "queued": len(waiting), "due_at": due}, [line], as_json=as_json)
        return
    wanted = list(dict.fromkeys([*ids, *(one.user_id for one in queued_erasures(settings))]))
    unfinished = unproven_runs(settings)
    if not wanted and not unfinished:
        show([], ["nobody is to be erased: name somebody by --user or --file"], as_json=as_json)
        return
    if dry_run or not yes:
        found = with_spinner("looking", partial(_preview, preview, settings, wanted))
        if dry_run:
            kept = (Text(problem, style="yellow") for problem in retention_problems(settings))
            show(found, [*preview_tables(found), *kept], as_json=as_json)
            return
        if not sys.stdin.isatty():
            raise UsageError("an erasure cannot be undone, and nobody can be asked here", hint="--dry-run shows it, --yes does it")
        show(found, preview_tables(found), as_json=False)
        rest = f", and finish {counted(len(unfinished), 'erasure')}" if unfinished else ""
        typer.confirm(f"Erase {counted(found.people, 'person')}{rest}? It cannot be undone.", abort=True)
    receipts = with_spinner("erasing", partial(carry_out_erasures, settings, ids))
    lines = [line for receipt in receipts for line in receipt_lines(receipt, receipt_file(settings, receipt))]
    lines += [Text(problem, style="yellow") for problem in retention_problems(settings)]
    show(receipts, lines, as_json=as_json)


def _preview(preview: Callable[..., Preview], settings: Settings, ids: list[str], progress: object) -> Preview:
    return preview(settings, ids)


def preview_tables(found: Preview) -> Iterator[RenderableType]:
    """Make the tables of where people are."""
    if found.is_empty:
        yield Text(f"{counted(found.people, 'person')}: nowhere in the input or in a table", style="yellow")
        return
    shown = RecordTable("What would be rewritten", "place", "what", "count", left=2)
    for kind, counts in (("lines of the input", found.lines), ("rows", found.rows), ("older data files, deleted", found.old_files)):
        for place, count in sorted(counts.items()):
            shown.add_row(place, kind, count)
    yield shown
    yield "and then: the indexes, the parsed input and the marts are dropped and built again"


def receipt_lines(receipt: Receipt, path: str) -> Iterator[RenderableType]:
    """Make the lines of a receipt."""
    rows = sum(receipt.rows_rewritten.values())
    yield (
        f"erased {counted(len(receipt.people), 'person')}: {counted(receipt.files_rewritten, 'file')} of the input and "
        f"{counted(rows, 'row')} rewritten, {counted(receipt.old_files_deleted, 'older data file')} deleted"
    )
    if not rows and not receipt.files_rewritten:
        yield Text("nothing had an id of theirs: is it written as in the records?", style="yellow")
    totals = "all totals are as before" if receipt.totals_equal else "totals not compared: records came in meanwhile"
    recount = "the recount agrees" if receipt.reconciled else "no recount was made"
    read = f"{counted(receipt.files_searched, 'file')} ({file_size(receipt.bytes_searched)}) read, no id found"
    yield Text(f"{read}; {totals}; {recount}", style="green")
    yield "whoever has the earlier marts open keeps them until they are closed"
    yield f"receipt: {path}"
