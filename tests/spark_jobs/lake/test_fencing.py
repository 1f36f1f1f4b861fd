"""Commits under leases: a replaced process cannot commit what it had decided; a commit of unknown outcome is made once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from terminal import ROOT, environment

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import StoreError
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.leases import Lease, held_leases
from spark_jobs.lake.locks import WRITE_EVENTS, WRITE_ORDERS, exclusive
from spark_jobs.lake.tables import HOUR_CLOSINGS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step

SECONDS = 2.0
# One row, by a process that stops itself: before delta-rs decides ("early"), or when all is decided and the put is next ("late").
WRITE = """
import os, signal, sys
import pyarrow as pa
from deltalake import DeltaTable
from spark_jobs.config import load_settings
from spark_jobs.errors import LeaseLostError
from spark_jobs.lake import lake
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import WRITE_EVENTS, exclusive
from spark_jobs.lake.tables import HOUR_CLOSINGS
from spark_jobs.steps import Step
from test_fencing import closing

settings = load_settings(home=sys.argv[1], lakehouse=sys.argv[2], lease_seconds=float(sys.argv[3]))
real = DeltaTable.create_write_transaction

class Paused(DeltaTable):
    def create_write_transaction(self, *arguments, **named):
        print("stops", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        return real(self, *arguments, **named)

held = Lake(settings)
try:
    with exclusive(settings, WRITE_EVENTS):
        if sys.argv[4] == "late":
            held._open_newest(HOUR_CLOSINGS).__class__ = Paused
        else:
            print("stops", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        held.append(HOUR_CLOSINGS, closing("zombie"), Step.HOUR_CLOSINGS)
except LeaseLostError as error:
    print(error, flush=True)
    sys.exit(7)
"""


def closing(who: str) -> pa.Table:
    """One row of a table."""
    schema = HOUR_CLOSINGS.schema
    return pa.Table.from_pylist([{field.name: who if pa.types.is_string(field.type) else None for field in schema}], schema)


@pytest.fixture
def machines(prefix: str, tmp_path: Path) -> list[Settings]:
    made = [load_settings(home=tmp_path / name, lakehouse=prefix, lease_seconds=SECONDS) for name in "ab"]
    ensure_tables(made[0])
    return made


def rows(settings: Settings) -> list[str]:
    found = Lake(settings).rows(HOUR_CLOSINGS)
    names = [field.name for field in HOUR_CLOSINGS.schema if pa.types.is_string(field.type)]
    return sorted(found[names[0]].to_pylist())


@pytest.mark.parametrize("moment", ["early", "late"])
def test_a_zombie_adds_no_row(machines: list[Settings], moment: str) -> None:
    """It is stopped before, or after, the last check before its put, and continued when another has taken over."""
    here = str(Path(__file__).parent)
    known = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with subprocess.Popen(
        [sys.executable, "-c", WRITE, str(machines[0].home_path), machines[0].lakehouse_uri, str(SECONDS), moment],
        cwd=here,
        env=environment(**known, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), here])),
        stdout=subprocess.PIPE,
        text=True,
    ) as zombie:
        assert zombie.stdout is not None and zombie.stdout.readline() == "stops\n"
        with exclusive(machines[1], WRITE_EVENTS):
            os.kill(zombie.pid, signal.SIGCONT)  # the heir has written nothing to this table but its fence
            said = zombie.stdout.read()
            assert zombie.wait(60) == 7, said
            Lake(machines[1]).append(HOUR_CLOSINGS, closing("heir"), Step.HOUR_CLOSINGS)
        assert "the lease events.write of" in said and f"process {os.getpid()}" in said
    assert rows(machines[0]) == ["heir"]


def test_without_the_fence_the_zombie_would_add_a_row(machines: list[Settings]) -> None:
    """What delta-rs refuses is the same fence; the table alone would take both rows."""
    lake = Lake(machines[0])
    with exclusive(machines[0], WRITE_EVENTS):
        lake.append(HOUR_CLOSINGS, closing("first"), Step.HOUR_CLOSINGS)
    old = DeltaTable(lake.uri(HOUR_CLOSINGS))
    lake.append(HOUR_CLOSINGS, closing("without a lease"), Step.HOUR_CLOSINGS)
    old.create_write_transaction([], mode="append", schema=old.schema())
    assert rows(machines[0]) == ["first", "without a lease"]


def test_a_lease_that_another_thread_releases_meanwhile_stops_no_commit(
    machines: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streams of an ingest hold a lease each: one may end its batch in the moment in which the other one commits."""
    taken, released = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(machines[0], WRITE_ORDERS):
            taken.set()
            released.wait(60)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(hold)
        assert taken.wait(60)

        def listed(lakehouse: str) -> list[Lease]:
            found = held_leases(lakehouse)
            released.set()
            other.result(60)
            return found

        with exclusive(machines[0], WRITE_EVENTS):
            monkeypatch.setattr("spark_jobs.lake.fencing.held_leases", listed)
            assert Lake(machines[0]).append(HOUR_CLOSINGS, closing("events"), Step.HOUR_CLOSINGS)
    assert rows(machines[0]) == ["events"]


def test_a_process_under_one_lease_commits_in_many_threads(machines: list[Settings]) -> None:
    """Their commits carry the same fence, which Delta refuses side by side: each is tried again on the newest version."""

    def append(number: int) -> bool:
        return Lake(machines[0]).append(HOUR_CLOSINGS, closing(f"{number:02}"), Step.HOUR_CLOSINGS)

    with exclusive(machines[0], WRITE_EVENTS), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(append, range(24)))
    assert rows(machines[0]) == [f"{number:02}" for number in range(24)]


@pytest.mark.parametrize("place", ["disk", "store"], indirect=True)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("transaction", [None, Transaction("query", 1)])
def test_a_commit_of_unknown_outcome_is_made_once(
    place, tmp_path: Path, late: bool, transaction: Transaction | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers that a put failed, but it took effect: at once, or only when the next attempt is under way."""
    home = place.settings(tmp_path, lease_seconds=SECONDS)
    ensure_tables(home)
    real = DeltaTable.create_write_transaction
    pending: list[Callable[[], None]] = []

    def loses_the_answer(self: DeltaTable, *arguments: object, **named: object) -> None:
        if not pending:
            pending.append(lambda: real(DeltaTable(self.table_uri, version=self.version()), *arguments, **named))  # type: ignore[arg-type]
            if not late:
                pending[0]()
            raise StoreError("put failed: no answer in time")
        if late and len(pending) == 1:
            pending.append(pending[0])
            pending[0]()
        real(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(DeltaTable, "create_write_transaction", loses_the_answer)
    with exclusive(home, WRITE_EVENTS):
        assert Lake(home).append(HOUR_CLOSINGS, closing("one"), Step.HOUR_CLOSINGS, transaction=transaction)
    assert rows(home) == ["one"]
    assert len(pending) == 1 + late


def test_two_writers_of_one_table_on_a_disk(settings: Settings) -> None:
    began = time.monotonic()

    def append(number: int) -> bool:
        return Lake(settings).append(HOUR_CLOSINGS, closing(f"{number:02}"), Step.HOUR_CLOSINGS)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(append, range(20)))
    assert rows(settings) == [f"{number:02}" for number in range(20)]
    assert time.monotonic() - began < 30


def test_a_commit_on_an_older_version_is_refused_if_rows_contradict(settings: Settings) -> None:
    lake = Lake(settings)
    lake.append(HOUR_CLOSINGS, closing("a"), Step.HOUR_CLOSINGS)
    snapshot = lake.pin(HOUR_CLOSINGS)
    files = snapshot.files(HOUR_CLOSINGS)
    lake.commit(HOUR_CLOSINGS, Step.HOUR_CLOSINGS, base=snapshot.version(HOUR_CLOSINGS), remove=files)
    with pytest.raises(CommitFailedError):
        lake.commit(HOUR_CLOSINGS, Step.HOUR_CLOSINGS, base=snapshot.version(HOUR_CLOSINGS), remove=files)
