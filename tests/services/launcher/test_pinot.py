"""A real Pinot: it starts, opens what it must and no more, and ends. What it serves is tested in tests/services/serving."""

from __future__ import annotations

import json
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.launcher.errors import ServiceError, ServiceUsageError
from services.launcher.pinot import Pinot, PinotClient
from services.launcher.processes import find

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]


@pytest.fixture
def pinot(tmp_path: Path, jar_cache: Path, java: Path) -> Iterator[Pinot]:
    made = Pinot(tmp_path / "home", jar_cache=jar_cache, java=lambda: java, heap="1g")
    yield made
    for role in made.role_names:
        for process in find(made.folder, role):
            process.kill()


def is_refused(port: int) -> bool:
    """Whether the port ends a connection of somebody who has no key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as wrapped:
            wrapped.send(b"\0\0\0\1x")
            wrapped.recv(1)
    except ssl.SSLError as error:
        return "ALERT" in str(error).upper()
    return False


def status_of(url: str, method: str, body: object = None) -> int:
    """The HTTP status of a request without a login."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, {"Content-Type": "text/plain"}, method=method), timeout=30
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_it_comes_up_shows_little_and_goes_down(pinot: Pinot) -> None:
    up = pinot.up()
    assert (up.running, up.problem, up.holds, sorted(up.processes)) == (True, None, {}, ["pinot", "zookeeper"])
    open_to_all = {
        one.laddr.port
        for pid in up.processes.values()
        for one in psutil.Process(pid).net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.ip != "127.0.0.1"
    }
    ports = json.loads((pinot.folder / "state.json").read_text("utf-8"))["ports"]
    assert open_to_all == {ports["server"]}  # as the warning says
    assert is_refused(ports["server"])
    secret = [pinot.folder, *(pinot.folder / name for name in ("keys.password", "login.password"))]
    assert [path.stat().st_mode & 0o077 for path in secret] == [0, 0, 0]

    # what a web page may send without a question of the browser's, and what CORS would allow it
    assert [status_of(f"{up.addresses['controller']}/schemas/t", method) for method in ("GET", "DELETE")] == [403, 403]
    assert status_of(f"{up.addresses['controller']}/sql", "POST", {"sql": "select 1"}) in (401, 403)
    with pytest.raises(ServiceError, match="it needs a login"):
        PinotClient(up.addresses["controller"], up.addresses["broker"]).query("select 1")
    assert pinot.client.query("select 1") == [[1]]

    assert pinot.up() == pinot.status()  # finds it running
    with pytest.raises(ServiceUsageError, match="runs on the data that would be deleted"):
        pinot.up(fresh=True)

    processes = [psutil.Process(pid) for pid in pinot.status().processes.values()]
    assert pinot.down()
    assert not any(process.is_running() for process in processes)
    assert not any(find(pinot.folder, role) for role in pinot.role_names)
    with pytest.raises(ServiceError, match="Pinot does not run"):
        _ = pinot.client
    assert pinot.down() is False
