"""Batches of landing files without Spark: the ingest's own jobs and sources, and a checkpoint of the form that Spark writes.

Only the scheduling is replaced: tasks run in this process, one after the other. So a home takes a tenth of a second, and a
property test can try hundreds. The tests with a real Spark say that the two agree.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from local import LocalExecutor

from spark_jobs.config import Settings
from spark_jobs.ingest.batch import BatchReport
from spark_jobs.ingest.events import EventsJob
from spark_jobs.ingest.orders import OrdersJob
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.steps import Step

JOBS: dict[str, type[StreamJob[Any]]] = {"events": EventsJob, "orders": OrdersJob}


class Checkpoint:
    """The checkpoint of a stream of files, of which ``commits`` says what has ended."""

    def __init__(self, settings: Settings, stream: str) -> None:
        self._folder = settings.checkpoints_path / stream
        if not (self._folder / "metadata").exists():
            self._write("metadata", json.dumps({"id": str(uuid.uuid4())}))

    def _write(self, name: str, *lines: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))

    @property
    def planned(self) -> int:
        """How many batches were planned."""
        return len(list(self._folder.glob("offsets/*")))

    def taken(self) -> set[str]:
        """The paths of all files of planned batches."""
        logs = [path.read_text().splitlines()[1:] for path in self._folder.glob("sources/0/*")]
        return {json.loads(line)["path"].removeprefix("file://") for lines in logs for line in lines}

    def plan(self, files: Iterable[Path]) -> int:
        """Plan a batch of these files; returns its id."""
        batch = self.planned
        entries = [
            json.dumps({"path": path.as_uri(), "timestamp": path.stat().st_mtime_ns // 10**6, "batchId": batch}) for path in files
        ]
        self._write(f"sources/0/{batch}", "v1", *entries)
        meta = json.dumps({"batchTimestampMs": int(time.time() * 1000)})
        self._write(f"offsets/{batch}", "v1", meta, json.dumps({"logOffset": batch}))
        return batch

    def end(self, batch: int) -> None:
        """Note that a batch has ended."""
        self._write(f"commits/{batch}", "v1", "{}")


def ingest(settings: Settings, stream: str = "orders", *, files_per_batch: int = 1000) -> list[BatchReport]:
    """Ingest the landing files of a stream that no batch has, in the order of their times."""
    checkpoint, reports = Checkpoint(settings, stream), list[BatchReport]()
    waiting = [path for path in settings.landing_path.glob(f"{stream}/*/*.jsonl*") if str(path) not in checkpoint.taken()]
    waiting.sort(key=lambda path: (path.stat().st_mtime_ns // 10**6, str(path)))
    job = JOBS[stream](settings, reports.append)
    for start in range(0, len(waiting), files_per_batch):
        batch = checkpoint.plan(waiting[start : start + files_per_batch])
        job.run_batch(batch, LocalExecutor())
        checkpoint.end(batch)
    return reports


def run(
    settings: Settings, stream: str, batch: int, *, fail_after: Step | None = None, monkeypatch: pytest.MonkeyPatch | None = None
) -> BatchReport:
    """Run a planned batch; with ``fail_after`` it ends there by KeyboardInterrupt, as a killed one does."""
    reports: list[BatchReport] = []
    job = JOBS[stream](settings, reports.append)
    if fail_after is not None:
        assert monkeypatch is not None

        def crash_point(moment: str, step: Step, batch_id: int) -> None:
            if (moment, step) == ("after", fail_after):
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("spark_jobs.steps.crash_point", crash_point)
            job.run_batch(batch, LocalExecutor())
    job.run_batch(batch, LocalExecutor())
    return reports[0]


def land(settings: Settings, name: str, stored: bytes, modified_ms: int) -> None:
    """Put a file into the landing folder, with a time."""
    target = settings.landing_path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(stored)
    os.utime(target, ns=(modified_ms * 10**6, modified_ms * 10**6))
