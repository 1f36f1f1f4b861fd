"""Which Python workers work on a query's batch, so that a batch that gets nowhere can be told from a slow one.

Each task leaves a file named by its process while it runs. That works on one machine only: on a cluster the workers are elsewhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pyspark import SparkContext

from spark_jobs.session import is_one_machine

Item = TypeVar("Item")
Result = TypeVar("Result")


class Activity:
    """The Spark jobs of one query's batches. ``jobs`` counts those that began; ``is_running``: one runs now.

    ``was_ended`` is set by whoever killed the workers of a job.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.jobs = 0
        self.is_running = False
        self.was_ended = False

    def run(
        self, context: SparkContext, items: Sequence[Item], slices: int, work: Callable[[Iterable[Item]], Iterable[Result]]
    ) -> list[Result]:
        """Run ``work`` over ``items`` in ``slices`` tasks; returns the results in the order of the items."""
        parts = context.parallelize(items, slices)
        if not is_one_machine(str(context.master)):
            return parts.mapPartitions(work).collect()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        folder = str(self._folder)
        self.jobs += 1
        self.is_running = True
        try:
            return parts.mapPartitions(lambda part: _marked(folder, work, part)).collect()
        finally:
            self.is_running = False

    def workers(self) -> set[int]:
        """The processes of the tasks that run now, or were killed."""
        try:
            return {int(name) for name in os.listdir(self._folder)}
        except FileNotFoundError:
            return set()


def _marked(folder: str, work: Callable[[Iterable[Item]], Iterable[Result]], part: Iterable[Item]) -> Iterator[Result]:
    mark = Path(folder) / str(os.getpid())
    mark.touch()
    try:
        yield from work(part)
    finally:
        mark.unlink(missing_ok=True)
