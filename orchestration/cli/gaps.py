"""The command that goes on behind records which a topic no longer has: accept-gap."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, Panel, examples
from orchestration.cli.output import print_json, say
from spark_jobs.errors import UsageError

if TYPE_CHECKING:
    from spark_jobs.ingest.kafka.gaps import Gap

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
    reason: Annotated[str, typer.Option(help="Why; it is kept.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what is missing.")] = False,
    as_json: Json = False,
) -> None:
    """Go on behind Kafka records that are gone before they were read. Nobody can count them any more.

    Shows which offsets are missing and keeps the decision in the table source_gaps; the ledger of the next batch counts them
    as lost_offsets. What the raw copy still holds of them, `adtally reconcile --repair` brings in.
    """
    from spark_jobs.ingest.kafka.config import read_kafka
    from spark_jobs.ingest.kafka.gaps import accept_gap as decide
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
        gaps = decide(settings, stream, at, reason=reason, accepted_by=getpass.getuser())
    copied = [copied_records(settings, stream, gap) for gap in gaps]
    if as_json:
        found = [{**_fields(gap), "in_raw_copy": count} for gap, count in zip(gaps, copied, strict=True)]
        print_json({"accepted": not dry_run, "gaps": found})
        return
    for gap, count in zip(gaps, copied, strict=True):
        say(f"missing: {gap.partition.topic} of {cluster}, {gap}; the raw copy holds {count:,} records of it")
    done = "nothing is missing" if not gaps else "only shown" if dry_run else "accepted: adtally ingest goes on behind them"
    say(done)


def _fields(gap: Gap) -> dict[str, object]:
    return {**gap.partition._asdict(), "first_offset": gap.first, "end_offset": gap.end}
