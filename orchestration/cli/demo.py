"""The command ``adtally demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestration.cli.context import Call
from orchestration.cli.options import Panel, examples
from orchestration.cli.output import console

app = typer.Typer()


@app.command(
    rich_help_panel=Panel.TRY,
    epilog=examples(
        "adtally demo",
        "adtally demo --events 20000                   quicker",
        "adtally --home /tmp/tally demo                in another folder, which must be new or a demo's",
        "adtally demo --lakehouse s3://bucket/demo     tables in an object store",
    ),
)
def demo(
    context: typer.Context,
    events: Annotated[int, typer.Option(min=1, help="Simulated event lines, beside the samples.")] = 200_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulated traffic.")] = 7,
    lakehouse: Annotated[
        str | None,
        typer.Option(metavar="<location>", help="Where the tables go, as s3://bucket/prefix; it must be empty or a demo's."),
    ] = None,
) -> None:
    """Run the main job end to end in a folder of its own and compare it with the known truth.

    It lands the samples and simulated traffic, ingests them in several micro-batches, builds the marts, and prints the
    conservation law, the differences from the truth (all 0, or exit status 1) and the top campaigns. A second run starts clean.
    """
    from orchestration.cli.demo_report import show_demo

    if not show_demo(context.ensure_object(Call).home, events=events, seed=seed, console=console(), lakehouse=lakehouse):
        raise typer.Exit(1)
