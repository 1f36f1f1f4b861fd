"""Describe a batch on the driver: its plan, the results of its tasks, and its rows of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from spark_jobs.ingest.contract.spec import BatchLimits
from spark_jobs.ingest.dedupe.classify import Classification, Outcome
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.files.landing import FileState, LandingFile
from spark_jobs.ingest.job import Scattered
from spark_jobs.ingest.kafka.ranges import OffsetRange, OffsetSplit
from spark_jobs.ingest.quarantine import Quarantined
from spark_jobs.ingest.reject_rows import HOURS
from spark_jobs.ingest.source import Planned
from spark_jobs.ingest.stage import StagedSplit, StageTask, ValidRows
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.log import Commit
from spark_jobs.lake.stamp import Stamp
from spark_jobs.units import NO_HOUR, from_micros, hour_moment

COUNTS = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")
_NEVER = int(np.iinfo(np.int64).min)


@dataclass(frozen=True)
class BatchReport:
    """What one batch did: counts of records, and the seconds that it took."""

    stream: str
    query_id: str
    batch_id: int
    offered: int
    accepted: int
    duplicate: int
    conflict: int
    rejected: int
    late: int
    seconds: float


@dataclass(frozen=True)
class IngestReport:
    """The sums over the batches of a run."""

    batches: int = 0
    offered: int = 0
    accepted: int = 0
    duplicate: int = 0
    conflict: int = 0
    rejected: int = 0
    late: int = 0

    def plus(self, batch: BatchReport) -> IngestReport:
        """Return these sums with one more batch added."""
        counted = {name: getattr(self, name) + getattr(batch, name) for name in COUNTS}
        return IngestReport(batches=self.batches + 1, **counted)


@dataclass(frozen=True)
class Plan:
    """All that decides a batch. The commit of its first table stores it, so that a batch that runs again decides the same."""

    limits: BatchLimits
    campaigns_version: int
    files: list[LandingFile]
    rule_set: str | None = None  # of invalid traffic; None: no rules, as in batches of an older adtally
    ranges: list[OffsetRange] = field(default_factory=list)
    lost_offsets: int = 0
    quarantined: list[Quarantined] = field(default_factory=list)  # of its files, or parts of its ranges
    fingerprints: list[str] = field(default_factory=list)  # of the files (`landing.FileState`); none: an older adtally

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read and no lost offset to count."""
        return not (self.files or self.ranges or self.lost_offsets)

    @property
    def input(self) -> Planned:
        """The input that the batch reads. Quarantined offsets are separate ranges."""
        ranges = [part for one in self.ranges for part in _cut(one, self.quarantined)]
        return Planned(self.limits.ingested_us, self.files, ranges, self.lost_offsets)

    def changed_files(self, states: Sequence[FileState]) -> list[LandingFile]:
        """Return the files that changed since the plan, by their present ``states``. Empty if the plan has no fingerprints."""
        known = zip(self.files, self.fingerprints, states, strict=False)
        return [file for file, planned, state in known if planned != state.fingerprint]

    def to_metadata(self, transaction: Transaction) -> dict[str, object]:
        """Return the plan as a commit stores it."""
        stored: dict[str, object] = {
            **asdict(transaction),
            "limits": asdict(self.limits),
            "campaigns_version": self.campaigns_version,
            "rule_set": self.rule_set,
            "files": [[file.modified_ms, file.path, file.size] for file in self.files],
        }
        if self.fingerprints:
            stored["fingerprints"] = self.fingerprints
        if self.ranges or self.lost_offsets:
            stored["ranges"] = [[one.name, one.start, one.end] for one in self.ranges]
            stored["lost_offsets"] = self.lost_offsets
        if self.quarantined:
            stored["quarantined"] = [[one.name, one.reason, one.cause, one.start, one.end] for one in self.quarantined]
        return stored

    @classmethod
    def from_commit(cls, commit: Commit, place: Callable[[str], str] = str) -> Plan:
        """Read the plan that ``to_metadata`` stored. ``place`` maps a path in the commit to the present path."""
        stored = commit.metadata
        return cls(
            BatchLimits(**stored["limits"]),
            int(stored["campaigns_version"]),
            [LandingFile(ms, place(path), size) for ms, path, size in stored["files"]],
            stored.get("rule_set"),
            [OffsetRange(*one) for one in stored.get("ranges", [])],
            int(stored.get("lost_offsets", 0)),
            [Quarantined(*one) for one in stored.get("quarantined", [])],
            stored.get("fingerprints", []),
        )


def _cut(whole: OffsetRange, quarantined: list[Quarantined]) -> list[OffsetRange]:
    """Cut a range where quarantined offsets begin and end."""
    edges = {edge for one in quarantined if one.name == whole.name for edge in (one.start, one.end)}
    points = [whole.start, *sorted(edge for edge in edges if whole.start < edge < whole.end), whole.end]
    return [OffsetRange(whole.name, start, end) for start, end in pairwise(points)]


@dataclass(frozen=True)
class PlannedBatch:
    """A batch before its records are read.

    ``committed`` is the commit of its accepted records, if an earlier run got that far. ``history_version`` is the newest version
    of the accepted table that has none of its rows.
    """

    transaction: Transaction
    plan: Plan
    committed: Commit | None
    history_version: int

    @property
    def stamp(self) -> Stamp:
        """The batch's own columns."""
        return Stamp(self.transaction.query_id, self.transaction.batch_id, self.plan.limits.ingested_us)


@dataclass(frozen=True)
class Batch(PlannedBatch):
    """A batch whose records are parsed. ``source`` is the kind of its source, ``regions`` those that the ledger counts it by.

    Its keys are either ``keys`` or, by shard in the executors, ``scattered``.
    """

    tasks: list[StageTask]
    splits: list[StagedSplit]
    keys: Keys
    source: str
    regions: list[str]
    scattered: Scattered | None = None

    @property
    def row_counts(self) -> list[int]:
        """Valid rows of each split."""
        return [len(split.rows) for split in self.splits]

    @cached_property
    def rows(self) -> ValidRows:
        """The columns of the valid rows of all splits."""
        return ValidRows.concatenate([split.rows for split in self.splits])

    @property
    def first_lines(self) -> list[int]:
        """The first line of each split: its number in the file, from 1, or the first offset of the range."""
        lines, before = [], 0
        for task, split in zip(self.tasks, self.splits, strict=True):
            if isinstance(task.split, OffsetSplit):
                lines.append(task.split.start)
                continue
            before = 1 if task.split.start == 0 else before
            lines.append(before)
            before += split.offered
        return lines


def ledger_rows(batch: Batch, classified: Classification, stream: str) -> list[dict[str, Any]]:
    """Return the batch's rows of the ledger: one dict per region and event hour, sorted, hour None first in its region."""
    regions = batch.regions
    number = {region: i for i, region in enumerate(regions)}
    of_split = [number[task.split.region] for task in batch.tasks]
    region = np.repeat(of_split, batch.row_counts).astype(np.int64)
    rows = batch.rows
    hours = rows.hours.astype(np.int64)
    refused = [split.rejects for split in batch.splits]
    reject_region = np.repeat(of_split, [len(counts.hours) for counts in refused]).astype(np.int64)
    none = np.empty(0, dtype=np.int64)
    reject_hours = np.concatenate([none, *(counts.hours for counts in refused)])
    rejects = np.concatenate([none, *(counts.counts for counts in refused)])

    # a cell is a region and an hour, as one number; NO_HOUR sorts first in its region
    code = np.concatenate((region, reject_region)) * HOURS + (np.concatenate((hours, reject_hours)) - NO_HOUR)
    cells, at = np.unique(code, return_inverse=True)
    valid_at, reject_at = at[: len(region)], at[len(region) :]
    size = len(cells)
    outcome = classified.outcome
    accepted = outcome == Outcome.ACCEPTED

    def count(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.bincount(valid_at[mask], minlength=size)

    rejected = np.zeros(size, dtype=np.int64)
    np.add.at(rejected, reject_at, rejects)
    spend = _exact_sums(rows.spend_nanos[accepted], valid_at[accepted], size)
    received = np.full(size, _NEVER)
    if batch.source == "files":
        np.maximum.at(received, valid_at[accepted], rows.received_us[accepted])
    else:
        # A topic's progress counts duplicates too: another cluster may have been first with all of its records. Partitions are read
        # separately, so the topic has progressed only as far as the slowest partition of this batch.
        np.maximum.at(received, valid_at, rows.received_us)
        np.minimum(received, _least_progress(batch), out=received)
    measures: dict[str, Sequence[int] | npt.NDArray[Any]] = {
        "offered": np.bincount(valid_at, minlength=size) + rejected,
        "accepted": count(accepted),
        "duplicate": count(outcome == Outcome.DUPLICATE),
        "conflict": count(outcome == Outcome.CONFLICT),
        "rejected": rejected,
        "late": count(accepted & rows.is_late),
        "invalid_traffic": count(accepted & rows.is_invalid),
        "unpriced": count(accepted & rows.is_unpriced),
        "spend_nanos": spend,
    }
    lines: list[dict[str, Any]] = [
        {
            "stream": stream,
            "source": batch.source,
            "region": regions[int(cells[i]) // HOURS],
            "event_hour": hour_moment(int(cells[i]) % HOURS + NO_HOUR),
            **{name: int(values[i]) for name, values in measures.items()},
            "max_received_at": None if received[i] == _NEVER else from_micros(int(received[i])),
        }
        for i in range(size)
    ]
    if not lines:  # files without a line: the ledger must name the batch nevertheless, which marks it as complete
        nothing: dict[str, Any] = {"stream": stream, "source": batch.source, **dict.fromkeys(measures, 0)}
        lines = [{**nothing, "region": region} for region in regions]
    if batch.plan.lost_offsets:
        lines[0]["lost_offsets"] = batch.plan.lost_offsets
    return lines


def _exact_sums(amounts: npt.NDArray[np.int64], at: npt.NDArray[np.intp], size: int) -> list[int]:
    """Return the sum of the ``amounts`` at each place 0 to ``size`` - 1, as Python integers, so that no sum overflows.

    The halves of the amounts are summed separately: for fewer than 2**31 amounts either sum fits into 64 bits.
    """
    halves = []
    for half in (amounts >> 32, amounts & 0xFFFF_FFFF):
        sums = np.zeros(size, dtype=np.int64)
        np.add.at(sums, at, half)
        halves.append(sums.tolist())
    return [(high << 32) + low for high, low in zip(*halves, strict=True)]


def _least_progress(batch: Batch) -> int:
    """Return the earliest, over the partitions with valid records, of their latest received_at (microseconds)."""
    latest: dict[str, int] = {}
    for task, split in zip(batch.tasks, batch.splits, strict=True):
        if len(split.rows):
            latest[task.split.name] = max(latest.get(task.split.name, _NEVER), int(split.rows.received_us.max()))
    return min(latest.values(), default=_NEVER)
