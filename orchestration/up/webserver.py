"""Dagster's webserver behind the request filter: ``python -m orchestration.up.webserver SOCKET``, then Dagster's own arguments.

It imports its modules while the code server at SOCKET loads the definitions, and opens the instance only when that one answers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dagster._grpc import server_watcher
from dagster_webserver import cli

from orchestration.up.request_filter import RequestFilter
from orchestration.up.services import WATCH_SECONDS, is_listening
from spark_jobs.config import load_settings

if __name__ == "__main__":
    _, socket, *arguments = sys.argv
    settings = load_settings()
    token = None if settings.webserver_token is None else settings.webserver_token.get_secret_value()
    create_app = cli.create_app_from_workspace_process_context  # type: ignore[attr-defined]
    cli.create_app_from_workspace_process_context = lambda *context, **options: RequestFilter(  # type: ignore[attr-defined,assignment]
        create_app(*context, **options), hosts=settings.webserver_hosts, token=token
    )
    server_watcher.WATCH_INTERVAL = WATCH_SECONDS
    while not is_listening(Path(socket)):
        time.sleep(0.05)
    cli.cli(arguments, auto_envvar_prefix="DAGSTER_WEBSERVER")
