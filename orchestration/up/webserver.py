"""Dagster's webserver behind the request filter: ``python -m orchestration.up.webserver``, with its own arguments."""

from __future__ import annotations

from typing import Any

from dagster_webserver import cli
from starlette.types import ASGIApp

from orchestration.up.request_filter import RequestFilter
from spark_jobs.config import Settings, load_settings


def filtered(app: ASGIApp, settings: Settings) -> RequestFilter:
    """The application behind the filter, by the settings."""
    token = settings.webserver_token
    return RequestFilter(app, hosts=settings.webserver_hosts, token=None if token is None else token.get_secret_value())


def main() -> None:
    """Run the webserver until a signal ends it."""
    settings = load_settings()
    create_app = cli.create_app_from_workspace_process_context  # type: ignore[attr-defined]

    def create_filtered_app(*arguments: Any, **options: Any) -> RequestFilter:
        return filtered(create_app(*arguments, **options), settings)

    cli.create_app_from_workspace_process_context = create_filtered_app  # type: ignore[attr-defined,assignment]
    cli.main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
