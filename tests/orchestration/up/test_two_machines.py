"""Two machines with a home each: a lakehouse and a landing folder on an object store, and a Postgres, are all that they share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from dagster._core.storage.tags import GRPC_INFO_TAG
from postgres import Postgres, throwaway_postgres
from store import upload

from orchestration.up.instance import home_instance
from orchestration.up.services import DAEMON, INGEST
from spark_jobs.config import Settings, load_settings
from tests.orchestration.up.deployment import Deployment, launch, processes_of, runs
from tests.orchestration.up.test_end_to_end import ENDED, differences, traffic

pytestmark = [pytest.mark.e2e, pytest.mark.services, pytest.mark.trial, pytest.mark.timeout(1800)]

TAKE_OVER_SECONDS = 60
_TICK = ("dagster/schedule_name", "dagster/sensor_name", ".dagster/scheduled_execution_time", "dagster/run_key")
JOBS = ("compaction", "vacuum", "marts_near_real_time", "settlement")
"""Jobs that a person starts at the same time: each of another pool."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with throwaway_postgres() as made:
        yield made


def stored_runs(settings: Settings) -> list[dg.DagsterRun]:
    """Return every run of the storage, with Dagster's hidden tags."""
    with home_instance(settings) as instance:
        return list(instance.get_runs())


def machines(found: list[dg.DagsterRun]) -> Counter[str]:
    """Count the runs by the socket of the code server that carried them out."""
    return Counter(json.loads(run.tags[GRPC_INFO_TAG])["socket"] for run in found if GRPC_INFO_TAG in run.tags)


def log(up: Deployment, name: str) -> str:
    path = up.home / "logs" / f"{name}.log"
    return path.read_text("utf-8", "replace") if path.exists() else ""


def kill(up: Deployment) -> None:
    """End a machine as a power cut does: all its processes at once."""
    found = [*processes_of(up.home), psutil.Process(up.process.pid)]
    for process in found:
        with_suppressed(process.suspend)  # none sees another one end
    for process in found:
        with_suppressed(process.kill)
    os.waitpid(up.process.pid, 0)


def with_suppressed(call: Any) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        call()


def test_two_machines_share_the_work_and_one_takes_over(tmp_path: Path, postgres: Postgres, prefix: str) -> None:
    changes = {
        "ADTALLY_LAKEHOUSE": f"{prefix}/lakehouse",
        "ADTALLY_LANDING": f"{prefix}/landing",
        "ADTALLY_DAGSTER_STORAGE": postgres.url,
        "ADTALLY_LEASE_SECONDS": "5",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in changes.items():
            patched.setenv(name, value)
        second_settings = load_settings(home=tmp_path / "second")
        truth = traffic(tmp_path / "traffic")
        with Deployment(tmp_path / "first", "--trigger", "1s", **changes) as first:
            first.wait_until_ready()
            first.wait_for("it runs the schedules", lambda: "this machine runs the schedules" in log(first, DAEMON), seconds=300)
            with Deployment(tmp_path / "second", "--trigger", "1s", **changes) as second:
                _share_and_take_over(first, second, second_settings, truth, tmp_path / "traffic")
    assert postgres.password not in "\n".join([*first.lines, *second.lines])
    for home in (first.home, second.home):
        assert not [path for path in home.rglob("*") if path.is_file() and postgres.password.encode() in path.read_bytes()]


def _share_and_take_over(first: Deployment, second: Deployment, settings: Settings, truth: dict[str, Any], folder: Path) -> None:
    web = second.wait_until_ready()
    second.wait_for("it waits to ingest", lambda: "another ingest (or fsck) runs" in log(second, INGEST), seconds=120)
    second.wait_for("it waits for the schedules", lambda: "another machine runs the schedules" in log(second, DAEMON), seconds=120)

    # the truth is that of this order: which of two records with one id is accepted depends on it
    files = sorted(folder.rglob("*.jsonl*"), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    later = folder.parent / "later"
    for path in files[len(files) // 2 :]:
        target = later / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    upload(folder, settings.landing_uri)
    second.wait_for("hours close", lambda: "closed_hours" in {run["jobName"] for run in runs(web)}, seconds=300)
    for job in JOBS:
        launch(web, job)
    second.wait_for("all runs end", lambda: {run["status"] for run in runs(web)} <= ENDED, seconds=600)
    shared_work = stored_runs(settings)
    assert [run for run in shared_work if not run.is_success] == [], second.report("runs failed")
    print("runs by machine", machines(shared_work))
    assert len(machines(shared_work)) == 2, second.report(f"only one machine carried out runs: {machines(shared_work)}")

    for job in JOBS:
        launch(web, job)
    second.wait_for("runs are in progress", lambda: "STARTED" in {run["status"] for run in runs(web)}, seconds=120)
    kill(first)
    gone = time.monotonic()
    second.wait_for("it runs the schedules", lambda: "this machine runs the schedules" in log(second, DAEMON), seconds=120)
    schedules_seconds = time.monotonic() - gone
    upload(later, settings.landing_uri)
    offered = sum(row["offered"] for row in truth["accounting"])
    second.wait_for("it ingests", lambda: " offered, " in log(second, INGEST), seconds=300)
    ingest_seconds = time.monotonic() - gone
    print(f"took over the schedules in {schedules_seconds:.0f} s, committed a batch after {ingest_seconds:.0f} s")
    assert schedules_seconds < TAKE_OVER_SECONDS

    second.wait_for("all is ingested", lambda: _offered(settings) == offered, seconds=300)
    asked = launch(web, "marts_near_real_time")

    def settled() -> bool:
        statuses = {run["runId"]: run["status"] for run in runs(web)}
        return statuses.get(asked) in ENDED and set(statuses.values()) <= ENDED

    second.wait_for("all runs end", settled, seconds=600)
    found = stored_runs(settings)
    again = {run.parent_run_id for run in found if run.is_success}
    failed = [run for run in found if not run.is_success and run.run_id not in again]
    assert failed == [], second.report("runs failed and were not made again")
    ticks = Counter(tuple(run.tags.get(key) for key in _TICK) for run in found if run.parent_run_id is None)
    doubled = {tick: count for tick, count in ticks.items() if count > 1 and (tick[2] or tick[3])}
    assert doubled == {}, second.report("a tick made several runs")
    assert differences(settings, truth) == []
    assert second.end(signal.SIGTERM) == 0, second.report("exit status")
    assert processes_of(second.home) == []


def _offered(settings: Settings) -> int:
    from spark_jobs.lake.lake import Lake
    from spark_jobs.lake.tables import BATCH_LEDGER

    rows = Lake(settings).rows(BATCH_LEDGER, "stream", "offered")
    return sum(row["offered"] for row in rows.to_pylist() if row["stream"] == "events")
