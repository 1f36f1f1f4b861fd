"""Dagster's code server: ``python -m orchestration.up.code_server SOCKET`` loads the definitions and serves them at SOCKET.

Before it starts, it prepares the instance, which nothing else may open meanwhile: two processes that create Dagster's databases at
the same time number their version twice, and Dagster never starts on such databases. While it runs it holds the lock of its
machine, by which the others know that its runs are not lost.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import dagster as dg
from dagster._cli.code_server import start_command
from dagster._core.events import JobFailureData, RunFailureReason
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES
from dagster._core.storage.tags import GRPC_INFO_TAG

from orchestration.up.instance import home_instance, initialize_pool_limits
from orchestration.up.services import LOCATION
from orchestration.up.storage_lock import PREPARATION, StorageLock, machine_lock
from spark_jobs.config import Settings, load_settings

_MESSAGE = "The process of this run ended with the adtally up that it belonged to."
_FAILURE = JobFailureData(error=None, failure_reason=RunFailureReason.UNEXPECTED_TERMINATION)
_LOCK_SECONDS = 2.0


def settle_lost_runs(instance: dg.DagsterInstance, socket: str) -> list[str]:
    """Mark the runs of a code server at ``socket`` that has ended as failed and free their pools; return their ids.

    Such runs are left when ``adtally up``, its code server or its machine is killed. They would keep their pools for ever; failed
    ones are retried.
    """
    lost = []
    for run in runs_by_socket(instance).get(socket, []):
        if run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, message=_MESSAGE)
        else:
            instance.report_run_failed(run, _MESSAGE, _FAILURE)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        lost.append(run.run_id)
    return lost


def runs_by_socket(instance: dg.DagsterInstance) -> dict[str, list[dg.DagsterRun]]:
    """Return the runs in progress that code servers started, by the socket of each server."""
    found: dict[str, list[dg.DagsterRun]] = {}
    for run in instance.get_runs(dg.RunsFilter(statuses=[*IN_PROGRESS_RUN_STATUSES, dg.DagsterRunStatus.CANCELING])):
        if socket := json.loads(run.tags.get(GRPC_INFO_TAG, "{}")).get("socket"):
            found.setdefault(socket, []).append(run)
    return found


def _keep_machine_lock(settings: Settings, socket: str) -> None:
    lock = StorageLock(settings, machine_lock(socket))
    while True:
        with suppress(Exception):  # the database does not answer: try again
            lock.try_acquire()
        time.sleep(_LOCK_SECONDS)


if __name__ == "__main__":
    _, socket = sys.argv
    settings = load_settings()
    threading.Thread(target=_keep_machine_lock, args=[settings, socket], daemon=True, name="machine-lock").start()
    with StorageLock(settings, PREPARATION).held(), home_instance(settings) as instance:
        initialize_pool_limits(instance)
        for run_id in settle_lost_runs(instance, socket):
            print(f"run {run_id} was lost when its adtally up was killed; it counts as failed")
    packages = Path(__file__).resolve().parents[2]  # the working directory, so that no other folder is searched first
    module = ("--module-name", "orchestration.definitions", "--working-directory", str(packages))
    start_command([*module, "--location-name", LOCATION, "--socket", socket, "--use-python-environment-entry-point"])
