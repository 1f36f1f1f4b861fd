"""Ingest landing files and Kafka topics into Delta tables, each record once: start the queries, watch them, and end them.

Each stream has one query for its landing files and one for its topic in each cluster. They share the write lock and the key index,
so a duplicate is found whatever source the record came from first. A cluster that does not answer delays only its own queries.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from py4j.protocol import Py4JError, Py4JJavaError  # type: ignore[import-untyped]
from pyspark.sql import SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.attribution.stream import AttributionStream
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, InterruptedIngestError, JavaLostError, KafkaError, StoppedError
from spark_jobs.failure import failure_cause
from spark_jobs.ingest.activity import Activity
from spark_jobs.ingest.batch import BatchReport, IngestReport
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.events import EventsJob
from spark_jobs.ingest.files.backlog import look_into_landing
from spark_jobs.ingest.in_force import InForce
from spark_jobs.ingest.kafka.config import KafkaCluster, read_kafka
from spark_jobs.ingest.kafka.raw import RawCopy
from spark_jobs.ingest.kafka.source import KafkaSource
from spark_jobs.ingest.orders import OrdersJob
from spark_jobs.ingest.query import SourceQuery
from spark_jobs.ingest.source import RecordSource
from spark_jobs.ingest.watchdog import Watchdog
from spark_jobs.ingest.write import load_task_code
from spark_jobs.lake.locks import INGEST, WRITE_EVENTS, exclusive
from spark_jobs.lake.roots import is_local
from spark_jobs.lake.tables import STREAMS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.publish.job import PublishLoop, is_publishing
from spark_jobs.session import build_session, end_java, is_one_machine, java_has_ended, java_pid
from spark_jobs.stopping import BATCH_SECONDS, StopNow, StopRequest

_JAVA_END_SECONDS = 2.0  # between the loss of its connection and its end
_PUBLISHING_SECONDS = 3.0  # to publish what has begun; the rest is published at the next start
_PLANNED_SECONDS = 3.0  # after a signal, with --continuous: a batch that is already planned may still begin
_STUCK_BATCHES = 3  # in a row, of one query
_OF_A_STOP = re.compile(
    r"cancel|shut ?down|worker exited unexpectedly|stopped SparkContext|Interrupted|Java side is empty|Connection refused"
)
RETRY_SECONDS = 5.0  # between two attempts to reach a cluster that does not answer


def run_ingest(
    settings: Settings,
    *,
    continuous: bool = False,
    trigger_seconds: float = 5.0,
    progress: Callable[[BatchReport], None] | None = None,
    notice: Callable[[str], None] | None = None,
    spark: SparkSession | None = None,
) -> IngestReport:
    """Ingest events and orders from the landing folders and from the clusters of kafka.toml, of which it keeps raw copies too.

    Without ``continuous`` it reads all that is there and ends. With ``continuous`` it runs until SIGTERM, retries clusters that do
    not answer, publishes what is committed (where kafka.toml says so), and credits orders by a third query (not if the tables are
    in an object store: attribution reads local paths).

    SIGTERM and SIGINT end it after the current batch, or within 30 s (stopping.py). ``progress`` is called after each batch.
    ``notice`` gets a line when a cluster stops or starts to answer, when a campaign file or a rule file turns bad (the prices and
    rules in force stay), and at the start for files that nothing reads. ``spark`` is a session of the caller's; it is not stopped.

    Raises BusyError if another ingest runs on the same home, AdtallyError if a batch failed, OffsetGapError if a topic lacks the
    offsets that are to be read next, InterruptedIngestError if it was stopped before it had read all that is there.
    """
    with exclusive(settings, INGEST):
        notice = notice or (lambda _line: None)
        in_force = InForce(settings, notice)
        total = IngestReport()
        guard = threading.Lock()

        def report(batch: BatchReport) -> None:
            nonlocal total
            with guard:
                total = total.plus(batch)
                if progress is not None:
                    progress(batch)

        ended = False
        is_own, session = spark is None, spark
        with StopRequest(end_java, status=0 if continuous else 1) if is_own else StopRequest() as stop:
            try:
                with stop.at_once():
                    session = spark or build_session(settings, "adtally-ingest")
                    stop.listen()
                    threading.Thread(target=_warm_up, args=(session,), daemon=True, name="warm-up").start()
                    ensure_tables(settings)
                    with exclusive(settings, WRITE_EVENTS):
                        in_force.prices()
                    in_force.rules()
                    for line in look_into_landing(settings):
                        notice(line)
                    with_attribution = continuous and is_local(settings.lakehouse_uri)
                    queries = _queries(settings, report, in_force, notice, with_attribution=with_attribution)
                loop = _QueryLoop(session, settings, continuous, trigger_seconds, notice)
                with _publishing(settings, loop.notice, stop.event) if continuous else contextlib.nullcontext():
                    ended = loop.until_done(queries, stop.event)
            except StopNow:
                pass
            except Exception as error:
                if not (_is_loss_of_java(error) or _OF_A_STOP.search(str(error))):
                    raise
                if not stop.event.wait(1.0):  # else a signal to all processes also ended Java and the workers
                    raise (_java_lost() if java_has_ended(_JAVA_END_SECONDS) else error) from error.__cause__
            finally:
                if is_own:
                    _end_session(session)
        if not (ended or continuous):
            raise InterruptedIngestError("stopped before all was ingested", hint="adtally ingest goes on where it stopped")
        return total


def _end_session(session: SparkSession | None) -> None:
    """Stop the session. End Java if the session never started, or if Java does not answer."""
    try:
        if session is not None and not java_has_ended():
            session.stop()
            return
    except Exception as error:
        if not _is_loss_of_java(error):
            raise
    end_java()


def _is_loss_of_java(error: Exception) -> bool:
    """Return whether ``error`` came from the end of Java, or from an end that has begun."""
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, Py4JError) and not isinstance(cause, Py4JJavaError)) or isinstance(cause, ConnectionError):
            return True
        cause = cause.__cause__
    return java_has_ended()


def _java_lost() -> JavaLostError:
    return JavaLostError(
        "Java ended in the middle of the ingest; nothing is lost",
        hint="start it again; was it killed for want of memory? docs/runbooks/ingest-restarts.md",
    )


def _warm_up(spark: SparkSession) -> None:
    """Start the Python workers while the queries start, so that the first batch need not wait for their imports."""
    tasks = spark.sparkContext.defaultParallelism
    with contextlib.suppress(Exception):  # the first batch reports whatever is wrong
        spark.sparkContext.parallelize(range(tasks), tasks).foreachPartition(load_task_code)


@contextlib.contextmanager
def _publishing(settings: Settings, notice: Callable[[str], None], stopped: threading.Event) -> Iterator[None]:
    """Publish what is committed in the block, and at its end the rest, to where kafka.toml says.

    A problem goes to ``notice`` and stops no ingest: what is not published yet is published later, under the same ids.
    """
    if not is_publishing(settings):
        yield
        return
    stop = threading.Event()

    def report(problem: str) -> None:
        notice(f"publishing waits: {problem}" if problem else "publishing goes on")

    def run() -> None:
        try:
            PublishLoop(settings, problem=report).run(stop)
        except AdtallyError as error:
            notice(f"publishing ended: {error}")

    thread = threading.Thread(target=run, name="publishing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_PUBLISHING_SECONDS if stopped.is_set() else None)


class _Job(Protocol):
    """What the loop needs of a query: a SourceQuery, or that of attribution."""

    failure: Exception | None
    stopping: threading.Event

    def start(self, spark: SparkSession, *, continuous: bool, trigger_seconds: float) -> StreamingQuery:
        """Start the query."""


@dataclass
class _Query:
    """A query of the loop: ``make`` makes its job, which starts what is ``running``.

    A query of a ``cluster`` may be made again, because the cluster may not answer.
    """

    name: str
    make: Callable[[], _Job]
    cluster: KafkaCluster | None = None
    job: _Job | None = None
    running: StreamingQuery | None = None
    retry_at: float = 0.0
    stuck: int = 0  # batches in a row that made no progress
    ended: bool = False


def _queries(
    settings: Settings,
    report: Callable[[BatchReport], None],
    in_force: InForce,
    notice: Callable[[str], None],
    *,
    with_attribution: bool,
) -> list[_Query]:
    index = KeyIndex(settings.key_index_path)

    def events(source: RecordSource | None = None) -> SourceQuery:
        return SourceQuery(EventsJob(settings, report, source, index, in_force, notice), settings)

    def orders(source: RecordSource | None = None) -> SourceQuery:
        return SourceQuery(OrdersJob(settings, report, source), settings)

    def events_of(cluster: KafkaCluster) -> SourceQuery:
        return events(KafkaSource(settings, "events", cluster))

    def orders_of(cluster: KafkaCluster) -> SourceQuery:
        return orders(KafkaSource(settings, "orders", cluster))

    def raw_of(stream: str, cluster: KafkaCluster) -> SourceQuery:
        return SourceQuery(RawCopy(settings, stream, cluster), settings)

    made = [_Query("events", events), _Query("orders", orders)]
    for cluster in read_kafka(settings).consumed:
        made.append(_Query(f"events-{cluster.name}", partial(events_of, cluster), cluster))
        made.append(_Query(f"orders-{cluster.name}", partial(orders_of, cluster), cluster))
        made += [_Query(f"raw_{stream}-{cluster.name}", partial(raw_of, stream, cluster), cluster) for stream in STREAMS]
    if with_attribution:
        made.append(_Query("attribution", lambda: AttributionStream(settings, notice=notice)))
    return made


class _QueryLoop:
    """Runs queries until all have ended, or until a stop is requested."""

    def __init__(
        self, spark: SparkSession, settings: Settings, continuous: bool, trigger_seconds: float, notice: Callable[[str], None]
    ) -> None:
        self._spark = spark
        self._batch_timeout = settings.batch_timeout.total_seconds()
        self._continuous = continuous
        self._trigger_seconds = trigger_seconds
        self.notice = notice
        self._away: dict[str, str] = {}  # query -> its cluster

    def until_done(self, queries: list[_Query], stop: threading.Event) -> bool:
        """Run the queries; return whether all ended before ``stop`` was set. If one fails, stop the others and raise its error."""
        watchdog: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if is_one_machine(str(self._spark.sparkContext.master)):
            watchdog = Watchdog(self._batch_timeout, java_pid(self._spark), lambda: _activities(queries))
        try:
            with watchdog:
                while not stop.is_set() and not all(query.ended for query in queries):
                    for query in queries:
                        self._check(query, queries)
                    stop.wait(0.2)
            if stop.is_set():
                self._stop(queries)
            return all(query.ended for query in queries)
        finally:
            if not java_has_ended():
                for query in queries:
                    if query.running is not None and query.running.isActive:
                        query.running.stop()

    def _stop(self, queries: list[_Query]) -> None:
        """Begin no further batch, wait up to BATCH_SECONDS for the running ones, then cancel what still runs."""
        running = {query.name: query.running for query in queries if query.running is not None and not query.ended}
        started = time.monotonic()
        while running and time.monotonic() < started + BATCH_SECONDS:
            if not self._continuous or time.monotonic() > started + _PLANNED_SECONDS:
                for query in queries:
                    if query.job is not None:
                        query.job.stopping.set()
            for query in queries:
                stream = running.get(query.name)
                if stream is None:
                    continue
                if stream.isActive and self._continuous and not stream.status["isTriggerActive"]:
                    stream.stop()
                if not stream.isActive:
                    del running[query.name]
                    self._end_of_stopped(query)
            time.sleep(0.05)
        if running:
            names = ", ".join(running)
            self.notice(
                f"the batch of {names} did not end within {BATCH_SECONDS:.0f} s: it is cut off, and made again at the next start"
            )
            self._spark.sparkContext.cancelAllJobs()
            for stream in running.values():
                with contextlib.suppress(Exception):  # if this hangs or fails, Java is ended next
                    stream.stop()

    def _end_of_stopped(self, query: _Query) -> None:
        """Raise the error that ended a query, unless the stop itself caused it. A query without an error has read all."""
        try:
            self._end_of(query)
        except StoppedError:
            return
        except KafkaError:
            if query.cluster is None or not self._continuous:  # else `_check` would only have printed a notice
                raise
        except AdtallyError as error:
            if not (isinstance(error.__cause__, Exception) and _OF_A_STOP.search(str(error))):
                raise
            return
        query.ended = not self._continuous

    def _check(self, query: _Query, queries: list[_Query]) -> None:
        """Start a query that should run and does not; otherwise look whether it has ended or its cluster answers again."""
        if query.ended or time.monotonic() < query.retry_at:
            return
        try:
            if query.running is None:
                query.job = query.make()
                query.running = query.job.start(self._spark, continuous=self._continuous, trigger_seconds=self._trigger_seconds)
            elif not query.running.isActive:
                if not self._restarts(query):
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
            for other in queries:  # each would wait as long for the same error
                if other.cluster == query.cluster and other.running is None:
                    other.retry_at = time.monotonic() + RETRY_SECONDS
            is_known = query.cluster.name in self._away.values()
            self._away[query.name] = query.cluster.name
            if not is_known:
                self.notice(f"{error}; its streams are tried again every {RETRY_SECONDS:.0f} s, the others go on")

    def _restarts(self, query: _Query) -> bool:
        """Return whether to start a query again because the watchdog killed its workers. Raises AdtallyError after a few times."""
        if not isinstance(query.job, SourceQuery) or not query.job.activity.was_ended or query.running is None:
            return False
        if query.running.exception() is None:
            return False
        query.stuck = 1 if query.job.batches else query.stuck + 1
        problem = f"a batch of {query.name} made no progress for {self._batch_timeout:.0f} s and its workers were ended"
        if query.stuck > _STUCK_BATCHES:
            raise AdtallyError(f"{problem}, {query.stuck} times in a row", hint="docs/runbooks/ingest-restarts.md")
        self.notice(f"{problem}; it is made again")
        query.running = None
        return True

    def _end_of(self, query: _Query) -> None:
        """Raise the error that ended a query, if there is one."""
        error = query.running.exception() if query.running is not None else None
        if error is None or query.job is None:
            return
        failure = query.job.failure
        if isinstance(query.job, SourceQuery) and not isinstance(failure, AdtallyError):
            failure = query.job.explained(failure or error) or failure
        if isinstance(failure, AdtallyError):
            raise failure
        cause = failure_cause(failure or error)
        raise AdtallyError(
            f"{cause}: the {query.name} stream failed", hint="; ".join(filter(None, (cause.hint, "--debug shows all of it")))
        ) from failure or error


def _activities(queries: list[_Query]) -> list[Activity]:
    return [query.job.activity for query in queries if isinstance(query.job, SourceQuery)]
