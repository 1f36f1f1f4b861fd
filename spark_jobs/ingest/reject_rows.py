"""Choose the rejected and conflicting records that get a row each.

A file, or a partition in a batch, has a limited number of rows for the same reasons and event hour. One more row, the summary,
stands for all further records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spark_jobs.ingest.contract.parse import Parsed, Reject
from spark_jobs.units import HOUR_US, NO_HOUR

HOURS = 2**32  # more than there are hours
RejectKind = tuple[tuple[str, ...], int]
"""Reasons and event hour (hours since the epoch; NO_HOUR: the record had no readable time)."""


def hour_of(time_us: int | None) -> int:
    """Return the hour of a time in microseconds."""
    return NO_HOUR if time_us is None else time_us // HOUR_US


@dataclass(frozen=True, eq=False)
class RejectCounts:
    """How many records of a split were rejected, by kind: parallel arrays. ``codes`` are indexes of ``reasons``."""

    reasons: list[tuple[str, ...]]
    codes: npt.NDArray[np.int32]
    hours: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        """How many records in all."""
        return int(self.counts.sum())

    def by_kind(self) -> dict[RejectKind, int]:
        """Return the counts as a dict."""
        kinds = zip(self.codes.tolist(), self.hours.tolist(), self.counts.tolist(), strict=True)
        return {(self.reasons[code], hour): count for code, hour, count in kinds}


def one_reject(reason: str) -> RejectCounts:
    """Return the counts of a single reject without a time."""
    return RejectCounts([(reason,)], np.zeros(1, np.int32), np.full(1, NO_HOUR, np.int32), np.ones(1, np.int64))


class RejectTally:
    """Counts the rejects of a split. ``kept`` of each kind get a row each (None: all)."""

    def __init__(self, kept: int | None) -> None:
        self._kept = kept
        self._codes: dict[tuple[str, ...], int] = {}
        self._counts: dict[int, int] = {}  # by code and hour, as one number
        self.total = 0

    def take(self, parsed: Parsed) -> list[Reject]:
        """Count the rejects of a chunk; return those that may get a row: the first ``kept`` of a kind and one for the summary."""
        chosen = []
        for reject in parsed.rejects:
            before = self._add(reject, 1)
            if self._kept is None or before <= self._kept:
                chosen.append(reject)
        for reject, count in parsed.repeats:
            self._add(reject, count)
        return chosen

    def _add(self, reject: Reject, count: int) -> int:
        """Count rejects of a kind; return how many there were before."""
        code = self._codes.setdefault(tuple(reject.reasons), len(self._codes))
        kind = code * HOURS + hour_of(reject.time_us) - NO_HOUR
        before = self._counts.get(kind, 0)
        self._counts[kind] = before + count
        self.total += count
        return before

    def counts(self) -> RejectCounts:
        """Return the counts."""
        kinds = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
        return RejectCounts(
            list(self._codes),
            (kinds // HOURS).astype(np.int32),
            (kinds % HOURS + NO_HOUR).astype(np.int32),
            np.fromiter(self._counts.values(), dtype=np.int64, count=len(self._counts)),
        )


@dataclass(frozen=True)
class Share:
    """What a split writes of a kind of rejects: its first ``own`` as rows, then a row for ``summary`` records, unless that is 0."""

    own: int
    summary: int


def share_rejects(names: Sequence[str], splits: Sequence[RejectCounts], kept: int | None) -> list[dict[RejectKind, Share]]:
    """Return, per split, the kinds of which not all rejects get a row. ``names`` are the splits' files or partitions."""
    shares: list[dict[RejectKind, Share]] = [{} for _ in splits]
    if kept is None:
        return shares
    sizes: Counter[str] = Counter()
    for name, split in zip(names, splits, strict=True):
        sizes[name] += split.total
    flooded = [number for number, name in enumerate(names) if sizes[name] > kept]
    totals: Counter[tuple[str, RejectKind]] = Counter()
    for number in flooded:
        totals.update({(names[number], kind): count for kind, count in splits[number].by_kind().items()})
    seen: Counter[tuple[str, RejectKind]] = Counter()
    for number in flooded:
        for kind, count in splits[number].by_kind().items():
            place = (names[number], kind)
            if totals[place] > kept:
                before = seen[place]
                begins_here = before <= kept < before + count
                shares[number][kind] = Share(max(0, min(count, kept - before)), totals[place] - kept if begins_here else 0)
                seen[place] = before + count
    return shares


def conflict_records(
    names: npt.NDArray[np.int64], hours: npt.NDArray[np.int64], kept: int | None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return which of a batch's conflicts get a row, and how many records the row counts (0: only its own).

    ``names`` (a number for each file or partition) and ``hours`` are those of the conflicts.
    """
    records = np.zeros(len(names), dtype=np.int64)
    if kept is None or len(names) <= kept:
        return np.ones(len(names), dtype=bool), records
    _, kinds, totals = np.unique(names * HOURS + hours - NO_HOUR, return_inverse=True, return_counts=True)
    order = np.argsort(kinds, kind="stable")
    ranks = np.empty(len(kinds), dtype=np.int64)
    ranks[order] = np.arange(len(kinds)) - np.repeat(np.cumsum(totals) - totals, totals)
    first_beyond = ranks == kept
    records[first_beyond] = totals[kinds[first_beyond]] - kept
    return ranks <= kept, records
