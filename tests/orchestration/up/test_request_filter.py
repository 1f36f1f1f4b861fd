"""What pages of other sites may not do to Dagster's webserver: a list of attacks by plain HTTP, and one by a real browser.

The same attacks are made on the bare webserver, where they succeed: a list that proves nothing would show there.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from browser import recorded_page
from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import EmptyWorkspaceTarget
from dagster_webserver.app import create_app_from_workspace_process_context
from playwright.sync_api import Browser
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestration.up.request_filter import RequestFilter
from orchestration.up.services import free_port
from spark_jobs.config import load_settings
from spark_jobs.errors import ConfigurationError

MUTATION = "mutation { reloadWorkspace { __typename } }"
BODY = json.dumps({"query": MUTATION})
JSON = {"Content-Type": "application/json"}
BY_GET = f"/graphql?query={quote(MUTATION)}"
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Protocol": "graphql-ws",
}
TOKEN = "a token of enough characters"


class Site:
    """A server in a thread; ``reached`` has the requests that came through to the application within."""

    def __init__(self, app: ASGIApp) -> None:
        self.reached: list[str] = []
        self.app, self.port = app, free_port(0)

    async def inner(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            self.reached.append(f"{scope.get('method', 'WS')} {scope['path']}")
        await self.app(scope, receive, send)

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: str = "") -> tuple[int, str, Any]:
        """Status, body and headers of the answer. ``{port}`` in a header is the site's. A WebSocket is left at its handshake."""
        given = {name: value.replace("{port}", str(self.port)) for name, value in (headers or {}).items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host="Host" in given)
        length = {"Content-Length": str(len(body))} if body else {}
        for name, value in (length | given).items():
            for one in value.split("\n"):
                connection.putheader(name, one)
        connection.endheaders(body.encode() or None)
        answer = connection.getresponse()
        text = "" if answer.status == 101 else answer.read().decode()
        connection.close()
        return answer.status, text, answer.headers


@contextmanager
def served(site: Site, app: ASGIApp) -> Iterator[Site]:
    server = uvicorn.Server(uvicorn.Config(app, port=site.port, log_level="error", interface="asgi3"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield site
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def dagster_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ASGIApp]:
    with (
        DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))) as instance,
        WorkspaceProcessContext(instance, workspace_load_target=EmptyWorkspaceTarget()) as context,
    ):
        yield create_app_from_workspace_process_context(context)


@pytest.fixture(scope="module")
def bare(dagster_app: ASGIApp) -> Iterator[Site]:
    site = Site(dagster_app)
    with served(site, site.inner):
        yield site


@pytest.fixture(scope="module")
def shielded(dagster_app: ASGIApp) -> Iterator[Site]:
    site = Site(dagster_app)
    with served(site, RequestFilter(site.inner, hosts=["Tally.Example"])):
        yield site


@pytest.fixture(scope="module")
def with_token(dagster_app: ASGIApp) -> Iterator[Site]:
    site = Site(dagster_app)
    with served(site, RequestFilter(site.inner, token=TOKEN)):
        yield site


OWN = {"Host": "127.0.0.1:{port}", "Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
EVIL = {"Origin": "http://evil.example"}
FOREIGN_HOST = {"Host": "evil.example:{port}", "Origin": "http://evil.example:{port}", "Sec-Fetch-Site": "same-origin"}
ATTACKS: dict[str, tuple[str, str, dict[str, str], str]] = {
    "a mutation by GET": ("GET", BY_GET, {}, ""),
    "a mutation by GET, of its own origin": ("GET", BY_GET, OWN, ""),
    "a mutation by GET, its path encoded": ("GET", BY_GET.replace("graphql", "%67raphql"), {}, ""),
    "a mutation by a link": ("GET", BY_GET, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, ""),
    "the query of a POST in its address": ("POST", BY_GET, {"Content-Type": "text/plain"}, "x"),
    "a form": ("POST", BY_GET, {"Content-Type": "application/x-www-form-urlencoded"}, "a=b"),
    "a POST without a type": ("POST", BY_GET, {}, ""),
    "a foreign Origin": ("POST", "/graphql", JSON | EVIL, BODY),
    "no page's Origin": ("POST", "/graphql", JSON | {"Origin": "null"}, BODY),
    "another port of this machine": ("POST", "/graphql", JSON | {"Origin": "http://127.0.0.1:1"}, BODY),
    "two Origins": ("POST", "/graphql", JSON | {"Origin": "http://127.0.0.1:{port}\nhttp://evil.example"}, BODY),
    "an Origin that begins like ours": ("POST", "/graphql", JSON | {"Origin": "http://127.0.0.1:{port}.evil.example"}, BODY),
    "an Origin with a user": ("POST", "/graphql", JSON | {"Origin": "http://127.0.0.1:{port}@evil.example"}, BODY),
    "a name that leads here": ("POST", "/graphql", JSON | FOREIGN_HOST, BODY),
    "a Host that begins like ours": ("POST", "/graphql", JSON | {"Host": "localhost.evil.example"}, BODY),
    "a Host that ends like ours": ("POST", "/graphql", JSON | {"Host": "evil.example@127.0.0.1:{port}"}, BODY),
    "an empty Host": ("POST", "/graphql", JSON | {"Host": ""}, BODY),
    "another site by what the browser says": ("POST", "/graphql", JSON | {"Sec-Fetch-Site": "cross-site"}, BODY),
    "another port by what the browser says": ("POST", "/graphql", JSON | {"Sec-Fetch-Site": "same-site"}, BODY),
    "a report of an asset": ("POST", "/report_asset_materialization/ad_events", EVIL, ""),
    "a WebSocket": ("GET", "/graphql", UPGRADE | EVIL, ""),
    "a WebSocket by a foreign name": ("GET", "/graphql", UPGRADE | FOREIGN_HOST, ""),
    "a WebSocket of a frame without origin": ("GET", "/graphql", UPGRADE | {"Origin": "null"}, ""),
}
WITH_AN_EMPTY_HOST = {"an empty Host", "a Host that ends like ours"}  # the bare server may refuse these by itself


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_fails(bare: Site, shielded: Site, attack: str) -> None:
    bare.reached.clear()
    shielded.reached.clear()
    status, said, _ = bare.ask(*ATTACKS[attack])
    if attack not in WITH_AN_EMPTY_HOST:
        assert bare.reached, (status, said)
    status, said, headers = shielded.ask(*ATTACKS[attack])
    assert status in (403, 405, 415), said
    assert shielded.reached == []
    assert "access-control-allow-origin" not in headers


def test_a_bare_webserver_is_operated_by_them(bare: Site) -> None:
    assert "reloadWorkspace" in bare.ask("GET", BY_GET, EVIL)[1]
    assert bare.ask("GET", "/graphql", UPGRADE | EVIL)[0] == 101


LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize(
    "headers",
    [{}, OWN, {"Host": "LOCALHOST:{port}"}, {"Host": "[::1]:{port}"}, {"Host": "tally.example", "Origin": "https://tally.example"}],
)
def test_what_is_ours_works(shielded: Site, headers: dict[str, str]) -> None:
    status, said, _ = shielded.ask("POST", "/graphql", JSON | headers, BODY)
    assert (status, "reloadWorkspace" in said) == (200, True), said
    assert shielded.ask("GET", "/graphql", UPGRADE | headers)[0] == 101
    assert shielded.ask("GET", "/runs", headers)[0] == 200


def test_a_link_of_another_site_shows_and_no_frame_does(shielded: Site) -> None:
    status, said, headers = shielded.ask("GET", "/runs", LINK)
    assert (status, "<html" in said) == (200, True)
    assert "frame-ancestors 'none'" in headers.get_all("content-security-policy")
    assert len(headers.get_all("content-security-policy")) == 2  # Dagster's own is there
    assert headers["x-frame-options"] == "DENY"
    assert shielded.ask("GET", "/runs", LINK | {"Sec-Fetch-Dest": "iframe"})[0] == 403
    assert shielded.ask("POST", "/graphql", JSON | LINK, BODY)[0] == 403
    assert shielded.ask("GET", "/graphql", {"Accept": "text/html"})[0] == 200  # the page to ask by hand


def test_token(with_token: Site) -> None:
    for path, headers in (("/runs", {}), (f"/runs?token={TOKEN[:-1]}", {}), ("/runs", {"Cookie": f"adtally_token={TOKEN}"})):
        assert with_token.ask("GET", path.replace(" ", "+"), headers)[0] == 401
    assert with_token.ask("GET", "/graphql", UPGRADE)[0] == 403
    assert with_token.reached == []
    assert with_token.ask("POST", "/graphql", JSON | {"Authorization": f"Bearer {TOKEN}"}, BODY)[0] == 200

    status, _, headers = with_token.ask("GET", f"//evil.example/a?b=c&token={quote(TOKEN)}")
    assert (status, headers["location"]) == (303, "/evil.example/a?b=c")
    cookie, *flags = headers["set-cookie"].split("; ")
    assert TOKEN not in headers["set-cookie"] and {"HttpOnly", "SameSite=strict"} <= set(flags)
    assert with_token.ask("GET", "/runs", {"Cookie": cookie})[0] == 200
    assert with_token.ask("GET", "/graphql", UPGRADE | {"Cookie": cookie})[0] == 101
    assert with_token.ask("POST", "/graphql", JSON | EVIL | {"Cookie": cookie}, BODY)[0] == 403


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADTALLY_WEBSERVER_HOSTS", "tally.example, other")
    assert load_settings(home=tmp_path).webserver_hosts == ("tally.example", "other")
    monkeypatch.setenv("ADTALLY_WEBSERVER_HOSTS", "tally.example:80")
    with pytest.raises(ConfigurationError, match="without a port"):
        load_settings(home=tmp_path)
    monkeypatch.delenv("ADTALLY_WEBSERVER_HOSTS")
    monkeypatch.setenv("ADTALLY_WEBSERVER_TOKEN", "short")
    with pytest.raises(ConfigurationError, match="ADTALLY_WEBSERVER_TOKEN") as caught:
        load_settings(home=tmp_path)
    assert "short'" not in str(caught.value)


ATTACKING_PAGE = """<!doctype html><title>x</title><body><pre id=said>waiting</pre>
<form id=form method=post enctype=text/plain target=hidden action="TARGET/graphql?query=QUERY"><input name=a value=b></form>
<iframe name=hidden></iframe><iframe id=frame src="TARGET/runs"></iframe>
<script>
const said = [], target = "TARGET";
const asked = (name, options) => fetch(target + (options.body ? "/graphql" : "/graphql?query=QUERY"), options)
  .then(answer => said.push(name + " " + (answer.type === "opaque" ? "sent" : "answered")))
  .catch(() => said.push(name + " failed"));
const socket = new Promise(done => {
  const it = new WebSocket(target.replace("http", "ws") + "/graphql", "graphql-ws");
  it.onopen = () => done(said.push("socket open")); it.onerror = () => done(said.push("socket refused")); });
const image = new Promise(done => {
  const it = new Image(); it.onload = it.onerror = done; it.src = target + "/graphql?query=QUERY&i"; });
document.getElementById("form").submit();
const body = JSON.stringify({query: decodeURIComponent("QUERY")}), method = "POST";
Promise.all([
  asked("get", {mode: "no-cors"}), asked("text", {mode: "no-cors", method, body, headers: {"Content-Type": "text/plain"}}),
  asked("json", {method, body, headers: {"Content-Type": "application/json"}}), socket, image,
]).then(() => setTimeout(() => document.getElementById("said").textContent = "done: " + said.sort().join("; "), 1500));
</script></body>"""


@contextmanager
def page(text: str) -> Iterator[str]:
    """A page on an origin of its own; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_arguments: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=partial(server.serve_forever, 0.05))
        thread.start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.e2e
def test_a_page_of_another_origin_in_a_real_browser(bare: Site, shielded: Site, browser: Browser) -> None:
    seen = {}
    for name, site in (("bare", bare), ("shielded", shielded)):
        site.reached.clear()
        text = ATTACKING_PAGE.replace("TARGET", f"http://127.0.0.1:{site.port}").replace("QUERY", quote(MUTATION))
        with page(text) as address, recorded_page(browser) as recorded:
            recorded.open(address)
            recorded.wait_for_text("done: ")
            seen[name] = (recorded.text().split("done: ")[1], sorted(set(site.reached)))
    said, reached = seen["bare"]
    assert "get sent" in said and "socket open" in said, said
    assert {"GET /graphql", "GET /runs", "POST /graphql", "WS /graphql"} <= set(reached)
    said, reached = seen["shielded"]
    assert "json failed" in said and "socket refused" in said, said
    assert reached == []

    with recorded_page(browser) as recorded:
        recorded.open(f"http://127.0.0.1:{shielded.port}/runs")
        recorded.wait_for_text("Runs")
        assert {"POST /graphql", "WS /graphql", "GET /runs"} <= set(shielded.reached)
        assert "refuses this request" not in recorded.text()
