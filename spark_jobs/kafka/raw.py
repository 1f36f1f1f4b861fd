"""The raw copy of a topic: every record as it came, by a query of its own, into `raw_events` or `raw_orders`.

It has offsets of its own and does its own reading: no line of the ingest's is in its way, so that what the one loses the other has,
and a recount needs neither the ingest nor the topic's retention. Its tasks write data files, which a commit a batch names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from confluent_kafka import KafkaError as Code
from confluent_kafka import Message, TopicPartition
from pyspark.sql import DataFrame

from spark_jobs.config import Settings
from spark_jobs.errors import KafkaError
from spark_jobs.failure import working_on
from spark_jobs.kafka.config import KafkaCluster
from spark_jobs.kafka.ranges import OffsetSplit, Partition, partition_of
from spark_jobs.kafka.reading import GONE, open_consumer, plain_offsets, uncollected
from spark_jobs.kafka.source import KafkaSource
from spark_jobs.sinks.data_files import DataFile, DataFileWriter
from spark_jobs.sinks.delta import DeltaSink, Transaction
from spark_jobs.sources.agreement import check_agreement
from spark_jobs.sources.query import SourceQuery
from spark_jobs.steps import Step
from spark_jobs.tables import RAW_TABLES, Table
from spark_jobs.transforms.stamp import Stamp, stamped

_QUIET_SECONDS = 30.0
_AT_ONCE = 10_000
_BATCH_FACTOR = 4  # a batch is written as it is read, and never held


@dataclass(frozen=True)
class CopyJob:
    """What the tasks of a batch write, and where."""

    table: Table
    uri: str
    stamp: Stamp


class RawCopy(SourceQuery):
    """The query that copies the topic of a stream of one cluster."""

    min_trigger_seconds = 10.0  # nobody waits for it

    def __init__(self, settings: Settings, stream: str, cluster: KafkaCluster) -> None:
        """Raises KafkaError where the cluster does not answer or lacks the topic, OffsetGapError where it is another topic."""
        self._topic = KafkaSource(settings, stream, cluster, f"raw_{stream}", _BATCH_FACTOR)
        super().__init__(self._topic, settings)
        self._settings = settings
        self._sink = DeltaSink(RAW_TABLES[stream], settings)

    def check_agreement(self) -> None:
        """See SourceQuery."""
        check_agreement(self._settings, self.source, [self._sink.table])

    def _run_batch(self, frame: DataFrame, batch_id: int) -> None:
        planned = self._topic.plan(batch_id)
        splits = self._topic.splits(planned)
        if not splits:
            return
        query_id = json.loads((self.checkpoint / "metadata").read_text("utf-8"))["id"]
        job = CopyJob(self._sink.table, self._sink.uri, Stamp(query_id, batch_id, planned.planned_us))
        context = frame.sparkSession.sparkContext
        slices = min(len(splits), context.defaultParallelism)
        written = self.activity.run(context, splits, slices, lambda part: [copy_splits(part, job)])
        files = [file for part in written for file in part]
        self._sink.append(files, Step.RAW_COPY, Transaction(query_id, batch_id))


def copy_splits(splits: Iterable[OffsetSplit], job: CopyJob) -> list[DataFile]:
    """Write the records of splits as data files of the raw table; one task's work.

    Raises KafkaError where the broker does not answer, or no longer has the offsets.
    """
    with DataFileWriter(job.uri, job.table) as writer, uncollected():
        for split in splits:
            with working_on(split):
                _copy_split(split, job, writer)
    return writer.files


def _copy_split(split: OffsetSplit, job: CopyJob, writer: DataFileWriter) -> None:
    place = partition_of(split.name)
    assert place is not None
    consumer = open_consumer(split.options)
    try:
        consumer.assign([TopicPartition(split.topic, split.partition, split.start)])
        position, heard, ended = split.start, time.monotonic(), split.start >= split.end
        while not ended:
            records: list[Any] = consumer.consume(_AT_ONCE, 1.0)
            offsets = plain_offsets(records, split.end)
            if offsets is None:  # seldom; to look at each takes three times as long
                records, offsets, ended = _looked_at(records, split, position)
            if records:
                writer.write(stamped(_columns(records, offsets, split, place), job.table, job.stamp))
                position, heard = offsets[-1] + 1, time.monotonic()
            elif not ended and time.monotonic() - heard > _QUIET_SECONDS:
                raise KafkaError(f"{split.name}: nothing came for {_QUIET_SECONDS:.0f} s", hint="is the broker up?")
    finally:
        consumer.close()


def _looked_at(messages: list[Message], split: OffsetSplit, position: int) -> tuple[list[Message], list[int], bool]:
    """The records of a split among messages, their offsets, and whether its end is reached.

    Raises KafkaError where the topic does not have ``position``, which is read next.
    """
    records, offsets, ended = [], [], False
    for message in messages:
        error = message.error()
        offset: Any = message.offset()
        if error is None:
            if offset < split.end:
                records.append(message)
                offsets.append(offset)
            ended |= offset >= split.end - 1
        elif error.code() in GONE:
            raise KafkaError(f"{split.name}: the topic does not have offset {position} any more")
        elif error.code() == Code._PARTITION_EOF:  # its offset is the one behind the last record
            ended |= offset >= split.end
    return records, offsets, ended


def _columns(records: list[Any], offsets: list[int], split: OffsetSplit, place: Partition) -> pa.Table:
    count = len(records)
    return pa.table(
        {
            "cluster": pa.repeat(pa.scalar(place.cluster), count),
            "source_topic": pa.repeat(pa.scalar(place.topic), count),
            "source_partition": pa.repeat(pa.scalar(split.partition, pa.int32()), count),
            "source_offset": pa.array(offsets, pa.int64()),
            "source_timestamp": pa.array([told[1] for told in map(Message.timestamp, records)], pa.timestamp("ms", "UTC")),
            "value": _binary(list(map(Message.value, records))),
        }
    )


def _binary(values: list[Any]) -> pa.Array:
    """Bytes as a column; null where there are none. Joined, which takes a third of the time of a value at a time."""
    if None in values:
        return pa.array(values, pa.binary())
    ends = np.cumsum(np.fromiter(chain((0,), map(len, values)), dtype=np.int64, count=len(values) + 1))
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)
