"""A stream's query, and what is common to the batches of all streams.

Spark's source (of files, or of Kafka) finds what is there and keeps offsets in the checkpoint; a batch is a list of files or of
ranges of offsets. Its tasks read the bytes themselves (``tasks``), for a record's place and its faults must be known to the byte.
Per batch, in this order: parse and stage; classify on the driver by narrow keys; write data files; commit the accepted records,
the rejected and conflicting ones, what follows from the accepted, and the ledger.
"""

from __future__ import annotations

import json
import shutil
import time
from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from spark_jobs.config import Settings
from spark_jobs.contract.spec import Limits, to_micros
from spark_jobs.dedupe.classify import Classification, Outcome
from spark_jobs.dedupe.keys import Keys
from spark_jobs.delta_log import Commit, DeltaLog
from spark_jobs.errors import ConservationError
from spark_jobs.jobs.batch import COUNTS, Batch, BatchReport, Plan, ledger_rows
from spark_jobs.locks import write_lock
from spark_jobs.rules.invalid_traffic import InvalidTrafficRules, no_rules
from spark_jobs.session import is_one_machine
from spark_jobs.sinks.delta import DeltaSink, Transaction
from spark_jobs.sources.query import SourceQuery
from spark_jobs.sources.source import FilesSource, Source
from spark_jobs.steps import Step, crash_point
from spark_jobs.tables import BATCH_LEDGER, Table
from spark_jobs.tasks.stage import StageTask, stage_split
from spark_jobs.tasks.write import SplitRows, WriteJob, Written, write_splits
from spark_jobs.transforms.events import CAMPAIGN_SCHEMA
from spark_jobs.transforms.stamp import Stamp, stamped_records

_ROWS_PER_WRITER = 250_000


class StreamJob(SourceQuery):
    """One stream: its query, and what a batch of it does. Sub-classes say where the accepted records go."""

    stream: str
    accepted_table: Table
    rejected_table: Table
    rejected_step: Step
    ledger_step: Step

    def __init__(self, settings: Settings, report: Callable[[BatchReport], None], source: Source | None = None) -> None:
        super().__init__(source or FilesSource(settings, self.stream))
        self.settings = settings
        self.report = report
        self._lock = write_lock(settings, self.stream)
        self._first = True
        self._rejected = DeltaSink(self.rejected_table, settings)
        self._ledger = DeltaSink(BATCH_LEDGER, settings)

    @abstractmethod
    def plan_prices(self) -> int:
        """Bring the prices up to date; returns the version of `campaigns` that a new batch is decided with."""

    def prices(self, plan: Plan) -> pa.Table:
        """The price list of a plan (CAMPAIGN_SCHEMA). Empty, unless a stream has prices."""
        return CAMPAIGN_SCHEMA.empty_table()

    def plan_rules(self) -> str | None:
        """The rule set of invalid traffic that a new batch is decided with; None: the stream has none."""
        return None

    def rules(self, plan: Plan) -> InvalidTrafficRules:
        """The rules of invalid traffic of a plan. None of them hits, unless a stream has some."""
        return no_rules()

    @abstractmethod
    def classify(self, batch: Batch, history_version: int) -> Classification:
        """Tell new records from resent ones, against the accepted table at ``history_version``."""

    def events_uri(self, batch: Batch) -> str | None:
        """Where the tasks write the accepted events. None: nothing to write."""
        return None

    @abstractmethod
    def commit_accepted(self, batch: Batch, history_version: int, classified: Classification, written: list[Written]) -> int:
        """Commit the accepted records with the batch's plan; returns how many stand in the table."""

    def commit_derived(self, batch: Batch, written: list[Written]) -> None:
        """Commit what follows from the accepted records. Nothing, unless a stream says otherwise."""
        return

    def _run_batch(self, frame: DataFrame, batch_id: int) -> None:
        spark = frame.sparkSession
        started = time.monotonic()
        crash_point("after", Step.OFFSETS, batch_id)  # Spark wrote them just before
        query_id = json.loads((self.checkpoint / "metadata").read_text("utf-8"))["id"]
        transaction = Transaction(query_id, batch_id)
        with self._lock:
            report = self._batch(spark, transaction, started)
        self._first = False
        self.report(report)
        crash_point("before", Step.COMMITS, batch_id)  # Spark writes it right after

    def _batch(self, spark: SparkSession, transaction: Transaction, started: float) -> BatchReport:
        log = DeltaLog(self.settings.table_uri(self.accepted_table.name))
        done = log.find_transaction(transaction.query_id, transaction.batch_id) if self._first else None
        plan = Plan.from_commit(done) if done else self._plan(transaction)
        if plan.is_empty:
            zero = dict.fromkeys(COUNTS, 0)
            return BatchReport(
                self.source.name, transaction.query_id, transaction.batch_id, seconds=time.monotonic() - started, **zero
            )
        # the classification of a batch never sees the batch's own rows
        history_version = done.version - 1 if done else log.latest_version() or 0
        name = f"{self.source.name}-{transaction.query_id}-{transaction.batch_id}"
        scratch = self.settings.scratch_path / name
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            # on a cluster each executor has a folder of its own (tasks/scratch.py)
            place = str(scratch) if is_one_machine(str(spark.sparkContext.master)) else name
            batch = self._stage(spark, plan, transaction, done, place)
            classified = self.classify(batch, history_version)
            written = self._write(spark, batch, classified)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        accepted = self.commit_accepted(batch, history_version, classified, written)
        rejects = [file for part in written for file in part.rejects]
        if rejects:
            self._rejected.append(rejects, self.rejected_step, transaction)
        self.commit_derived(batch, written)
        return self._commit_ledger(batch, classified, accepted, started)

    def _plan(self, transaction: Transaction) -> Plan:
        planned = self.source.plan(transaction.batch_id)
        settings = self.settings
        limits = Limits(
            ingested_us=planned.planned_us,
            earliest_us=to_micros(settings.earliest_event_time),
            future_skew_us=settings.future_skew // timedelta(microseconds=1),
            hour_grace_us=settings.hour_grace // timedelta(microseconds=1),
        )
        return Plan(limits, self.plan_prices(), planned.files, self.plan_rules(), planned.ranges, planned.lost_offsets)

    def _stage(self, spark: SparkSession, plan: Plan, transaction: Transaction, done: Commit | None, scratch: str) -> Batch:
        splits = self.source.splits(plan.input)
        tasks = [StageTask(self.stream, split, plan.limits, scratch) for split in splits]
        prices, rules = self.prices(plan), self.rules(plan)
        context = spark.sparkContext
        slices = max(1, min(len(tasks), context.defaultParallelism * 4))
        results = context.parallelize(tasks, slices).map(lambda task: stage_split(task, prices, rules)).collect()
        keys = Keys.concatenate([Keys.from_bytes(s.keys) for s in results])
        return Batch(plan, transaction, done, tasks, results, keys, self.source.kind, self.source.regions(splits))

    def _write(self, spark: SparkSession, batch: Batch, classified: Classification) -> list[Written]:
        job = WriteJob(
            of_events=self.stream == "events",
            stamp=stamp_of(batch),
            campaigns=self.prices(batch.plan),
            rules=self.rules(batch.plan),
            rule_set=batch.plan.rule_set,
            rejected_table=self.rejected_table,
            rejected_uri=self.settings.table_uri(self.rejected_table.name),
            events_uri=self.events_uri(batch),
        )
        work = split_rows(batch, classified)
        if not job.of_events:
            work = [w for w, split in zip(work, batch.splits, strict=True) if len(w.conflicts) or split.reject_hours]
        if not work:
            return []
        context = spark.sparkContext
        # as many tasks as files are worth writing
        writers = max(1, min(context.defaultParallelism, -(-len(classified.outcome) // _ROWS_PER_WRITER), len(work)))
        return context.parallelize(work, writers).mapPartitions(lambda part: [write_splits(part, job)]).collect()

    def _commit_ledger(self, batch: Batch, classified: Classification, accepted: int, started: float) -> BatchReport:
        rows = ledger_rows(batch, classified, self.stream)
        totals = {name: sum(row[name] for row in rows) for name in COUNTS}
        lines = sum(split.offered for split in batch.splits)
        parts = totals["accepted"] + totals["duplicate"] + totals["conflict"] + totals["rejected"]
        if not lines == totals["offered"] == parts or accepted != totals["accepted"]:
            raise ConservationError(
                f"batch {batch.transaction.batch_id} of {self.stream}: {lines} lines offered, {parts} accounted for, "
                f"{totals['accepted']} accepted but {accepted} written",
                hint="nothing of it is in the ledger; docs/runbooks/conservation-broken.md",
            )
        table = stamped_records(rows, BATCH_LEDGER, stamp_of(batch))
        self._ledger.append_rows(table, self.ledger_step, batch.transaction)
        return BatchReport(
            stream=self.source.name,
            query_id=batch.transaction.query_id,
            batch_id=batch.transaction.batch_id,
            seconds=time.monotonic() - started,
            **totals,
        )


def stamp_of(batch: Batch) -> Stamp:
    """What the rows of a batch are marked with."""
    return Stamp(batch.transaction.query_id, batch.transaction.batch_id, batch.plan.limits.ingested_us)


def split_rows(batch: Batch, classified: Classification) -> list[SplitRows]:
    """The batch's outcome, cut into its splits."""
    made, start = [], 0
    for task, first_line, count in zip(batch.tasks, batch.first_lines, batch.row_counts, strict=True):
        outcome = classified.outcome[start : start + count]
        conflicts = np.flatnonzero(outcome == Outcome.CONFLICT)
        fingerprints = classified.accepted_fingerprint[start : start + count][conflicts]
        made.append(SplitRows(task, first_line, np.flatnonzero(outcome), conflicts, fingerprints))
        start += count
    return made
