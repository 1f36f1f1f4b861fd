"""The command ``adtally ingest``."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.context import Call, settings_of
from orchestration.cli.options import Json, Panel, Trigger, examples, seconds
from orchestration.cli.output import console, print_json, say
from orchestration.cli.publish import publish_at_end
from orchestration.cli.settlement import settle_at_end
from spark_jobs.errors import UsageError
from spark_jobs.no_pandas import hide_pandas
from spark_jobs.texts import counted

if TYPE_CHECKING:
    from spark_jobs.ingest.batch import BatchReport, IngestReport

app = typer.Typer()


@app.command(
    rich_help_panel=Panel.TAKE_IN,
    epilog=examples(
        "adtally ingest                                all present records, then end",
        "adtally ingest --continuous --trigger 5s      until SIGTERM, which ends after the current batch",
        "adtally ingest --json | jq .accepted",
    ),
)
def ingest(
    context: typer.Context,
    continuous: Annotated[bool, typer.Option("--continuous", help="Continue with new files until stopped.")] = False,
    trigger: Trigger = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait while another ingest runs, and take its place when it ends.")] = False,
    is_settled: Annotated[
        bool, typer.Option("--settle/--no-settle", help="At the end: find invalid traffic, credit orders, bill closed days.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Ingest events and orders into the Delta tables, each exactly once. Then settle and publish what follows from them.

    It reads the landing folder and the Kafka clusters of HOME/kafka.toml, which also says where to publish. With --continuous
    it credits orders while it runs, and Dagster reviews and bills hours that close. --json prints one object at the end; with
    --continuous also a line for each batch.
    """
    from spark_jobs.lake.landing_view import landing_exists

    every = None if trigger is None else seconds(trigger, "--trigger")
    settings = settings_of(context)
    is_named = context.ensure_object(Call).home is not None or "ADTALLY_HOME" in os.environ
    has_state = settings.state_uri == str(settings.home_path)  # else the home may be new: its state is in the lakehouse
    if is_named and has_state and not settings.home_path.exists() and not landing_exists(settings):
        raise UsageError(f"there is no home at {settings.home_path}", hint="mistyped? mkdir makes a new one")
    if context.ensure_object(Call).owns_process:
        hide_pandas()
    from spark_jobs.ingest.runner import run_ingest

    shown = console(stderr=True)
    waiting = shown.status("starting Spark")

    def on_batch(batch: BatchReport) -> None:
        waiting.update("ingesting")
        if as_json and continuous:
            print_json({"type": "batch", **asdict(batch)}, lines=True)
        else:
            shown.print(batch_line(batch), soft_wrap=True)

    def on_notice(line: str) -> None:
        shown.print(f"adtally: {line}", soft_wrap=True)

    with waiting:
        report = run_ingest(settings, continuous=continuous, trigger_seconds=every, waits=wait, progress=on_batch, notice=on_notice)
    if not continuous:
        if is_settled:
            settle_at_end(settings)
        publish_at_end(settings)
    if as_json:
        print_json({"type": "end", **asdict(report)} if continuous else report, lines=continuous)
    else:
        say(totals_line(report))


def totals_line(report: IngestReport) -> str:
    """Return the totals of an ingest on one line."""
    if report.batches == 0:
        return "nothing new to ingest"
    return (
        f"{counted(report.batches, 'batch')}: {report.offered:,} offered = {report.accepted:,} accepted + "
        f"{report.duplicate:,} duplicate + {report.conflict:,} conflict + {report.rejected:,} rejected; "
        f"{report.late:,} of the accepted late"
    )


def batch_line(batch: BatchReport) -> str:
    """Return the counts of a batch on one line."""
    return (
        f"{batch.stream} batch {batch.batch_id}: {batch.offered:,} offered, {batch.accepted:,} accepted, "
        f"{batch.duplicate:,} duplicate, {batch.conflict:,} conflict, {batch.rejected:,} rejected, "
        f"{batch.late:,} late, {batch.seconds:.1f} s"
    )
