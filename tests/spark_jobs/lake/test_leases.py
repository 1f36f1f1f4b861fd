"""Leases of a lakehouse in a real object store: one holder, takeover from the dead, and a store that is away for a while."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout
from store import fresh_prefix
from terminal import ROOT, environment

from services.launcher.processes import find
from services.launcher.trial import throwaway_s3
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import BusyError, LeaseLostError
from spark_jobs.lake.leases import Holder, Lease, Record, this_process
from spark_jobs.lake.locks import INGEST, LOCKS, UP, WRITE_EVENTS, exclusive, is_held
from spark_jobs.lake.places import SharedObject
from spark_jobs.lake.store import object_store

SECONDS = 2.0
FAR = Record(
    Holder("1" * 32, "far", 1, "1", "another boot", "1"),
    token=7,
    nonce="n",
    seconds=SECONDS,
    renewed=3,
    released=False,
    fenced=True,
    since="2020-01-01T00:00:00Z",
    command="adtally ingest",
)
"""The lease of a process of another machine."""


@pytest.fixture
def lakehouse(store: dict[str, str]) -> str:
    return fresh_prefix()


def no_fence(_lease: Lease) -> None:
    return


def machine(lakehouse: str, fence=no_fence, seconds: float = SECONDS) -> Lease:
    """The lease as another object: threads of one process are refused as other machines are."""
    return Lease(lakehouse, f"{lakehouse}/_adtally", "ingest", seconds, fence)


def shared(lakehouse: str) -> SharedObject:
    return SharedObject(f"{lakehouse}/_adtally/leases", "ingest.json", 60)


def record(lakehouse: str) -> Record:
    found = shared(lakehouse).read()
    assert found is not None
    return Record.parse(found[0])


def elsewhere(lakehouse: str, **changes: Any) -> Record:
    """Leave the lease as a process of another machine does that died with it."""
    mine = replace(FAR, **changes)
    assert shared(lakehouse).write(mine.encode(), "")
    return mine


@contextmanager
def keeps_renewing(lakehouse: str, left: Record) -> Iterator[None]:
    """Renew another machine's lease, as that machine does."""
    ended = threading.Event()

    def renew() -> None:
        number = 0
        while not ended.wait(SECONDS / 4):
            found = shared(lakehouse).read()
            number += 1
            shared(lakehouse).write(replace(left, nonce=str(number)).encode(), found[1] if found else "")

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment(**{name: value for name, value in os.environ.items() if name.startswith("AWS_")}),
        stdout=subprocess.PIPE,
        text=True,
    )


HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from spark_jobs.config import load_settings
from spark_jobs.lake.locks import INGEST, exclusive
with exclusive(load_settings(home=sys.argv[1], lakehouse=sys.argv[2], lease_seconds=float(sys.argv[3])), INGEST):
    print("held", flush=True)
    time.sleep(float(sys.argv[4]))
"""


def test_one_holder_and_a_token_that_grows(lakehouse: str) -> None:
    first, second = machine(lakehouse), machine(lakehouse)
    tokens = []
    for lease in (first, second, second, first):
        lease.acquire(timeout=0)
        tokens.append(lease.token)
        lease.release()
        assert record(lakehouse).released
    assert tokens == [1, 2, 3, 4]


def test_one_of_64_wins(lakehouse: str) -> None:
    """Each is a lease object of its own, so only the store's conditional puts decide."""
    first = machine(lakehouse)
    first.acquire(timeout=0)
    first.release()
    objects = [shared(lakehouse) for _ in range(64)]
    _, tag = objects[0].read() or (b"", "")
    barrier = threading.Barrier(64)

    def contend(number: int) -> bool:
        barrier.wait()
        return objects[number].write(b"%d" % number, tag) is not None

    with ThreadPoolExecutor(64) as pool:
        won = list(pool.map(contend, range(64)))
    assert sum(won) == 1
    assert objects[0].read()[0] == b"%d" % won.index(True)  # type: ignore[index]


def test_threads_of_a_process_exclude_each_other(lakehouse: str, tmp_path: Path) -> None:
    home = load_settings(home=tmp_path, lakehouse=lakehouse, lease_seconds=SECONDS)
    at_once, most = 0, 0
    guard = threading.Lock()

    def work(_number: int) -> None:
        nonlocal at_once, most
        with exclusive(home, WRITE_EVENTS):
            with guard:
                at_once += 1
                most = max(most, at_once)
            time.sleep(0.01)
            with guard:
                at_once -= 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(64)))
    assert most == 1
    with exclusive(home, INGEST), pytest.raises(BusyError), exclusive(home, INGEST):
        pass


def test_processes_exclude_each_other_and_the_message_names_the_holder(lakehouse: str, tmp_path: Path) -> None:
    home = load_settings(home=tmp_path / "b", lakehouse=lakehouse, lease_seconds=SECONDS)
    with run_python(HOLD, str(tmp_path / "a"), lakehouse, str(SECONDS), "60") as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        began = time.monotonic()
        expected = rf"another ingest \(or fsck\) runs on {lakehouse}: host \S+, process {process.pid}, since 20\d\d-"
        with pytest.raises(BusyError, match=expected), exclusive(home, INGEST):
            pass
        assert time.monotonic() - began < SECONDS / 2  # it is on this machine, so one look is enough
        assert is_held(home, INGEST)
        process.kill()
    began = time.monotonic()
    assert not is_held(home, INGEST)
    with exclusive(home, INGEST):
        assert time.monotonic() - began < SECONDS  # a dead process of this machine needs no waiting
        assert record(lakehouse).token == 2


def test_a_dead_machine_is_replaced_within_two_leases(lakehouse: str, caplog: pytest.LogCaptureFixture) -> None:
    left = elsewhere(lakehouse)
    fenced: list[int] = []
    lease = machine(lakehouse, lambda taken: fenced.append(taken.token))
    began = time.monotonic()
    lease.acquire(timeout=0)  # it is told once what it waits for
    took = time.monotonic() - began
    assert SECONDS <= took < 2 * SECONDS
    assert [line for line in caplog.messages if "host far, process 1" in line and "still runs" in line] == caplog.messages[-1:]
    assert fenced == [left.token + 1] and record(lakehouse).fenced
    lease.release()


@pytest.mark.services
def test_a_living_machine_is_left_alone(lakehouse: str) -> None:
    left = elsewhere(lakehouse)
    with keeps_renewing(lakehouse, left):
        began = time.monotonic()
        with pytest.raises(Timeout):
            machine(lakehouse).acquire(timeout=0)
        assert time.monotonic() - began < SECONDS  # a renewal is seen within a quarter of a lease
        with pytest.raises(Timeout):
            machine(lakehouse).acquire(timeout=2 * SECONDS)
        assert machine(lakehouse).is_taken()
    assert record(lakehouse).holder == left.holder


@pytest.mark.services
def test_wall_clocks_decide_nothing(lakehouse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiter whose clock is an hour ahead, or behind, takes over neither sooner nor later."""
    left = elsewhere(lakehouse, since="1999-01-01T00:00:00Z")
    real = time.time
    for shift in (3600.0, -3600.0):
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        with keeps_renewing(lakehouse, left), pytest.raises(Timeout):
            machine(lakehouse).acquire(timeout=1.5 * SECONDS)
    began = time.monotonic()
    lease = machine(lakehouse)
    lease.acquire(timeout=3 * SECONDS)
    assert time.monotonic() - began >= SECONDS
    lease.release()


def test_a_takeover_killed_before_it_has_fenced_is_finished_by_the_next(lakehouse: str) -> None:
    elsewhere(lakehouse, released=True, fenced=False)
    fenced: list[int] = []

    def fails(_lease: Lease) -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        machine(lakehouse, fails).acquire(timeout=0)
    assert record(lakehouse).released and not record(lakehouse).fenced
    lease = machine(lakehouse, lambda taken: fenced.append(taken.token))
    lease.acquire(timeout=0)
    assert fenced == [9]
    lease.release()
    machine(lakehouse, fails).acquire(timeout=0)  # nothing is left to fence


def test_a_commit_of_unknown_outcome_makes_the_next_holder_fence(lakehouse: str) -> None:
    lease = machine(lakehouse)
    lease.acquire(timeout=0)
    lease.mark_dirty()
    lease.release()
    fenced: list[int | None] = []
    machine(lakehouse, lambda taken: fenced.append(taken.token)).acquire(timeout=0)
    assert fenced == [2]


def test_a_holder_that_was_replaced_learns_it(lakehouse: str) -> None:
    lease = machine(lakehouse)
    lease.acquire(timeout=0)
    assert lease.token is not None
    other = replace(FAR, token=lease.token + 1)
    found = shared(lakehouse).read()
    assert found is not None and shared(lakehouse).write(other.encode(), found[1])
    lease.check()  # within its time it need not ask
    time.sleep(SECONDS)
    with pytest.raises(LeaseLostError, match=r"the lease ingest of \S+ was taken over by host far, process 1, since .*noticed at"):
        lease.check()
    with pytest.raises(LeaseLostError):
        _ = lease.token
    lease.release()
    assert record(lakehouse) == other  # it has not released the other's lease


def test_a_put_of_unknown_outcome_is_decided_by_the_object(lakehouse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each put takes effect and its answer is lost, one after the other; then the store says that the tag is another."""
    from spark_jobs.errors import StoreError

    real = SharedObject.write
    lost = 0

    def loses_answers(self: SharedObject, data: bytes, tag: str) -> str | None:
        nonlocal lost
        new = real(self, data, tag)
        if new is not None and lost < 2:
            lost += 1
            raise StoreError("put failed: no answer in time")
        return new

    monkeypatch.setattr(SharedObject, "write", loses_answers)
    lease = machine(lakehouse)
    lease.acquire(timeout=0)
    assert (lost, lease.token) == (2, 1)
    lost = 0
    time.sleep(SECONDS * 1.1)
    lease.check()
    assert lost == 2
    lost = 0
    lease.release()
    assert record(lakehouse).released


@pytest.mark.services
def test_the_lease_outlasts_an_absence_of_the_store(tmp_path: Path) -> None:
    """The store stops for longer than the lease. Nobody could take it over, so the holder goes on with it."""
    with throwaway_s3(parent=tmp_path) as own:
        environment = own.environment()
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            lease = machine(fresh_prefix())
            lease.acquire(timeout=0)
            token, pid = lease.token, find(own.folder, "s3")[0].pid
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(3 * SECONDS, os.kill, (pid, signal.SIGCONT)).start()
            time.sleep(1.2 * SECONDS)
            began = time.monotonic()
            lease.check()
            assert time.monotonic() - began > SECONDS  # it waited for the store
            assert lease.token == token
            lease.release()
        finally:
            os.environ.update({name: value for name, value in before.items() if value is not None})


def test_a_home_of_a_local_lakehouse_has_files(tmp_path: Path) -> None:
    home = load_settings(home=tmp_path)
    with exclusive(home, *LOCKS):
        assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.lock")) == sorted(
            lock.file for lock in LOCKS
        )
    assert len({lock.lease for lock in LOCKS}) == len(LOCKS)


def test_up_is_of_the_machine(lakehouse: str, tmp_path: Path) -> None:
    homes = [load_settings(home=tmp_path / name, lakehouse=lakehouse) for name in "ab"]
    with exclusive(homes[0], UP), exclusive(homes[1], UP):
        pass


def test_what_the_object_says(lakehouse: str, tmp_path: Path) -> None:
    home: Settings = load_settings(home=tmp_path, lakehouse=lakehouse, lease_seconds=SECONDS)
    with exclusive(home, WRITE_EVENTS):
        found = json.loads(bytes(object_store(lakehouse).get("_adtally/leases/events.write.json").bytes()))
    assert found["holder"]["pid"] == os.getpid() == this_process().pid
    assert re.fullmatch(r"20\d\d-.*Z", found["since"])
    assert (found["token"], found["seconds"], found["released"]) == (1, SECONDS, False)
