"""Run a batch job as a streaming query of Spark: Spark plans the batches and runs their tasks."""

from __future__ import annotations

import pickle
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyspark import RDD
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, StoppedError
from spark_jobs.ingest.durable_checkpoint import CheckpointSync
from spark_jobs.ingest.job import BatchJob, Item, Result, Scattered
from spark_jobs.ingest.pace import Pace
from spark_jobs.ingest.watchdog import Activity
from spark_jobs.lake.checkpoint_copy import checkpoint_copy
from spark_jobs.session import is_one_machine
from spark_jobs.steps import watch_checkpoint

_POLLING_DELAY = "spark.sql.streaming.pollingDelay"  # how long a query sleeps after a look that found no input


class SparkExecutor:
    """Runs the tasks of a batch in Spark's Python workers (see `job.Executor`). On one machine ``activity`` knows the workers.

    On one machine the results are files in the folder ``results`` while a job runs: through Java they would take several times as
    long, and fill its heap.
    """

    def __init__(self, spark: SparkSession, activity: Activity, results: Path) -> None:
        self._context = spark.sparkContext
        self._activity = activity
        self._results = results
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
        shutil.rmtree(self._results, ignore_errors=True)  # of a process that was killed
        self._results.mkdir(parents=True)
        try:
            with self._activity.watched(function) as task:
                paths = parts.mapPartitions(partial(_to_file, str(self._results), task)).collect()
            return [result for path in paths for result in _from_file(path)]
        finally:
            shutil.rmtree(self._results, ignore_errors=True)

    def scatter(
        self, function: Callable[[Iterable[Item]], Iterable[tuple[int, Any]]], items: Sequence[Item], slices: int, parts: int
    ) -> Scattered:
        """See Executor."""
        return _Shuffled(self._context.parallelize(items, slices).mapPartitions(function).partitionBy(parts, int))


class _Shuffled:
    """Values in Spark's shuffle files, which Spark makes at the first call of ``gather`` and reuses at the next."""

    def __init__(self, pairs: RDD[tuple[int, Any]]) -> None:
        self._pairs = pairs

    def gather(self, function: Callable[[int, Iterable[Any]], Result], parts: Sequence[int]) -> list[Result]:
        """See Scattered."""
        made = self._pairs.mapPartitionsWithIndex(lambda part, pairs: [function(part, (value for _, value in pairs))])
        return self._pairs.context.runJob(made, list, parts)

    def delete(self) -> None:
        """See Scattered."""
        self._pairs._jrdd.rdd().cleanShuffleDependencies(False)


def _to_file(folder: str, task: Callable[[Iterable[Item]], Iterable[Result]], part: Iterable[Item]) -> Iterator[str]:
    """Write the results of a task to a file; yield its path."""
    path = f"{folder}/{uuid.uuid4().hex}"
    with open(path, "wb") as file:
        for result in task(part):
            pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
    yield path


def _from_file(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        while file.peek(1):
            yield pickle.load(file)


class SourceQuery:
    """The streaming query of one batch job.

    ``failure`` is the error that ended it, because Spark passes on only the text. ``batches`` counts the batches that ended.
    ``pace`` makes the pauses of a continuous query.
    """

    def __init__(self, job: BatchJob, settings: Settings) -> None:
        self._job = job
        self._source = job.source
        self._sync = CheckpointSync(job.source.checkpoint, checkpoint_copy(settings, job.source.name))
        self.activity = Activity(settings.scratch_path / "workers" / job.source.name)
        self._results = settings.scratch_path / "results" / job.source.name
        self.stopping = job.stopping
        self.batches = 0
        self._is_checked = False
        self.failure: Exception | None = None
        self.pace: Pace | None = None
        self._stream: StreamingQuery | None = None
        self._polling_seconds = 0.0
        self._running_batch = threading.Lock()

    def has_ended(self) -> bool:
        """Return whether a start without ``continuous`` would run no batch; False if only Spark can tell. Raises as `start`."""
        self._check()
        return self._source.has_ended()

    def _check(self) -> None:
        """Bring the checkpoint back from a remote lakehouse, set torn files of it aside, and compare it with the tables."""
        if not self._is_checked:
            self._sync.before_start()
            self._job.check_agreement()
            self._is_checked = True

    def start(self, spark: SparkSession, *, continuous: bool, trigger_seconds: float) -> StreamingQuery:
        """Start the query. It reads all input and ends, or, with ``continuous``, runs until it is stopped.

        ``trigger_seconds`` is the interval of its ``pace``. Raises TableCorruptionError if the checkpoint and the tables do not
        agree.
        """
        checkpoint = self._source.checkpoint
        self._check()
        writer = self._source.load(spark).writeStream.queryName(self._source.name).foreachBatch(self._run)
        # with its scheme, because a cluster's default file system may be another one
        writer = writer.option("checkpointLocation", f"file://{checkpoint}")
        if continuous:
            self.pace = Pace(max(self._job.min_trigger_seconds, trigger_seconds), self._source.look_seconds)
            self._polling_seconds = self.pace.interval_seconds
            spark.conf.set(_POLLING_DELAY, f"{int(self._polling_seconds * 1000)}ms")  # the query keeps what it starts with
            writer = writer.trigger(processingTime="0 seconds")
        else:
            writer = writer.trigger(availableNow=True)
        watch_checkpoint(checkpoint)
        self._stream = writer.start()
        return self._stream

    def stop_if_out_of_pace(self) -> bool:
        """Stop the query if it looks for input twice as often as it should, or half as often, and no batch runs.

        Returns whether it was stopped; then a new one must be started.
        """
        if self.pace is None or self._stream is None or 0.5 <= self.pace.interval_seconds / self._polling_seconds <= 2:
            return False
        if not self._running_batch.acquire(blocking=False):
            return False
        self.stopping.set()  # a batch that Spark begins meanwhile ends at once, and the new query runs it
        self._running_batch.release()
        self._stream.stop()
        return True

    def copy_ended(self) -> None:
        """Copy to a remote lakehouse which batches have ended, and delete what only older batches needed there."""
        if self._sync.copy is not None:
            self._sync.copy.add_new()
            self._sync.copy.delete_old()

    def explained(self, error: Exception) -> AdtallyError | None:
        """Return the source's own error if the source caused ``error``."""
        return self._source.explained(error)

    def _run(self, frame: DataFrame, batch_id: int) -> None:
        """Run one batch, and pause after it. It does not read the frame's rows: tasks read the source themselves."""
        with self._running_batch:
            self._run_and_pause(batch_id, frame.sparkSession)

    def _run_and_pause(self, batch_id: int, spark: SparkSession) -> None:
        started = time.monotonic()
        try:
            if self.stopping.is_set():
                raise StoppedError("stopped before this batch")
            self._source.before_batch()
            self._sync.before_commit()
            self._job.run_batch(batch_id, SparkExecutor(spark, self.activity, self._results))
            self.batches += 1
            self.activity.was_ended = False  # the batch ended although its workers were killed once
            if self.pace is not None:
                self.pace.pause_after(started, is_full=self._source.is_full(batch_id))
        except Exception as error:
            self.failure = error if isinstance(error, AdtallyError) else self.explained(error) or error
            raise
