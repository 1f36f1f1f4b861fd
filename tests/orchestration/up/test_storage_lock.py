"""What machines agree on in the Postgres that they share, on a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psycopg2
import pytest
import terminal
from dagster._core.storage.tags import GRPC_INFO_TAG
from postgres import Postgres, throwaway_postgres

from orchestration.demo import demo_settings
from orchestration.up.daemon import LostMachines, TakesTurns
from orchestration.up.instance import POOLS, home_instance, initialize_pool_limits, write_instance_config
from orchestration.up.services import socket_path
from orchestration.up.storage_lock import DAEMON, QUEUE, StorageLock, machine_lock
from spark_jobs.config import Settings, load_settings

HOLDER = """
import sys, time
from orchestration.up.storage_lock import StorageLock
from spark_jobs.config import load_settings
lock = StorageLock(load_settings(), sys.argv[1])
print(lock.try_acquire(), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with throwaway_postgres() as made:
        yield made


@pytest.fixture
def shared(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a machine that shares Dagster's storage."""
    monkeypatch.setenv("ADTALLY_DAGSTER_STORAGE", postgres.url)
    return load_settings(home=tmp_path / "home")


def test_one_machine_has_a_lock_and_the_next_one_gets_it_when_its_process_is_killed(shared: Settings) -> None:
    url = shared.dagster_storage
    assert url is not None
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, DAEMON],
        env=terminal.environment(ADTALLY_DAGSTER_STORAGE=url.get_secret_value()),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    lock = StorageLock(shared, DAEMON)
    assert not lock.try_acquire() and not lock.is_held()
    assert StorageLock(shared, QUEUE).try_acquire()
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 10
    while not lock.try_acquire():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert lock.is_held()
    assert lock.try_acquire()  # once more
    lock.release()
    assert not lock.is_held()


def test_a_broken_connection_is_a_lost_lock(shared: Settings, postgres: Postgres) -> None:
    lock = StorageLock(shared, DAEMON)
    assert lock.try_acquire()
    ender = psycopg2.connect(postgres.url.replace("+psycopg2", ""))
    ender.autocommit = True
    with ender.cursor() as cursor:
        cursor.execute("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()")
    ender.close()
    assert not lock.is_held()
    assert lock.try_acquire() and lock.is_held()
    lock.close()


def test_a_storage_that_does_not_answer_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    address = "postgresql+psycopg2://adtally:not-to-be-shown@127.0.0.1:1/dagster"
    env = terminal.environment(ADTALLY_DAGSTER_STORAGE=address)
    done = terminal.run("--home", "home", "up", "--port", "0", "--no-ingest", cwd=tmp_path, env=env)
    assert done.status == 2
    assert done.error.startswith("Dagster's storage does not answer: connection to server at")
    assert "not-to-be-shown" not in done.error


def test_a_demo_has_its_runs_in_its_own_home(shared: Settings, tmp_path: Path) -> None:
    assert demo_settings(tmp_path).dagster_storage is None


def test_without_a_shared_storage_every_lock_is_free(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "home")
    one, other = StorageLock(settings, DAEMON), StorageLock(settings, DAEMON)
    assert one.try_acquire() and other.try_acquire() and one.is_held()


def test_the_instance_is_in_the_database_and_its_address_in_no_file(shared: Settings, postgres: Postgres) -> None:
    with home_instance(shared) as instance:
        assert type(instance.run_storage).__name__ == "PostgresRunStorage"
        initialize_pool_limits(instance)
        initialize_pool_limits(instance)  # the second machine
        assert instance.event_log_storage.get_concurrency_keys() == set(POOLS)
        assert postgres.password not in str(instance.get_ref())
    files = [path for path in shared.home_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if postgres.password.encode() in path.read_bytes()]
    assert not [path for path in files if path.suffix == ".db"]
    assert postgres.password not in repr(shared) + str(shared.model_dump())


def test_the_storage_follows_the_setting_and_other_changes_are_kept(shared: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_instance_config(shared)
    path.write_text(path.read_text().replace("max_concurrent_runs: 3", "max_concurrent_runs: 9"))
    write_instance_config(shared)
    assert path.read_text().count("\nstorage:") == 1
    monkeypatch.delenv("ADTALLY_DAGSTER_STORAGE")
    with home_instance(load_settings(home=shared.home_path)) as instance:
        assert type(instance.run_storage).__name__ == "SqliteRunStorage"
        queue = instance.get_concurrency_config().run_queue_config
        assert queue is not None and queue.max_concurrent_runs == 9


def test_a_home_of_the_same_path_on_another_machine_has_another_socket(shared: Settings) -> None:
    shared.dagster_path.mkdir(parents=True)
    first = socket_path(shared)
    assert socket_path(shared) == first
    (shared.dagster_path / "machine_id").unlink()  # a new disk
    assert socket_path(shared) != first


def _run(instance: dg.DagsterInstance, socket: str) -> str:
    run_id = os.urandom(16).hex()
    tags = {GRPC_INFO_TAG: json.dumps({"host": "localhost", "socket": socket})}
    instance.add_run(dg.DagsterRun(job_name="job", run_id=run_id, status=dg.DagsterRunStatus.STARTED, tags=tags))
    return run_id


def test_runs_of_a_machine_that_is_gone_fail_at_the_second_look(shared: Settings) -> None:
    living = StorageLock(shared, machine_lock("/tmp/living.sock"))
    assert living.try_acquire()
    with home_instance(shared) as instance:
        own, other, gone = (_run(instance, each) for each in (str(socket_path(shared)), "/tmp/living.sock", "/tmp/gone.sock"))
        lost = LostMachines(shared)
        assert lost.settle(instance) == []
        assert lost.settle(instance) == [gone]
        assert lost.settle(instance) == []
        left = instance.get_runs(dg.RunsFilter(run_ids=[own, other, gone], statuses=[dg.DagsterRunStatus.STARTED]))
        assert {run.run_id for run in left} == {own, other}
        for run_id in (own, other):
            instance.delete_run(run_id)
    living.close()


def test_a_machine_takes_no_run_while_another_one_does(shared: Settings) -> None:
    """Two that take at once would each see a free pool."""
    TakesTurns.queue = StorageLock(shared, QUEUE)
    other = StorageLock(shared, QUEUE)
    daemon = TakesTurns(2)
    assert other.try_acquire()
    assert list(daemon.run_iteration(None)) == []  # it does not even look at the queue
    other.release()
    with pytest.raises(AttributeError):
        list(daemon.run_iteration(None))
    assert other.try_acquire(), "the lock of the queue is not given back after an error"
    other.close()
