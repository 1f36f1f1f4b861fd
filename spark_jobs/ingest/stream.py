"""Run the batches of a stream. `events` and `orders` define what is specific to their stream.

Spark finds the input of a source and plans batches of it: lists of landing files, or ranges of offsets of a topic. The tasks of a
batch read the bytes themselves, because the exact place and faults of each record matter. A batch takes these steps, in this order:

1. Tasks parse the records and keep the valid ones in scratch files (`stage`).
2. The driver, or on a cluster the executors, classify the valid records by narrow keys: new, duplicate or conflict.
3. Tasks write data files (`write`).
4. The driver commits the accepted records, then the rejected and conflicting ones, then what is derived from the accepted, and last
   the batch's rows of the ledger.
"""

from __future__ import annotations

import shutil
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.erasure.suppression import read_suppression
from spark_jobs.errors import ConservationError
from spark_jobs.failure import failure_cause
from spark_jobs.ingest.agreement import check_agreement
from spark_jobs.ingest.batch import COUNTS, Batch, BatchReport, Plan, PlannedBatch, ledger_rows
from spark_jobs.ingest.contract.spec import BatchLimits
from spark_jobs.ingest.dedupe.classify import Classification, Outcome
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.dedupe.shards import SHARDS, blocks_of
from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA
from spark_jobs.ingest.files.landing import FileState, LandingFile, Split, file_states, relative_name
from spark_jobs.ingest.job import BatchJob, Executor, Scattered
from spark_jobs.ingest.kafka.ranges import OffsetRange
from spark_jobs.ingest.poison import ATTEMPTS, Attempts, Unit, find_poison, is_of_content
from spark_jobs.ingest.quarantine import POISON, Quarantined, QuarantineLimits
from spark_jobs.ingest.reject_rows import conflict_records, share_rejects
from spark_jobs.ingest.source import FilesSource, RecordSource
from spark_jobs.ingest.stage import StagedSplit, StageTask, flood, stage_splits, unread_split
from spark_jobs.ingest.write import SplitRows, WriteJob, Written, write_splits
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.locks import WRITE_LOCKS, lock_handle
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.stamp import stamped_records
from spark_jobs.lake.tables import BATCH_LEDGER, MINUTE_METRICS, REJECTED_TABLES, TABLES
from spark_jobs.lake.writes import DeltaSink
from spark_jobs.steps import Step, crash_point
from spark_jobs.stopping import lock_unless_stopped
from spark_jobs.traffic.rules import InvalidTrafficRules, no_rules
from spark_jobs.units import to_micros

_ROWS_PER_WRITER = 250_000
_DRIVER = SHARDS  # the part of scattered values that the driver takes

C = TypeVar("C", bound=Classification)  # of a stream


class StreamJob(BatchJob, Generic[C]):
    """The batches of one stream from one source. Sub-classes define what is specific to the stream."""

    stream: str

    def __init__(self, settings: Settings, report: Callable[[BatchReport], None], source: RecordSource | None = None) -> None:
        """``report`` is called after each batch; ``source`` is by default the landing folder of the stream."""
        super().__init__(source or FilesSource(settings, self.stream))
        self.settings = settings
        self.report = report
        self.accepted_table = TABLES[self.stream]
        self.rejected_table = REJECTED_TABLES[self.stream]
        self._lock = lock_handle(settings, WRITE_LOCKS[self.stream])
        self._is_first = True
        self._rejected = DeltaSink(self.rejected_table, settings)
        self._ledger = DeltaSink(BATCH_LEDGER, settings)

    def newest_references(self) -> tuple[int, str | None]:
        """Return the version of table `campaigns` and the rule set of invalid traffic for a new batch. By default neither."""
        return 0, None

    def references(self, plan: Plan) -> tuple[pa.Table, InvalidTrafficRules]:
        """Return the price list (CAMPAIGN_SCHEMA) and the rules of a plan. By default no price, and rules that no record breaks."""
        return CAMPAIGN_SCHEMA.empty_table(), no_rules()

    @property
    def scatters_keys(self) -> bool:
        """Whether the keys of the records stay in the executors, scattered by shard (`dedupe/shards.py`). By default not."""
        return False

    @abstractmethod
    def classify(self, batch: Batch) -> C:
        """Classify the valid records as new, duplicate or conflict, against the accepted table at ``batch.history_version``."""

    def events_uri(self, batch: Batch) -> str | None:
        """Return where the tasks write accepted events. None by default: they write none."""
        return None

    @abstractmethod
    def contradictions(self, batch: Batch, classified: C, written: list[Written], ledger: list[dict[str, Any]]) -> Iterator[str]:
        """Yield how a decided batch contradicts its ledger or its own earlier commit. If it does, the batch commits nothing."""

    @abstractmethod
    def commit_accepted(self, batch: Batch, classified: C, written: list[Written]) -> None:
        """Commit the accepted records and, in the commit's metadata, the batch's plan."""

    def write_derived(self, batch: Batch, written: list[Written]) -> list[DataFile]:
        """Write data files of what is derived from the accepted records. Nothing by default."""
        return []

    def commit_derived(self, batch: Batch, files: list[DataFile]) -> None:
        """Commit the files of `write_derived`. Nothing by default."""
        return

    def check_agreement(self) -> None:
        """See BatchJob."""
        derived = [MINUTE_METRICS] if self.stream == "events" else []
        check_agreement(self.settings, self.source, [self.accepted_table, *derived, BATCH_LEDGER], self.rejected_table)

    def run_batch(self, batch_id: int, executor: Executor) -> None:
        """See BatchJob. Raises ConservationError, and commits nothing, if the batch's numbers do not agree."""
        started = time.monotonic()
        crash_point("after", Step.OFFSETS, batch_id)  # Spark wrote them just before
        transaction = Transaction(self.source.query_id(), batch_id)
        with lock_unless_stopped(self._lock, self.stopping):
            counts = self._complete(transaction, executor)
        self._is_first = False
        seconds = time.monotonic() - started
        self.report(BatchReport(self.source.name, transaction.query_id, batch_id, seconds=seconds, **counts))
        crash_point("before", Step.COMMITS, batch_id)  # Spark writes it right after

    def _complete(self, transaction: Transaction, executor: Executor) -> dict[str, int]:
        """Do the missing steps of a batch; return its COUNTS, all 0 if no step was missing."""
        log = DeltaLog(self.settings.table_uri(self.accepted_table.name))
        committed = log.find_transaction(transaction.query_id, transaction.batch_id) if self._is_first else None
        plan = Plan.from_commit(committed, self.source.place) if committed else self._plan(transaction)
        if plan.is_empty or (committed and self._ledger.has(transaction)):  # the latter: only the checkpoint lacks its end
            return dict.fromkeys(COUNTS, 0)
        states = file_states(plan.files)
        if committed:
            self._refuse_changed_files(plan, states, transaction)
        else:
            plan = replace(plan, fingerprints=[state.fingerprint for state in states])
        # the version before the batch's own rows: it must not find them as duplicates
        history_version = committed.version - 1 if committed else log.latest_version() or 0
        batch, classified, written = self._decide(PlannedBatch(transaction, plan, committed, history_version), executor)
        with ThreadPoolExecutor(1, thread_name_prefix="derive") as beside:
            derived = beside.submit(self.write_derived, batch, written)  # takes as long as everything else here
            self._refuse_files_changed_while_read(plan, states, transaction)
            ledger = ledger_rows(batch, classified, self.stream)
            self._refuse_contradictions(batch, classified, written, ledger)
            self.commit_accepted(batch, classified, written)
            rejects = [file for part in written for file in part.rejects]
            if rejects:
                self._rejected.append(rejects, Step(f"rejected_{self.stream}"), transaction)
            self.commit_derived(batch, derived.result())
        rows = stamped_records(ledger, BATCH_LEDGER, batch.stamp)
        self._ledger.append_rows(rows, Step(f"{self.stream}_ledger"), transaction)
        return _totals(ledger)

    def _decide(self, planned: PlannedBatch, executor: Executor) -> tuple[Batch, C, list[Written]]:
        """Try the batch, again if its content makes it fail, and at last without the input that makes it fail.

        If its accepted records are committed, the batch runs only as it was planned.
        """
        attempts = Attempts.read(self.settings.attempts_path / f"{self.source.name}.json", planned.transaction)
        while True:
            attempts.begin()
            if planned.committed is None and attempts.count > ATTEMPTS:
                return self._try(self._without_poison(planned, executor, attempts), executor, uuid.uuid4().hex)
            try:
                return self._try(planned, executor)
            except Exception as error:
                if planned.committed is not None or not self._is_of_content(error, executor):
                    raise

    def _is_of_content(self, error: Exception, executor: Executor) -> bool:
        """Return whether its records may have made the batch fail. False if somebody stopped it."""
        return not (executor.was_cut_off or self.stopping.is_set()) and is_of_content(error)

    def _try(self, planned: PlannedBatch, executor: Executor, part: str = "") -> tuple[Batch, C, list[Written]]:
        """Stage, classify and write: all steps of a batch before its commits. A file counts only after a commit names it.

        ``part`` gives each further cut of the batch into splits a separate scratch folder, so that their files do not mix.
        """
        name = f"{self.source.name}-{planned.transaction.query_id}{part}-{planned.transaction.batch_id}"
        scratch = self.settings.scratch_path / name
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            # on a cluster each executor has its own folder of that name (`stage.scratch_folder`)
            batch = self._stage(planned, executor, str(scratch) if executor.shares_disk else name)
            classified = self.classify(batch)
            if batch.scattered is not None:
                batch.scattered.delete()
            return batch, classified, self._write(batch, classified, executor)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _without_poison(self, planned: PlannedBatch, executor: Executor, attempts: Attempts) -> PlannedBatch:
        """Set aside the files or offsets that make the batch fail."""
        plan = planned.plan

        def failure_of(units: Sequence[Unit]) -> str | None:
            files = [unit for unit in units if isinstance(unit, LandingFile)]
            ranges = [unit for unit in units if isinstance(unit, OffsetRange)]
            try:
                self._try(replace(planned, plan=replace(plan, files=files, ranges=ranges)), executor, uuid.uuid4().hex)
            except Exception as error:
                if not self._is_of_content(error, executor):
                    raise
                return failure_cause(error).text
            return None

        quarantined = list(plan.quarantined)
        for unit, cause in find_poison([*plan.files, *plan.ranges], attempts, failure_of):
            if isinstance(unit, OffsetRange):
                quarantined.append(Quarantined(unit.name, POISON, cause, unit.start, unit.end))
            else:
                quarantined.append(Quarantined(relative_name(unit.path, self.settings.landing_uri), POISON, cause))
        return replace(planned, plan=replace(plan, quarantined=quarantined))

    def _refuse_changed_files(self, plan: Plan, states: list[FileState], transaction: Transaction) -> None:
        """Raise ConservationError if a file changed since the batch's accepted records were committed."""
        changed = plan.changed_files(states)
        if changed:
            name = relative_name(changed[0].path, self.settings.landing_uri)
            others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ConservationError(
                f"{name}{others} changed or vanished after batch {transaction.batch_id} was committed to "
                f"{self.accepted_table.name} and before the batch was complete",
                hint="put the file back as it was, or finish the batch without it: adtally fsck --repair; "
                "docs/runbooks/conservation-broken.md",
            )

    def _refuse_files_changed_while_read(self, plan: Plan, before: list[FileState], transaction: Transaction) -> None:
        """Raise ConservationError if a file changed since ``before``: the two passes may have read different lines."""
        after = file_states(plan.files)
        changed = [file for file, was, now in zip(plan.files, before, after, strict=True) if was != now]
        if changed:
            raise ConservationError(
                f"{relative_name(changed[0].path, self.settings.landing_uri)} changed while batch {transaction.batch_id} of "
                f"{self.stream} read it; nothing was committed",
                hint="write files elsewhere and rename them into the landing folder; then run adtally ingest again",
            )

    def _refuse_contradictions(self, batch: Batch, classified: C, written: list[Written], ledger: list[dict[str, Any]]) -> None:
        """Raise ConservationError unless lines, outcomes, written rows and earlier commits all agree."""
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
        limits = BatchLimits(
            ingested_us=planned.planned_us,
            earliest_us=to_micros(settings.earliest_event_time),
            future_skew_us=settings.future_skew // timedelta(microseconds=1),
            hour_grace_us=settings.hour_grace // timedelta(microseconds=1),
            rejects_kept=settings.max_reject_rows,
        )
        campaigns_version, rule_set = self.newest_references()
        return Plan(limits, campaigns_version, planned.files, rule_set, planned.ranges, planned.lost_offsets)

    def _stage(self, planned: PlannedBatch, executor: Executor, scratch: str) -> Batch:
        plan = planned.plan
        # a committed plan already names its quarantined input, so that today's settings do not matter
        limits = None if planned.committed else self._limits_of_files()
        tasks = self._tasks(plan, scratch, limits)
        prices, rules = self.references(plan)
        slices = max(1, min(len(tasks), executor.parallelism * 4))
        scattered: Scattered | None = None
        if self.scatters_keys:
            scattered = executor.scatter(lambda part: _scatter(stage_splits(part, prices, rules)), tasks, slices, SHARDS + 1)
            (found_splits,) = scattered.gather(lambda _, splits: list(splits), [_DRIVER])
            results = sorted(found_splits, key=lambda split: split.number)
        else:
            results = executor.map(lambda part: stage_splits(part, prices, rules), tasks, slices)
        if limits is not None and (found := files_to_set_aside(tasks, results, limits)):
            plan = replace(plan, quarantined=[*plan.quarantined, *found])
            kept = {task.split.number: result for task, result in zip(tasks, results, strict=True)}
            tasks = self._tasks(plan, scratch, limits)
            results = [unread_split(t, t.quarantined) if t.quarantined else kept[t.split.number] for t in tasks]
        return Batch(
            planned.transaction,
            plan,
            planned.committed,
            planned.history_version,
            tasks,
            results,
            Keys.concatenate([split.keys for split in results]),
            self.source.kind,
            self.source.regions([task.split for task in tasks]),
            scattered,
        )

    def _limits_of_files(self) -> QuarantineLimits:
        settings = self.settings
        return QuarantineLimits(settings.max_rejects_per_file, settings.max_rejects_per_file_share, settings.max_gzip_ratio)

    def _tasks(self, plan: Plan, scratch: str, limits: QuarantineLimits | None) -> list[StageTask]:
        """Return a task for each split to read and for each quarantined input, in the order of the records."""
        tasks: list[StageTask] = []
        unread: set[Quarantined] = set()
        suppression = read_suppression(self.settings)
        for split in self.source.splits(plan.input):
            found = next((one for one in plan.quarantined if one.covers(split.name, split.start)), None)
            if found not in unread:
                tasks.append(StageTask(self.stream, split, plan.limits, scratch, limits, found, suppression))
            if found is not None:
                unread.add(found)
        return tasks

    def _write(self, batch: Batch, classified: C, executor: Executor) -> list[Written]:
        prices, rules = self.references(batch.plan)
        job = WriteJob(
            of_events=self.stream == "events",
            stamp=batch.stamp,
            campaigns=prices,
            rules=rules,
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
        # each task writes its own files: no more tasks than there are files worth writing
        writers = max(1, min(executor.parallelism, -(-len(classified.outcome) // _ROWS_PER_WRITER), len(work)))
        return executor.map(lambda part: [write_splits(part, job)], work, writers)


def _scatter(staged: Iterable[StagedSplit]) -> Iterator[tuple[int, Any]]:
    """Yield the keys of staged splits by shard, and the rest of the results for the driver."""
    for split in staged:
        yield from blocks_of(split.number, split.keys)
        yield _DRIVER, replace(split, keys=Keys.concatenate([]))


def _totals(ledger: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(row[name] for row in ledger) for name in COUNTS}


def files_to_set_aside(tasks: list[StageTask], results: list[StagedSplit], limits: QuarantineLimits) -> list[Quarantined]:
    """Return the files of a staged batch that must be set aside, for one of their splits or for the sum of all."""
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
    """Cut the batch's outcome into its splits."""
    kept = batch.plan.limits.rejects_kept
    names = [task.split.name for task in batch.tasks]
    shares = share_rejects(names, [split.rejects for split in batch.splits], kept)
    conflicts = np.flatnonzero(classified.outcome == Outcome.CONFLICT)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    name_of_row = np.repeat(np.array([number[name] for name in names], dtype=np.int64), batch.row_counts)
    hours = batch.rows.hours.astype(np.int64)
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
