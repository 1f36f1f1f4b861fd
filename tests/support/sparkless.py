"""Batches of landing files without Spark: the ingest's own jobs and sources, and a checkpoint of the form that Spark writes.

Only the scheduling is replaced: tasks run in this process, one after the other. So a home takes a tenth of a second, and a
property test can try hundreds. The tests with a real Spark say that the two agree.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.in_process import Checkpoint as Checkpoint
from benchmarks.in_process import LocalExecutor
from spark_jobs.config import Settings
from spark_jobs.ingest.batch import BatchReport
from spark_jobs.ingest.events import EventsJob
from spark_jobs.ingest.orders import OrdersJob
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.steps import Step

JOBS: dict[str, type[StreamJob[Any]]] = {"events": EventsJob, "orders": OrdersJob}


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
