"""Finding and ending processes, with small ones in place of Java."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from services.launcher.errors import ServiceError
from services.launcher.processes import cause, find, lives, mark, spawn, stop, wait_ready


@pytest.fixture
def java(tmp_path: Path) -> Path:
    """A program that takes Java's place: it does what its last argument, a shell command, says."""
    path = tmp_path / "java"
    path.write_text('#!/bin/sh\nfor last; do :; done\neval "$last"\n', "utf-8")
    path.chmod(0o755)
    return path


def started(java: Path, folder: Path, command: str, role: str = "main") -> psutil.Process:
    return spawn(java, folder, role, [command], output=folder / "logs" / "main.out")


def test_a_process_is_found_by_its_mark_alone(tmp_path: Path, java: Path) -> None:
    process = started(java, tmp_path, "while :; do sleep 0.1; done")
    try:
        wait_ready(process, lambda: None if find(tmp_path, "main") else "not there", seconds=10)
        assert [found.pid for found in find(tmp_path, "main")] == [process.pid]
        assert find(tmp_path, "other") == []
        assert find(tmp_path.parent, "main") == []
    finally:
        stop(process, seconds=0)
    assert find(tmp_path, "main") == []
    assert not lives(process)


def test_a_process_that_obeys_is_not_killed(tmp_path: Path, java: Path) -> None:
    process = started(java, tmp_path, "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done")
    output = tmp_path / "logs" / "main.out"
    wait_ready(process, lambda: None if output.read_text() else "not there", seconds=10)
    assert stop(process, seconds=20)
    assert not psutil.pid_exists(process.pid)


def test_a_process_that_does_not_end_is_killed(tmp_path: Path, java: Path) -> None:
    process = started(java, tmp_path, "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    output = tmp_path / "logs" / "main.out"
    wait_ready(process, lambda: None if output.read_text() else "not there", seconds=10)
    assert not stop(process, seconds=0.5)
    assert not psutil.pid_exists(process.pid)


def test_an_end_while_waiting_is_noticed_at_once(tmp_path: Path, java: Path) -> None:
    process = started(java, tmp_path, "exit 3")
    assert wait_ready(process, lambda: "closed", seconds=60) == "its process ended"


def test_the_time_of_waiting_is_limited(tmp_path: Path, java: Path) -> None:
    process = started(java, tmp_path, "while :; do sleep 0.1; done")
    try:
        assert wait_ready(process, lambda: "closed", seconds=0.3) == "not ready after 0 s: closed"
    finally:
        stop(process, seconds=0)


def test_a_java_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="cannot be started: No such file"):
        spawn(tmp_path / "none", tmp_path, "main", [], output=tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's end is Linux's")
def test_a_process_of_a_test_ends_with_the_test(tmp_path: Path, java: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from services.launcher.processes import spawn\n"
        "folder = Path(sys.argv[1])\n"
        "command = ['while :; do sleep 0.1; done']\n"
        "made = spawn(folder / 'java', folder, 'main', command, output=folder / 'out', ends_with_parent=True)\n"
        "print(made.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    process = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([process], timeout=10)
    assert find(tmp_path, "main") == []


def test_the_mark_names_folder_and_role() -> None:
    assert mark(Path("/a b/kafka"), "kafka") == "-Dadtally.service=/a b/kafka:kafka"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ""),
        ("starting\nlistening\n\n", "listening"),
        ("a\nERROR first\nINFO more\nERROR the   last\n\tat org.x(Y.java:1)\nINFO end\n", "ERROR the last"),
        ("java.lang.IllegalStateException: no\n\tat x\n\t... 5 more\n", "java.lang.IllegalStateException: no"),
        (
            "Caused by: java.net.BindException: Address already in use\n",
            "Caused by: java.net.BindException: Address already in use",
        ),
        ("ERROR " + "x" * 1000, "ERROR " + "x" * 294),
    ],
)
def test_the_cause_is_the_last_fault_else_the_last_line(tmp_path: Path, text: str, found: str) -> None:
    log = tmp_path / "a.log"
    log.write_text(text, "utf-8")
    assert cause(log) == found


def test_a_log_with_a_fault_goes_before_one_without(tmp_path: Path) -> None:
    first, second = tmp_path / "a.log", tmp_path / "b.out"
    first.write_text("INFO all is well\n", "utf-8")
    second.write_text("Error: Could not find or load main class x\n", "utf-8")
    assert cause(tmp_path / "none", first, second) == "Error: Could not find or load main class x"
    second.write_text("", "utf-8")
    assert cause(tmp_path / "none", first, second) == "INFO all is well"
