"""Batches of events made by the ingest's own code in this process, one landing file each: what a test with many batches can afford.

Only Spark's part is not there: the checkpoint that plans a batch, and the workers that its tasks run in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lake

from spark_jobs.config import Settings
from spark_jobs.contract.spec import Limits, to_micros
from spark_jobs.jobs.batch import BatchReport, Plan
from spark_jobs.jobs.events import EventsJob
from spark_jobs.sinks.delta import Transaction
from spark_jobs.sources.landing import LandingFile


class _Here:
    """Runs the tasks of a batch one after the other."""

    defaultParallelism = 1
    master = "local"

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self._items = list(items)

    @property
    def sparkContext(self) -> _Here:
        return self

    def parallelize(self, items: Iterable[Any], _slices: int) -> _Here:
        return _Here(items)

    def map(self, function: Callable[[Any], Any]) -> _Here:
        return _Here(map(function, self._items))

    def mapPartitions(self, function: Callable[[Any], Iterable[Any]]) -> _Here:
        return _Here(function(self._items))

    def collect(self) -> list[Any]:
        return self._items


class LocalEvents(EventsJob):
    """The stream of events of a home; each call of ``take`` is a batch."""

    def __init__(self, settings: Settings, query_id: str = "local") -> None:
        super().__init__(settings, lambda _: None)
        self._query_id = query_id
        self._next = 0
        self._path = Path()

    def take(self, records: Iterable[dict[str, Any]], region: str = "eu-west") -> BatchReport:
        """Land the records as a file and ingest it."""
        name = f"events/{region}/{self._query_id}-{self._next:04d}.jsonl"
        self._path = lake.land(self.settings, name, list(records))
        report = self._batch(_Here(), Transaction(self._query_id, self._next), time.monotonic())  # type: ignore[arg-type]
        self._first = False
        self._next += 1
        return report

    def _plan(self, transaction: Transaction) -> Plan:
        state = self._path.stat()
        limits = Limits(
            ingested_us=to_micros(datetime(2025, 6, 2, 12, tzinfo=UTC)) + transaction.batch_id * 1_000_000,
            earliest_us=to_micros(self.settings.earliest_event_time),
            future_skew_us=self.settings.future_skew // timedelta(microseconds=1),
            hour_grace_us=self.settings.hour_grace // timedelta(microseconds=1),
        )
        file = LandingFile(state.st_mtime_ns // 1_000_000, str(self._path), state.st_size)
        return Plan(limits, self.plan_prices(), [file], self.plan_rules())
