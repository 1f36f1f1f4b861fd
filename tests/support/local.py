"""Batches of events and of orders made by the ingest's own code in this process, one landing file each: what a test can afford.

Only Spark's part is missing: the checkpoint that plans a batch, and the workers that its tasks run in.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lake

from benchmarks.in_process import LocalExecutor
from spark_jobs.config import Settings
from spark_jobs.ingest.batch import BatchReport
from spark_jobs.ingest.events import EventsJob
from spark_jobs.ingest.files.landing import LandingFile
from spark_jobs.ingest.orders import OrdersJob
from spark_jobs.ingest.source import FilesSource, Planned
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.units import SECOND_US, to_micros


class _ChosenFiles(FilesSource):
    """The landing files that a test names. Its batches are planned a second apart, on 2025-06-02 from 12:00 UTC."""

    def __init__(self, settings: Settings, stream: str, query_id: str) -> None:
        super().__init__(settings, stream)
        self.paths: list[Path] = []
        self._query_id = query_id

    def query_id(self) -> str:
        return self._query_id

    def plan(self, batch_id: int) -> Planned:
        states = [(path, path.stat()) for path in self.paths]
        files = [LandingFile(state.st_mtime_ns // 1_000_000, str(path), state.st_size) for path, state in states]
        return Planned(to_micros(datetime(2025, 6, 2, 12, tzinfo=UTC)) + batch_id * SECOND_US, files)


class _Local(StreamJob[Any]):
    """A stream of a home; each call of a ``take`` method is a batch."""

    def __init__(self, settings: Settings, query_id: str = "local") -> None:
        self._files = _ChosenFiles(settings, self.stream, query_id)
        self._reports: list[BatchReport] = []
        super().__init__(settings, self._reports.append, self._files)

    def take(self, records: Iterable[dict[str, Any]], region: str = "eu-west") -> BatchReport:
        """Land the records as a file and ingest it."""
        return self.take_content(lake.lines(records), region=region)

    def take_content(self, content: bytes, ending: str = ".jsonl", region: str = "eu-west") -> BatchReport:
        """Land a file and ingest it."""
        return self.take_landed([lake.land(self.settings, f"{self._next_name(region)}{ending}", content)])

    def take_files(self, files: Iterable[Iterable[dict[str, Any]]], region: str = "eu-west") -> BatchReport:
        """Land several files and ingest them as one batch."""
        name = self._next_name(region)
        return self.take_landed([lake.land(self.settings, f"{name}-{at}.jsonl", list(file)) for at, file in enumerate(files)])

    def take_landed(self, paths: Iterable[Path]) -> BatchReport:
        """Ingest files of the landing folder as one batch."""
        self._files.paths = list(paths)
        self.run_batch(len(self._reports), LocalExecutor())
        return self._reports[-1]

    def _next_name(self, region: str) -> str:
        return f"{self.stream}/{region}/{self._files.query_id()}-{len(self._reports):04d}"


class LocalEvents(_Local, EventsJob):
    """The stream of events."""


class LocalOrders(_Local, OrdersJob):
    """The stream of orders."""
