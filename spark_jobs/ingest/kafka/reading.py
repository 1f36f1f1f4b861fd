"""Records of a partition by their offsets, as tasks read them: committed ones alone, each whole, whatever is in it.

Runs in Spark's Python workers and must stay importable without a session.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as Code

from spark_jobs.errors import KafkaError
from spark_jobs.ingest.files.lines import BLOCK_BYTES, MOST_LINES, Lines
from spark_jobs.ingest.kafka.ranges import OffsetSplit

QUIET_SECONDS = 60.0  # without a single record or an end: given up
ASK_SECONDS = 10.0  # then the broker is asked whether it is there, and given up if not: the batch holds a lock that others wait for
_ANSWER_SECONDS = 5.0
_AT_ONCE = 5_000
_POLL_SECONDS = 0.2
_CONSUMER = {
    "group.id": "adtally",  # none is joined, no offset is committed: the checkpoint holds them
    "enable.auto.commit": "false",
    "enable.auto.offset.store": "false",
    "isolation.level": "read_committed",
    "auto.offset.reset": "error",  # or a gap would be gone past in silence
    "enable.partition.eof": "true",
    "fetch.queue.backoff.ms": "10",  # its default of a second is ten times what a full queue lasts us
    "log_level": "0",  # what matters comes as an error
}
GONE = (Code.OFFSET_OUT_OF_RANGE, Code._AUTO_OFFSET_RESET)
_held: dict[tuple[tuple[str, str], ...], Consumer] = {}


def open_consumer(options: dict[str, str], **more: str) -> Consumer:
    """A consumer that reads what it is told to, for who connects by ``options``. Raises KafkaError where they cannot be right."""
    try:
        return Consumer({**_CONSUMER, **more, **options})
    except KafkaException as error:
        raise KafkaError(f"no client of Kafka can be made: {error.args[0].str()}", hint="docs/kafka.md") from None


def _consumer(options: dict[str, str]) -> Consumer:
    """This process's consumer for a cluster: to connect takes longer than to read a small batch."""
    key = tuple(sorted(options.items()))
    if key not in _held:
        _held[key] = open_consumer(options)
    return _held[key]


def read_records(split: OffsetSplit) -> Iterator[Lines]:
    """The records of a split; ``numbers`` are offsets from its start. A record without a value is an empty one.

    Raises KafkaError where the broker does not answer or sends nothing for a minute, or no longer has the offsets.
    """
    consumer = _consumer(split.options)
    consumer.assign([TopicPartition(split.topic, split.partition, split.start)])
    try:
        yield from _chunks(consumer, split)
    finally:
        consumer.unassign()


def _chunks(consumer: Consumer, split: OffsetSplit) -> Iterator[Lines]:
    values: list[bytes] = []
    offsets: list[int] = []
    size = 0
    heard = asked = time.monotonic()
    ended = split.start >= split.end
    trouble = ""
    while not ended:
        with uncollected():
            messages = consumer.consume(_AT_ONCE, _POLL_SECONDS)
            plain = plain_offsets(messages, split.end)
            if plain is not None:  # nearly always, at two thirds of the cost of looking at each
                found: list[Any] = list(map(Message.value, messages))
                messages = []
        if plain is not None:
            filled = [value or b"" for value in found]
            values += filled
            offsets += plain
            size += sum(map(len, filled))
            heard = time.monotonic()
        for message in messages:
            error = message.error()
            offset: Any = message.offset()
            if error is not None:
                if error.code() == Code._PARTITION_EOF:
                    ended = offset >= split.end
                elif error.code() in GONE:
                    raise KafkaError(
                        f"{split.name}: the topic does not have offset {split.start} any more", hint="docs/runbooks/offset-gap.md"
                    )
                else:
                    trouble = error.str()
                if ended:
                    break
                continue
            if offset >= split.end:
                ended = True
                break
            value = message.value() or b""
            values.append(value)
            offsets.append(offset)
            size += len(value)
            heard = time.monotonic()
            if offset == split.end - 1:
                ended = True
                break
        if values and (ended or size >= BLOCK_BYTES or len(values) >= MOST_LINES):
            yield _lines(values, offsets, split.start)
            values, offsets, size = [], [], 0
        if ended or time.monotonic() - max(heard, asked) < ASK_SECONDS:
            continue
        asked = time.monotonic()
        silence = asked - heard
        problem = _problem(consumer, split)  # not every broker that goes is told as an error
        if problem or silence > QUIET_SECONDS:
            why = f" ({problem or trouble})" if problem or trouble else ""
            raise KafkaError(
                f"{split.name}: nothing came for {silence:.0f} s, with offsets up to {split.end - 1} to come{why}",
                hint="is the broker up?",
            )


def _problem(consumer: Consumer, split: OffsetSplit) -> str:
    """Why the broker of a partition does not answer; empty: it does."""
    try:
        consumer.get_watermark_offsets(TopicPartition(split.topic, split.partition), timeout=_ANSWER_SECONDS, cached=False)
    except KafkaException as error:
        return str(error.args[0].str())
    return ""


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector of cycles rests meanwhile: it would go through thousands of messages again and again, which have none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def plain_offsets(messages: list[Message], end: int) -> list[int] | None:
    """Offsets of messages that all are records before the last one of a split; None: they are not."""
    # map over a method: half the time of a comprehension. What any() looks at is whether there is an error: none is false
    if not messages or any(map(Message.error, messages)):
        return None
    offsets: list[Any] = list(map(Message.offset, messages))
    return offsets if offsets[-1] < end - 1 else None


def _lines(values: list[bytes], offsets: list[int], start: int) -> Lines:
    sizes = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
    data = b"\n".join([*values, b""])
    return Lines(data, np.cumsum(sizes + 1), 0, np.array(offsets, dtype=np.int64) - start)
