"""Ingest: landing files into Delta, each record once. Starts the two streams and ends them."""

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
from spark_jobs.errors import AdtallyError, BusyError, ConservationError
from spark_jobs.jobs.batch import BatchReport, IngestReport
from spark_jobs.jobs.campaigns import load_campaigns
from spark_jobs.jobs.events import EventsJob
from spark_jobs.jobs.orders import OrdersJob
from spark_jobs.jobs.stream import StreamJob
from spark_jobs.session import build_session
from spark_jobs.sinks.delta import ensure_tables
from spark_jobs.tasks.write import load_task_code


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

    ``progress`` is called after each batch. ``spark`` is for callers with a session of their own; it is not stopped.
    Raises BusyError where another ingest runs on the same home, AdtallyError where a batch failed.
    """
    settings.home_path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.home_path / ".ingest.lock", timeout=0)
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
        with _StopRequest() as stop:
            session = spark or build_session(settings, "adtally-ingest")
            try:
                threading.Thread(target=_warm_up, args=(session,), daemon=True, name="warm-up").start()
                ensure_tables(settings)
                load_campaigns(settings)
                _run_queries(
                    session,
                    [EventsJob(settings, report), OrdersJob(settings, report)],
                    stop.event,
                    continuous,
                    trigger_seconds,
                )
            finally:
                if spark is None:
                    session.stop()
        return total
    finally:
        lock.release()


def _warm_up(spark: SparkSession) -> None:
    """Start the Python workers while the queries start: the first batch need not wait for their imports."""
    tasks = spark.sparkContext.defaultParallelism
    with contextlib.suppress(Exception):  # whatever is wrong is said by the first batch
        spark.sparkContext.parallelize(range(tasks), tasks).foreachPartition(load_task_code)


def _run_queries(
    spark: SparkSession, jobs: list[StreamJob], stop: threading.Event, continuous: bool, trigger_seconds: float
) -> None:
    queries = [job.start(spark, continuous=continuous, trigger_seconds=trigger_seconds) for job in jobs]
    try:
        while any(query.isActive for query in queries):
            if stop.is_set():
                for query in queries:
                    _stop_after_batch(query)
                break
            for query in queries:
                _raise_failure(query)
            stop.wait(0.2)
        for query in queries:
            _raise_failure(query)
    finally:
        for query in queries:
            if query.isActive:
                query.stop()


def _stop_after_batch(query: StreamingQuery) -> None:
    """Let a running batch end (bounded by nothing but the batch), then stop between two batches."""
    while query.isActive and query.status["isTriggerActive"]:
        time.sleep(0.05)
    query.stop()


def _raise_failure(query: StreamingQuery) -> None:
    error = query.exception()
    if error is None:
        return
    text = str(error)
    for known in (ConservationError,):
        if known.__name__ in text:
            raise known(_last_line(text)) from error
    raise AdtallyError(f"the {query.name} stream failed: {_last_line(text)}", hint="run with --debug for all of it") from error


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "Exception" in line]
    return (named or lines or ["unknown"])[0][:500]
