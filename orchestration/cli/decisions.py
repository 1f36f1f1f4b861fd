"""The commands ``adtally accept-gap`` and ``adtally release``: an operator decides about input that the ingest cannot read."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import DryRun, Json, Panel, Reason, examples
from orchestration.cli.output import show
from spark_jobs.errors import UsageError

app = typer.Typer()


@app.command(
    "accept-gap",
    rich_help_panel=Panel.CHECK,
    epilog=examples(
        "adtally accept-gap events eu-west --dry-run",
        "adtally accept-gap events eu-west --reason 'retention passed while the ingest was down'",
    ),
)
def accept_gap(
    context: typer.Context,
    stream: Annotated[str, typer.Argument(help="events or orders.")],
    cluster: Annotated[str, typer.Argument(help="A cluster of kafka.toml.")],
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Skip Kafka records that were deleted before the ingest read them. adtally can no longer count them.

    Shows the missing offsets and keeps the decision in the table source_gaps; the ledger of the next batch counts them as
    lost_offsets. `adtally reconcile --repair` restores those that the raw copy still has.
    """
    from spark_jobs.ingest.kafka.config import read_kafka
    from spark_jobs.ingest.kafka.gaps import accept_gap as accept
    from spark_jobs.ingest.kafka.gaps import copied_records, missing_now

    if stream not in ("events", "orders"):
        raise UsageError(f"{stream!r} is no stream", hint="events or orders")
    if not dry_run and not reason.strip():
        raise UsageError("--reason is empty", hint="say why records are given up; --dry-run only shows which")
    settings = settings_of(context)
    at = read_kafka(settings).cluster(cluster)
    if dry_run:
        gaps = missing_now(settings, stream, at)[2]
    else:
        gaps = accept(settings, stream, at, reason=reason, accepted_by=getpass.getuser())
    lines, found = [], []
    for gap in gaps:
        copied = copied_records(settings, stream, gap)
        lines.append(f"missing: {gap.partition.topic} of {cluster}, {gap}; the raw copy has {copied:,} records of it")
        found.append({**gap.partition._asdict(), "first_offset": gap.first, "end_offset": gap.end, "in_raw_copy": copied})
    done = "nothing is missing" if not gaps else "only shown" if dry_run else "accepted: adtally ingest continues after them"
    show({"accepted": not dry_run, "gaps": found}, [*lines, done], as_json=as_json)


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
    reason: Reason = "",
    by: Annotated[str | None, typer.Option(help="Who decides. Default: the user of this process.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the quarantined files, and which are released.")] = False,
    as_json: Json = False,
) -> None:
    """Let the next ingest read a quarantined file again, once, under another name.

    The table releases keeps the decision. A file that a limit quarantined meets the same limit again: raise it first.
    """
    from spark_jobs.ingest.release import read_quarantine, release_file

    settings = settings_of(context)
    if listed == (name is not None):
        raise UsageError("name a quarantined file, or give --list", hint="adtally release --list")
    if name is not None:
        released = release_file(settings, name, reason=reason, released_by=by or getpass.getuser())
        line = f"released: adtally ingest reads it as {released}"
        show({"source_file": name, "released_as": released}, [line], as_json=as_json)
        return
    files = read_quarantine(settings)
    lines = []
    for file in files:
        place = file.source_file if file.first_offset is None else f"{file.source_file}, from offset {file.first_offset}"
        state = f"; released as {file.released_as}" if file.released_as else ""
        lines.append(f"{place}: {file.reason}: {file.cause}{state}")
    show({"quarantine": files}, lines or ["nothing is quarantined"], as_json=as_json)
