"""Ingests of several machines on one lakehouse in an object store: one at a time, and one that was replaced writes nothing more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from store import variables
from terminal import PROGRAM, ROOT, environment
from truths import assert_truth

from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, TABLES

pytestmark = [pytest.mark.services, pytest.mark.trial, pytest.mark.timeout(900)]

SECONDS = 4.0


@pytest.fixture
def machines(prefix: str, tmp_path: Path) -> list[Settings]:
    """Two machines, whose disks are separate but for the landing folder."""
    named = {"lakehouse": prefix, "landing": tmp_path / "landing", "lease_seconds": SECONDS}
    return [load_settings(home=tmp_path / name, **named) for name in ("first", "second")]


def start(machine: Settings, *options: str) -> subprocess.Popen[str]:
    known = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    more = {"ADTALLY_LEASE_SECONDS": str(SECONDS), "ADTALLY_MAX_FILES_PER_BATCH": "4"}
    return subprocess.Popen(
        [*PROGRAM, "ingest", *options],
        cwd=ROOT,
        env=environment(**known, **variables(machine), **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.communicate()


def wait_for(what: Callable[[], bool], seconds: float = 400) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.2)


def versions(machine: Settings) -> dict[str, int | None]:
    lake = Lake(machine)
    return {name: lake.version(table) for name, table in TABLES.items()}


def batches(machine: Settings) -> int:
    lake = Lake(machine)
    return lake.rows(BATCH_LEDGER).num_rows if lake.exists(BATCH_LEDGER) else 0


def test_an_ingest_that_was_stopped_and_replaced(machines: list[Settings], tmp_path: Path) -> None:
    """The first is stopped beyond its lease, the second ingests what came meanwhile; then the first is continued."""
    first, second = machines
    truth = json.loads(simulate(tmp_path / "made", 4_000, seed=91, lines_per_file=400, click_rate=0.2, conversion=0.4).as_json())
    files = [path for path in (tmp_path / "made").glob("events/**/*") if path.is_file()]
    files.sort(key=lambda path: (path.stat().st_mtime_ns, str(path)))
    for path in files[len(files) // 2 :]:  # the truth is of files in this order
        target = tmp_path / "later" / path.relative_to(tmp_path / "made")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    shutil.copytree(tmp_path / "made", first.landing_path)
    zombie = start(first, "--continuous")
    try:
        wait_for(lambda: batches(first) > 0)
        os.kill(zombie.pid, signal.SIGSTOP)
        shutil.copytree(tmp_path / "later", first.landing_path, dirs_exist_ok=True)
        heir = start(second)
        _, said = heir.communicate(timeout=400)
        assert heir.returncode == 0, said[-3000:]
        assert "waiting up to" in said and f"process {zombie.pid}" in said
        assert_truth(second, truth)
        before, at = versions(second), Lake(second).rows(EVENTS).num_rows
        os.kill(zombie.pid, signal.SIGCONT)
        _, said = zombie.communicate(timeout=120)
    finally:
        end(zombie)
    assert zombie.returncode == 1, said[-3000:]
    assert "was taken over by" in said and f"process {heir.pid}" in said and "noticed at" in said
    assert "Traceback" not in said
    assert versions(second) == before and Lake(second).rows(EVENTS).num_rows == at


def test_two_ingests_at_once(machines: list[Settings]) -> None:
    first, second = machines
    simulate(first.landing_path, 4_000, seed=92, lines_per_file=500)
    running = start(first, "--continuous")
    try:
        wait_for(lambda: batches(first) > 0)
        refused = start(second)
        _, said = refused.communicate(timeout=120)
        assert refused.returncode == 1 and f"process {running.pid}" in said and "another ingest (or fsck) runs" in said
        assert said.count("\n") == 1
        running.kill()
        began = time.monotonic()
        done = start(second)
        _, said = done.communicate(timeout=300)
        assert done.returncode == 0, said[-3000:]
        assert time.monotonic() - began < 300
    finally:
        end(running)
