"""End the Python workers of a batch that makes no progress, so that the batch fails and runs again.

Progress is a task that begins or ends, or processor time of a worker: a slow gzip file uses it, a stopped or deadlocked worker does
not. The watchdog never ends the driver's own work (locks, commits). While it runs, each task keeps a file named by its process id,
so that the watchdog knows the workers of a batch. This works on one machine only: a cluster has workers elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from spark_jobs.ingest.job import Item, Result

Task = Callable[[Iterable[Item]], Iterable[Result]]
_LEAST_CPU_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 5.0


class Activity:
    """The Spark jobs of one query's batches. ``jobs`` counts the started ones; ``is_running`` says whether one runs now.

    Whoever kills the workers of a job sets ``was_ended``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.jobs = 0
        self.is_running = False
        self.was_ended = False

    @contextlib.contextmanager
    def watched(self, task: Task[Item, Result]) -> Iterator[Task[Item, Result]]:
        """Yield ``task`` in a form that marks its worker. The block runs a job."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self.jobs += 1
        self.is_running = True
        try:
            yield partial(_marked, str(self._folder), task)
        finally:
            self.is_running = False

    def workers(self) -> set[int]:
        """Return the processes of the tasks that run now, or were killed."""
        try:
            return {int(name) for name in os.listdir(self._folder)}
        except FileNotFoundError:
            return set()


def _marked(folder: str, task: Task[Item, Result], part: Iterable[Item]) -> Iterator[Result]:
    mark = Path(folder) / str(os.getpid())
    mark.touch()
    try:
        yield from task(part)
    finally:
        mark.unlink(missing_ok=True)


@dataclass
class _Progress:
    """The state of a batch when it last made progress, and the time without progress since."""

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
        self._seen: dict[Activity, _Progress] = {}
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
        self._seen = {activity: self._seen.get(activity, _Progress()) for activity in running}
        for activity, seen in self._seen.items():
            workers = activity.workers()
            cpu = _cpu_seconds(workers)
            if (activity.jobs, workers) == (seen.jobs, seen.workers) and cpu - seen.cpu_seconds < _LEAST_CPU_SECONDS:
                seen.idle_seconds += passed_seconds
            else:
                self._seen[activity] = _Progress(activity.jobs, workers, cpu)
        stuck = [activity for activity, seen in self._seen.items() if seen.idle_seconds >= self._limit]
        for activity in stuck:
            workers = activity.workers()
            if workers:
                self._end(activity, workers)
        if stuck and len(stuck) == len(running) and not any(activity.workers() for activity in stuck):
            for activity in stuck:  # none of them has a worker: the process that starts workers is stuck
                self._end(activity, None)

    def _end(self, activity: Activity, workers: set[int] | None) -> None:
        """Kill those ``workers`` that descend from Java; None: all descendants of Java."""
        activity.was_ended = True
        self._seen[activity] = _Progress()
        with contextlib.suppress(psutil.Error):  # Java has ended
            for process in psutil.Process(self._java).children(recursive=True):
                if workers is None or process.pid in workers:
                    with contextlib.suppress(psutil.Error):
                        process.kill()


def _cpu_seconds(pids: Iterable[int]) -> float:
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total
