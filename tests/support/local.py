"""Batches of events and of orders made by the ingest's own code in this process, one landing file each: what a test can afford.

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
from spark_jobs.ingest.batch import BatchReport, Plan
from spark_jobs.ingest.contract.spec import Limits
from spark_jobs.ingest.events import EventsJob
from spark_jobs.ingest.files.landing import LandingFile
from spark_jobs.ingest.orders import OrdersJob
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.lake.commit import Transaction
from spark_jobs.units import to_micros


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


class _Local(StreamJob):
    """A stream of a home; each call of ``take`` is a batch."""

    def __init__(self, settings: Settings, query_id: str = "local") -> None:
        super().__init__(settings, lambda _: None)
        self._query_id = query_id
        self._next = 0
        self._paths: list[Path] = []

    def take(self, records: Iterable[dict[str, Any]], region: str = "eu-west") -> BatchReport:
        """Land the records as a file and ingest it."""
        return self.take_content(lake.lines(records), region=region)

    def take_content(self, content: bytes, ending: str = ".jsonl", region: str = "eu-west") -> BatchReport:
        """Land a file and ingest it."""
        name = f"{self.stream}/{region}/{self._query_id}-{self._next:04d}{ending}"
        self._paths = [lake.land(self.settings, name, content)]
        return self._run_next()

    def take_files(self, files: Iterable[Iterable[dict[str, Any]]], region: str = "eu-west") -> BatchReport:
        """Land several files and ingest them as one batch."""
        named = [(f"{self.stream}/{region}/{self._query_id}-{self._next:04d}-{at}.jsonl", file) for at, file in enumerate(files)]
        self._paths = [lake.land(self.settings, name, list(file)) for name, file in named]
        return self._run_next()

    def take_landed(self, paths: Iterable[Path]) -> BatchReport:
        """Ingest files that lie in the landing folder as one batch."""
        self._paths = list(paths)
        return self._run_next()

    def _run_next(self) -> BatchReport:
        report = self._batch(_Here(), Transaction(self._query_id, self._next), time.monotonic())  # type: ignore[arg-type]
        self._first = False
        self._next += 1
        return report

    def _plan(self, transaction: Transaction) -> Plan:
        states = [(path, path.stat()) for path in self._paths]
        limits = Limits(
            ingested_us=to_micros(datetime(2025, 6, 2, 12, tzinfo=UTC)) + transaction.batch_id * 1_000_000,
            earliest_us=to_micros(self.settings.earliest_event_time),
            future_skew_us=self.settings.future_skew // timedelta(microseconds=1),
            hour_grace_us=self.settings.hour_grace // timedelta(microseconds=1),
            rejects_kept=self.settings.max_reject_rows,
        )
        files = [LandingFile(state.st_mtime_ns // 1_000_000, str(path), state.st_size) for path, state in states]
        return Plan(limits, self.plan_prices(), files, self.plan_rules())


class LocalEvents(_Local, EventsJob):
    """The stream of events."""


class LocalOrders(_Local, OrdersJob):
    """The stream of orders."""
