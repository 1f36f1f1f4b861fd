"""Ingest: landing files into Delta, each record once. Starts the streams and ends them."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from pyspark.sql import SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, BusyError, InterruptedIngestError
from spark_jobs.jobs.attribution_stream import AttributionStream
from spark_jobs.jobs.batch import BatchReport, IngestReport
from spark_jobs.jobs.campaigns import load_campaigns
from spark_jobs.jobs.events import EventsJob
from spark_jobs.jobs.orders import OrdersJob
from spark_jobs.jobs.stream import StreamJob
from spark_jobs.session import build_session
from spark_jobs.sinks.delta import ensure_tables
from spark_jobs.tasks.write import load_task_code

INGEST_LOCK = ".ingest.lock"  # in ADTALLY_HOME, held by whoever ingests


class _StopRequest:
    """SIGTERM or SIGINT: end after the current batch."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.event.set()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def run_ingest(
    settings: Settings,
    *,
    continuous: bool = False,
    trigger_seconds: float = 5.0,
    progress: Callable[[BatchReport], None] | None = None,
    spark: SparkSession | None = None,
) -> IngestReport:
    """Ingest events and orders: all that is there, or, with ``continuous``, until SIGTERM (which ends after the current batch).

    With ``continuous`` a third query credits orders meanwhile (not on an object store: attribution reads local paths).
    SIGTERM and SIGINT end it after the current batch. ``progress`` is called after each batch. ``spark`` is for callers with a
    session of their own; it is not stopped. Raises BusyError where another ingest runs on the same home, AdtallyError where a
    batch failed, InterruptedIngestError where it was stopped before all that is there was ingested.
    """
    settings.home_path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.home_path / INGEST_LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"another ingest runs on {settings.home_path}", hint="stop it, or use its ADTALLY_HOME for reading"
        ) from None
    total = IngestReport()
    guard = threading.Lock()

    def report(batch: BatchReport) -> None:
        nonlocal total
        with guard:
            total = total.plus(batch)
            if progress is not None:
                progress(batch)

    try:
        session = spark or build_session(settings, "adtally-ingest")
        try:
            with _StopRequest() as stop:  # now: a new session takes SIGINT for itself
                threading.Thread(target=_warm_up, args=(session,), daemon=True, name="warm-up").start()
                ensure_tables(settings)
                load_campaigns(settings)
                jobs: list[StreamJob | AttributionStream] = [EventsJob(settings, report), OrdersJob(settings, report)]
                if continuous and "://" not in settings.lakehouse_uri:
                    jobs.append(AttributionStream(settings))
                ended = _run_queries(session, jobs, stop.event, continuous, trigger_seconds)
        finally:
            if spark is None:
                session.stop()
        if not (ended or continuous):
            raise InterruptedIngestError("stopped before all was ingested", hint="adtally ingest goes on where it stopped")
        return total
    finally:
        lock.release()


def _warm_up(spark: SparkSession) -> None:
    """Start the Python workers while the queries start: the first batch need not wait for their imports."""
    tasks = spark.sparkContext.defaultParallelism
    with contextlib.suppress(Exception):  # whatever is wrong is said by the first batch
        spark.sparkContext.parallelize(range(tasks), tasks).foreachPartition(load_task_code)


def _run_queries(
    spark: SparkSession,
    jobs: list[StreamJob | AttributionStream],
    stop: threading.Event,
    continuous: bool,
    trigger_seconds: float,
) -> bool:
    """Run the queries to their end, or until ``stop`` is set (then False)."""
    running = [(job, job.start(spark, continuous=continuous, trigger_seconds=trigger_seconds)) for job in jobs]
    try:
        while any(query.isActive for _, query in running) and not stop.is_set():
            for job, query in running:
                _raise_failure(job, query)
            stop.wait(0.2)
        ended = not any(query.isActive for _, query in running)
        for _, query in running:
            _stop_after_batch(query)
        for job, query in running:
            _raise_failure(job, query)
        return ended
    finally:
        for _, query in running:
            if query.isActive:
                query.stop()


def _stop_after_batch(query: StreamingQuery) -> None:
    """Let a running batch end (bounded by nothing but the batch), then stop between two batches."""
    while query.isActive and query.status["isTriggerActive"]:
        time.sleep(0.05)
    query.stop()


def _raise_failure(job: StreamJob | AttributionStream, query: StreamingQuery) -> None:
    error = query.exception()
    if error is None:
        return
    if isinstance(job.failure, AdtallyError):
        raise job.failure
    cause = f"{type(job.failure).__name__}: {job.failure}" if job.failure else str(error)
    raise AdtallyError(
        f"the {query.name} stream failed: {' '.join(cause.split())[:500]}", hint="run with --debug for all of it"
    ) from job.failure or error
