"""A streaming query over a source: started in one way, its failure kept as it was, for Spark passes on its text only."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, StoppedError
from spark_jobs.ingest.activity import Activity
from spark_jobs.ingest.durable_checkpoint import CheckpointSync, set_aside_torn
from spark_jobs.ingest.source import Source
from spark_jobs.steps import watch_checkpoint


class SourceQuery(ABC):
    """The query of one source. Sub-classes say what a batch does.

    ``failure`` is what it failed by; ``min_trigger_seconds`` the least time between two of its batches. ``batches`` counts those
    that ended. No batch begins once ``stopping`` is set.
    """

    min_trigger_seconds = 0.0

    def __init__(self, source: Source, settings: Settings) -> None:
        self.source = source
        self.activity = Activity(settings.scratch_path / "workers" / source.name)
        self.stopping = threading.Event()
        self.batches = 0
        self.checkpoint = source.checkpoint
        self._sync = CheckpointSync(source.checkpoint)
        self.failure: Exception | None = None

    def start(self, spark: SparkSession, *, continuous: bool, trigger_seconds: float) -> StreamingQuery:
        """Start it: all that is there, or until stopped.

        What a power cut tore of the checkpoint is set aside. Raises TableCorruptionError if it and the tables do not agree.
        """
        set_aside_torn(self.checkpoint)
        self.check_agreement()
        # said to be local files: a cluster's default file system may be another
        writer = (
            self.source.load(spark)
            .writeStream.queryName(self.source.name)
            .foreachBatch(self._run)
            .option("checkpointLocation", f"file://{self.checkpoint}")
        )
        if continuous:
            seconds = max(self.min_trigger_seconds, trigger_seconds)
            writer = writer.trigger(processingTime=f"{int(seconds * 1000)} milliseconds")
        else:
            writer = writer.trigger(availableNow=True)
        watch_checkpoint(self.checkpoint)
        return writer.start()

    def explained(self, error: Exception) -> AdtallyError | None:
        """A failure in the words of the source, where that is at fault."""
        return self.source.explained(error)

    @abstractmethod
    def check_agreement(self) -> None:
        """Raise TableCorruptionError if the checkpoint and the tables of the query do not agree (ingest/agreement.py)."""

    @abstractmethod
    def _run_batch(self, frame: DataFrame, batch_id: int) -> None:
        """What a batch does."""

    def _run(self, frame: DataFrame, batch_id: int) -> None:
        try:
            if self.stopping.is_set():
                raise StoppedError("stopped before this batch")
            self._sync.before_commit()
            self._run_batch(frame, batch_id)
            self.batches += 1
            self.activity.was_ended = False  # it came to its end all the same
        except Exception as error:
            self.failure = error if isinstance(error, AdtallyError) else self.explained(error) or error
            raise
