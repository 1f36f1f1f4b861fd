"""Prints a line for each change of state of ``adtally up``, and its addresses once the UI answers."""

from __future__ import annotations

import contextlib
from datetime import datetime

from orchestration.cli.output import console
from spark_jobs.config import Settings


def run_up(settings: Settings, *, port: int, trigger_seconds: float, ingest: bool) -> None:
    """Run ``adtally up`` and print what happens."""
    from orchestration.up.up import up

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
    up(settings, port=port, trigger_seconds=trigger_seconds, ingest=ingest, tell=tell, ready=ready)
    say("all ended")
