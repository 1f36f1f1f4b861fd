"""The raw copy of a topic: every record as it came, by a query of its own, into `raw_events` or `raw_orders`.

It has offsets of its own and does its own reading: no line of the ingest's is in its way, so that what the one loses the other has,
and a recount needs neither the ingest nor the topic's retention. Its tasks write data files, which a commit a batch names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from confluent_kafka import KafkaError as Code
from confluent_kafka import TopicPartition
from pyspark.sql import DataFrame

from spark_jobs.config import Settings
from spark_jobs.errors import KafkaError
from spark_jobs.kafka.config import KafkaCluster
from spark_jobs.kafka.ranges import OffsetSplit, partition_of
from spark_jobs.kafka.reading import open_consumer
from spark_jobs.kafka.source import KafkaSource
from spark_jobs.sinks.data_files import DataFile, DataFileWriter
from spark_jobs.sinks.delta import DeltaSink, Transaction
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
        super().__init__(self._topic)
        self._sink = DeltaSink(RAW_TABLES[stream], settings)

    def _run_batch(self, frame: DataFrame, batch_id: int) -> None:
        planned = self._topic.plan(batch_id)
        splits = self._topic.splits(planned)
        if not splits:
            return
        query_id = json.loads((self.checkpoint / "metadata").read_text("utf-8"))["id"]
        job = CopyJob(self._sink.table, self._sink.uri, Stamp(query_id, batch_id, planned.planned_us))
        context = frame.sparkSession.sparkContext
        slices = min(len(splits), context.defaultParallelism)
        written = context.parallelize(splits, slices).mapPartitions(lambda part: [copy_splits(part, job)]).collect()
        files = [file for part in written for file in part]
        self._sink.append(files, Step.RAW_COPY, Transaction(query_id, batch_id))


def copy_splits(splits: Iterable[OffsetSplit], job: CopyJob) -> list[DataFile]:
    """Write the records of splits as data files of the raw table; one task's work.

    Raises KafkaError where the broker does not answer, or no longer has the offsets.
    """
    with DataFileWriter(job.uri, job.table) as writer:
        for split in splits:
            _copy_split(split, job, writer)
    return writer.files


def _copy_split(split: OffsetSplit, job: CopyJob, writer: DataFileWriter) -> None:
    place = partition_of(split.name)
    assert place is not None
    consumer = open_consumer(split.options)
    try:
        consumer.assign([TopicPartition(split.topic, split.partition, split.start)])
        position, heard = split.start, time.monotonic()
        while position < split.end:
            messages = consumer.consume(_AT_ONCE, 1.0)
            # where a partition ends is told as a message with the offset behind its last record
            told = [(message.error(), message.offset()) for message in messages]
            reached = [offset for error, offset in told if error is None or error.code() == Code._PARTITION_EOF]
            for error, _ in told:
                if error is not None and error.code() in (Code.OFFSET_OUT_OF_RANGE, Code._AUTO_OFFSET_RESET):
                    raise KafkaError(f"{split.name}: the topic does not have offset {position} any more")
            records: list[Any] = [
                message
                for message, (error, offset) in zip(messages, told, strict=True)
                if error is None and offset is not None and offset < split.end
            ]
            if records:
                writer.write(stamped(_columns(records, place.cluster, place.topic, split.partition), job.table, job.stamp))
                position = records[-1].offset() + 1
            behind = [offset for offset in reached if offset is not None and offset >= split.end]
            if behind:
                return
            if records:
                heard = time.monotonic()
            elif time.monotonic() - heard > _QUIET_SECONDS:
                raise KafkaError(f"{split.name}: nothing came for {_QUIET_SECONDS:.0f} s", hint="is the broker up?")
    finally:
        consumer.close()


def _columns(records: list[Any], cluster: str, topic: str, partition: int) -> pa.Table:
    count = len(records)
    return pa.table(
        {
            "cluster": pa.repeat(pa.scalar(cluster), count),
            "source_topic": pa.repeat(pa.scalar(topic), count),
            "source_partition": pa.repeat(pa.scalar(partition, pa.int32()), count),
            "source_offset": pa.array([record.offset() for record in records], pa.int64()),
            "source_timestamp": pa.array([record.timestamp()[1] for record in records], pa.timestamp("ms", "UTC")),
            "value": pa.array([record.value() for record in records], pa.binary()),
        }
    )
