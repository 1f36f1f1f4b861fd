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
from dataclasses import dataclass, field
from functools import partial

from py4j.protocol import Py4JError, Py4JJavaError  # type: ignore[import-untyped]
from pyspark.sql import SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.attribution.stream import AttributionQuery, AttributionStream
from spark_jobs.background import in_background
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, InterruptedIngestError, JavaLostError, KafkaError, StoppedError
from spark_jobs.failure import failure_cause
from spark_jobs.ingest.batch import BatchReport, IngestReport
from spark_jobs.ingest.copying import Index, copying, open_key_index
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.events import EventsJob, finish_merges
from spark_jobs.ingest.files.backlog import look_into_landing
from spark_jobs.ingest.in_force import InForce
from spark_jobs.ingest.kafka.config import KafkaCluster, read_kafka
from spark_jobs.ingest.kafka.raw import RawCopy
from spark_jobs.ingest.kafka.source import KafkaSource
from spark_jobs.ingest.orders import OrdersJob
from spark_jobs.ingest.pace import default_interval
from spark_jobs.ingest.query import SourceQuery
from spark_jobs.ingest.source import RecordSource
from spark_jobs.ingest.watchdog import Activity, Watchdog
from spark_jobs.ingest.write import load_task_code
from spark_jobs.lake.fencing import check_leases
from spark_jobs.lake.landing_view import has_view, refresh_landing
from spark_jobs.lake.locks import INGEST, SECONDS, WRITE_EVENTS, Patience, exclusive, is_held
from spark_jobs.lake.tables import STREAMS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.publish.job import PublishLoop, is_publishing
from spark_jobs.session import build_session, end_java, is_one_machine, java_has_ended, java_pid, master_of
from spark_jobs.stopping import BATCH_SECONDS, StopNow, StopRequest

_JAVA_END_SECONDS = 2.0  # between the loss of its connection and its end
_PUBLISHING_SECONDS = 3.0  # to publish what has begun; the rest is published at the next start
_PLANNED_SECONDS = 3.0  # after a signal, with --continuous: a batch that is already planned may still begin
_STUCK_BATCHES = 3  # in a row, of one query
_STOP_MESSAGE = re.compile(
    r"cancel|shut ?down|worker exited unexpectedly|stopped SparkContext|Interrupted|Java side is empty|Connection refused"
)
_TURN_SECONDS = 0.2  # between two looks whether the queries have ended
_CONTINUOUS_TURN_SECONDS = 1.0  # they end only if they fail, and each look asks Java
RETRY_SECONDS = 5.0  # between two attempts to reach a cluster that does not answer


def run_ingest(
    settings: Settings,
    *,
    continuous: bool = False,
    trigger_seconds: float | None = None,
    waits: bool = False,
    progress: Callable[[BatchReport], None] | None = None,
    notice: Callable[[str], None] | None = None,
    spark: SparkSession | None = None,
) -> IngestReport:
    """Ingest events and orders from the landing folders and the clusters of kafka.toml, and keep raw copies of the topics.

    Without ``continuous`` it reads all input and ends; it starts no Spark if there is none, and no batch to finish. With
    ``continuous`` it runs until SIGTERM, retries clusters that do not answer, publishes committed versions (if kafka.toml says
    where), and credits orders in a thread. ``trigger_seconds`` is the interval of `pace`, by default that of the lakehouse.

    SIGTERM and SIGINT end it after the current batch, or within 30 s (stopping.py). It calls ``progress`` after each batch.
    ``notice`` gets a line when a cluster stops or starts to answer, when a campaign file or a rule file turns bad (the prices and
    rules in force stay), and at the start for files that nothing reads. It does not stop a session ``spark`` of the caller.

    With ``waits`` it begins when no other ingest runs on the lakehouse; ``notice`` gets a line if it has to wait.

    Raises BusyError if another ingest runs and it does not wait, AdtallyError if a batch failed, OffsetGapError if a topic lacks
    the next offsets, InterruptedIngestError if it was stopped before it had read all input.
    """
    notice = notice or (lambda _line: None)
    has_waited = waits and is_held(settings, INGEST)
    if has_waited:
        notice("another ingest runs; this one waits for its end")
    with exclusive(settings, INGEST, patience_seconds=SECONDS[Patience.ENDLESS] if waits else None):
        if has_waited:
            notice("this ingest begins")
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
                    refresh_landing(settings, is_full=True)
                    ensure_tables(settings)
                    with exclusive(settings, WRITE_EVENTS):
                        in_force.prices()
                    in_force.rules()
                    for line in look_into_landing(settings):
                        notice(line)
                    index, copy_index = open_key_index(settings, str(spark.sparkContext.master) if spark else master_of(settings))
                    queries = _queries(settings, report, in_force, notice, index, with_attribution=continuous)
                    if not continuous and all(query.has_ended() for query in queries):
                        with copying(copy_index, list, notice):  # the last process may have ended before its last copy
                            return total
                    session = spark or build_session(settings, "adtally-ingest")
                    stop.listen()
                    threading.Thread(target=_warm_up, args=(session,), daemon=True, name="warm-up").start()
                interval = default_interval(settings) if trigger_seconds is None else trigger_seconds
                loop = _QueryLoop(session, settings, queries, continuous, interval, notice)
                publishes = continuous and is_publishing(settings)
                refreshes = continuous and has_view(settings)
                with (
                    _publishing(settings, notice, stop.event) if publishes else contextlib.nullcontext(),
                    _refreshing(settings, interval, notice) if refreshes else contextlib.nullcontext(),
                    copying(copy_index, loop.source_queries, notice),
                ):
                    ended = loop.until_done(stop.event)
                    if ended and isinstance(index, KeyIndex):  # an ingest that was stopped leaves them to the next one
                        finish_merges(settings, index, notice)
            except StopNow:
                pass
            except Exception as error:
                if not (_is_loss_of_java(error) or _STOP_MESSAGE.search(str(error))):
                    raise
                if not stop.event.wait(1.0):  # else a signal to all processes also ended Java and the workers
                    if not java_has_ended(_JAVA_END_SECONDS):
                        raise error from error.__cause__
                    raise JavaLostError(
                        "Java ended in the middle of the ingest; nothing is lost",
                        hint="start it again; was it killed for want of memory? docs/runbooks/ingest-restarts.md",
                    ) from error.__cause__
            finally:
                if is_own:
                    _end_session(session)
        if not (ended or continuous):
            raise InterruptedIngestError("stopped before all was ingested", hint="adtally ingest continues where it stopped")
        return total


def _end_session(session: SparkSession | None) -> None:
    """Stop the session. End Java if the session never started or Java does not answer."""
    try:
        if session is not None and not java_has_ended():
            session.stop()
            return
    except Exception as error:
        if not _is_loss_of_java(error):
            raise
    end_java()


def _is_loss_of_java(error: Exception) -> bool:
    """Return whether the end of Java caused ``error``, even if Java is still ending."""
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, Py4JError) and not isinstance(cause, Py4JJavaError)) or isinstance(cause, ConnectionError):
            return True
        cause = cause.__cause__
    return java_has_ended()


def _warm_up(spark: SparkSession) -> None:
    """Start the Python workers while the queries start, so that the first batch need not wait for their imports."""
    with contextlib.suppress(Exception):  # the first batch reports whatever is wrong
        tasks = spark.sparkContext.defaultParallelism
        spark.sparkContext.parallelize(range(tasks), tasks).foreachPartition(load_task_code)


@contextlib.contextmanager
def _publishing(settings: Settings, notice: Callable[[str], None], stopped: threading.Event) -> Iterator[None]:
    """Publish during the block the versions that are committed, and at its end the rest.

    A problem goes to ``notice`` and stops no ingest: what is not published yet is published later, under the same ids.
    """

    def report(problem: str) -> None:
        notice(f"publishing waits: {problem}" if problem else "publishing goes on")

    def run(stop: threading.Event) -> None:
        try:
            PublishLoop(settings, problem=report).run(stop)
        except AdtallyError as error:
            notice(f"publishing ended: {error}")

    with in_background("publishing", run, wait_seconds=lambda: _PUBLISHING_SECONDS if stopped.is_set() else None):
        yield


@contextlib.contextmanager
def _refreshing(settings: Settings, seconds: float, notice: Callable[[str], None]) -> Iterator[None]:
    """Bring the view of the landing folder up to its store during the block, every ``seconds``.

    ``notice`` gets a line when the store stops or starts to answer.
    """

    def run(stop: threading.Event) -> None:
        is_away = False
        while not stop.wait(seconds):
            try:
                refresh_landing(settings)
            except AdtallyError as error:
                if not is_away:
                    notice(f"{error}; the landing folder is listed again every {seconds:g} s")
                is_away = True
            else:
                if is_away:
                    notice("the landing folder can be listed again")
                is_away = False

    with in_background("landing", run):
        yield


@dataclass
class _Query:
    """A query of the loop: ``make`` makes its job, which starts the ``running`` query.

    The loop may make a query of a ``cluster`` again, because the cluster may not answer.
    """

    name: str
    make: Callable[[], SourceQuery | AttributionStream]
    cluster: KafkaCluster | None = None
    job: SourceQuery | AttributionStream | None = None
    checked: SourceQuery | AttributionStream | None = None
    running: StreamingQuery | AttributionQuery | None = None
    retry_at: float = 0.0
    stuck: int = 0  # batches in a row that made no progress
    ended: bool = False

    def has_ended(self) -> bool:
        """Return whether the query would run no batch. False for a cluster: only Spark reads its offsets."""
        if self.cluster is not None:
            return False
        self.checked = self.make()
        return isinstance(self.checked, SourceQuery) and self.checked.has_ended()

    def next_job(self) -> SourceQuery | AttributionStream:
        """Return the job that `has_ended` checked or, for another start, a new one."""
        job, self.checked = self.checked or self.make(), None
        return job


def _queries(
    settings: Settings,
    report: Callable[[BatchReport], None],
    in_force: InForce,
    notice: Callable[[str], None],
    index: Index,
    *,
    with_attribution: bool,
) -> list[_Query]:
    def events(source: RecordSource | None = None) -> SourceQuery:
        return SourceQuery(EventsJob(settings, report, source, index, in_force, notice), settings)

    def orders(source: RecordSource | None = None) -> SourceQuery:
        return SourceQuery(OrdersJob(settings, report, source), settings)

    def topic(stream: str, cluster: KafkaCluster) -> SourceQuery:
        source = KafkaSource(settings, stream, cluster)
        return events(source) if stream == "events" else orders(source)

    def raw_copy(stream: str, cluster: KafkaCluster) -> SourceQuery:
        return SourceQuery(RawCopy(settings, stream, cluster), settings)

    made = [_Query("events", events), _Query("orders", orders)]
    for cluster in read_kafka(settings).consumed:
        made += [_Query(f"{stream}-{cluster.name}", partial(topic, stream, cluster), cluster) for stream in STREAMS]
        made += [_Query(f"raw_{stream}-{cluster.name}", partial(raw_copy, stream, cluster), cluster) for stream in STREAMS]
    if with_attribution:
        made.append(_Query("attribution", lambda: AttributionStream(settings, notice=notice)))
    return made


@dataclass
class _QueryLoop:
    """Runs queries until all have ended, or until a stop is requested."""

    spark: SparkSession
    settings: Settings
    queries: list[_Query]
    continuous: bool
    trigger_seconds: float
    notice: Callable[[str], None]
    away: dict[str, str] = field(default_factory=dict)  # query -> its cluster, which does not answer

    def until_done(self, stop: threading.Event) -> bool:
        """Run the queries; return whether all ended before ``stop`` was set. If one fails, stop the others and raise its error."""
        queries = self.queries
        watchdog: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if is_one_machine(str(self.spark.sparkContext.master)):
            watchdog = Watchdog(self._batch_seconds, java_pid(self.spark), self._activities)
        try:
            with watchdog:
                while not stop.is_set() and not all(query.ended for query in queries):
                    check_leases(self.settings.lakehouse_uri, renews=False)
                    for query in queries:
                        self._check(query)
                    stop.wait(_CONTINUOUS_TURN_SECONDS if self.continuous else _TURN_SECONDS)
            if stop.is_set():
                self._stop()
            return all(query.ended for query in queries)
        finally:
            self._end_pauses()
            if not java_has_ended():
                for query in queries:
                    if query.running is not None and query.running.isActive:
                        query.running.stop()

    @property
    def _batch_seconds(self) -> float:
        return self.settings.batch_timeout.total_seconds()

    def source_queries(self) -> list[SourceQuery]:
        """Return the queries of sources that were made so far."""
        return [query.job for query in self.queries if isinstance(query.job, SourceQuery)]

    def _end_pauses(self) -> None:
        for job in self.source_queries():
            if job.pace is not None:
                job.pace.end()

    def _activities(self) -> list[Activity]:
        return [query.activity for query in self.source_queries()]

    def _stop(self) -> None:
        """Begin no further batch, wait up to BATCH_SECONDS for the running ones, then cancel what still runs."""
        self._end_pauses()
        running = {query.name: query.running for query in self.queries if query.running is not None and not query.ended}
        started = time.monotonic()
        while running and time.monotonic() < started + BATCH_SECONDS:
            if not self.continuous or time.monotonic() > started + _PLANNED_SECONDS:
                for query in self.queries:
                    if query.job is not None:
                        query.job.stopping.set()
            for query in self.queries:
                stream = running.get(query.name)
                if stream is None:
                    continue
                if stream.isActive and self.continuous and not stream.status["isTriggerActive"]:
                    stream.stop()
                if not stream.isActive:
                    del running[query.name]
                    self._end_of_stopped(query)
            time.sleep(0.05)
        if running:
            problem = f"the batch of {', '.join(running)} did not end within {BATCH_SECONDS:.0f} s"
            self.notice(f"{problem}: it is cut off, and made again at the next start")
            self.spark.sparkContext.cancelAllJobs()
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
            if query.cluster is None or not self.continuous:  # else `_check` would only have printed a notice
                raise
        except AdtallyError as error:
            if not (isinstance(error.__cause__, Exception) and _STOP_MESSAGE.search(str(error))):
                raise
            return
        query.ended = not self.continuous

    def _check(self, query: _Query) -> None:
        """Start a query that should run and does not; otherwise look whether it has ended or its cluster answers again."""
        if query.ended or time.monotonic() < query.retry_at:
            return
        try:
            if query.running is None:
                job = query.job = query.next_job()
                if isinstance(job, AttributionStream):
                    query.running = job.start(trigger_seconds=self.trigger_seconds)
                else:
                    query.running = job.start(self.spark, continuous=self.continuous, trigger_seconds=self.trigger_seconds)
            elif not query.running.isActive:
                if not self._restarts(query):
                    self._end_of(query)
                    query.ended = True
            elif isinstance(query.job, SourceQuery) and query.job.stop_if_out_of_pace():
                query.running = None
            elif query.cluster is not None and query.name in self.away and query.running.lastProgress is not None:
                del self.away[query.name]
                if query.cluster.name not in self.away.values():
                    self.notice(f"cluster {query.cluster.name} answers again")
        except KafkaError as error:
            if not self.continuous or query.cluster is None:
                raise
            query.running = None
            for other in self.queries:  # each would wait as long for the same error
                if other.cluster == query.cluster and other.running is None:
                    other.retry_at = time.monotonic() + RETRY_SECONDS
            is_known = query.cluster.name in self.away.values()
            self.away[query.name] = query.cluster.name
            if not is_known:
                self.notice(f"{error}; its streams are tried again every {RETRY_SECONDS:.0f} s, the others go on")

    def _restarts(self, query: _Query) -> bool:
        """Return whether to start a query again because the watchdog killed its workers. Raises AdtallyError after a few times."""
        if not isinstance(query.job, SourceQuery) or not query.job.activity.was_ended:
            return False
        if query.running is None or query.running.exception() is None:
            return False
        query.stuck = 1 if query.job.batches else query.stuck + 1
        problem = f"a batch of {query.name} made no progress for {self._batch_seconds:.0f} s and its workers were ended"
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
        hint = "; ".join(filter(None, (cause.hint, "--debug shows all of it")))
        raise AdtallyError(f"{cause}: the {query.name} stream failed", hint=hint) from failure or error
