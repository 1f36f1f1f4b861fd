"""Data docs and runbooks over http, asked as a browser does, and as somebody who wants to read what is none of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from console import RunningConsole, ask, ask_bytes, running_console

from orchestration.console.reports import docs_dir
from spark_jobs.config import load_settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one page of data docs, and with files beside it that the console must not serve."""
    settings = load_settings(home=tmp_path_factory.mktemp("home"))
    secret = settings.home_path / "landing" / "secret.html"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    page = settings.quality_path / "validations" / "events.html"
    page.parent.mkdir(parents=True)
    page.write_text("<h1>events</h1>")
    (settings.quality_path / "index.html").write_text("<h1>Data docs</h1>")
    (settings.quality_path / "validations.json").write_text("[]")
    (settings.quality_path / "link.html").symlink_to(secret)
    return settings.home_path


@pytest.fixture(scope="module")
def console(home: Path) -> Iterator[RunningConsole]:
    with running_console(home) as running:
        yield running


def test_runbooks_are_pages_and_their_links_lead_on(console: RunningConsole) -> None:
    status, headers, body = ask(console, "/docs/runbooks/failed-run.md")
    assert (status, headers.get_content_type()) == (200, "text/html")
    assert "<h1>A run failed</h1>" in body
    assert '<a href="silent-source.md">' in body
    assert ask(console, "/docs/runbooks/silent-source.md")[0] == 200
    assert "<table>" in ask(console, "/docs/runbooks/README.md")[2]
    assert ask_bytes(console, "/docs/img/check.png")[1].get_content_type() == "image/png"


def test_data_docs_have_a_policy_of_their_own_for_the_styles_that_they_carry(console: RunningConsole) -> None:
    status, headers, body = ask(console, "/quality/validations/events.html")
    assert (status, headers.get_content_type(), body) == (200, "text/html", "<h1>events</h1>")
    [policy, frames] = headers.get_all("content-security-policy") or []
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'") and "script" not in policy
    assert frames == "frame-ancestors 'none'"
    assert ask(console, "/quality/index.html")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/quality/../landing/secret.html",
        "/quality/%2e%2e/landing/secret.html",
        "/quality//etc/passwd",
        "/quality/link.html",
        "/quality/validations.json",
        "/quality/a%00.html",
        f"/quality/{'a' * 300}.html",
        "//evil.example/docs",
        "/quality",
        "/quality/",
        "/landing/secret.html",
        "/docs/../pyproject.toml",
    ],
)
def test_nothing_else_is_served(console: RunningConsole, path: str) -> None:
    assert ask(console, path)[0] == 404


def test_the_documentation_is_found_in_a_checkout() -> None:
    assert docs_dir() == Path(__file__).resolve().parents[3] / "docs"


def test_the_documentation_of_the_marts_is_in_a_sandbox(console: RunningConsole, home: Path) -> None:
    status, _, body = ask(console, "/marts")
    assert status == 404 and "adtally marts docs" in body
    page = load_settings(home=home).marts_path.parent / "docs" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("<script>alert(1)</script>")
    status, headers, body = ask(console, "/marts")
    assert (status, body) == (200, "<script>alert(1)</script>")
    assert str(headers["content-security-policy"]).startswith("sandbox allow-scripts; default-src 'none'")
