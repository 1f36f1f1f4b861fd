"""Processes under supervision: real ones, small ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from terminal import HEARS_SIGNALS

from orchestration.up.guard import BoundedLog
from orchestration.up.supervisor import Backoff, Service, last_error

QUICK = Backoff(first_seconds=0.05, most_seconds=0.2, well_seconds=30)
LONG = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
POLITE = (  # what the ingest does: it ends after its batch
    "import signal, sys, time\n"
    "def end(*_): time.sleep(0.5); print('batch ended', flush=True); sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(600)\n"
)
FAMILY = (  # a child in the session, and one that has left it, each with its pid in a file; none of them hears SIGTERM
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = [sys.executable, '-c', 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)']\n"
    "for n in (0, 1):\n"
    "    print('child', subprocess.Popen(child, start_new_session=bool(n)).pid, flush=True)\n"
    "print('up', flush=True)\n"
)


def never() -> bool:
    return False


def python(name: str, code: str, *, stop_seconds: float = 10, asks_all: bool = False) -> Callable[..., Service]:
    """What makes the service, given its logs, environment and so on."""
    return partial(Service, name, (sys.executable, "-c", code), stop_seconds=stop_seconds, asks_all=asks_all)


def wait_for(true: Callable[[], bool], what: str, *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


class Desk:
    """Services by name, and what they told."""

    def __init__(self, logs: Path, backoff: Backoff = QUICK) -> None:
        self.told: list[tuple[str, str]] = []
        self.services: dict[str, Service] = {}
        self.logs, self.backoff = logs, backoff

    def start(self, make: Callable[..., Service]) -> Service:
        service = make(
            logs=self.logs,
            environment=dict(os.environ),
            tell=lambda name, text: self.told.append((name, text)),
            backoff=self.backoff,
        )
        self.services[service.name] = service
        service.start()
        return service

    def up(self, *makers: Callable[..., Service]) -> None:
        for make in makers:
            name = self.start(make).name
            wait_for(lambda name=name: "up\n" in self.log(name), f"{name} is up")  # type: ignore[misc]

    def log(self, name: str) -> str:
        path = self.services[name].log
        return path.read_text() if path.exists() else ""

    def check(self) -> None:
        for service in self.services.values():
            service.check()

    def check_until(self, true: Callable[[], bool], what: str) -> None:
        def turn() -> bool:
            self.check()
            return true()

        wait_for(turn, f"{what}; told {self.told}")

    def end(self, *names: str, hurry: Callable[[], bool] = never) -> None:
        for name in names:
            self.services[name].ask_to_end()
        for name in names:
            self.services[name].wait_ended(hurry)

    def texts(self, name: str) -> list[str]:
        return [text for other, text in self.told if other == name]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "logs")
    yield made
    made.end(*made.services, hurry=lambda: True)


def children_of(log: str) -> list[int]:
    return [int(line.split()[1]) for line in log.splitlines() if line.startswith("child ")]


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# Starting again


def test_a_process_that_fails_is_started_again_later_each_time_and_each_start_is_told(desk: Desk) -> None:
    desk.start(python("a", "import sys; sys.exit('adtally: error: the disk is full')"))
    desk.check_until(lambda: desk.texts("a").count("starting again") == 4, "four starts again")
    ends = [text for text in desk.texts("a") if text.startswith("ended")]
    waits = [float(text.split("next start in ")[1].split(" s")[0]) for text in ends[:4]]
    assert waits == [0.05, 0.1, 0.2, 0.2]
    assert all("ended with status 1 after" in text and text.endswith("s: the disk is full") for text in ends)


def test_a_process_that_ran_well_starts_from_the_shortest_wait_again(tmp_path: Path) -> None:
    now = [0.0]
    told: list[str] = []
    service = python("a", "import sys; sys.exit(3)")(
        logs=tmp_path,
        environment=dict(os.environ),
        tell=lambda _, text: told.append(text),
        backoff=Backoff(1, 60, 60),
        clock=lambda: now[0],
    )

    def run_for(seconds: float) -> None:
        wait_for(lambda: not service.is_running, "the end")
        now[0] += seconds
        service.check()
        now[0] += 100
        service.check()

    service.start()
    for seconds in (1, 1, 1, 60, 1):
        run_for(seconds)
    service.ask_to_end()
    service.wait_ended(never)
    assert [text.split("next start in ")[1].split(" s")[0] for text in told if "next start" in text] == ["1", "2", "4", "1", "2"]


def test_wrong_use_is_not_tried_again(desk: Desk) -> None:
    desk.start(python("a", "import sys; print('adtally: error: no such setting'); sys.exit(2)"))
    desk.check_until(lambda: desk.services["a"].gave_up, "given up")
    time.sleep(0.3)
    desk.check()
    assert desk.texts("a") == ["starting", "ended with status 2 and is not started again: no such setting"]


def test_a_process_that_is_killed_is_named_by_its_signal_and_started_again(desk: Desk) -> None:
    desk.up(python("a", "import os; print('pid', os.getpid(), flush=True); " + LONG))
    os.kill(int(desk.log("a").split("pid ")[1].split()[0]), signal.SIGKILL)
    desk.check_until(lambda: desk.log("a").count("up\n") == 2, "the second start")
    assert any(text.startswith("ended with SIGKILL") for text in desk.texts("a"))


def test_a_command_that_is_not_there_says_so(desk: Desk) -> None:
    desk.start(partial(Service, "a", ("/nonexistent/command",), stop_seconds=1))
    desk.check_until(lambda: any("No such file" in text for text in desk.texts("a")), "the reason")


# Ending


def test_all_end_in_the_order_asked_and_the_polite_one_ends_its_batch(desk: Desk) -> None:
    desk.up(python("a", POLITE), python("b", LONG))
    desk.end("b", "a")
    assert [entry for entry in desk.told if entry[1].startswith("end")] == [
        ("b", "ending"),
        ("a", "ending"),
        ("b", "ended"),
        ("a", "ended"),
    ]
    assert "batch ended" in desk.log("a")


def test_what_does_not_end_in_its_time_is_killed(desk: Desk) -> None:
    desk.up(python("a", STUBBORN, stop_seconds=0.5))
    begun = time.monotonic()
    desk.end("a")
    assert 0.5 <= time.monotonic() - begun < 8
    assert desk.texts("a")[-1] == "ended with SIGKILL"


def test_whoever_is_in_a_hurry_does_not_wait(desk: Desk) -> None:
    desk.up(python("a", STUBBORN, stop_seconds=600))
    begun = time.monotonic()
    desk.end("a", hurry=lambda: True)
    assert time.monotonic() - begun < 8
    assert not desk.services["a"].is_running


def test_one_that_waits_for_its_next_start_is_not_started_after_the_end(desk: Desk) -> None:
    desk.start(python("a", "raise SystemExit(1)"))
    desk.check_until(lambda: len(desk.texts("a")) > 1, "the first end")
    desk.end("a")
    time.sleep(0.3)
    desk.check()
    assert not desk.services["a"].is_running


@pytest.mark.parametrize("asks_all", [False, True])
def test_nothing_of_a_session_is_left(desk: Desk, asks_all: bool) -> None:
    desk.up(python("a", FAMILY + "time.sleep(600)", stop_seconds=0.3, asks_all=asks_all))
    children = children_of(desk.log("a"))
    assert len(children) == 2 and all(map(lives, children))
    desk.end("a")
    assert not any(map(lives, children))


def test_what_a_crashed_process_leaves_behind_is_ended_before_the_next_start(desk: Desk) -> None:
    desk.up(python("a", FAMILY + "raise SystemExit(1)"))
    children = children_of(desk.log("a"))
    desk.check_until(lambda: len(children_of(desk.log("a"))) > 2, "the second start")
    assert not any(map(lives, children[:2]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        f"{HEARS_SIGNALS}import os, sys, time\n"
        "from pathlib import Path\n"
        "from orchestration.up.supervisor import Service\n"
        f"shared = dict(logs=Path({str(tmp_path)!r}), environment=dict(os.environ), tell=lambda *_: None)\n"
        f"family = Service('family', (sys.executable, '-c', {FAMILY + 'time.sleep(600)'!r}), stop_seconds=0.5, **shared)\n"
        f"polite = Service('polite', (sys.executable, '-c', {POLITE!r}), stop_seconds=10, **shared)\n"
        "family.start()\n"
        "polite.start()\n"
        "time.sleep(600)\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()})
    try:
        logs = [tmp_path / "family.log", tmp_path / "polite.log"]
        wait_for(lambda: all(log.exists() and "up\n" in log.read_text() for log in logs), "both are up")
        left = psutil.Process(supervisor.pid).children(recursive=True)
        assert len(left) == 6  # two guards, two commands, two children
        supervisor.send_signal(number)
        supervisor.wait(60)
    finally:
        supervisor.kill()
        supervisor.wait()
    wait_for(lambda: not any(lives(process.pid) for process in left), "all have ended")
    assert "batch ended" in logs[1].read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="a process learns of its parent's end on Linux only")
def test_a_guard_that_is_killed_takes_its_command_along(desk: Desk) -> None:
    desk.up(python("a", "import os; print('pid', os.getpid(), flush=True); " + LONG))
    pid = int(desk.log("a").split("pid ")[1].split()[0])
    guard = psutil.Process(pid).parent()
    assert guard is not None
    guard.kill()
    wait_for(lambda: not lives(pid), "the command has ended")


# Logs


def test_a_log_is_bounded_and_loses_the_oldest_only(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "a.log", limit=1000, kept=2)
    for n in range(100):
        log.write(f"{n:02d}".encode() * 49 + b"x\n")
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == ["a.log", "a.log.1", "a.log.2"]
    assert all(path.stat().st_size <= 1000 for path in kept)
    text = "".join(path.read_text() for path in reversed(kept))
    lines = [int(line[:2]) for line in text.splitlines()]
    assert lines == list(range(lines[0], 100)) and len(lines) > 18


def test_a_process_that_never_stops_writing_can_be_ended(desk: Desk) -> None:
    desk.start(python("a", "print('up', flush=True)\nwhile True: print('x' * 100)"))
    wait_for(lambda: desk.services["a"].log.exists() and desk.services["a"].log.stat().st_size > 10**6, "it writes")
    desk.end("a")
    assert desk.texts("a")[-1] == "ended"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("--- x started: a\nfine\n", ""),
        ("adtally: error: old\n--- 1 started: a\nfine\n", ""),
        ("--- 1 started: a\nadtally: error: the disk  is full\nlater\n", "the disk is full"),
        (
            "--- 1 started: a\nTraceback\n  File x\nsqlite3.OperationalError: locked\n--- 1 ended\n",
            "sqlite3.OperationalError: locked",
        ),
    ],
)
def test_the_error_of_the_last_start_is_found(tmp_path: Path, text: str, expected: str) -> None:
    log = tmp_path / "a.log"
    log.write_text(text)
    assert last_error(log) == expected
