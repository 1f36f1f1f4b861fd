"""Read a topic as a source. Spark's Kafka source finds the offsets and keeps them in the checkpoint; tasks read the records.

Before each batch the source checks that the topic still has the batch's offsets. If retention removed some, or if somebody deleted
the topic and created it again, the batch fails and names the missing offsets. An operator may give them up (``gaps.accept_gap``);
the ledger counts them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, KafkaError
from spark_jobs.ingest.checkpoint_log import has_plan
from spark_jobs.ingest.files.landing import Split
from spark_jobs.ingest.kafka.config import KafkaCluster
from spark_jobs.ingest.kafka.gaps import keep_topic, known_topic_id, query_name, read_topic, readable_ranges, topic_label
from spark_jobs.ingest.kafka.ranges import OffsetRange, OffsetSplit, Partition, plan_offset_splits, read_batch_offsets
from spark_jobs.ingest.source import FULL_SHARE, Planned, RecordSource

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_TASK_ERROR = re.compile(r"spark_jobs\.errors\.KafkaError: ([^\n]+)")
# Java's client and Spark's source report one of these if no broker answers
_NO_BROKER = re.compile("TimeoutException|Timed out|DisconnectException|UnknownTopicOrPartition|BrokerNotAvailable|KafkaException")


class KafkaSource(RecordSource):
    """The topic of a stream in one cluster."""

    kind = "kafka"

    def __init__(
        self, settings: Settings, stream: str, cluster: KafkaCluster, query: str | None = None, batch_factor: int = 1
    ) -> None:
        """``query`` is how the query's name begins, by default the stream. ``batch_factor`` multiplies the size of its batches.

        Raises KafkaError if the cluster does not answer or lacks the topic, OffsetGapError if the topic was created again.
        """
        self.cluster = cluster
        self.topic = cluster.topic(stream)
        self.label = topic_label(settings, stream, read_topic(cluster, self.topic))
        self.name = query_name(query or stream, cluster.name, self.topic, self.label)
        self.checkpoint = settings.checkpoints_path / self.name
        self._settings = settings
        self._stream = stream
        self._max_offsets = batch_factor * cluster.max_offsets_per_batch

    def load(self, spark: SparkSession) -> DataFrame:
        """See RecordSource."""
        options = {
            "kafka.request.timeout.ms": "15000",
            "kafka.default.api.timeout.ms": "20000",
            # the default is two minutes, in which a task that waits for a lost broker blocks a core that another cluster could use
            "kafkaConsumer.pollTimeoutMs": "15000",
            **self.cluster.spark_options(),
            "kafka.isolation.level": "read_committed",
            "subscribe": self.topic,
            "startingOffsets": "earliest",
            "failOnDataLoss": "true",
            "maxOffsetsPerTrigger": str(self._max_offsets),
        }
        return spark.readStream.format("kafka").options(**options).load().select("partition")

    def before_batch(self) -> None:
        """Write the id of the topic."""
        if known_topic_id(self.checkpoint) is None:
            keep_topic(self.checkpoint, read_topic(self.cluster, self.topic))

    def plan(self, batch_id: int) -> Planned:
        """See RecordSource. Raises OffsetGapError if the topic lacks offsets of the batch, KafkaError if no broker answers."""
        state = read_topic(self.cluster, self.topic)
        keep_topic(self.checkpoint, state)
        offsets = read_batch_offsets(self.checkpoint, batch_id, self.topic)
        wanted = [
            OffsetRange(Partition(self.cluster.name, self.label, number).name, offsets.start[number], end)
            for number, end in offsets.end.items()
        ]
        ranges, lost = readable_ranges(self._settings, self._stream, wanted, state)
        return Planned(offsets.planned_us, ranges=ranges, lost_offsets=lost)

    def has_records(self, batch_id: int) -> bool:
        """See RecordSource."""
        if not has_plan(self.checkpoint, batch_id):
            return False
        found = read_batch_offsets(self.checkpoint, batch_id, self.topic)
        return any(end > found.start[number] for number, end in found.end.items())

    def is_full(self, batch_id: int) -> bool:
        """See RecordSource."""
        found = read_batch_offsets(self.checkpoint, batch_id, self.topic)
        return sum(end - found.start[number] for number, end in found.end.items()) > FULL_SHARE * self._max_offsets

    def splits(self, planned: Planned) -> list[OffsetSplit]:
        """See RecordSource."""
        return plan_offset_splits(planned.ranges, self.cluster.client_options())

    def regions(self, splits: Sequence[Split | OffsetSplit]) -> list[str]:
        """Return the cluster's name, whatever regions the records name."""
        return [self.cluster.name]

    def explained(self, error: Exception) -> AdtallyError | None:
        """See RecordSource."""
        text = str(error)
        message = _TASK_ERROR.search(text)
        if message:
            return KafkaError(message[1].strip())
        if _NO_BROKER.search(text):
            where = f"cluster {self.cluster.name} does not answer at {self.cluster.bootstrap_servers}"
            return KafkaError(where, hint="is the broker up?")
        return None
