"""Which Python workers run the tasks of a query's batch, so that the watchdog can tell a stuck batch from a slow one.

While it runs, each task keeps a file named by its process id. This works on one machine only: a cluster has workers elsewhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Task = Callable[[Iterable[Item]], Iterable[Result]]


class Activity:
    """The Spark jobs of one query's batches. ``jobs`` counts those that began; ``is_running``: one runs now.

    Whoever kills the workers of a job sets ``was_ended``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.jobs = 0
        self.is_running = False
        self.was_ended = False

    @contextmanager
    def watched(self, task: Task[Item, Result]) -> Iterator[Task[Item, Result]]:
        """Yield ``task`` in a form that marks its worker; meanwhile a job is running."""
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
