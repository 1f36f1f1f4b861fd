"""The command ``adtally up``: a line for each change of state, and the addresses once the UI answers."""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import Annotated

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Panel, Trigger, examples, seconds
from orchestration.cli.output import console

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
    trigger: Trigger = None,
    no_ingest: Annotated[bool, typer.Option("--no-ingest", help="Run without the continuous ingest.")] = False,
) -> None:
    """Start Dagster, the continuous ingest and the builds of the marts after it on this machine, and keep them running.

    Everything listens on the loopback address only. What ends is started again, after a growing pause. Ctrl-C or SIGTERM ends
    everything in order, the ingest after its batch; a second Ctrl-C ends it at once. The logs are in ADTALLY_HOME/logs.
    """
    from orchestration.up import up as supervisor

    every = None if trigger is None else seconds(trigger, "--trigger")
    settings = settings_of(context)
    out = console()

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # the reader of the lines has ended; the processes continue
            out.print(line, soft_wrap=True)
            out.file.flush()

    def tell(name: str, text: str) -> None:
        say(f"{datetime.now():%H:%M:%S}  {name:<11}  {text}")

    def ready(address: str, console_address: str) -> None:
        say(f"UI         {address}" + ("/?token=$ADTALLY_WEBSERVER_TOKEN" if settings.webserver_token else ""))
        say(f"GraphQL    {address}/graphql")
        say(f"console    {console_address}" + ("/?token=$ADTALLY_CONSOLE_TOKEN" if settings.console_token else ""))
        say(f"logs       {settings.home_path / 'logs'}")
        say("Ctrl-C ends all of it.")

    say(f"adtally up on {settings.home_path}")
    chosen = settings.webserver_port if port is None else port
    supervisor.up(settings, port=chosen, trigger_seconds=every, ingest=not no_ingest, tell=tell, ready=ready)
    say("all ended")
