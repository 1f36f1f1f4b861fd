"""Publishes one table to one topic: each transaction has a version's messages and a note of the published position.

Only Kafka knows what was published: a version's transaction also writes the position to the compacted topic CONTROL_TOPIC. So after
a kill both exist or neither, and the next publisher reads there where to continue. Its producer has the transactional id of the
table and topic, so an earlier publisher can no longer commit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka import KafkaError as Refusal
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]
from confluent_kafka.cimpl import NewTopic

from spark_jobs.errors import BusyError, KafkaError, PublicationError
from spark_jobs.ingest.kafka.config import KafkaCluster
from spark_jobs.publish.messages import Messages
from spark_jobs.steps import Step, durable

CONTROL_TOPIC = "adtally-publications"
MESSAGES_A_TRANSACTION = 100_000
TRANSACTION_SECONDS = 60
_ANSWER_SECONDS = 20.0
_ABORT_SECONDS = 5.0
_READ_SECONDS = TRANSACTION_SECONDS + 30.0  # another publisher's open transaction hides the records after it
_TAIL = 2_000  # newest notes, which are read first
_FENCED = (Refusal._FENCED, Refusal.INVALID_PRODUCER_EPOCH, Refusal.PRODUCER_FENCED)
_NO_LEADER = (Refusal.LEADER_NOT_AVAILABLE, Refusal.NOT_LEADER_FOR_PARTITION)

Options = dict[str, str | int | float | bool]


@dataclass(frozen=True)
class Position:
    """The published position of a table in a topic: ``records`` messages of ``version``, all of them if ``is_complete``.

    ``is_whole``: all rows of that version were published, not only the added ones. ``total_records``: messages ever published.
    ``committed_ms``: the time of the version's commit, which tells it from the same version of a restored table.
    """

    table: str
    table_id: str
    topic: str
    version: int
    records: int
    is_complete: bool
    is_whole: bool
    total_records: int
    committed_ms: int

    @property
    def key(self) -> str:
        """The key of its notes."""
        return f"{self.table_id}/{self.topic}"


def read_positions(cluster: KafkaCluster, wanted: str | None = None) -> dict[str, Position]:
    """Read the newest note of every table and topic, by key; with ``wanted`` only recent notes, if that key is among them.

    Reads everything that was committed before it began. Raises KafkaError if the broker does not answer.
    """
    with _kafka_errors():
        return _Notes(cluster).read(wanted)


class Outlet:
    """The topic that a table is published to, a context manager. Only one can be open for a table and topic.

    ``adopt``: publish although the topic has messages of another table. Raises KafkaError if the broker does not answer, BusyError
    if another publisher took over, PublicationError if the topic is another table's.
    """

    def __init__(self, cluster: KafkaCluster, table: str, table_id: str, topic: str, step: Step, *, adopt: bool = False) -> None:
        self._cluster, self._step, self._adopt = cluster, step, adopt
        self._named = Position(table, table_id, topic, -1, 0, True, False, 0, 0)
        self.topic = topic
        self.position: Position | None = None
        self._producer: Producer | None = None

    def __enter__(self) -> Outlet:
        with _kafka_errors():
            ensure_topics(self._cluster, self.topic)
            self._producer = Producer(self._options())
            # aborts an earlier publisher's open transaction, and fences that publisher
            self._producer.init_transactions(_READ_SECONDS)
            held = _Notes(self._cluster).read(self._named.key)
        self.position = held.get(self._named.key)
        others = {note.table_id for note in held.values() if note.topic == self.topic and note.table_id != self._named.table_id}
        if self.position is None and others and not self._adopt:
            raise PublicationError(
                f"topic {self.topic} has what another table {self._named.table} published ({min(others)}); "
                f"{self._named.table_id} would be added to its sums",
                hint="name a new topic in kafka.toml, or publish into this one knowingly: `adtally publish --adopt-topic`",
            )
        return self

    def __exit__(self, _kind: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        self._producer = None

    def publish(self, version: int, messages: Messages, *, committed_ms: int = 0, is_whole: bool = False) -> int:
        """Publish the messages of a version that are not published yet; returns their number.

        A transaction has at most MESSAGES_A_TRANSACTION messages. Raises as ``__enter__``; uncommitted messages are not published.
        """
        with _kafka_errors():
            try:
                return self._publish(version, messages, committed_ms, is_whole)
            except BaseException:
                with suppress(KafkaException):  # so that readers need not wait for the timeout
                    self._held.purge()
                    self._held.abort_transaction(_ABORT_SECONDS)
                raise

    def _publish(self, version: int, messages: Messages, committed_ms: int, is_whole: bool) -> int:
        done = self._published_part(version, is_whole)
        skip, sent, in_transaction = done, 0, False
        for key, value in _one_by_one(messages):
            if skip:
                skip -= 1
                continue
            if not in_transaction:
                self._held.begin_transaction()
                in_transaction = True
            self._send(self.topic, key, value)
            sent, done = sent + 1, done + 1
            if sent % MESSAGES_A_TRANSACTION == 0:
                self._commit(version, done, committed_ms, is_complete=False, is_whole=is_whole)
                in_transaction = False
        if not in_transaction:
            self._held.begin_transaction()
        self._commit(version, done, committed_ms, is_complete=True, is_whole=is_whole)
        return sent

    def _published_part(self, version: int, is_whole: bool) -> int:
        """Return how many messages of an incomplete version are published."""
        at = self.position
        return at.records if at and at.version == version and at.is_whole == is_whole and not at.is_complete else 0

    def _commit(self, version: int, done: int, committed_ms: int, *, is_complete: bool, is_whole: bool) -> None:
        before = self.position or self._named
        note = replace(
            self._named,
            version=version,
            records=done,
            is_complete=is_complete,
            is_whole=is_whole,
            total_records=before.total_records + done - self._published_part(version, is_whole),
            committed_ms=committed_ms,
        )
        self._send(CONTROL_TOPIC, note.key, json.dumps(asdict(note), sort_keys=True))
        if self._held.flush(TRANSACTION_SECONDS):
            raise KafkaException(Refusal(Refusal._TIMED_OUT, "messages were not taken in time"))
        with durable(self._step, version):
            self._held.commit_transaction(TRANSACTION_SECONDS)
        self.position = note

    @property
    def _held(self) -> Producer:
        if self._producer is None:
            raise RuntimeError("the outlet is not open")
        return self._producer

    def _send(self, topic: str, key: str, value: str) -> None:
        while True:
            try:
                self._held.produce(topic, key=key, value=value)
                self._held.poll(0)
                return
            except BufferError:  # the queue is full
                self._held.poll(0.05)

    def _options(self) -> Options:
        return {
            **_client(self._cluster),
            "transactional.id": f"adtally-{self._named.table_id}-{self.topic}",
            "transaction.timeout.ms": TRANSACTION_SECONDS * 1000,
            "acks": "all",
            "partitioner": "murmur2",  # that of Java's clients, so that a reader can compute a key's partition
            "linger.ms": 2,
            "queue.buffering.max.messages": 50_000,
        }


def _one_by_one(messages: Messages) -> Iterator[tuple[str, str]]:
    for keys, values in messages:
        yield from zip(keys, values, strict=True)


def _client(cluster: KafkaCluster) -> Options:
    return {**cluster.client_options(), "log_level": 0}


def ensure_topics(cluster: KafkaCluster, topic: str) -> None:
    """Create the topic and CONTROL_TOPIC if they are missing, with the cluster's defaults for partitions and replicas."""
    admin = AdminClient(_client(cluster))
    there = admin.list_topics(timeout=_ANSWER_SECONDS).topics
    control = NewTopic(CONTROL_TOPIC, 1, -1, config={"cleanup.policy": "compact", "segment.ms": "3600000"})
    missing = [new for new in (NewTopic(topic, -1, -1), control) if new.topic not in there]
    for name, made in admin.create_topics(missing, operation_timeout=_ANSWER_SECONDS).items() if missing else ():
        try:
            made.result(timeout=_ANSWER_SECONDS + 5)
        except KafkaException as error:
            if error.args[0].code() != Refusal.TOPIC_ALREADY_EXISTS:
                raise PublicationError(
                    f"topic {name} is missing on {cluster.name} and cannot be made: {error.args[0].str()}",
                    hint=f"make it{' with cleanup.policy=compact and one partition' if name == CONTROL_TOPIC else ''}",
                ) from None
    if CONTROL_TOPIC in there:
        _require_compaction(admin, cluster)


def _require_compaction(admin: AdminClient, cluster: KafkaCluster) -> None:
    """Raise PublicationError if CONTROL_TOPIC is not compacted: its retention would delete the notes."""
    resource = ConfigResource(ConfigResource.Type.TOPIC, CONTROL_TOPIC)
    try:
        found = admin.describe_configs([resource], request_timeout=_ANSWER_SECONDS)[resource].result(_ANSWER_SECONDS + 5)
    except KafkaException:  # this user may not read the configuration
        return
    policy = found["cleanup.policy"].value
    if policy != "compact":
        raise PublicationError(
            f"topic {CONTROL_TOPIC} of {cluster.name} has cleanup.policy={policy}, so its notes would be lost",
            hint="set it to compact",
        )


@dataclass(frozen=True)
class _Notes:
    """Reads CONTROL_TOPIC."""

    cluster: KafkaCluster

    def read(self, wanted: str | None) -> dict[str, Position]:
        """See ``read_positions``."""
        ends = self._ends()
        if wanted is not None and any(end - first > _TAIL for first, end in ends.values()):
            newest = self._read({partition: (max(first, end - _TAIL), end) for partition, (first, end) in ends.items()})
            if wanted in newest:
                return newest
        return self._read(ends)

    def _consumer(self, isolation: str) -> Consumer:
        return Consumer(
            {
                **_client(self.cluster),
                "group.id": "adtally-publish",
                "isolation.level": isolation,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,
                "fetch.wait.max.ms": 20,  # reaches the end at once
            }
        )

    def _ends(self) -> dict[int, tuple[int, int]]:
        """Return partition -> (first offset, end offset), including open transactions."""
        consumer = self._consumer("read_uncommitted")
        try:
            topic = consumer.list_topics(CONTROL_TOPIC, timeout=_ANSWER_SECONDS).topics[CONTROL_TOPIC]
            if topic.error is not None:
                if topic.error.code() == Refusal.UNKNOWN_TOPIC_OR_PART:
                    return {}
                raise KafkaException(topic.error)
            return {partition: self._bounds(consumer, partition) for partition in topic.partitions}
        finally:
            consumer.close()

    @staticmethod
    def _bounds(consumer: Consumer, partition: int) -> tuple[int, int]:
        """Return the first and end offset; waits for a leader, which a new topic or one of a lost broker lacks."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            try:
                first, end = consumer.get_watermark_offsets(TopicPartition(CONTROL_TOPIC, partition), _ANSWER_SECONDS)
                return first, end
            except KafkaException as error:
                if error.args[0].code() not in _NO_LEADER or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _read(self, ranges: Mapping[int, tuple[int, int]]) -> dict[str, Position]:
        found: dict[str, Position] = {}
        left = {partition: end for partition, (first, end) in ranges.items() if first < end}
        if not left:
            return found
        consumer = self._consumer("read_committed")
        deadline = time.monotonic() + _READ_SECONDS
        try:
            consumer.assign([TopicPartition(CONTROL_TOPIC, partition, ranges[partition][0]) for partition in left])
            while left:
                if time.monotonic() > deadline:
                    raise KafkaException(Refusal(Refusal._TIMED_OUT, f"{CONTROL_TOPIC} cannot be read to its end"))
                message = consumer.poll(0.2)
                if message is None:
                    continue
                error, partition, offset = message.error(), message.partition(), message.offset()
                if error is None:
                    with suppress(ValueError, TypeError):  # another program's record is ignored
                        note = Position(**json.loads(message.value() or "null"))
                        found[note.key] = note
                elif error.code() != Refusal._PARTITION_EOF:
                    if not error.retriable() and error.code() != Refusal._TRANSPORT:
                        raise KafkaException(error)
                elif partition is not None and offset is not None and offset >= left.get(partition, 0):
                    left.pop(partition, None)
        finally:
            consumer.close()
        return found


@contextmanager
def _kafka_errors() -> Iterator[None]:
    """Raise Kafka's errors as BusyError or KafkaError."""
    try:
        yield
    except KafkaException as error:
        refusal = error.args[0]
        if refusal.code() in _FENCED:
            problem = "another publisher of this table and topic has taken over"
            raise BusyError(problem, hint="one is enough; stop the other") from None
        hint = "nothing is lost: publishing goes on where it stopped when the broker answers"
        raise KafkaError(f"Kafka: {refusal.str()}", hint=hint) from None
