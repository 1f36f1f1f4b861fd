"""Signals are heard in any state, and a batch that gets nowhere loses its workers; with real processes, without Spark."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from spark_jobs.errors import StoppedError
from spark_jobs.ingest.watchdog import Activity, Watchdog
from spark_jobs.stopping import StopNow, StopRequest, lock_unless_stopped

ROOT = Path(__file__).resolve().parents[2]
_WAITS = """
import sys, time, threading
from spark_jobs import stopping
stopping._JAVA_SECONDS, stopping._PROCESS_SECONDS, stopping._ONE_SIGNAL_SECONDS = 1.0, 1.5, 0.2
lock = threading.Lock()
lock.acquire()
def end_java():
    print("java ended", flush=True)
"""
_STATES = {
    # what the process does -> its output and exit status after one signal
    "starting": ("with stopping.StopRequest(end_java, status=0) as stop:\n  with stop.at_once():", ["StopNow"], 0),
    "running": ("with stopping.StopRequest(end_java, status=0) as stop:\n  if True:", ["java ended"], 0),
    "one shot": ("with stopping.StopRequest(end_java, status=1) as stop:\n  if True:", ["java ended"], 1),
}


def _waiting(block: str) -> subprocess.Popen[str]:
    """A process in ``block`` that waits for what never comes."""
    code = f"{_WAITS}\ntry:\n" + textwrap.indent(f'{block}\n    print("ready", flush=True)\n    lock.acquire()', "  ")
    code += '\nexcept stopping.StopNow:\n  print("StopNow", flush=True)\n'
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("state", _STATES)
def test_one_signal_ends_a_process_that_waits_for_ever(state: str) -> None:
    block, said, status = _STATES[state]
    process = _waiting(block)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (out.splitlines(), process.returncode) == (said, status)


def test_a_second_signal_ends_it_at_once_unless_it_is_an_echo_of_the_first() -> None:
    process = _waiting("from spark_jobs import stopping as s\ns._JAVA_SECONDS = 600.0\n" + _STATES["running"][0])
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130


def test_a_signal_before_anything_waits_is_heard_too() -> None:
    stop = StopRequest()
    stop.event.set()
    with pytest.raises(StopNow), stop.at_once():
        pytest.fail("it went on")


def test_who_waits_for_a_lock_is_let_go(tmp_path: Path) -> None:
    stopping = threading.Event()
    path = tmp_path / "lock"
    with FileLock(path), pytest.raises(StoppedError):
        threading.Timer(0.3, stopping.set).start()
        with lock_unless_stopped(FileLock(path), stopping):
            pass
    with lock_unless_stopped(FileLock(path), threading.Event()):
        pass


@contextlib.contextmanager
def _workers(*programs: str) -> Iterator[tuple[int, list[psutil.Process]]]:
    """A process with a child for each program, as Java has Python workers."""
    starts = "".join(f"subprocess.Popen([sys.executable, '-c', {program!r}]);" for program in programs)
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess, sys, time;{starts}time.sleep(600)"])
    try:
        found = psutil.Process(parent.pid)
        while len(found.children()) < len(programs):
            time.sleep(0.02)
        yield parent.pid, sorted(found.children(), key=lambda child: child.pid)
    finally:
        for child in psutil.Process(parent.pid).children():
            child.kill()
        parent.kill()
        parent.wait()


def _running(folder: Path, *workers: psutil.Process) -> Activity:
    activity = Activity(folder)
    activity.is_running = True
    folder.mkdir()
    for worker in workers:
        (folder / str(worker.pid)).touch()
    return activity


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_stopped_worker_is_ended_and_one_that_works_is_not(tmp_path: Path) -> None:
    with _workers("import time; time.sleep(600)", "while True: pass") as (java, (sleeper, busy)):
        sleeper.suspend()
        stuck, works = _running(tmp_path / "stuck", sleeper), _running(tmp_path / "works", busy)
        watchdog = Watchdog(10.0, java, lambda: [stuck, works])
        before = busy.cpu_times().user
        for _ in range(3):
            watchdog.look(4.0)
            assert _lives(sleeper)
            while busy.cpu_times().user < before + 0.1:
                time.sleep(0.02)
            before = busy.cpu_times().user
        watchdog.look(4.0)
        psutil.wait_procs([sleeper], 5)
        assert [_lives(sleeper), _lives(busy)] == [False, True]
        assert stuck.was_ended and not works.was_ended


def test_a_task_that_ends_is_progress_and_a_batch_without_workers_is_left_while_another_works(tmp_path: Path) -> None:
    with _workers("import time; time.sleep(600)", "import time; time.sleep(600)") as (java, (first, second)):
        batch, waits = _running(tmp_path / "batch", first, second), _running(tmp_path / "waits")
        watchdog = Watchdog(10.0, java, lambda: [batch, waits])
        watchdog.look(0.0)
        watchdog.look(8.0)
        (tmp_path / "batch" / str(first.pid)).unlink()
        watchdog.look(8.0)
        watchdog.look(8.0)
        assert _lives(second) and not (batch.was_ended or waits.was_ended)
        watchdog.look(8.0)
        psutil.wait_procs([second], 5)
        assert [batch.was_ended, waits.was_ended, _lives(first), _lives(second)] == [True, False, True, False]


def test_where_no_worker_starts_what_starts_them_is_ended(tmp_path: Path) -> None:
    with _workers("import time; time.sleep(600)") as (java, (daemon,)):
        waits = _running(tmp_path / "waits")
        watchdog = Watchdog(10.0, java, lambda: [waits])
        watchdog.look(0.0)
        watchdog.look(9.0)
        assert _lives(daemon)
        watchdog.look(2.0)
        psutil.wait_procs([daemon], 5)
        assert waits.was_ended and not _lives(daemon)


def test_the_process_of_a_mark_is_ended_only_below_java(tmp_path: Path) -> None:
    with _workers("import time; time.sleep(600)") as (_, (other,)):
        stuck = _running(tmp_path / "stuck", other)
        watchdog = Watchdog(1.0, os.getpid() if not psutil.Process().children() else 2**22, lambda: [stuck])
        watchdog.look(0.0)
        watchdog.look(2.0)
        assert stuck.was_ended and _lives(other)
