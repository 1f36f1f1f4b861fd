"""Up, down and status of a service of two processes, with small Python programs in place of Java."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.launcher import jars, service
from services.launcher.errors import ServiceBusyError, ServiceError, ServiceUsageError
from services.launcher.java_service import JavaService
from services.launcher.processes import find
from services.launcher.service import Role

SLEEP = "time.sleep(600)"


class Pair(JavaService):
    """A base and a top that needs it. ``commands`` are what they run, ``unready`` what a probe answers, by role."""

    name = "pair"
    role_names = ("base", "top")
    port_uses = ("base", "top")
    ready_seconds = 10.0
    default_heap = "1g"

    def __init__(self, root: Path, java: Path) -> None:
        super().__init__(root, jar_cache=root / "jars", java=lambda: java)
        self.commands = {"base": SLEEP, "top": SLEEP}
        self.unready: dict[str, str] = {}
        self.settled = 0

    def roles(self, ports: dict[str, int]) -> list[Role]:
        return [Role(name, (self.commands[name],), (), 5.0) for name in self.role_names]

    def probe(self, role: str, ports: dict[str, int]) -> str | None:
        if role in self.unready:
            return self.unready[role]
        return None if find(self.folder, role) else "no process"

    def addresses(self, ports: dict[str, int]) -> dict[str, str]:
        return {"top": f"127.0.0.1:{ports['top']}"}

    def holds(self, ports: dict[str, int]) -> dict[str, int]:
        return {}

    def settle(self, ports: dict[str, int], progress: service.Progress) -> None:
        self.settled += 1


@pytest.fixture
def java(tmp_path: Path) -> Path:
    path = tmp_path / "java"
    path.write_text(f"#!{sys.executable} -IS\nimport sys, time\nexec(sys.argv[-1])\n", "utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def pair(tmp_path: Path, java: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    conf = tmp_path / "conf"
    (conf / "pair").mkdir(parents=True)
    (conf / "pair" / "jars.lock.json").write_text(json.dumps({"service": "pair", "version": "1.0", "jars": []}), "utf-8")
    (conf / "pair" / "top.conf").write_text("port=$top\nbase=$base\ndata=$data\n", "utf-8")
    monkeypatch.setattr(jars, "CONF", conf)
    monkeypatch.setattr(service, "CONF", conf)
    made = Pair(tmp_path / "home", java)
    yield made
    for role in made.role_names:
        for process in find(made.folder, role):
            process.kill()


def again(pair: Pair) -> Pair:
    """What another command sees: nothing but the folder and the processes."""
    other = Pair(pair.folder.parent, pair._java())
    other.commands, other.unready = pair.commands, pair.unready
    return other


def ports_of(pair: Pair) -> dict[str, int]:
    found: dict[str, int] = json.loads((pair.folder / "state.json").read_text("utf-8"))["ports"]
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)


def test_up_status_down_twice(pair: Pair) -> None:
    assert not pair.status().running and pair.status().problem is None
    assert pair.down() is False
    seen = []
    for _ in range(2):
        up = pair.up()
        assert (up.running, up.problem, sorted(up.processes)) == (True, None, ["base", "top"])
        assert up.addresses == {"top": f"127.0.0.1:{ports_of(pair)['top']}"}
        assert again(pair).status() == up
        seen.append(ports_of(pair))
        said: list[str] = []
        assert again(pair).down(said.append) is True
        assert said == ["stopping top", "stopping base"]  # what was started last ends first
        status = pair.status()
        assert (status.running, status.problem, status.processes, status.addresses) == (False, None, {}, {})
        assert not any(find(pair.folder, role) for role in pair.role_names)
        assert pair.down() is False
    assert seen[0] == seen[1]  # ports are remembered


def test_the_configuration_has_the_ports_and_the_data_folder(pair: Pair) -> None:
    pair.up()
    ports = ports_of(pair)
    text = (pair.folder / "conf" / "top.conf").read_text("utf-8")
    assert text == f"port={ports['top']}\nbase={ports['base']}\ndata={pair.data}\n"


def test_a_second_up_finds_it_running(pair: Pair) -> None:
    first = pair.up()
    said: list[str] = []
    other = again(pair)
    assert other.up(said.append) == first
    assert said == ["pair runs already"]
    assert other.settled == 1  # what is missing is made on every up


def test_a_second_up_does_not_pretend(pair: Pair) -> None:
    pair.up()
    other = again(pair)
    other.unready, other.ready_seconds = {"top": "does not answer"}, 0.3
    with pytest.raises(ServiceError, match=r"runs, but top: not ready after 0 s: does not answer.*logs in"):
        other.up()
    assert other.status().problem == "top: does not answer"


def test_data_are_not_deleted_and_ports_not_changed_while_it_runs(pair: Pair) -> None:
    pair.up()
    with pytest.raises(ServiceUsageError, match=r"runs on the data.*services pair down"):
        again(pair).up(fresh=True)
    with pytest.raises(ServiceUsageError, match=r"runs on port \d+, not 1 "):
        again(pair).up(wanted_ports={"top": 1})
    assert again(pair).up(wanted_ports={"top": ports_of(pair)["top"]}).running


def test_fresh_deletes_data_and_nothing_else_does(pair: Pair) -> None:
    pair.up()
    (pair.data / "kept").write_text("x", "utf-8")
    pair.down()
    pair.up()
    assert (pair.data / "kept").exists()
    pair.down()
    pair.up(fresh=True)
    assert list(pair.data.iterdir()) == []


def test_a_kill_is_noticed_and_the_next_up_starts_anew(pair: Pair) -> None:
    first = pair.up()
    for pid in first.processes.values():
        kill(pid)
    status = again(pair).status()
    assert not status.running
    assert status.problem is not None and status.problem.startswith("it was not stopped but ended by itself")
    said: list[str] = []
    second = again(pair).up(said.append)
    assert said[0].startswith("pair was not stopped but ended by itself (process ")
    assert second.running and not set(second.processes.values()) & set(first.processes.values())


def test_a_pid_that_another_program_has_now_is_left_alone(pair: Pair) -> None:
    pair.up()
    pair.down()
    path = pair.folder / "state.json"
    state = json.loads(path.read_text("utf-8"))
    state["processes"] = {role: {"pid": os.getpid(), "started_at": 1.0} for role in pair.role_names}
    path.write_text(json.dumps(state), "utf-8")
    assert not pair.status().running
    assert pair.down() is False  # and this test goes on
    assert json.loads(path.read_text("utf-8"))["processes"] == {}


def test_half_a_service_is_told_and_started_whole(pair: Pair) -> None:
    first = pair.up()
    kill(first.processes["base"])
    assert again(pair).status().problem == "base not running"
    second = again(pair).up()
    assert sorted(second.processes) == ["base", "top"]
    assert second.processes["top"] != first.processes["top"]


@pytest.mark.parametrize("damage", ["{", None])
def test_down_ends_what_runs_though_the_state_is_broken_or_gone(pair: Pair, damage: str | None) -> None:
    pair.up()
    path = pair.folder / "state.json"
    path.write_text(damage, "utf-8") if damage else path.unlink()
    assert again(pair).down() is True
    assert not any(find(pair.folder, role) for role in pair.role_names)


def test_a_start_that_fails_tells_the_cause_and_leaves_nothing(pair: Pair) -> None:
    pair.commands["top"] = "print('ERROR no such thing'); sys.exit(3)"
    pair.unready["top"] = "closed"
    with pytest.raises(ServiceError, match=r"top did not start: its process ended: ERROR no such thing \(logs in .*/pair/logs\)"):
        pair.up()
    assert not any(find(pair.folder, role) for role in pair.role_names)
    assert again(pair).status().problem is None


def test_a_start_that_takes_too_long_is_given_up(pair: Pair) -> None:
    pair.unready["top"], pair.ready_seconds = "still thinking", 0.5
    with pytest.raises(ServiceError, match="top did not start: not ready after 0 s: still thinking"):
        pair.up()
    assert not any(find(pair.folder, role) for role in pair.role_names)


def test_an_interrupted_start_leaves_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pair, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pair.up()
    assert not any(find(pair.folder, role) for role in pair.role_names)


@pytest.fixture
def stopped(pair: Pair) -> Pair:
    pair.up()
    pair.down()
    return pair


def test_a_remembered_port_that_is_taken_is_replaced(stopped: Pair) -> None:
    before = ports_of(stopped)
    with socket.create_server(("127.0.0.1", before["top"])):
        said: list[str] = []
        stopped.up(said.append)
    assert f"port {before['top']} (top) is taken by another program; choosing a new one" in said
    after = ports_of(stopped)
    assert after["base"] == before["base"] and after["top"] != before["top"]


def test_a_port_to_which_data_are_bound_is_not_replaced(stopped: Pair) -> None:
    stopped.ports_are_kept = True
    before = ports_of(stopped)
    (stopped.data / "some").touch()
    with socket.create_server(("127.0.0.1", before["top"])):
        with pytest.raises(ServiceUsageError, match=f"port {before['top']} .* is taken, and its data is bound to it.*--fresh"):
            stopped.up()
        assert ports_of(stopped) == before
        stopped.up(fresh=True)
    assert ports_of(stopped)["top"] != before["top"]


def test_a_port_that_was_asked_for_must_be_free(stopped: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServiceUsageError, match=f"port {port} is taken"):
            stopped.up(wanted_ports={"top": port})
    assert not stopped.status().running
    stopped.up(wanted_ports={"top": port})
    assert ports_of(stopped)["top"] == port


def test_one_command_at_a_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BUSY_SECONDS", 0.2)
    pair.unready["top"] = "waiting"
    failed: list[BaseException] = []

    def up() -> None:
        try:
            pair.up()
        except ServiceError as error:
            failed.append(error)

    thread = threading.Thread(target=up)
    thread.start()
    try:
        while not find(pair.folder, "top"):
            time.sleep(0.02)
        with pytest.raises(ServiceBusyError, match="another process has been starting or stopping pair"):
            again(pair).down()
    finally:
        pair.unready.clear()
        thread.join()
    assert not failed
    assert pair.status().running
