"""Data docs and runbooks over http, asked as a browser does, and as somebody who wants to read what is none of his."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from orchestration.up.reports import docs_dir, serving_reports
from spark_jobs.config import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


@pytest.fixture
def address(settings: Settings) -> Iterator[str]:
    with serving_reports(settings, 0) as found:
        yield found


def ask(address: str, path: str, *, host: str | None = None, method: str = "GET") -> tuple[int, str, str]:
    """Status, content type and body; the path is sent as it is."""
    place = urlsplit(address)
    connection = HTTPConnection(str(place.hostname), place.port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or place.netloc)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read().decode("utf-8", "replace")
    connection.close()
    return response.status, response.headers["Content-Type"], body


def test_runbooks_are_pages_and_their_links_lead_on(address: str) -> None:
    status, kind, body = ask(address, "/docs/runbooks/failed-run.md")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert "<h1>A run failed</h1>" in body
    assert '<a href="silent-source.md">' in body
    assert ask(address, "/docs/runbooks/silent-source.md")[0] == 200
    assert "<table>" in ask(address, "/docs/runbooks/README.md")[2]
    assert ask(address, "/docs/img/check.png")[1] == "image/png"


def test_data_docs_are_there_once_an_hour_was_validated(address: str, settings: Settings) -> None:
    assert "no hour has been validated yet" in ask(address, "/")[2]
    page = settings.quality_path / "validations" / "events.html"
    page.parent.mkdir(parents=True)
    page.write_text("<h1>events</h1>")
    (settings.quality_path / "index.html").write_text("<h1>Data docs</h1>")
    assert 'href="/quality/index.html"' in ask(address, "/")[2]
    assert ask(address, "/quality/validations/events.html") == (200, "text/html; charset=utf-8", "<h1>events</h1>")


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
        "*",
        "//evil.example/docs",
        "/quality",
        "/quality/",
        "/landing/secret.html",
        "/docs/../pyproject.toml",
    ],
)
def test_nothing_else_is_served(address: str, settings: Settings, path: str) -> None:
    secret = settings.home_path / "landing" / "secret.html"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    settings.quality_path.mkdir()
    (settings.quality_path / "validations.json").write_text("[]")
    (settings.quality_path / "link.html").symlink_to(secret)
    assert ask(address, path)[0] == 404


def test_another_name_of_the_address_and_other_methods_get_nothing(address: str) -> None:
    assert ask(address, "/", host="evil.example")[0] == 403
    assert ask(address, "/", host=f"evil.example:{urlsplit(address).port}")[0] == 403
    assert ask(address, "/", host=f"localhost:{urlsplit(address).port}")[0] == 200
    assert ask(address, "/", method="POST")[0] == 501


def test_a_port_that_is_taken_is_left_alone(address: str, settings: Settings) -> None:
    with serving_reports(settings, urlsplit(address).port or 0) as other:
        assert other != address
        assert ask(other, "/")[0] == ask(address, "/")[0] == 200


def test_the_documentation_is_found_in_a_checkout() -> None:
    assert docs_dir() == Path(__file__).resolve().parents[3] / "docs"
