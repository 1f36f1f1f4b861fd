"""Copy each record of a topic unchanged, but for ids of erased people, into `raw_events` or `raw_orders` for the recount.

A streaming query with its own offsets plans the batches; the code below reads them. It shares no line with the ingest's reader
(`reading.py`, `ranges.py`), so that a fault in one of them cannot lose the same record on both sides; a test of the layout checks
the imports. Tasks write data files, and the driver commits them once a batch.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as Code

from spark_jobs.config import Settings
from spark_jobs.erasure.suppression import Suppression, read_suppression
from spark_jobs.errors import KafkaError
from spark_jobs.failure import working_on
from spark_jobs.ingest.agreement import check_agreement
from spark_jobs.ingest.job import BatchJob, Executor
from spark_jobs.ingest.kafka.config import KafkaCluster
from spark_jobs.ingest.kafka.source import KafkaSource
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.data_files import DataFile, DataFileWriter
from spark_jobs.lake.stamp import Stamp, stamped
from spark_jobs.lake.tables import RAW_TABLES, Table
from spark_jobs.lake.writes import DeltaSink
from spark_jobs.steps import Step

_QUIET_SECONDS = 30.0
_MESSAGES = 10_000  # of one call of the client
_SLICE_OFFSETS = 1_000_000  # of one task
_BATCH_FACTOR = 4  # a batch is written while it is read, so a large one needs no memory
_CONSUMER = {
    "group.id": "adtally-raw",  # required; no group is joined and no offset is committed
    "enable.auto.commit": "false",
    "isolation.level": "read_committed",
    "auto.offset.reset": "error",  # a missing offset must not be skipped in silence
    "enable.partition.eof": "true",
    "log_level": "0",
}


@dataclass(frozen=True)
class Slice:
    """Offsets [start, end) of a partition, for one task. ``options`` may hold secrets."""

    name: str  # kafka/<cluster>/<topic>/<partition>
    start: int
    end: int
    options: dict[str, str] = field(repr=False)

    def __str__(self) -> str:
        """Return the partition and the offsets."""
        return f"{self.name} offsets {self.start} to {self.end - 1}"


class RawCopy(BatchJob):
    """The job that copies the topic of a stream of one cluster."""

    min_trigger_seconds = 10.0  # nothing waits for the copy

    def __init__(self, settings: Settings, stream: str, cluster: KafkaCluster) -> None:
        """Raises KafkaError if the cluster does not answer or lacks the topic, OffsetGapError if the topic was created again."""
        self._topic = KafkaSource(settings, stream, cluster, f"raw_{stream}", _BATCH_FACTOR)
        super().__init__(self._topic)
        self._settings = settings
        self._sink = DeltaSink(RAW_TABLES[stream], settings)

    def check_agreement(self) -> None:
        """See BatchJob."""
        check_agreement(self._settings, self.source, [self._sink.table])

    def run_batch(self, batch_id: int, executor: Executor) -> None:
        """Copy the records of a batch's offsets. Do nothing if they are copied: a batch runs again after a kill in its pause."""
        query_id = self.source.query_id()
        transaction = Transaction(query_id, batch_id)
        if self._sink.has(transaction):
            return
        planned = self._topic.plan(batch_id)
        options = self._topic.cluster.client_options()
        slices = [part for one in planned.ranges for part in cut(one.name, one.start, one.end, options)]
        if not slices:
            return
        table, uri, stamp = self._sink.table, self._sink.uri, Stamp(query_id, batch_id, planned.planned_us)
        tasks = min(len(slices), executor.parallelism)
        while True:
            suppression = read_suppression(self._settings)
            written = executor.map(partial(_copied, table=table, uri=uri, stamp=stamp, suppression=suppression), slices, tasks)
            if read_suppression(self._settings) == suppression:  # otherwise somebody was erased meanwhile
                break
        files = [file for part in written for file in part]
        self._sink.append(files, Step.RAW_COPY, transaction)


def _copied(slices: Iterable[Slice], table: Table, uri: str, stamp: Stamp, suppression: Suppression | None) -> list[list[DataFile]]:
    return [copy_slices(slices, table, uri, stamp, suppression)]


def cut(name: str, start: int, end: int, options: dict[str, str]) -> list[Slice]:
    """Cut the offsets [start, end) of a partition into slices."""
    return [Slice(name, at, min(at + _SLICE_OFFSETS, end), options) for at in range(start, end, _SLICE_OFFSETS)]


def copy_slices(
    slices: Iterable[Slice], table: Table, uri: str, stamp: Stamp, suppression: Suppression | None = None
) -> list[DataFile]:
    """Write the records of slices as data files. Raises KafkaError if the broker does not answer, or lacks the offsets."""
    with DataFileWriter(uri, table) as writer, _no_garbage_collection():
        for part in slices:
            with working_on(part):
                for records in read_slice(part):
                    records = records if suppression is None else _suppressed(records, suppression)
                    writer.write(stamped(records, table, stamp))
    return writer.files


def _suppressed(records: pa.Table, suppression: Suppression) -> pa.Table:
    values = [None if value is None else suppression.line(value) for value in records["value"].to_pylist()]
    return records.set_column(records.schema.get_field_index("value"), "value", pa.array(values, pa.binary()))


def read_slice(part: Slice) -> Iterator[pa.Table]:
    """Read the committed records of a slice as columns of the raw tables.

    Kafka's offsets have holes, so the last one may have no record. Then a record after the slice, or the end of the partition,
    shows that all were read. Raises KafkaError as ``copy_slices`` does.
    """
    _, cluster, label, number = part.name.split("/")
    topic, partition = label.split("~")[0], int(number)
    consumer = _connect(part.options)
    try:
        consumer.assign([TopicPartition(topic, partition, part.start)])
        next_offset, answered = part.start, time.monotonic()
        while next_offset < part.end:
            messages = consumer.consume(_MESSAGES, 1.0)
            records: list[Any] = messages
            events: list[Message] = []
            if any(map(Message.error, messages)):
                records = [message for message in messages if message.error() is None]
                events = [message for message in messages if message.error() is not None]
            offsets = np.fromiter(map(Message.offset, records), dtype=np.int64, count=len(records))
            inside = int(np.searchsorted(offsets, part.end))
            if inside:
                yield _columns(records[:inside], offsets[:inside], cluster, label, partition)
            if records:
                next_offset, answered = int(offsets[-1]) + 1, time.monotonic()
            for event in events:
                next_offset = max(next_offset, _end_of_partition(event, part, next_offset))
            if next_offset < part.end and time.monotonic() - answered > _QUIET_SECONDS:
                raise KafkaError(f"{part.name}: no record for {_QUIET_SECONDS:.0f} s", hint="is the broker up?")
    finally:
        consumer.close()


def _connect(options: dict[str, str]) -> Consumer:
    try:
        return Consumer({**_CONSUMER, **options})
    except KafkaException as error:
        raise KafkaError(f"no client of Kafka can be made: {error.args[0].str()}", hint="docs/kafka.md") from None


def _end_of_partition(event: Message, part: Slice, next_offset: int) -> int:
    """Return the end of the partition if ``event`` is that, else 0. Raises KafkaError if the topic lacks ``next_offset``."""
    error: Any = event.error()
    if error.code() in (Code.OFFSET_OUT_OF_RANGE, Code._AUTO_OFFSET_RESET):
        raise KafkaError(f"{part.name}: the topic does not have offset {next_offset} any more")
    return int(event.offset() or 0) if error.code() == Code._PARTITION_EOF else 0


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


def _columns(records: list[Any], offsets: npt.NDArray[np.int64], cluster: str, topic: str, partition: int) -> pa.Table:
    count = len(records)
    return pa.table(
        {
            "cluster": pa.repeat(pa.scalar(cluster), count),
            "source_topic": pa.repeat(pa.scalar(topic), count),
            "source_partition": pa.repeat(pa.scalar(partition, pa.int32()), count),
            "source_offset": pa.array(offsets),
            "source_timestamp": pa.array([stamp[1] for stamp in map(Message.timestamp, records)], pa.timestamp("ms", "UTC")),
            "value": _binary(list(map(Message.value, records))),
        }
    )


def _binary(values: list[Any]) -> pa.Array:
    """Return values as a column, null if a record has none. Joining the bytes takes a third of the time of one value at a time."""
    if None in values:
        return pa.array(values, pa.binary())
    ends = np.cumsum(np.fromiter(chain((0,), map(len, values)), dtype=np.int64, count=len(values) + 1))
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)
