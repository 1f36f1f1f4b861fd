"""Which rejected and conflicting records get rows of their own. A file, or a partition in a batch, has at most so many rows for the
same reasons and event hour; one more row, the summary, stands for all records beyond them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spark_jobs.ingest.contract.parse import Parsed, Reject
from spark_jobs.units import HOUR_US, NO_HOUR

_HOURS = 2**32  # more than there are hours
Kind = tuple[tuple[str, ...], int]
"""Reasons and event hour (hours since the epoch; NO_HOUR: the record had no readable time)."""


def hour_of(time_us: int | None) -> int:
    """The hour of a time in microseconds."""
    return NO_HOUR if time_us is None else time_us // HOUR_US


@dataclass(frozen=True)
class RejectCounts:
    """How many records of a split were rejected, by kind: parallel arrays. ``codes`` (int32) are indexes of ``reasons``, ``hours``
    are int32, ``counts`` int64, as bytes.
    """

    reasons: list[tuple[str, ...]]
    codes: bytes
    hours: bytes
    counts: bytes

    @property
    def by_hour(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Hours, some of them more than once, and their counts."""
        return np.frombuffer(self.hours, dtype=np.int32), np.frombuffer(self.counts, dtype=np.int64)

    @property
    def total(self) -> int:
        """How many in all."""
        return int(self.by_hour[1].sum())

    def by_kind(self) -> dict[Kind, int]:
        """The counts as a dict."""
        hours, counts = self.by_hour
        kinds = zip(np.frombuffer(self.codes, dtype=np.int32).tolist(), hours.tolist(), counts.tolist(), strict=True)
        return {(self.reasons[code], hour): count for code, hour, count in kinds}


def one_reject(reason: str) -> RejectCounts:
    """The counts of a single reject without a time."""
    return RejectCounts(
        [(reason,)], *(np.array([value], kind).tobytes() for value, kind in ((0, "i4"), (NO_HOUR, "i4"), (1, "i8")))
    )


class RejectTally:
    """Counts the rejects of a split. ``kept``: how many of a kind get rows of their own (None: all)."""

    def __init__(self, kept: int | None) -> None:
        self._kept = kept
        self._codes: dict[tuple[str, ...], int] = {}
        self._counts: dict[int, int] = {}  # by code and hour, as one number
        self.total = 0

    def take(self, parsed: Parsed) -> list[Reject]:
        """Count the rejects of a chunk; returns those that may get a row: per kind the first ``kept`` and one more, which a summary
        row may begin with.
        """
        chosen = []
        for reject in parsed.rejects:
            before = self._add(reject, 1)
            if self._kept is None or before <= self._kept:
                chosen.append(reject)
        for reject, count in parsed.repeats:
            self._add(reject, count)
        return chosen

    def _add(self, reject: Reject, count: int) -> int:
        """Count rejects of a kind; returns how many there were before."""
        code = self._codes.setdefault(tuple(reject.reasons), len(self._codes))
        kind = code * _HOURS + hour_of(reject.time_us) - NO_HOUR
        before = self._counts.get(kind, 0)
        self._counts[kind] = before + count
        self.total += count
        return before

    def counts(self) -> RejectCounts:
        """What was counted."""
        kinds = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
        return RejectCounts(
            list(self._codes),
            (kinds // _HOURS).astype(np.int32).tobytes(),
            (kinds % _HOURS + NO_HOUR).astype(np.int32).tobytes(),
            np.fromiter(self._counts.values(), dtype=np.int64, count=len(self._counts)).tobytes(),
        )


@dataclass(frozen=True)
class Share:
    """What a split may write of a kind of rejects: its first ``own`` ones as rows of their own; then, where ``summary`` is not 0,
    a row that stands for so many records.
    """

    own: int
    summary: int


def share_rejects(names: Sequence[str], splits: Sequence[RejectCounts], kept: int | None) -> list[dict[Kind, Share]]:
    """Per split the kinds of which not all rejects get a row. ``names`` are those of the files or partitions of the splits."""
    shares: list[dict[Kind, Share]] = [{} for _ in splits]
    if kept is None:
        return shares
    sizes: Counter[str] = Counter()
    for name, split in zip(names, splits, strict=True):
        sizes[name] += split.total
    flooded = [number for number, name in enumerate(names) if sizes[name] > kept]
    totals: Counter[tuple[str, Kind]] = Counter()
    for number in flooded:
        totals.update({(names[number], kind): count for kind, count in splits[number].by_kind().items()})
    seen: Counter[tuple[str, Kind]] = Counter()
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
    """Which of a batch's conflicts, in their order, get a row, and how many records it stands for.

    ``names`` (a number for each file or partition) and ``hours`` are of the conflicts. A row of its own stands for 0.
    """
    records = np.zeros(len(names), dtype=np.int64)
    if kept is None or len(names) <= kept:
        return np.ones(len(names), dtype=bool), records
    _, kinds, totals = np.unique(names * _HOURS + hours - NO_HOUR, return_inverse=True, return_counts=True)
    order = np.argsort(kinds, kind="stable")
    ranks = np.empty(len(kinds), dtype=np.int64)
    ranks[order] = np.arange(len(kinds)) - np.repeat(np.cumsum(totals) - totals, totals)
    first_beyond = ranks == kept
    records[first_beyond] = totals[kinds[first_beyond]] - kept
    return ranks <= kept, records
