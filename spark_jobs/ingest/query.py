"""Run a batch job as a streaming query of Spark: Spark plans the batches and runs their tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, StoppedError
from spark_jobs.ingest.durable_checkpoint import CheckpointSync, set_aside_torn
from spark_jobs.ingest.job import BatchJob, Item, Result
from spark_jobs.ingest.watchdog import Activity
from spark_jobs.session import is_one_machine
from spark_jobs.steps import watch_checkpoint


class SparkExecutor:
    """Runs the tasks of a batch in Spark's Python workers (see `job.Executor`). On one machine ``activity`` knows the workers."""

    def __init__(self, spark: SparkSession, activity: Activity) -> None:
        self._context = spark.sparkContext
        self._activity = activity
        self.parallelism = self._context.defaultParallelism
        self.shares_disk = is_one_machine(str(self._context.master))

    @property
    def was_cut_off(self) -> bool:
        """See Executor."""
        return self._activity.was_ended

    def map(self, function: Callable[[Iterable[Item]], Iterable[Result]], items: Sequence[Item], slices: int) -> list[Result]:
        """See Executor."""
        parts = self._context.parallelize(items, slices)
        if not self.shares_disk:
            return parts.mapPartitions(function).collect()
        with self._activity.watched(function) as task:
            return parts.mapPartitions(task).collect()


class SourceQuery:
    """The streaming query of one batch job.

    ``failure`` is the error that ended it, because Spark passes on only the text. ``batches`` counts the batches that ended.
    """

    def __init__(self, job: BatchJob, settings: Settings) -> None:
        self._job = job
        self._source = job.source
        self._sync = CheckpointSync(job.source.checkpoint)
        self.activity = Activity(settings.scratch_path / "workers" / job.source.name)
        self.stopping = job.stopping
        self.batches = 0
        self.failure: Exception | None = None

    def start(self, spark: SparkSession, *, continuous: bool, trigger_seconds: float) -> StreamingQuery:
        """Start the query. It reads all input and ends, or, with ``continuous``, runs until it is stopped.

        Sets torn files of the checkpoint aside. Raises TableCorruptionError if the checkpoint and tables do not agree.
        """
        checkpoint = self._source.checkpoint
        set_aside_torn(checkpoint)
        self._job.check_agreement()
        writer = self._source.load(spark).writeStream.queryName(self._source.name).foreachBatch(self._run)
        # with its scheme, because a cluster's default file system may be another one
        writer = writer.option("checkpointLocation", f"file://{checkpoint}")
        if continuous:
            seconds = max(self._job.min_trigger_seconds, trigger_seconds)
            writer = writer.trigger(processingTime=f"{int(seconds * 1000)} milliseconds")
        else:
            writer = writer.trigger(availableNow=True)
        watch_checkpoint(checkpoint)
        return writer.start()

    def explained(self, error: Exception) -> AdtallyError | None:
        """Return the source's own error if the source caused ``error``."""
        return self._source.explained(error)

    def _run(self, frame: DataFrame, batch_id: int) -> None:
        """Run one batch. It does not read the frame's rows: tasks read the source themselves."""
        try:
            if self.stopping.is_set():
                raise StoppedError("stopped before this batch")
            self._sync.before_commit()
            self._job.run_batch(batch_id, SparkExecutor(frame.sparkSession, self.activity))
            self.batches += 1
            self.activity.was_ended = False  # the batch ended although its workers were killed once
        except Exception as error:
            self.failure = error if isinstance(error, AdtallyError) else self.explained(error) or error
            raise
