"""Who may ask the console what: by plain HTTP, of the real program."""

from __future__ import annotations

import http.client
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from console import RunningConsole, ask, running_console

TOKEN = "a-token-of-enough-characters"
CROSS_SITE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningConsole]:
    """A console of a home without anything."""
    with running_console(tmp_path_factory.mktemp("empty"), ADTALLY_WEBSERVER_HOSTS="tally.example") as running:
        yield running


@pytest.fixture(scope="module")
def with_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningConsole]:
    with running_console(tmp_path_factory.mktemp("token"), ADTALLY_CONSOLE_TOKEN=TOKEN) as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ({"Host": "evil.example"}, "GET", 403),
        ({"Host": "127.0.0.1.evil.example"}, "GET", 403),
        ({"Host": ""}, "GET", 403),
        ({"Origin": "http://evil.example"}, "GET", 403),
        ({"Origin": "null"}, "GET", 403),
        (CROSS_SITE, "GET", 403),
        ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, "POST", 403),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "POST", 415),
        ({"Content-Type": "application/json"}, "POST", 405),
        ({"Content-Type": "application/json"}, "PUT", 405),
        ({"Content-Type": "application/json"}, "DELETE", 405),
        ({}, "GET", 200),
        ({"Host": "tally.example", "Origin": "https://tally.example"}, "GET", 200),
        (LINK, "GET", 200),
    ],
)
def test_who_may_ask(empty: RunningConsole, headers: dict[str, str], method: str, status: int) -> None:
    for path in ("/", "/static/app.css") if method == "GET" else ("/",):
        assert ask(empty, path, headers, method)[0] == status, path
    if status == 403:
        assert ask(empty, "/live", headers)[0] == 403


def test_every_answer_has_the_headers_of_a_safe_page(empty: RunningConsole) -> None:
    for path in ("/", "/static/app.js", "/no-such-page", "/export/today/campaigns.csv"):
        _, headers, _ = ask(empty, path)
        policy = "; ".join(headers.get_all("content-security-policy") or [])
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy, path
        assert "unsafe" not in policy and "http:" not in policy and "https:" not in policy and "*" not in policy, path
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY"), path
        assert "access-control-allow-origin" not in headers and "server" not in headers, path


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2f..%2fconsole/app.py", "/static//etc/passwd", "/static/"]
)
def test_no_other_file_is_served(empty: RunningConsole, path: str) -> None:
    status, _, body = ask(empty, path)
    assert status in (400, 404) and "import" not in body and "root:" not in body


def test_an_empty_home_says_what_to_do(empty: RunningConsole) -> None:
    status, _, body = ask(empty, "/")
    assert status == 200 and "adtally " in body and "Traceback" not in body


def test_without_the_token_nothing_is_shown(with_token: RunningConsole) -> None:
    for path in ("/", "/static/app.js", "/live", "/export/today/campaigns.csv", f"/?token={TOKEN}x"):
        status, _, body = ask(with_token, path)
        assert status == 401 and "ADTALLY_CONSOLE_TOKEN" in body and TOKEN not in body, path
    assert ask(with_token, "/", {"Authorization": f"Bearer {TOKEN}"})[0] == 200
    assert not [line for line in with_token.lines if TOKEN in line]


def test_the_token_in_an_address_becomes_a_cookie(with_token: RunningConsole) -> None:
    status, headers, _ = ask(with_token, f"/?currency=EUR&token={TOKEN}")
    assert (status, headers["location"]) == (303, "/?currency=EUR")
    cookie, *flags = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=strict"} <= set(flags) and TOKEN not in cookie
    status, _, body = ask(with_token, "/", {"Cookie": cookie})
    assert status == 200 and TOKEN not in body


def test_a_signal_ends_it_although_a_stream_is_open(tmp_path: Path) -> None:
    with running_console(tmp_path) as running:
        parts = urlsplit(running.address)
        assert parts.hostname is not None
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        connection.request("GET", "/live")
        answer = connection.getresponse()
        assert (answer.status, answer.headers.get_content_type()) == (200, "text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no" and answer.headers["cache-control"] == "no-store"
        assert running.end(signal.SIGINT, seconds=10) == 0, running.lines
        connection.close()
    assert "Traceback" not in "\n".join(running.lines)
