"""Dagster's daemon, which burns less CPU while nothing happens: ``python -m orchestration.up.daemon``, with its own arguments.

Machines that share Dagster's storage run one each. One of them runs the schedules, the sensors and the watch over runs; it also
settles the runs of machines that are gone. Every machine takes runs from the queue, one at a time and one machine at a time, and
carries them out itself. If the first machine goes, another one takes its place.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from typing import Any

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._daemon import controller
from dagster._daemon.cli import main
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon
from dagster._grpc import server_watcher
from dagster_shared.error import SerializableErrorInfo

from orchestration.partitions import hourly_partitions
from orchestration.up.code_server import runs_by_socket, settle_lost_runs
from orchestration.up.instance import home_instance, request_reload
from orchestration.up.services import WATCH_SECONDS, socket_path
from orchestration.up.storage_lock import DAEMON, QUEUE, StorageLock, machine_lock
from spark_jobs.config import Settings, load_settings
from spark_jobs.failure import one_line

# Each reload reads and parses all definitions. It is not needed: the watcher notices when the code server has new ones.
controller.RELOAD_WORKSPACE_INTERVAL = 24 * 3600
server_watcher.WATCH_INTERVAL = WATCH_SECONDS

_TURN_SECONDS = 2.0
_REST_SECONDS = 15.0  # longer than it takes to start a run, and then another machine's turn
_WATCH_SECONDS = 8.0  # shorter than the time in which the database misses a machine
_RELOAD_SECONDS = 20.0


class TakesTurns(QueuedRunCoordinatorDaemon):
    """Dagster's queue where machines share it: it takes one run at a time while it holds the lock of the queue.

    After that it rests, so that another machine takes the next run.
    """

    queue: StorageLock
    _rests_until = 0.0

    def run_iteration(self, *arguments: Any, **options: Any) -> Generator[Any, None, None]:
        """See Dagster's class. Does nothing while another machine takes a run, or while it rests."""
        if time.monotonic() >= self._rests_until and self.queue.try_acquire():
            try:
                yield from super().run_iteration(*arguments, **options)
            finally:
                self.queue.release()

    def _get_runs_to_dequeue(self, *arguments: Any, **options: Any) -> list[DagsterRun]:
        taken = super()._get_runs_to_dequeue(*arguments, **options)[:1]
        if taken:
            self._rests_until = time.monotonic() + _REST_SECONDS
        return taken


class LostMachines:
    """Finds machines that have runs in progress and no longer hold their lock."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._own = settings, str(socket_path(settings))
        self._missing: set[str] = set()

    def settle(self, instance: DagsterInstance) -> list[str]:
        """Mark the runs of each machine that was already missing at the last call as failed; return their ids.

        Two calls, because all machines lose their locks for a moment when the database restarts.
        """
        missing = {socket for socket in runs_by_socket(instance) if socket != self._own and self._is_missing(socket)}
        lost = [run_id for socket in missing & self._missing for run_id in settle_lost_runs(instance, socket)]
        self._missing = missing
        return lost

    def _is_missing(self, socket: str) -> bool:
        lock = StorageLock(self._settings, machine_lock(socket))
        try:
            return lock.try_acquire()
        finally:
            lock.close()


def _wait_for_place(settings: Settings, place: StorageLock) -> None:
    """Carry out queued runs until this machine is the one that runs schedules and sensors."""
    print("another machine runs the schedules and sensors; this one takes runs from the queue", flush=True)
    workspace = WorkspaceFileTarget([str(settings.dagster_path / "workspace.yaml")])
    with home_instance(settings) as instance, WorkspaceProcessContext(instance, workspace) as context:
        queue, partitions = TakesTurns(_TURN_SECONDS), _FirstPartition(settings)
        while not place.try_acquire():
            if instance.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.QUEUED])) and partitions.is_current():
                for problem in queue.run_iteration(context):
                    if isinstance(problem, SerializableErrorInfo):
                        print(f"no run was taken from the queue: {one_line(problem.message)}", flush=True)
            time.sleep(_TURN_SECONDS)


class _FirstPartition:
    """Asks for new definitions if the lakehouse has got hours before the first partition, which queued runs may be of.

    The sensor that does so on the first machine reaches the definitions of that machine only.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._start = settings, hourly_partitions(settings).start
        self._look_at = self._current_at = 0.0

    def is_current(self) -> bool:
        """Return whether the definitions have all partitions. It looks every _RELOAD_SECONDS, the time that a reload has."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at, before, self._start = now + _RELOAD_SECONDS, self._start, hourly_partitions(self._settings).start
            if self._start < before:
                request_reload(self._settings)
                self._current_at = self._look_at
        return now >= self._current_at


def _watch(settings: Settings, place: StorageLock) -> None:
    """Settle the runs of lost machines; end this process when it has lost its place, and another machine may have it."""
    lost = LostMachines(settings)
    with home_instance(settings) as instance:
        while place.is_held():
            try:
                for run_id in lost.settle(instance):
                    print(f"run {run_id} was lost with its machine; it counts as failed", flush=True)
            except Exception as error:  # the database does not answer; `is_held` tells whether the lock is lost
                print(f"lost runs were not looked for: {error}", flush=True)
            time.sleep(_WATCH_SECONDS)
    print("adtally: error: the connection to Dagster's storage broke, and with it the right to run schedules", flush=True)
    os._exit(1)


def _share(settings: Settings) -> None:
    """Take part in a storage that machines share. Returns when this machine is to run the schedules and sensors."""
    TakesTurns.queue = StorageLock(settings, QUEUE)
    controller.QueuedRunCoordinatorDaemon = TakesTurns  # type: ignore[attr-defined]
    place = StorageLock(settings, DAEMON)
    if not place.try_acquire():
        _wait_for_place(settings, place)
    print("this machine runs the schedules and sensors", flush=True)
    threading.Thread(target=_watch, args=[settings, place], daemon=True, name="place").start()


if __name__ == "__main__":
    settings = load_settings()
    if settings.dagster_storage is not None:
        _share(settings)
    main()
