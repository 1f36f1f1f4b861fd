"""The command that has quarantined files read again: release."""

from __future__ import annotations

import getpass
from dataclasses import asdict
from typing import Annotated

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, Panel, examples
from orchestration.cli.output import console, print_json, say
from spark_jobs.errors import UsageError

app = typer.Typer()


@app.command(
    rich_help_panel=Panel.CHECK,
    epilog=examples(
        "adtally release --list",
        "adtally release events/eu-west/part-7.jsonl.gz --reason 'the sender confirmed its size, the limit is raised'",
    ),
)
def release(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="The file, as status names it: <stream>/<region>/<name>.")] = None,
    reason: Annotated[str, typer.Option(help="Why; it is kept.")] = "",
    by: Annotated[str | None, typer.Option(help="Who decides; it is kept. Default: the user of this process.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show what was quarantined, and what became of it.")] = False,
    as_json: Json = False,
) -> None:
    """Let the next ingest read a quarantined file again, once, under another name.

    The decision is kept in the table releases. A file that a limit quarantined meets the same limit again: raise it first.
    """
    from spark_jobs.ingest.release import read_quarantine, release_file

    settings = settings_of(context)
    if listed == (name is not None):
        raise UsageError("name a quarantined file, or give --list", hint="adtally release --list")
    if name is not None:
        found = release_file(settings, name, reason=reason, released_by=by or getpass.getuser())
        if as_json:
            print_json({"source_file": name, "released_as": found})
        else:
            say(f"released: adtally ingest reads it as {found}")
        return
    known = read_quarantine(settings)
    if as_json:
        print_json({"quarantine": [asdict(one) for one in known]})
        return
    for one in known:
        place = one.source_file if one.first_offset is None else f"{one.source_file}, from offset {one.first_offset}"
        state = f"; released as {one.released_as}" if one.released_as else ""
        say(f"{place}: {one.reason}: {one.cause}{state}")
    if not known:
        console().print("nothing is quarantined")
