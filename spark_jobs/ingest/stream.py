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
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from spark_jobs.config import Settings
from spark_jobs.errors import ConservationError
from spark_jobs.failure import failure_cause
from spark_jobs.ingest.agreement import check_agreement
from spark_jobs.ingest.batch import COUNTS, Batch, BatchReport, Plan, ledger_rows
from spark_jobs.ingest.contract.spec import Limits
from spark_jobs.ingest.dedupe.classify import Classification, Outcome
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA
from spark_jobs.ingest.files.fingerprint import FileState, file_states
from spark_jobs.ingest.files.landing import LandingFile, Split, relative_name
from spark_jobs.ingest.kafka.ranges import OffsetRange
from spark_jobs.ingest.poison import ATTEMPTS, Attempts, Unit, find_poison, is_of_content
from spark_jobs.ingest.quarantine import POISON, Quarantined, QuarantineLimits
from spark_jobs.ingest.query import SourceQuery
from spark_jobs.ingest.reject_rows import conflict_records, share_rejects
from spark_jobs.ingest.source import FilesSource, Source
from spark_jobs.ingest.stage import StagedSplit, StageTask, flood, stage_splits, unread_split
from spark_jobs.ingest.write import SplitRows, WriteJob, Written, write_splits
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.locks import WRITE_LOCKS, file_lock
from spark_jobs.lake.log import Commit, DeltaLog
from spark_jobs.lake.stamp import Stamp, stamped_records
from spark_jobs.lake.tables import BATCH_LEDGER, MINUTE_METRICS, Table
from spark_jobs.lake.writes import DeltaSink
from spark_jobs.session import is_one_machine
from spark_jobs.steps import Step, crash_point
from spark_jobs.stopping import lock_unless_stopped
from spark_jobs.traffic.rules import InvalidTrafficRules, no_rules
from spark_jobs.units import to_micros

_ROWS_PER_WRITER = 250_000


class StreamJob(SourceQuery):
    """One stream: its query, and what a batch of it does. Sub-classes say where the accepted records go."""

    stream: str
    accepted_table: Table
    rejected_table: Table
    rejected_step: Step
    ledger_step: Step

    def __init__(self, settings: Settings, report: Callable[[BatchReport], None], source: Source | None = None) -> None:
        super().__init__(source or FilesSource(settings, self.stream), settings)
        self.settings = settings
        self.report = report
        self._lock = file_lock(settings, WRITE_LOCKS[self.stream])
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

    def contradictions(
        self, batch: Batch, classified: Classification, written: list[Written], ledger: list[dict[str, Any]]
    ) -> Iterator[str]:
        """What of a decided batch contradicts its ledger, or what of it was committed before; nothing is committed then."""
        return iter(())

    @abstractmethod
    def commit_accepted(self, batch: Batch, history_version: int, classified: Classification, written: list[Written]) -> None:
        """Commit the accepted records with the batch's plan."""

    def commit_derived(self, batch: Batch, written: list[Written]) -> None:
        """Commit what follows from the accepted records. Nothing, unless a stream says otherwise."""
        return

    def check_agreement(self) -> None:
        """See SourceQuery."""
        derived = [MINUTE_METRICS] if self.stream == "events" else []
        check_agreement(self.settings, self.source, [self.accepted_table, *derived, BATCH_LEDGER], self.rejected_table)

    def _run_batch(self, frame: DataFrame, batch_id: int) -> None:
        spark = frame.sparkSession
        started = time.monotonic()
        crash_point("after", Step.OFFSETS, batch_id)  # Spark wrote them just before
        query_id = json.loads((self.checkpoint / "metadata").read_text("utf-8"))["id"]
        transaction = Transaction(query_id, batch_id)
        with lock_unless_stopped(self._lock, self.stopping):
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
        if done and self._ledger.has(transaction):  # complete; only Spark's checkpoint does not know it yet
            zero = dict.fromkeys(COUNTS, 0)
            return BatchReport(self.source.name, transaction.query_id, transaction.batch_id, **zero, seconds=0.0)
        states = file_states(file.path for file in plan.files)
        if done:
            self._refuse_changed_files(plan, states, transaction)
        else:
            plan = replace(plan, fingerprints=[state.fingerprint for state in states])
        # the classification of a batch never sees the batch's own rows
        history_version = done.version - 1 if done else log.latest_version() or 0
        batch, classified, written = self._decide(spark, plan, transaction, done, history_version)
        self._refuse_files_changed_while_read(plan, states, transaction)
        ledger = ledger_rows(batch, classified, self.stream)
        self._refuse_contradictions(batch, classified, written, ledger)
        self.commit_accepted(batch, history_version, classified, written)
        rejects = [file for part in written for file in part.rejects]
        if rejects:
            self._rejected.append(rejects, self.rejected_step, transaction)
        self.commit_derived(batch, written)
        self._ledger.append_rows(stamped_records(ledger, BATCH_LEDGER, stamp_of(batch)), self.ledger_step, transaction)
        return BatchReport(
            stream=self.source.name,
            query_id=transaction.query_id,
            batch_id=transaction.batch_id,
            seconds=time.monotonic() - started,
            **_totals(ledger),
        )

    def _decide(
        self, spark: SparkSession, plan: Plan, transaction: Transaction, done: Commit | None, history_version: int
    ) -> tuple[Batch, Classification, list[Written]]:
        """Try the batch, more than once where it fails for its content; at last without what it fails by.

        Once a table has its plan, a batch is only tried as it is planned.
        """
        attempts = Attempts.read(self.settings.attempts_path / f"{self.source.name}.json", transaction)
        while True:
            attempts.begin()
            if done is None and attempts.count > ATTEMPTS:
                plan = self._without_poison(spark, plan, transaction, history_version, attempts)
                return self._try(spark, plan, transaction, done, history_version, uuid.uuid4().hex)
            try:
                return self._try(spark, plan, transaction, done, history_version)
            except Exception as error:
                if done is not None or not self._is_of_content(error):
                    raise

    def _is_of_content(self, error: Exception) -> bool:
        """Whether the batch may have failed for its records, and not for who stopped it."""
        return not (self.activity.was_ended or self.stopping.is_set()) and is_of_content(error)

    def _try(
        self,
        spark: SparkSession,
        plan: Plan,
        transaction: Transaction,
        done: Commit | None,
        history_version: int,
        part: str = "",
    ) -> tuple[Batch, Classification, list[Written]]:
        """Stage, classify and write: all of a batch but its commits. Files that no commit names count for nothing.

        ``part`` is another name for each other cut of the batch into splits: what executors have staged is not to be mixed up.
        """
        name = f"{self.source.name}-{transaction.query_id}{part}-{transaction.batch_id}"
        scratch = self.settings.scratch_path / name
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            # on a cluster each executor has a folder of its own (ingest/scratch.py)
            place = str(scratch) if is_one_machine(str(spark.sparkContext.master)) else name
            batch = self._stage(spark, plan, transaction, done, place)
            classified = self.classify(batch, history_version)
            return batch, classified, self._write(spark, batch, classified)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _without_poison(
        self, spark: SparkSession, plan: Plan, transaction: Transaction, history_version: int, attempts: Attempts
    ) -> Plan:
        """The plan with the files or offsets set aside by which the batch fails."""

        def failure_of(units: Sequence[Unit]) -> str | None:
            files = [unit for unit in units if isinstance(unit, LandingFile)]
            ranges = [unit for unit in units if isinstance(unit, OffsetRange)]
            try:
                self._try(spark, replace(plan, files=files, ranges=ranges), transaction, None, history_version, uuid.uuid4().hex)
            except Exception as error:
                if not self._is_of_content(error):
                    raise
                return failure_cause(error).text
            return None

        found = find_poison([*plan.files, *plan.ranges], attempts, failure_of)
        return replace(plan, quarantined=[*plan.quarantined, *(self._poison(unit, cause) for unit, cause in found)])

    def _poison(self, unit: Unit, cause: str) -> Quarantined:
        if isinstance(unit, OffsetRange):
            return Quarantined(unit.name, POISON, cause, unit.start, unit.end)
        return Quarantined(relative_name(unit.path, self.settings.landing_path), POISON, cause)

    def _refuse_changed_files(self, plan: Plan, states: list[FileState], transaction: Transaction) -> None:
        """Raise ConservationError if a file is another one than when the batch's accepted records were committed."""
        changed = plan.changed_files(states)
        if changed:
            name = relative_name(changed[0].path, self.settings.landing_path)
            others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ConservationError(
                f"{name}{others} changed or vanished after batch {transaction.batch_id} was committed to "
                f"{self.accepted_table.name} and before the batch was complete",
                hint="put the file back as it was, or finish the batch without it: adtally fsck --repair; "
                "docs/runbooks/conservation-broken.md",
            )

    def _refuse_files_changed_while_read(self, plan: Plan, before: list[FileState], transaction: Transaction) -> None:
        """Raise ConservationError if a file changed since ``before``: its two passes may have read different lines."""
        after = file_states(file.path for file in plan.files)
        changed = [file for file, was, now in zip(plan.files, before, after, strict=True) if was != now]
        if changed:
            raise ConservationError(
                f"{relative_name(changed[0].path, self.settings.landing_path)} changed while batch {transaction.batch_id} of "
                f"{self.stream} read it; nothing was committed",
                hint="write files elsewhere and rename them into the landing folder; then run adtally ingest again",
            )

    def _refuse_contradictions(
        self, batch: Batch, classified: Classification, written: list[Written], ledger: list[dict[str, Any]]
    ) -> None:
        """Raise ConservationError unless lines, outcomes, written rows and what was committed before all agree."""
        totals = _totals(ledger)
        lines = sum(split.offered for split in batch.splits)
        parts = totals["accepted"] + totals["duplicate"] + totals["conflict"] + totals["rejected"]
        refused = sum(part.rejected_records for part in written)
        found = list(self.contradictions(batch, classified, written, ledger))
        if not lines == totals["offered"] == parts:
            found.append(f"{lines} lines offered, {parts} accounted for")
        if refused != totals["conflict"] + totals["rejected"]:
            found.append(f"{totals['conflict'] + totals['rejected']} conflicting and rejected, but {refused} written")
        if found:
            place = f"batch {batch.transaction.batch_id} of {self.stream}"
            committed = f"only its {self.accepted_table.name}" if batch.committed else "nothing of it"
            raise ConservationError(
                f"{place}: {'; '.join(found)}", hint=f"{committed} is committed; docs/runbooks/conservation-broken.md"
            )

    def _plan(self, transaction: Transaction) -> Plan:
        planned = self.source.plan(transaction.batch_id)
        settings = self.settings
        limits = Limits(
            ingested_us=planned.planned_us,
            earliest_us=to_micros(settings.earliest_event_time),
            future_skew_us=settings.future_skew // timedelta(microseconds=1),
            hour_grace_us=settings.hour_grace // timedelta(microseconds=1),
            rejects_kept=settings.max_reject_rows,
        )
        return Plan(limits, self.plan_prices(), planned.files, self.plan_rules(), planned.ranges, planned.lost_offsets)

    def _stage(self, spark: SparkSession, plan: Plan, transaction: Transaction, done: Commit | None, scratch: str) -> Batch:
        # once the plan stands in a commit it says what is set aside, whatever today's settings are
        limits = None if done else self._limits_of_files()
        tasks = self._tasks(plan, scratch, limits)
        prices, rules = self.prices(plan), self.rules(plan)
        context = spark.sparkContext
        slices = max(1, min(len(tasks), context.defaultParallelism * 4))
        results = self.activity.run(context, tasks, slices, lambda part: stage_splits(part, prices, rules))
        if limits is not None and (found := files_to_set_aside(tasks, results, limits)):
            plan = replace(plan, quarantined=[*plan.quarantined, *found])
            kept = {task.split.number: result for task, result in zip(tasks, results, strict=True)}
            tasks = self._tasks(plan, scratch, limits)
            results = [unread_split(t, t.quarantined) if t.quarantined else kept[t.split.number] for t in tasks]
        keys = Keys.concatenate([Keys.from_bytes(s.keys) for s in results])
        regions = self.source.regions([task.split for task in tasks])
        return Batch(plan, transaction, done, tasks, results, keys, self.source.kind, regions)

    def _limits_of_files(self) -> QuarantineLimits:
        settings = self.settings
        return QuarantineLimits(settings.max_rejects_per_file, settings.max_rejects_per_file_share, settings.max_gzip_ratio)

    def _tasks(self, plan: Plan, scratch: str, limits: QuarantineLimits | None) -> list[StageTask]:
        """A task for each split of what is read, in the order of the records; one for each file or range that is set aside."""
        tasks: list[StageTask] = []
        unread: set[Quarantined] = set()
        for split in self.source.splits(plan.input):
            found = next((one for one in plan.quarantined if one.covers(split.name, split.start)), None)
            if found not in unread:
                tasks.append(StageTask(self.stream, split, plan.limits, scratch, limits, found))
            if found is not None:
                unread.add(found)
        return tasks

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
        work = [w for w, split in zip(split_rows(batch, classified), batch.splits, strict=True) if split.offered]
        if not job.of_events:
            rejecting = {split.number for split in batch.splits if split.rejects.total}
            work = [w for w in work if len(w.conflicts) or w.task.split.number in rejecting]
        if not work:
            return []
        context = spark.sparkContext
        # as many tasks as files are worth writing
        writers = max(1, min(context.defaultParallelism, -(-len(classified.outcome) // _ROWS_PER_WRITER), len(work)))
        return self.activity.run(context, work, writers, lambda part: [write_splits(part, job)])


def _totals(ledger: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(row[name] for row in ledger) for name in COUNTS}


def stamp_of(batch: Batch) -> Stamp:
    """What the rows of a batch are marked with."""
    return Stamp(batch.transaction.query_id, batch.transaction.batch_id, batch.plan.limits.ingested_us)


def files_to_set_aside(tasks: list[StageTask], results: list[StagedSplit], limits: QuarantineLimits) -> list[Quarantined]:
    """The files of a staged batch that its splits, each by itself or all together, found to be set aside."""
    found = {one.name: one for result in results if (one := result.quarantined) is not None}
    sums: dict[str, tuple[int, int]] = {}
    for task, result in zip(tasks, results, strict=True):
        if isinstance(task.split, Split) and task.quarantined is None:
            rejected, offered = sums.get(task.split.name, (0, 0))
            sums[task.split.name] = (rejected + result.rejects.total, offered + result.offered)
    for name, (rejected, offered) in sums.items():
        if name not in found and limits.is_flood(rejected, offered):
            found[name] = flood(name, rejected, offered)
    known = {task.split.name for task in tasks if task.quarantined is not None}
    return [one for name, one in sorted(found.items()) if name not in known]


def split_rows(batch: Batch, classified: Classification) -> list[SplitRows]:
    """The batch's outcome, cut into its splits."""
    kept = batch.plan.limits.rejects_kept
    names = [task.split.name for task in batch.tasks]
    shares = share_rejects(names, [split.rejects for split in batch.splits], kept)
    conflicts = np.flatnonzero(classified.outcome == Outcome.CONFLICT)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    name_of_row = np.repeat(np.array([number[name] for name in names], dtype=np.int64), batch.row_counts)
    hours = batch.column("hours", np.int32).astype(np.int64)
    has_row, records = conflict_records(name_of_row[conflicts], hours[conflicts], kept)
    conflicts, records = conflicts[has_row], records[has_row]
    made, start = [], 0
    for task, first_line, count, share in zip(batch.tasks, batch.first_lines, batch.row_counts, shares, strict=True):
        low, high = np.searchsorted(conflicts, (start, start + count))
        own = conflicts[low:high]
        fingerprints = classified.accepted_fingerprint[own]
        dropped = np.flatnonzero(classified.outcome[start : start + count])
        made.append(SplitRows(task, first_line, dropped, own - start, fingerprints, records[low:high], share))
        start += count
    return made
