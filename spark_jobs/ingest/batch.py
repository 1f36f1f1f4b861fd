"""A micro-batch on the driver: what it is decided with, what its tasks made of it, and its lines of the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from spark_jobs.ingest.contract.spec import Limits
from spark_jobs.ingest.dedupe.classify import Classification, Outcome
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.files.fingerprint import FileState
from spark_jobs.ingest.files.landing import LandingFile
from spark_jobs.ingest.kafka.ranges import OffsetRange, OffsetSplit
from spark_jobs.ingest.quarantine import Quarantined
from spark_jobs.ingest.source import Planned
from spark_jobs.ingest.stage import StagedSplit, StageTask
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.log import Commit
from spark_jobs.units import NO_HOUR, from_micros, hour_moment

COUNTS = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")
_HOURS = 2**32  # more than there are hours
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
        """These sums and one more batch."""
        counted = {name: getattr(self, name) + getattr(batch, name) for name in COUNTS}
        return IngestReport(batches=self.batches + 1, **counted)


@dataclass(frozen=True)
class Plan:
    """What a batch is decided with. Stored in the commit of its first table: a batch that runs again is decided the same."""

    limits: Limits
    campaigns_version: int
    files: list[LandingFile]
    rule_set: str | None = None  # of invalid traffic; None: no rule, as all were before there were rules
    ranges: list[OffsetRange] = field(default_factory=list)
    lost_offsets: int = 0
    quarantined: list[Quarantined] = field(default_factory=list)  # of its files, or parts of its ranges
    fingerprints: list[str] = field(default_factory=list)  # of the files (ingest/files/fingerprint.py); empty: of an older adtally

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read and nothing to tell."""
        return not (self.files or self.ranges or self.lost_offsets)

    @property
    def input(self) -> Planned:
        """What it was planned to read. Offsets that are set aside are ranges of their own."""
        ranges = [part for one in self.ranges for part in _cut(one, self.quarantined)]
        return Planned(self.limits.ingested_us, self.files, ranges, self.lost_offsets)

    def changed_files(self, states: Sequence[FileState]) -> list[LandingFile]:
        """Those of ``files``, whose ``states`` are given, that are not what they were planned as; none of an older adtally's."""
        known = zip(self.files, self.fingerprints, states, strict=False)
        return [file for file, planned, state in known if planned != state.fingerprint]

    def to_metadata(self, transaction: Transaction) -> dict[str, object]:
        """The plan as it is stored in a commit."""
        stored: dict[str, object] = {
            "query_id": transaction.query_id,
            "batch_id": transaction.batch_id,
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
    def from_commit(cls, commit: Commit) -> Plan:
        """The inverse of ``to_metadata``."""
        stored = commit.metadata
        return cls(
            Limits(**stored["limits"]),
            int(stored["campaigns_version"]),
            [LandingFile(*file) for file in stored["files"]],
            stored.get("rule_set"),
            [OffsetRange(*one) for one in stored.get("ranges", [])],
            int(stored.get("lost_offsets", 0)),
            [Quarantined(*one) for one in stored.get("quarantined", [])],
            stored.get("fingerprints", []),
        )


def _cut(whole: OffsetRange, quarantined: list[Quarantined]) -> list[OffsetRange]:
    """A range, cut where offsets that are set aside begin and end."""
    edges = {edge for one in quarantined if one.name == whole.name for edge in (one.start, one.end)}
    points = [whole.start, *sorted(edge for edge in edges if whole.start < edge < whole.end), whole.end]
    return [OffsetRange(whole.name, start, end) for start, end in pairwise(points)]


@dataclass
class Batch:
    """A parsed batch on the driver."""

    plan: Plan
    transaction: Transaction
    committed: Commit | None  # of the accepted records, where the batch has come so far before
    tasks: list[StageTask]
    splits: list[StagedSplit]
    keys: Keys
    source: str  # kind of it, as the ledger says
    regions: list[str]  # that the ledger counts it by

    @property
    def row_counts(self) -> list[int]:
        """Valid rows of each split."""
        return [len(s.hours) // 4 for s in self.splits]

    def column(self, name: str, kind: type[Any]) -> npt.NDArray[Any]:
        """A byte column of the splits as one array."""
        parts = [np.frombuffer(getattr(s, name), dtype=kind) for s in self.splits]
        return np.concatenate(parts) if parts else np.empty(0, dtype=kind)

    @property
    def first_lines(self) -> list[int]:
        """The number (from 1) of the first line of each split within its file; of a topic's its first offset."""
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
    """The batch's ledger: one dict a region and event hour, in a fixed order (of a region hour None first)."""
    regions = batch.regions
    number = {region: i for i, region in enumerate(regions)}
    of_split = [number[task.split.region] for task in batch.tasks]
    region = np.repeat(of_split, batch.row_counts).astype(np.int64)
    hours = batch.column("hours", np.int32).astype(np.int64)
    by_hour = [split.rejects.by_hour for split in batch.splits]
    reject_region = np.repeat(of_split, [len(hours) for hours, _ in by_hour]).astype(np.int64)
    none = np.empty(0, dtype=np.int64)
    reject_hours = np.concatenate([none, *(hours for hours, _ in by_hour)])
    rejects = np.concatenate([none, *(counts for _, counts in by_hour)])

    # a cell is a region and an hour, as one number: NO_HOUR comes first of its region
    code = np.concatenate((region, reject_region)) * _HOURS + (np.concatenate((hours, reject_hours)) - NO_HOUR)
    cells, at = np.unique(code, return_inverse=True)
    valid_at, reject_at = at[: len(region)], at[len(region) :]
    size = len(cells)
    outcome = classified.outcome
    accepted = outcome == Outcome.ACCEPTED

    def count(mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.bincount(valid_at[mask], minlength=size)

    rejected = np.zeros(size, dtype=np.int64)
    np.add.at(rejected, reject_at, rejects)
    spend = _exact_sums(batch.column("spend", np.int64)[accepted], valid_at[accepted], size)
    received = np.full(size, _NEVER)
    arrived = batch.column("received", np.int64)
    if batch.source == "files":
        np.maximum.at(received, valid_at[accepted], arrived[accepted])
    else:
        # a topic's progress: a duplicate is some too, for another cluster may have been the first with all that it holds. Its
        # partitions are read apart, so it has come no further than the last of those that it had anything of
        np.maximum.at(received, valid_at, arrived)
        np.minimum(received, _least_progress(batch), out=received)
    measures: dict[str, Sequence[int] | npt.NDArray[Any]] = {
        "offered": np.bincount(valid_at, minlength=size) + rejected,
        "accepted": count(accepted),
        "duplicate": count(outcome == Outcome.DUPLICATE),
        "conflict": count(outcome == Outcome.CONFLICT),
        "rejected": rejected,
        "late": count(accepted & batch.column("late", np.bool_)),
        "invalid_traffic": count(accepted & batch.column("invalid", np.bool_)),
        "unpriced": count(accepted & batch.column("unpriced", np.bool_)),
        "spend_nanos": spend,
    }
    rows: list[dict[str, Any]] = [
        {
            "stream": stream,
            "source": batch.source,
            "region": regions[int(cells[i]) // _HOURS],
            "event_hour": hour_moment(int(cells[i]) % _HOURS + NO_HOUR),
            **{name: int(values[i]) for name, values in measures.items()},
            "max_received_at": None if received[i] == _NEVER else from_micros(int(received[i])),
        }
        for i in range(size)
    ]
    if not rows:  # files without a line: the batch still is complete only when it stands in the ledger
        nothing: dict[str, Any] = {"stream": stream, "source": batch.source, **dict.fromkeys(measures, 0)}
        rows = [{**nothing, "region": region} for region in regions]
    if batch.plan.lost_offsets:
        rows[0]["lost_offsets"] = batch.plan.lost_offsets
    return rows


def _exact_sums(amounts: npt.NDArray[np.int64], at: npt.NDArray[Any], size: int) -> list[int]:
    """The sum of the ``amounts`` of each place 0 to ``size`` - 1, as Python's integers, which no sum overflows.

    The halves of an amount are added up apart: of fewer than 2**31 amounts either sum fits into 64 bits.
    """
    halves = []
    for half in (amounts >> 32, amounts & 0xFFFF_FFFF):
        sums = np.zeros(size, dtype=np.int64)
        np.add.at(sums, at, half)
        halves.append(sums.tolist())
    return [(high << 32) + low for high, low in zip(*halves, strict=True)]


def _least_progress(batch: Batch) -> int:
    """Of the partitions with valid records in a batch the earliest of their latest received_at, in microseconds."""
    latest: dict[str, int] = {}
    for task, split in zip(batch.tasks, batch.splits, strict=True):
        arrived = np.frombuffer(split.received, dtype=np.int64)
        if len(arrived):
            latest[task.split.name] = max(latest.get(task.split.name, _NEVER), int(arrived.max()))
    return min(latest.values(), default=_NEVER)
