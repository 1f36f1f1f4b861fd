"""Links to data docs and runbooks, which the console serves over http."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import dagster as dg

from orchestration.console import QUALITY
from spark_jobs.config import Settings, load_settings


@cache  # the definitions ask 73 times, and reading the settings takes 5 ms
def _reports_url() -> str | None:
    return load_settings().reports_url


def runbook(name: str) -> str:
    """Return the line of a description that names the runbook."""
    page, url = f"docs/runbooks/{name}.md", _reports_url()
    return f"Runbook: [`{page}`]({url}/{page})" if url else f"Runbook: `{page}`"


def runbook_link(settings: Settings, page: str) -> dg.MetadataValue[str]:
    """Return a page such as docs/runbooks/stream-lag.md: a link if it is served, else its path."""
    return dg.MetadataValue.url(f"{settings.reports_url}/{page}") if settings.reports_url else dg.MetadataValue.path(page)


def report_link(settings: Settings, page: Path) -> dg.MetadataValue[str]:
    """Return a page of the data docs: a link if it is served, else its path."""
    if not settings.reports_url:
        return dg.MetadataValue.path(str(page))
    return dg.MetadataValue.url(f"{settings.reports_url}/{QUALITY}/{page.relative_to(settings.quality_path).as_posix()}")
