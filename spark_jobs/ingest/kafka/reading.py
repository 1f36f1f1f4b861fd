"""Read the committed records of a partition by their offsets, whatever bytes they hold.

Runs in Spark's Python workers and must stay importable without a session.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as Code

from spark_jobs.errors import KafkaError
from spark_jobs.ingest.files.lines import BLOCK_BYTES, MOST_LINES, Lines
from spark_jobs.ingest.kafka.ranges import OffsetSplit

QUIET_SECONDS = 60.0  # without a record or the end of the partition, after which reading fails
ASK_SECONDS = 10.0  # without a record, after which the broker must answer: the batch holds a lock that others wait for
_ANSWER_SECONDS = 5.0
_AT_ONCE = 5_000
_POLL_SECONDS = 0.2
_CONSUMER = {
    "group.id": "adtally",  # required; no group is joined and no offset is committed: the checkpoint holds them
    "enable.auto.commit": "false",
    "enable.auto.offset.store": "false",
    "isolation.level": "read_committed",
    "auto.offset.reset": "error",  # a missing offset must not be skipped in silence
    "enable.partition.eof": "true",
    "fetch.queue.backoff.ms": "10",  # the default, a second, is ten times as long as a full queue lasts
    "log_level": "0",  # errors arrive as messages
}
_consumers: dict[tuple[tuple[str, str], ...], Consumer] = {}


def open_consumer(options: dict[str, str], **more: str) -> Consumer:
    """Return a consumer that connects by ``options``. Raises KafkaError if these are wrong."""
    try:
        return Consumer({**_CONSUMER, **more, **options})
    except KafkaException as error:
        raise KafkaError(f"no client of Kafka can be made: {error.args[0].str()}", hint="docs/kafka.md") from None


def read_records(split: OffsetSplit) -> Iterator[Lines]:
    """Read the records of a split; ``numbers`` are offsets from its start. A record without a value is an empty line.

    Raises KafkaError if the broker does not answer, sends nothing for a minute, or no longer has the offsets.
    """
    # a process keeps one consumer for each cluster: to connect takes longer than to read a small batch
    key = tuple(sorted(split.options.items()))
    if key not in _consumers:
        _consumers[key] = open_consumer(split.options)
    consumer = _consumers[key]
    consumer.assign([TopicPartition(split.topic, split.partition, split.start)])
    try:
        yield from _chunks(consumer, split)
    finally:
        consumer.unassign()


def _chunks(consumer: Consumer, split: OffsetSplit) -> Iterator[Lines]:
    values: list[bytes] = []
    offsets: list[int] = []
    size = 0
    last_record = last_check = time.monotonic()
    is_complete = split.start >= split.end
    trouble = ""
    while not is_complete:
        with _no_garbage_collection():
            new_values, new_offsets, events = _consume(consumer)
        inside = bisect_left(new_offsets, split.end)
        if inside:
            values += new_values[:inside]
            offsets += new_offsets[:inside]
            size += sum(map(len, new_values[:inside]))
            last_record = time.monotonic()
        is_complete = bool(new_offsets) and new_offsets[-1] >= split.end - 1
        for offset, error in events if not is_complete else ():
            if error.code() == Code._PARTITION_EOF:
                is_complete |= offset >= split.end
            elif error.code() in (Code.OFFSET_OUT_OF_RANGE, Code._AUTO_OFFSET_RESET):
                raise KafkaError(
                    f"{split.name}: the topic does not have offset {split.start} any more", hint="docs/runbooks/offset-gap.md"
                )
            else:
                trouble = error.str()
        if values and (is_complete or size >= BLOCK_BYTES or len(values) >= MOST_LINES):
            yield _lines(values, offsets, split.start)
            values, offsets, size = [], [], 0
        if is_complete or time.monotonic() - max(last_record, last_check) < ASK_SECONDS:
            continue
        last_check = time.monotonic()
        silence = last_check - last_record
        problem = _problem(consumer, split)  # the client does not report every lost broker as an error
        if problem or silence > QUIET_SECONDS:
            why = f" ({problem or trouble})" if problem or trouble else ""
            raise KafkaError(
                f"{split.name}: nothing came for {silence:.0f} s, with offsets up to {split.end - 1} to come{why}",
                hint="is the broker up?",
            )


def _consume(consumer: Consumer) -> tuple[list[bytes], list[int], list[tuple[int, Code]]]:
    """Return values and offsets of the next records, and offset and code of each error or end of a partition."""
    records = consumer.consume(_AT_ONCE, _POLL_SECONDS)
    events: list[tuple[Any, Any]] = []
    if any(map(Message.error, records)):  # map over a method takes half the time of a comprehension
        events = [(message.offset(), message.error()) for message in records if message.error() is not None]
        records = [message for message in records if message.error() is None]
    values: list[Any] = list(map(Message.value, records))
    offsets: list[Any] = list(map(Message.offset, records))
    return [value or b"" for value in values], offsets, events


def _problem(consumer: Consumer, split: OffsetSplit) -> str:
    """Return why the broker of a partition does not answer; empty if it does."""
    try:
        consumer.get_watermark_offsets(TopicPartition(split.topic, split.partition), timeout=_ANSWER_SECONDS, cached=False)
    except KafkaException as error:
        return str(error.args[0].str())
    return ""


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch Python's cyclic collector off: it would visit thousands of messages, which have no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _lines(values: list[bytes], offsets: list[int], start: int) -> Lines:
    sizes = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
    data = b"\n".join([*values, b""])
    return Lines(data, np.cumsum(sizes + 1), 0, np.array(offsets, dtype=np.int64) - start)
