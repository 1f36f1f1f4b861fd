"""Dagster's code server: ``python -m orchestration.up.code_server SOCKET`` loads the definitions and serves them at SOCKET.

Before it starts, it prepares the instance, which nothing else may open meanwhile: two processes that create Dagster's databases at
the same time number their version twice, and Dagster never starts on such databases.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import dagster as dg
from dagster._cli.code_server import start_command
from dagster._core.events import JobFailureData, RunFailureReason
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES
from dagster._core.storage.tags import GRPC_INFO_TAG

from orchestration.up.instance import home_instance, initialize_pool_limits
from orchestration.up.services import LOCATION
from spark_jobs.config import load_settings

_MESSAGE = "The process of this run ended with the adtally up that it belonged to."
_FAILURE = JobFailureData(error=None, failure_reason=RunFailureReason.UNEXPECTED_TERMINATION)


def settle_lost_runs(instance: dg.DagsterInstance, socket: str) -> list[str]:
    """Mark the runs of an earlier code server at ``socket`` as failed and free their pools; return their ids.

    Such runs are left when ``adtally up`` or its code server is killed. They would keep their pools for ever; failed ones are
    retried.
    """
    lost = []
    for run in instance.get_runs(dg.RunsFilter(statuses=[*IN_PROGRESS_RUN_STATUSES, dg.DagsterRunStatus.CANCELING])):
        if json.loads(run.tags.get(GRPC_INFO_TAG, "{}")).get("socket") != socket:
            continue
        if run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, message=_MESSAGE)
        else:
            instance.report_run_failed(run, _MESSAGE, _FAILURE)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        lost.append(run.run_id)
    return lost


if __name__ == "__main__":
    _, socket = sys.argv
    with home_instance(load_settings()) as instance:
        initialize_pool_limits(instance)
        for run_id in settle_lost_runs(instance, socket):
            print(f"run {run_id} was lost when its adtally up was killed; it counts as failed")
    packages = Path(__file__).resolve().parents[2]  # the working directory, so that no other folder is searched first
    module = ("--module-name", "orchestration.definitions", "--working-directory", str(packages))
    start_command([*module, "--location-name", LOCATION, "--socket", socket, "--use-python-environment-entry-point"])
