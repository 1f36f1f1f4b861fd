"""Ends the Python workers of a batch that makes no progress, so that the batch fails and can be made again.

Progress is a task that begins or ends, or processor time of a worker: a slow gzip file uses it, a stopped or deadlocked worker does
not. What the driver does itself (locks, commits) is never ended.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psutil

from spark_jobs.ingest.activity import Activity

_LEAST_CPU_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 5.0


@dataclass
class _Seen:
    """What a batch had done when it last made progress, and for how long it has made none since."""

    jobs: int = -1
    workers: set[int] = field(default_factory=set)
    cpu_seconds: float = 0.0
    idle_seconds: float = 0.0


class Watchdog:
    """Watches activities from a thread. ``java`` is the process below which the workers run. Use as a context manager."""

    def __init__(self, limit_seconds: float, java: int, activities: Callable[[], Iterable[Activity]]) -> None:
        self._limit = limit_seconds
        self._pause = min(_LONGEST_PAUSE_SECONDS, limit_seconds / 10)
        self._java = java
        self._activities = activities
        self._seen: dict[Activity, _Seen] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_LONGEST_PAUSE_SECONDS)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._pause):
            now = time.monotonic()
            self.look(min(now - last, 2 * self._pause))  # if this process was stopped, its workers may have been as well
            last = now

    def look(self, passed_seconds: float) -> None:
        """Look at all activities once, ``passed_seconds`` after the last time, and end the workers of those that are stuck."""
        running = [activity for activity in self._activities() if activity.is_running]
        self._seen = {activity: self._seen.get(activity, _Seen()) for activity in running}
        for activity, seen in self._seen.items():
            workers = activity.workers()
            cpu = _cpu_seconds(workers)
            if (activity.jobs, workers) == (seen.jobs, seen.workers) and cpu - seen.cpu_seconds < _LEAST_CPU_SECONDS:
                seen.idle_seconds += passed_seconds
            else:
                self._seen[activity] = _Seen(activity.jobs, workers, cpu)
        stuck = [activity for activity, seen in self._seen.items() if seen.idle_seconds >= self._limit]
        for activity in stuck:
            workers = activity.workers()
            if workers:
                self._end(activity, workers)
        if stuck and len(stuck) == len(running) and not any(activity.workers() for activity in stuck):
            for activity in stuck:  # no worker was started for any of them: that which starts workers is stuck
                self._end(activity, None)

    def _end(self, activity: Activity, workers: set[int] | None) -> None:
        """Kill the workers, of all that run below Java; None: all of these."""
        activity.was_ended = True
        self._seen[activity] = _Seen()
        for process in processes_below(self._java):
            if workers is None or process.pid in workers:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def processes_below(parent: int) -> list[psutil.Process]:
    """All processes that descend from ``parent``; none where it is gone."""
    try:
        return psutil.Process(parent).children(recursive=True)
    except psutil.Error:
        return []


def _cpu_seconds(pids: Iterable[int]) -> float:
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total
