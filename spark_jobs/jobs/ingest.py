"""Ingest: landing files and Kafka's topics into Delta, each record once. Starts the streams and ends them.

There is a query for the files of each stream, and for its topic in each cluster; they share the write lock and the key index, so
a record is found again wherever it came from before. A cluster that does not answer holds up its own queries alone.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Protocol

from filelock import FileLock, Timeout
from pyspark.sql import SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.config import Settings
from spark_jobs.dedupe.index import KeyIndex
from spark_jobs.errors import AdtallyError, BusyError, InterruptedIngestError, KafkaError
from spark_jobs.jobs.attribution_stream import AttributionStream
from spark_jobs.jobs.batch import BatchReport, IngestReport
from spark_jobs.jobs.campaigns import load_campaigns
from spark_jobs.jobs.events import EventsJob
from spark_jobs.jobs.orders import OrdersJob
from spark_jobs.jobs.publish import PublishLoop, is_publishing
from spark_jobs.kafka.config import KafkaCluster, read_kafka
from spark_jobs.kafka.raw import RawCopy
from spark_jobs.kafka.source import KafkaSource
from spark_jobs.locks import write_lock
from spark_jobs.session import build_session
from spark_jobs.sinks.delta import ensure_tables
from spark_jobs.sources.query import SourceQuery
from spark_jobs.tables import STREAMS
from spark_jobs.tasks.write import load_task_code

INGEST_LOCK = ".ingest.lock"  # in ADTALLY_HOME, held by whoever ingests
RETRY_SECONDS = 5.0  # between two tries of a cluster that does not answer


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
    notice: Callable[[str], None] | None = None,
    spark: SparkSession | None = None,
) -> IngestReport:
    """Ingest events and orders: all that is there, or, with ``continuous``, until SIGTERM (which ends after the current batch).

    From the landing folders and from the clusters of kafka.toml, of which raw copies are kept too. With ``continuous`` a cluster
    that does not answer is tried again until it does; ``notice`` is told when that begins and ends. With ``continuous`` what is
    committed is also published, where kafka.toml says where (jobs/publish.py).

    With ``continuous`` a third query credits orders meanwhile (not on an object store: attribution reads local paths).
    SIGTERM and SIGINT end it after the current batch. ``progress`` is called after each batch. ``spark`` is for callers with a
    session of their own; it is not stopped. Raises BusyError where another ingest runs on the same home, AdtallyError where a
    batch failed, OffsetGapError where a topic lacks what is to be read next, InterruptedIngestError where it was stopped before
    all that is there was ingested.
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
                with write_lock(settings, "events"):
                    load_campaigns(settings)
                queries = _queries(settings, report, with_attribution=continuous and "://" not in settings.lakehouse_uri)
                run = _Run(session, continuous, trigger_seconds, notice or (lambda _line: None))
                with _publishing(settings, run.notice) if continuous else contextlib.nullcontext():
                    ended = run.until_done(queries, stop.event)
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


@contextlib.contextmanager
def _publishing(settings: Settings, notice: Callable[[str], None]) -> Iterator[None]:
    """Publish what is committed meanwhile, and at the end what was, where kafka.toml says where.

    What is wrong with it is told, and stops no ingest: what is not published yet is published later, under the same ids.
    """
    if not is_publishing(settings):
        yield
        return
    stop = threading.Event()

    def told(problem: str) -> None:
        notice(f"publishing waits: {problem}" if problem else "publishing goes on")

    def run() -> None:
        try:
            PublishLoop(settings, problem=told).run(stop)
        except AdtallyError as error:
            notice(f"publishing ended: {error}")

    thread = threading.Thread(target=run, name="publishing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Job(Protocol):
    """What a query needs."""

    failure: Exception | None

    def start(self, spark: SparkSession, *, continuous: bool, trigger_seconds: float) -> StreamingQuery:
        """Start the query."""


@dataclass
class _Query:
    """A query: how its job is made, and the job and the query while there are such.

    One of a ``cluster`` may have to be made again, for the cluster may be away.
    """

    name: str
    make: Callable[[], _Job]
    cluster: KafkaCluster | None = None
    job: _Job | None = None
    running: StreamingQuery | None = None
    retry_at: float = 0.0
    ended: bool = False


def _queries(settings: Settings, report: Callable[[BatchReport], None], *, with_attribution: bool) -> list[_Query]:
    index = KeyIndex(settings.key_index_path)
    made = [
        _Query("events", lambda: EventsJob(settings, report, index=index)),
        _Query("orders", lambda: OrdersJob(settings, report)),
    ]
    for cluster in read_kafka(settings).consumed:

        def of_events(at: KafkaCluster = cluster) -> _Job:
            return EventsJob(settings, report, KafkaSource(settings, "events", at), index)

        def of_orders(at: KafkaCluster = cluster) -> _Job:
            return OrdersJob(settings, report, KafkaSource(settings, "orders", at))

        made += [_Query(f"events-{cluster.name}", of_events, cluster), _Query(f"orders-{cluster.name}", of_orders, cluster)]
        made += [_Query(f"raw_{stream}-{cluster.name}", partial(RawCopy, settings, stream, cluster), cluster) for stream in STREAMS]
    if with_attribution:
        made.append(_Query("attribution", lambda: AttributionStream(settings)))
    return made


class _Run:
    """Runs queries to their end, or until told to stop."""

    def __init__(self, spark: SparkSession, continuous: bool, trigger_seconds: float, notice: Callable[[str], None]) -> None:
        self._spark = spark
        self._continuous = continuous
        self._trigger_seconds = trigger_seconds
        self.notice = notice
        self._away: dict[str, str] = {}  # query -> its cluster

    def until_done(self, queries: list[_Query], stop: threading.Event) -> bool:
        """Run them; False: ``stop`` came before their end. Raises what a job failed by, and stops the others then."""
        try:
            while not stop.is_set() and not all(query.ended for query in queries):
                for query in queries:
                    self._look_after(query, queries)
                stop.wait(0.2)
            ended = all(query.ended for query in queries)
            for query in queries:
                if query.running is not None:
                    _stop_after_batch(query.running)
                    is_away = query.cluster is not None and self._continuous  # which is told, and no failure
                    with contextlib.suppress(*((KafkaError,) if is_away else ())):
                        self._end_of(query)
            return ended
        finally:
            for query in queries:
                if query.running is not None and query.running.isActive:
                    query.running.stop()

    def _look_after(self, query: _Query, queries: list[_Query]) -> None:
        """Start a query that does not run and should, and see what became of one that does."""
        if query.ended or time.monotonic() < query.retry_at:
            return
        try:
            if query.running is None:
                query.job = query.make()
                query.running = query.job.start(self._spark, continuous=self._continuous, trigger_seconds=self._trigger_seconds)
            elif not query.running.isActive:
                self._end_of(query)
                query.ended = True
            elif query.cluster is not None and query.name in self._away and query.running.lastProgress is not None:
                del self._away[query.name]
                if query.cluster.name not in self._away.values():
                    self.notice(f"cluster {query.cluster.name} answers again")
        except KafkaError as error:
            if not self._continuous or query.cluster is None:
                raise
            query.running = None
            for other in queries:  # each that is not running would wait as long to be told the same
                if other.cluster == query.cluster and other.running is None:
                    other.retry_at = time.monotonic() + RETRY_SECONDS
            is_told = query.cluster.name in self._away.values()
            self._away[query.name] = query.cluster.name
            if not is_told:
                self.notice(f"{error}; its streams are tried again every {RETRY_SECONDS:.0f} s, the others go on")

    def _end_of(self, query: _Query) -> None:
        """Raise what a query that has ended failed by."""
        error = query.running.exception() if query.running is not None else None
        if error is None or query.job is None:
            return
        failure = query.job.failure
        if isinstance(query.job, SourceQuery) and not isinstance(failure, AdtallyError):
            failure = query.job.explained(failure or error) or failure
        if isinstance(failure, AdtallyError):
            raise failure
        cause = f"{type(failure).__name__}: {failure}" if failure else str(error)
        raise AdtallyError(
            f"the {query.name} stream failed: {' '.join(cause.split())[:500]}", hint="run with --debug for all of it"
        ) from failure or error


def _stop_after_batch(query: StreamingQuery) -> None:
    """Let a running batch end (bounded by nothing but the batch), then stop between two batches."""
    while query.isActive and query.status["isTriggerActive"]:
        time.sleep(0.05)
    query.stop()
