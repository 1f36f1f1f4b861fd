"""Prints a line for each change of state of ``adtally up``, and its addresses once the UI answers."""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Panel, examples, seconds
from orchestration.cli.output import console

if TYPE_CHECKING:
    from spark_jobs.config import Settings

app = typer.Typer()


@app.command(
    rich_help_panel=Panel.TRY,
    epilog=examples(
        "adtally up                                    the UI on http://127.0.0.1:3000, until Ctrl-C",
        "adtally up --port 0                           on a free port",
        "adtally up --no-ingest                        Dagster alone, which then ingests on a schedule",
    ),
)
def up(
    context: typer.Context,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the UI; 0 takes a free one. Default: ADTALLY_WEBSERVER_PORT or 3000."),
    ] = None,
    trigger: Annotated[str, typer.Option(help="Time between two batches of the ingest, as 500ms, 5s, 2m.")] = "5s",
    no_ingest: Annotated[bool, typer.Option("--no-ingest", help="Leave the continuous ingest out.")] = False,
) -> None:
    """Start Dagster (webserver, daemon, code server) and the continuous ingest on this machine, and keep them running.

    All of it listens on the loopback address only. What ends is started again, later each time. Ctrl-C or SIGTERM ends all of it
    in order, the ingest after its batch; a second Ctrl-C at once. The logs lie in ADTALLY_HOME/logs.
    """
    every = seconds(trigger, "--trigger")
    settings = settings_of(context)
    run_up(settings, port=settings.webserver_port if port is None else port, trigger_seconds=every, ingest=not no_ingest)


def run_up(settings: Settings, *, port: int, trigger_seconds: float, ingest: bool) -> None:
    """Run ``adtally up`` and print what happens."""
    from orchestration.up import up as supervisor

    out = console()

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # the reader of the lines has ended; the processes continue
            out.print(line, soft_wrap=True)
            out.file.flush()

    def tell(name: str, text: str) -> None:
        say(f"{datetime.now():%H:%M:%S}  {name:<11}  {text}")

    def ready(address: str, reports: str) -> None:
        say(f"UI         {address}" + ("/?token=$ADTALLY_WEBSERVER_TOKEN" if settings.webserver_token else ""))
        say(f"GraphQL    {address}/graphql")
        say(f"reports    {reports}  (data docs, runbooks)")
        say(f"logs       {settings.home_path / 'logs'}")
        say("Ctrl-C ends all of it.")

    say(f"adtally up on {settings.home_path}")
    supervisor.up(settings, port=port, trigger_seconds=trigger_seconds, ingest=ingest, tell=tell, ready=ready)
    say("all ended")
