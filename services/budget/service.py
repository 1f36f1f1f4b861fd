"""Consumes a topic of Kafka into the store, and measures how far behind the store is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
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
_MAINTENANCE_SECONDS = 30.0  # between looks for new partitions and for days to seal


# the client retries after these errors by itself
_RETRIED = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._RESOLVE)


class BudgetService:
    """Consumes one topic into one file, which also has the offsets.

    ``client``: librdkafka's settings to connect, ``bootstrap.servers`` at least. ``keep_days``: once everything is consumed, the
    service forgets the uuids of older days and seals these days; None keeps all.
    """

    def __init__(
        self,
        path: Path,
        client: Mapping[str, str],
        topic: str,
        *,
        keep_days: int | None = KEEP_DAYS,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path, self.topic = path, topic
        self._client: dict[str, str | int | float | bool] = {**client, "log_level": 0}
        self._keep_days = keep_days
        self._now = now

    def run(self, stop: threading.Event, *, once: bool = False, from_start: bool = False, accept_gap: bool = False) -> Loaded:
        """Consume until ``stop`` is set, or, with ``once``, up to the end of every partition.

        ``from_start``: read the topic again; the uuids prevent a second count. Raises BudgetBusyError if another process consumes
        into the file, BrokerError if the broker does not answer, and, without ``accept_gap``, GapError if unread messages were
        deleted.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{self.path}.lock", timeout=0), Store(self.path) as store:
                return self._consume(store, stop, once, from_start, accept_gap)
        except Timeout:
            raise BudgetBusyError(f"another process consumes into {self.path}", hint="one is enough") from None
        except KafkaException as error:
            raise _broker_error(error) from None

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
                    total = total.plus(store.load(self.topic, messages, ends, self._now()))
                if at_end >= partitions:
                    if once:
                        self._seal(store)
                        return total
                    if time.monotonic() - looked > _MAINTENANCE_SECONDS:
                        looked = time.monotonic()
                        self._seal(store)
                        if self._topic_id() != topic_id:
                            raise BrokerError(
                                f"topic {self.topic} was made anew", hint="start again: the service then reads it from its start"
                            )
                        if len(self._partitions(consumer)) != len(partitions):
                            partitions, at_end = self._assign(consumer, store.offsets(self.topic), accept_gap), set()
            return total
        finally:
            consumer.close()

    def lags(self) -> dict[int, int]:
        """Return partition -> offsets behind its end. Raises BrokerError if the broker does not answer."""
        with Store(self.path, read_only=True) as store:
            offsets = store.offsets(self.topic)
        consumer = self._consumer()
        try:
            found = {}
            for partition in self._partitions(consumer):
                first, end = consumer.get_watermark_offsets(TopicPartition(self.topic, partition), _ANSWER_SECONDS)
                found[partition] = end - offsets.get(partition, first)
            return found
        except KafkaException as error:
            raise _broker_error(error) from None
        finally:
            consumer.close()

    def _consumer(self) -> Consumer:
        # a consumer needs the name of a group, although it commits nothing there
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
        """Return the topic's id, which changes if the topic is deleted and created again."""
        admin = AdminClient(self._client)  # keep a reference: a deleted client gives no answer
        futures = admin.describe_topics(TopicCollection([self.topic]), request_timeout=_ANSWER_SECONDS)
        try:
            return str(futures[self.topic].result(timeout=_ANSWER_SECONDS + 5).topic_id)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                place = f"{self.topic} on {self._client['bootstrap.servers']}"
                raise BudgetUsageError(f"there is no topic {place}", hint="`adtally publish` makes it") from None
            raise

    def _partitions(self, consumer: Consumer) -> set[int]:
        found = consumer.list_topics(self.topic, timeout=_ANSWER_SECONDS).topics[self.topic]
        if found.error is not None:
            raise KafkaException(found.error)
        return set(found.partitions)

    def _assign(self, consumer: Consumer, offsets: dict[int, int], accept_gap: bool) -> set[int]:
        """Assign every partition at its offset of the store, or at its first message. Return the partitions."""
        assigned, gaps = [], []
        partitions = self._partitions(consumer)
        for partition in sorted(partitions):
            first, end = consumer.get_watermark_offsets(TopicPartition(self.topic, partition), _ANSWER_SECONDS)
            offset = offsets.get(partition, first)
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
                hint="publish all again with `adtally publish --whole`, then continue with `adtally budget --accept-gap`",
            )
        consumer.assign(assigned)
        return partitions

    def _seal(self, store: Store) -> None:
        """Forget the uuids of old days. Call it only at the end of the topic: a backlog still needs them."""
        if self._keep_days is not None:
            store.seal(self.topic, (self._now().date() - timedelta(days=self._keep_days)).isoformat())


def _split(polled: list[Received[bytes, bytes]]) -> tuple[list[Message], dict[int, int]]:
    """Return the messages, and the ends of partitions reached. Raises KafkaException for an error that the client cannot retry."""
    messages: list[Message] = []
    ends: dict[int, int] = {}
    for received in polled:
        error, partition, offset = received.error(), received.partition(), received.offset()
        if partition is None or offset is None:  # an error of no partition
            partition, offset = -1, -1
        if error is None:
            messages.append(Message(partition, offset, received.key(), received.value()))
        elif error.code() == KafkaError._PARTITION_EOF:
            ends[partition] = offset
        elif not error.retriable() and error.code() not in _RETRIED:
            raise KafkaException(error)
    return messages, ends


def _broker_error(error: KafkaException) -> BrokerError:
    reason = error.args[0].str() if error.args and isinstance(error.args[0], KafkaError) else str(error)
    return BrokerError(f"Kafka: {reason}", hint="what was consumed is kept; start again when the broker answers")
