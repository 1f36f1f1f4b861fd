"""The command ``adtally console``."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Panel, examples
from orchestration.cli.output import say

app = typer.Typer()


@app.command(
    rich_help_panel=Panel.ASK,
    epilog=examples(
        "adtally console                               on http://127.0.0.1:3001, until Ctrl-C", "adtally console --port 0"
    ),
)
def console(
    context: typer.Context,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one. Default: ADTALLY_CONSOLE_PORT or 3001."),
    ] = None,
) -> None:
    """Serve the console: pages on spend, delivery, trust and billing for a browser, live while records arrive.

    It only reads, and listens on the loopback address only. `adtally up` starts it too.
    """
    from orchestration.console.server import serve

    settings = settings_of(context)
    shown_token = "/?token=$ADTALLY_CONSOLE_TOKEN" if settings.console_token else ""
    serve(settings, settings.console_port if port is None else port, lambda address: say(f"{address}{shown_token}"))
