"""Publishes the rows of new Delta versions of `minute_metrics` and `attributed_orders` to Kafka, each version once.

It publishes versions in order, each in a transaction that also notes the version (``spark_jobs.publish.outlet``). So a reader of
committed messages sees each message once, whatever process is killed. Versions that only rearrange rows publish nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.errors import BusyError, KafkaConfigurationError, KafkaError, PublicationError, TableCorruptionError
from spark_jobs.failure import one_line
from spark_jobs.ingest.kafka.config import Publish, read_kafka
from spark_jobs.lake.commit import WRITE_ERRORS, Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import PUBLISH, exclusive
from spark_jobs.lake.tables import PUBLICATIONS, Table
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.publish.messages import CreditsMessages, Messages, MetricsMessages
from spark_jobs.publish.outlet import Outlet, Position, read_positions
from spark_jobs.publish.progress import TopicStatus, publications_app_id, status_of, topics_of
from spark_jobs.steps import Step

_CHECK_SECONDS = 30.0  # between checks for missing versions, and for a table that was created again
_ROW_SECONDS = 10.0  # between two rows of `publications`
_LAST_SECONDS = 20.0  # at the end, for versions that were committed before it; the next run publishes the rest
_QUIET_VERSIONS = 50  # versions without rows after which the position is noted
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Kafka also fences a publisher that was suspended for longer than a transaction may take: one fencing proves no other publisher.
_FENCED_PAUSE, _FENCED_AGAIN_SECONDS = 5.0, 600.0
_WHOLE = "`adtally publish --whole` publishes all rows as they stand, under the same ids"


@dataclass(frozen=True)
class Published:
    """A version that was published. ``lag_seconds``: how long after its commit (by this machine's clock)."""

    table: str
    topic: str
    version: int
    records: int
    lag_seconds: float


@dataclass
class TopicReport:
    """The work of one run on a topic: the number of ``versions`` with rows, and their messages. ``version``: the published one."""

    table: str
    topic: str
    version: int | None = None
    versions: int = 0
    records: int = 0


@dataclass(frozen=True)
class PublishReport:
    """Both topics; none if kafka.toml has no [publish]."""

    topics: list[TopicReport] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Target:
    """A table and its topic."""

    source: type[MetricsMessages] | type[CreditsMessages]
    topic: str
    step: Step

    @property
    def table(self) -> Table:
        return self.source.table

    @property
    def name(self) -> str:
        return self.table.name


def is_publishing(settings: Settings) -> bool:
    """Return whether kafka.toml says where to publish. Raises KafkaConfigurationError if it is wrong."""
    return read_kafka(settings).publish is not None


def publish_new(
    settings: Settings, *, whole: bool = False, adopt: bool = False, progress: Callable[[Published], None] | None = None
) -> PublishReport:
    """Publish all versions that are not published yet; nothing if kafka.toml does not say where.

    ``whole``: publish all current rows, whatever was published before, for when versions are gone or a topic was lost. ``adopt``:
    publish to a topic that has messages of another table. Raises KafkaError if the broker does not answer, BusyError if another
    publisher runs, PublicationError if versions are gone or a topic is another table's.
    """
    started = time.monotonic()
    publish = read_kafka(settings).publish
    if publish is None:
        return PublishReport()
    with exclusive(settings, PUBLISH), ExitStack() as ends:
        reports = []
        for target in _targets(publish):
            publisher = _Publisher(settings, publish, target, progress)
            ends.callback(publisher.rows.write)
            publisher.run_once(whole=whole, adopt=adopt)
            reports.append(publisher.report)
        return PublishReport(reports, time.monotonic() - started)


class PublishLoop:
    """Publishes each version soon after it is committed. Raises KafkaConfigurationError if kafka.toml does not say where.

    Calls ``problem`` once when the broker stops answering (with an empty text when it answers again), and tries again until then.
    Calls it too if one topic is blocked; the other one continues.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        adopt: bool = False,
        progress: Callable[[Published], None] | None = None,
        problem: Callable[[str], None] | None = None,
    ) -> None:
        publish = read_kafka(settings).publish
        if publish is None:
            raise _nowhere(settings)
        self._settings, self._publish, self._adopt = settings, publish, adopt
        self._progress, self._problem = progress, problem or (lambda _: None)
        self._failure: Exception | None = None

    def run(self, stop: threading.Event) -> None:
        """Publish until ``stop`` is set, then the versions that were committed before that.

        Raises at the end what `publish_new` raises, apart from KafkaError. Ends early if every topic is blocked.
        """
        with exclusive(self._settings, PUBLISH):
            threads = [
                threading.Thread(target=self._run, args=(target, stop), name=f"publish-{target.name}", daemon=True)
                for target in _targets(self._publish)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self, target: _Target, stop: threading.Event) -> None:
        publisher = _Publisher(self._settings, self._publish, target, self._progress)
        pause, is_reported, fenced = _FIRST_PAUSE, False, -math.inf

        def report_recovery() -> None:
            nonlocal pause, is_reported
            pause = _FIRST_PAUSE
            if is_reported:
                self._problem("")
            is_reported = False

        try:
            while not stop.is_set():
                try:
                    publisher.follow(stop, report_recovery, adopt=self._adopt)
                except KafkaError as error:
                    if not is_reported:
                        self._problem(f"{target.topic}: {error}")
                        is_reported = True
                    stop.wait(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                except BusyError as error:
                    if time.monotonic() - fenced < _FENCED_AGAIN_SECONDS:
                        raise
                    fenced, is_reported = time.monotonic(), True
                    self._problem(f"{target.topic}: {error}")
                    stop.wait(_FENCED_PAUSE)
        except Exception as error:
            self._failure = self._failure or error
            self._problem(f"{target.topic}: {error}")
        finally:
            with suppress(TableCorruptionError, *WRITE_ERRORS):  # the next row has these versions too
                publisher.rows.write()


class _Publisher:
    """Publishes one table."""

    def __init__(self, settings: Settings, publish: Publish, target: _Target, progress: Callable[[Published], None] | None) -> None:
        self._lake, self._publish, self._target = Lake(settings), publish, target
        self._log = self._lake.log(target.table)
        self._messages = target.source(self._lake)
        self._progress = progress or (lambda _: None)
        self.report = TopicReport(target.name, target.topic)
        self.rows = _PublicationRows(self._lake, publish.cluster.name)

    def run_once(self, *, whole: bool, adopt: bool) -> None:
        """Publish all unpublished versions."""
        identity = self._lake.table_id(self._target.table)
        if identity is None:
            return
        with self._outlet(identity, adopt) as outlet:
            self._require_same(outlet)
            if whole:
                self._whole(outlet, self._log.latest_version() or 0)
            self._catch_up(outlet, None)

    def follow(self, stop: threading.Event, opened: Callable[[], None], *, adopt: bool) -> None:
        """Publish each version as it is committed, until ``stop`` is set or the table has another id."""
        identity = self._lake.table_id(self._target.table)
        if identity is None:
            stop.wait(1.0)
            return
        with self._outlet(identity, adopt) as outlet:
            opened()
            checked = -math.inf
            while not stop.is_set():
                if time.monotonic() - checked > _CHECK_SECONDS:
                    if self._lake.table_id(self._target.table) != identity:
                        return
                    self._require_same(outlet)
                    self._require_next(outlet)
                    checked = time.monotonic()
                self._catch_up(outlet, stop)
                self.rows.write_in_time()
                stop.wait(self._log.poll_seconds)
            self._catch_up(outlet, _Deadline(_LAST_SECONDS))

    def _outlet(self, identity: str, adopt: bool) -> Outlet:
        target = self._target
        return Outlet(self._publish.cluster, target.name, identity, target.topic, target.step, adopt=adopt)

    def _catch_up(self, outlet: Outlet, stop: threading.Event | _Deadline | None) -> None:
        at = outlet.position
        if at is not None and at.is_whole and not at.is_complete:
            self._whole(outlet, at.version)
        version = _next(outlet.position)
        quiet = 0
        while stop is None or not stop.is_set():
            commit = self._log.commit(version)
            if commit is None:
                if stop is None:
                    self._require_next(outlet)
                break
            if commit.changes_rows:
                self._publish_version(outlet, version, lambda: self._messages.of_commit(commit), commit.committed_ms)  # noqa: B023
                quiet = 0
            else:
                quiet += 1
                if quiet == _QUIET_VERSIONS:
                    outlet.publish(version, iter(()), committed_ms=commit.committed_ms)
                    quiet = 0
            version += 1

    def _whole(self, outlet: Outlet, version: int) -> None:
        commit = self._log.commit(version)
        at = 0 if commit is None else commit.committed_ms
        self._publish_version(outlet, version, lambda: self._messages.whole(version, at), at, is_whole=True)

    def _publish_version(
        self, outlet: Outlet, version: int, messages: Callable[[], Messages], at: int, *, is_whole: bool = False
    ) -> None:
        before = outlet.position
        try:
            records = outlet.publish(version, messages(), committed_ms=at, is_whole=is_whole)
        except (FileNotFoundError, TableCorruptionError) as error:
            raise PublicationError(
                f"version {version} of {self._target.name} cannot be published: {one_line(error.args[0])}", hint=_WHOLE
            ) from None
        self.report.version = version
        self.report.versions += 1
        self.report.records += records
        if outlet.position is not None:
            self.rows.add(outlet.position, records, _next(before))
        self._progress(Published(self._target.name, self._target.topic, version, records, time.time() - at / 1000))

    def _require_same(self, outlet: Outlet) -> None:
        """Raise PublicationError if the newest published version is missing, or another commit has its number."""
        at, latest = outlet.position, self._log.latest_version()
        if at is None or latest is None:
            return
        held = self._log.commit(at.version)
        if latest < at.version or (held is not None and held.committed_ms != at.committed_ms):
            raise PublicationError(
                f"{self._target.name} is not what it was when version {at.version} of it was published",
                hint="an older copy of it was put back: publish into new topics, see docs/runbooks/publishing-behind.md",
            )

    def _require_next(self, outlet: Outlet) -> None:
        """Raise PublicationError if the log has newer versions than the next one to publish, but not that one."""
        wanted, latest = _next(outlet.position), self._log.latest_version()
        if latest is not None and latest >= wanted and self._log.commit(wanted) is None:
            raise PublicationError(
                f"version {wanted} of {self._target.name} is to be published next, and its log does not have it any more",
                hint=_WHOLE,
            )


class _Deadline:
    """Like an event that is set when a time has passed."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def is_set(self) -> bool:
        return time.monotonic() >= self._end


def _next(position: Position | None) -> int:
    if position is None:
        return 0
    return position.version + 1 if position.is_complete else position.version


class _PublicationRows:
    """Writes rows of `publications`, one for the versions of some seconds, so that this costs less than publishing."""

    def __init__(self, lake: Lake, cluster: str) -> None:
        self._lake, self._cluster = lake, cluster
        self._newest: Position | None = None
        self._first, self._records = 0, 0
        self._written = time.monotonic()

    def add(self, position: Position, records: int, first_version: int) -> None:
        """Add a published version to the next row."""
        if self._newest is None:
            self._first, self._records = first_version, 0
        self._newest, self._records = position, self._records + records

    def write_in_time(self) -> None:
        """Write the row if it is time."""
        if time.monotonic() - self._written >= _ROW_SECONDS:
            with suppress(TableCorruptionError, *WRITE_ERRORS):
                self.write()

    def write(self) -> None:
        """Write the row, once per version, if a version was published since the previous row."""
        newest, self._newest, self._written = self._newest, None, time.monotonic()
        if newest is None:
            return
        if not self._lake.exists(PUBLICATIONS):
            ensure_tables(self._lake.settings)
        row = {
            "cluster": self._cluster,
            "topic": newest.topic,
            "table_name": newest.table,
            "table_id": newest.table_id,
            "first_version": self._first,
            "version": newest.version,
            "records": self._records,
            "total_records": newest.total_records,
            "published_at": datetime.now(UTC),
        }
        rows = pa.Table.from_pylist([row], PUBLICATIONS.schema)
        transaction = Transaction(publications_app_id(self._cluster, newest.key), newest.version)
        metadata = {"total_records": newest.total_records}
        self._lake.append(PUBLICATIONS, rows, Step.PUBLICATIONS, transaction=transaction, metadata=metadata)


def ask_publications(settings: Settings, *, now: datetime | None = None) -> list[TopicStatus]:
    """Do as `read_publications`, but from the notes in Kafka. Raises KafkaError if the broker does not answer."""
    publish = read_kafka(settings).publish
    if publish is None:
        raise _nowhere(settings)
    held = read_positions(publish.cluster)
    lake = Lake(settings)
    found = []
    for target in _targets(publish):
        at = held.get(f"{lake.table_id(target.table)}/{target.topic}")
        version = None if at is None or _next(at) == 0 else _next(at) - 1
        total = at.total_records if at else None
        found.append(status_of(lake, publish, target.table, target.topic, version, total, now or datetime.now(UTC)))
    return found


def _targets(publish: Publish) -> list[_Target]:
    (_, metrics), (_, credits) = topics_of(publish)
    return [_Target(MetricsMessages, metrics, Step.PUBLISHED_METRICS), _Target(CreditsMessages, credits, Step.PUBLISHED_CREDITS)]


def _nowhere(settings: Settings) -> KafkaConfigurationError:
    return KafkaConfigurationError(
        f"{settings.kafka_path} does not say where to publish", hint="it needs a table [publish]; see docs/publishing.md"
    )
