"""Consuming: from Kafka into the store, and how far behind that is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka import Message as Received
from confluent_kafka.admin import AdminClient
from filelock import FileLock, Timeout

from services.budget.errors import BrokerError, BudgetBusyError, BudgetUsageError, GapError
from services.budget.store import Loaded, Message, Store

MESSAGES_AT_ONCE = 5_000
KEEP_DAYS = 35
_ANSWER_SECONDS = 20.0
_POLL_SECONDS = 0.2
_LOOK_AROUND_SECONDS = 30.0  # for new partitions, for days to seal


def _now() -> datetime:
    return datetime.now(UTC)


class BudgetService:
    """Consumes one topic into one file.

    ``client``: librdkafka's settings to connect, ``bootstrap.servers`` at least. ``keep_days``: uuids of days longer ago are
    forgotten once all is consumed, and the days sealed; None keeps all. Offsets lie in the file, the group is nobody else's.
    """

    def __init__(
        self,
        path: Path,
        client: Mapping[str, str],
        topic: str,
        *,
        keep_days: int | None = KEEP_DAYS,
        now: Callable[[], datetime] = _now,
        progress: Callable[[Loaded], None] | None = None,
    ) -> None:
        self.path, self.topic = path, topic
        self._client: dict[str, str | int | float | bool] = {**client, "log_level": 0}
        self._keep_days = keep_days
        self._now = now
        self._progress = progress or (lambda _: None)

    def run(self, stop: threading.Event, *, once: bool = False, from_start: bool = False, accept_gap: bool = False) -> Loaded:
        """Consume until ``stop`` is set, or, with ``once``, up to the end of every partition as it is met.

        ``from_start``: read again what is there; what was counted is known by its uuid. Raises BudgetBusyError where another
        process consumes into the file, BrokerError where the broker does not answer, GapError where messages that were never
        consumed are gone, unless ``accept_gap``.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.path}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BudgetBusyError(f"another process consumes into {self.path}", hint="one is enough") from None
        try:
            with Store(self.path) as store:
                return self._consume(store, stop, once, from_start, accept_gap)
        except KafkaException as error:
            raise _broker_error(error) from None
        finally:
            lock.release()

    def _consume(self, store: Store, stop: threading.Event, once: bool, from_start: bool, accept_gap: bool) -> Loaded:
        topic_id = self._topic_id()
        store.begin_topic(self.topic, topic_id)
        consumer = self._consumer()
        try:
            partitions = self._assign(consumer, {} if from_start else store.offsets(self.topic), accept_gap)
            at_end: set[int] = set()
            total, looked = Loaded(), time.monotonic()
            while not stop.is_set():
                messages, ends = _split(consumer.consume(MESSAGES_AT_ONCE, _POLL_SECONDS))
                at_end -= {message.partition for message in messages}
                at_end |= ends.keys()
                if messages or ends:
                    done = store.load(self.topic, messages, ends, self._now())
                    total = total.plus(done)
                    if messages:
                        self._progress(done)
                if at_end >= partitions:
                    if once:
                        self._seal(store)
                        return total
                    if time.monotonic() - looked > _LOOK_AROUND_SECONDS:
                        looked = time.monotonic()
                        self._seal(store)
                        if self._topic_id() != topic_id:
                            raise BrokerError(f"topic {self.topic} was made anew", hint="start again: it is read from its start")
                        if len(self._partitions(consumer)) != len(partitions):
                            partitions, at_end = self._assign(consumer, store.offsets(self.topic), accept_gap), set()
            return total
        finally:
            consumer.close()

    def lags(self) -> dict[int, int]:
        """Partition -> offsets behind its end. Raises BrokerError where the broker does not answer."""
        with Store(self.path, read_only=True) as store:
            held = store.offsets(self.topic)
        consumer = self._consumer()
        try:
            found = {}
            for partition in self._partitions(consumer):
                first, end = consumer.get_watermark_offsets(TopicPartition(self.topic, partition), _ANSWER_SECONDS)
                found[partition] = end - held.get(partition, first)
            return found
        except KafkaException as error:
            raise _broker_error(error) from None
        finally:
            consumer.close()

    def _consumer(self) -> Consumer:
        # the group commits nothing; a consumer only needs the name of one
        return Consumer(
            {
                **self._client,
                "group.id": "adtally-budget",
                "isolation.level": "read_committed",
                "enable.auto.commit": "false",
                "enable.auto.offset.store": "false",
                "auto.offset.reset": "error",
                "enable.partition.eof": "true",
            }
        )

    def _topic_id(self) -> str:
        """The topic's own id: of one made anew under the same name it is another."""
        admin = AdminClient(self._client)  # held: its answers come only while it is there
        futures = admin.describe_topics(TopicCollection([self.topic]), request_timeout=_ANSWER_SECONDS)
        try:
            return str(futures[self.topic].result(timeout=_ANSWER_SECONDS + 5).topic_id)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise BudgetUsageError(
                    f"there is no topic {self.topic} on {self._client['bootstrap.servers']}", hint="`adtally publish` makes it"
                ) from None
            raise

    def _partitions(self, consumer: Consumer) -> set[int]:
        found = consumer.list_topics(self.topic, timeout=_ANSWER_SECONDS).topics[self.topic]
        if found.error is not None:
            raise KafkaException(found.error)
        return set(found.partitions)

    def _assign(self, consumer: Consumer, held: dict[int, int], accept_gap: bool) -> set[int]:
        """Assign every partition where the store stands, or at its first message."""
        assigned, gaps = [], []
        partitions = self._partitions(consumer)
        for partition in sorted(partitions):
            first, end = consumer.get_watermark_offsets(TopicPartition(self.topic, partition), _ANSWER_SECONDS)
            offset = held.get(partition, first)
            if offset < first:
                gaps.append(f"partition {partition} lacks offsets {offset} to {first - 1}")
                offset = first
            elif offset > end:
                gaps.append(f"partition {partition} ends at {end}, before offset {offset}")
                offset = first
            assigned.append(TopicPartition(self.topic, partition, offset))
        if gaps and not accept_gap:
            raise GapError(
                f"messages of {self.topic} that were not consumed are gone: {'; '.join(gaps)}",
                hint="publish all again with `adtally publish --whole`, then go on with `adtally budget --accept-gap`",
            )
        consumer.assign(assigned)
        return partitions

    def _seal(self, store: Store) -> None:
        """Forget the uuids of days that are long over. Only here, at the end of the topic: in a backlog they are still needed."""
        if self._keep_days is not None:
            store.seal(self.topic, (self._now().date() - timedelta(days=self._keep_days)).isoformat())


def _split(polled: list[Received[bytes, bytes]]) -> tuple[list[Message], dict[int, int]]:
    """The messages, and where partitions ended. Raises KafkaException for what is neither."""
    messages: list[Message] = []
    ends: dict[int, int] = {}
    for each in polled:
        error, partition, offset = each.error(), each.partition(), each.offset()
        if partition is None or offset is None:  # an error of no partition
            partition, offset = -1, -1
        if error is None:
            messages.append(Message(partition, offset, _bytes(each.key()), _bytes(each.value())))
        elif error.code() == KafkaError._PARTITION_EOF:
            ends[partition] = offset
        elif not error.retriable() and error.code() not in _WAITS:
            raise KafkaException(error)
    return messages, ends


# what the client goes on with by itself
_WAITS = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._RESOLVE)


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _broker_error(error: KafkaException) -> BrokerError:
    said = error.args[0].str() if error.args and isinstance(error.args[0], KafkaError) else str(error)
    return BrokerError(f"Kafka: {said}", hint="what was consumed is kept; start again when the broker answers")


def stop_on_signals(stop: threading.Event) -> None:
    """SIGTERM and SIGINT end ``BudgetService.run`` after the messages that it holds."""
    import signal

    with suppress(ValueError):  # not in the main thread
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
