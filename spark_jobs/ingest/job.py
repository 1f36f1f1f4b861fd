"""Define a batch job and the executor of its tasks, without Spark. `query` connects both to Spark; tests run them in-process."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from spark_jobs.ingest.source import RecordSource

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs the tasks of a batch, ``parallelism`` at a time. If it ``shares_disk``, all tasks see the driver's files."""

    parallelism: int
    shares_disk: bool

    @property
    def was_cut_off(self) -> bool:
        """Whether somebody killed workers during the batch, so that its records did not make it fail."""

    def map(self, function: Callable[[Iterable[Item]], Iterable[Result]], items: Sequence[Item], slices: int) -> list[Result]:
        """Call ``function`` in at most ``slices`` tasks, each with some of the ``items``; return all results in their order."""

    def scatter(
        self, function: Callable[[Iterable[Item]], Iterable[tuple[int, Any]]], items: Sequence[Item], slices: int, parts: int
    ) -> Scattered:
        """Call ``function`` as `map` does. It yields values, each with the number of its part, below ``parts``."""


class Scattered(Protocol):
    """Values that tasks have made and that lie, by part, where they were made. A lost value is made again."""

    def gather(self, function: Callable[[int, Iterable[Any]], Result], parts: Sequence[int]) -> list[Result]:
        """Call ``function`` with the number and the values of each of the ``parts``, a task each; return the results in order."""

    def delete(self) -> None:
        """Delete the values."""


class BatchJob(ABC):
    """Reads the batches of one source into tables. No batch begins after ``stopping`` is set."""

    min_trigger_seconds = 0.0  # the shortest time between two batches

    def __init__(self, source: RecordSource) -> None:
        self.source = source
        self.stopping = threading.Event()

    @abstractmethod
    def check_agreement(self) -> None:
        """Raise TableCorruptionError if the source's checkpoint and the job's tables do not agree (`ingest/agreement.py`)."""

    @abstractmethod
    def run_batch(self, batch_id: int, executor: Executor) -> None:
        """Read a batch that the source has planned, and commit it. Completes a batch that ran before, and never counts it twice."""
