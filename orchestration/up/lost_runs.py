"""Settles the runs that a killed ``adtally up`` has left behind in its instance, which would hold their pools for ever.

``python -m orchestration.up.lost_runs SOCKET``: runs that were processes of the code server at this socket, where none listens
now. They count as failed, so that those that may be retried are. Before that, Dagster's databases are made where there are none,
and the limits of all pools are set.
"""

from __future__ import annotations

import json
import sys

import dagster as dg
from dagster._core.events import JobFailureData, RunFailureReason
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES
from dagster._core.storage.tags import GRPC_INFO_TAG

from orchestration.up.instance import home_instance, initialize_pool_limits
from spark_jobs.config import load_settings

_MESSAGE = "The process of this run ended with the adtally up that it belonged to."


def settle_lost_runs(instance: dg.DagsterInstance, socket: str) -> list[str]:
    """Mark the lost runs as failed and free their pools; their ids."""
    statuses = [*IN_PROGRESS_RUN_STATUSES, dg.DagsterRunStatus.CANCELING]
    lost = [
        run
        for run in instance.get_runs(dg.RunsFilter(statuses=statuses))
        if json.loads(run.tags.get(GRPC_INFO_TAG, "{}")).get("socket") == socket
    ]
    for run in lost:
        if run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, message=_MESSAGE)
        else:
            reason = JobFailureData(error=None, failure_reason=RunFailureReason.UNEXPECTED_TERMINATION)
            instance.report_run_failed(run, _MESSAGE, reason)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return [run.run_id for run in lost]


if __name__ == "__main__":
    with home_instance(load_settings()) as opened:
        initialize_pool_limits(opened)
        for run_id in settle_lost_runs(opened, sys.argv[1]):
            print(run_id)
