"""The raw copy of a topic: every record as it came, by a query of its own, into `raw_events` or `raw_orders`.

Spark's source reads it and Delta's own sink writes it: no line of the ingest's reading is in its way, so that what the one loses
the other has, and a recount needs neither the ingest nor the topic's retention.
"""

from __future__ import annotations

from pyspark.sql import SparkSession
from pyspark.sql import functions as f
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.kafka.config import KafkaCluster
from spark_jobs.kafka.gaps import checkpoint_of, keep_topic, read_topic, refuse_gaps, topic_label
from spark_jobs.kafka.source import explain_failure, spark_reader_options
from spark_jobs.tables import RAW_TABLES

TRIGGER_SECONDS = 10.0  # at least: nobody waits for it, and a commit through Spark takes a second


class RawCopy:
    """The query that copies the topic of a stream of one cluster."""

    def __init__(self, settings: Settings, stream: str, cluster: KafkaCluster) -> None:
        """Raises KafkaError where the cluster does not answer or lacks the topic, OffsetGapError where records of it are gone."""
        self.cluster = cluster
        self.topic = cluster.topic(stream)
        self.failure: Exception | None = None
        self._settings = settings
        self._stream = stream
        state = read_topic(cluster, self.topic)
        self.label = topic_label(settings, stream, state)
        self.checkpoint = checkpoint_of(settings, f"raw_{stream}", cluster.name, self.topic, self.label)
        self.stream = self.checkpoint.name
        self._goes_past_a_gap = refuse_gaps(settings, stream, self.checkpoint, self.label, state)
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        keep_topic(self.checkpoint, state)

    def start(self, spark: SparkSession, *, continuous: bool, trigger_seconds: float) -> StreamingQuery:
        """Start it: all that is there, or until stopped."""
        options = spark_reader_options(self.cluster, self.topic, 4 * self.cluster.max_offsets_per_batch)
        if self._goes_past_a_gap:  # all of it by decision: it was looked at just now
            options["failOnDataLoss"] = "false"
        reader = spark.readStream.format("kafka")
        for name, value in options.items():
            reader = reader.option(name, value)
        now = f.current_timestamp()
        rows = reader.load().select(
            f.lit(self.cluster.name).alias("cluster"),
            f.lit(self.label).alias("source_topic"),
            f.col("partition").alias("source_partition"),
            f.col("offset").alias("source_offset"),
            f.col("timestamp").alias("source_timestamp"),
            f.col("value"),
            now.alias("ingested_at"),
            f.to_date(now).alias("ingested_date"),
        )
        writer = (
            rows.writeStream.queryName(self.stream)
            .format("delta")
            .outputMode("append")
            .option("checkpointLocation", f"file://{self.checkpoint}")
        )
        if continuous:
            writer = writer.trigger(processingTime=f"{int(max(TRIGGER_SECONDS, trigger_seconds) * 1000)} milliseconds")
        else:
            writer = writer.trigger(availableNow=True)
        return writer.start(self._settings.table_uri(RAW_TABLES[self._stream].name))

    def explained(self, error: Exception) -> AdtallyError | None:
        """The error in our own words, where the cluster is at fault."""
        return explain_failure(self.cluster, error)
