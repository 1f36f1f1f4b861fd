"""What batches took: landing files, and ranges of Kafka's offsets matched with the raw copy."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq

from spark_jobs.audit.checkpoints import TopicQuery
from spark_jobs.audit.plans import BatchPlan, PlannedRange
from spark_jobs.audit.raw import NO_END, RawTable, Span, intersect, subtract
from spark_jobs.audit.store import ParsedFile, RawChunk, RawFile
from spark_jobs.config import Settings
from spark_jobs.lake.lake import Snapshot

BatchKey = tuple[str, int]
"""The query id and the batch id of a batch."""


@dataclass(frozen=True)
class Occurrence:
    """What a batch (by its number) took: a landing file, or offsets [start, end) of a Kafka partition inside one parsed chunk.

    ``entry`` None: it is not there in the planned state. It ``is_waiting`` if the query that writes the raw copy has yet to reach
    it; otherwise it is gone.
    """

    batch: int
    name: str
    start: int = 0
    end: int = NO_END
    entry: ParsedFile | None = None
    is_waiting: bool = False


class PlannedRanges:
    """The planned ranges of Kafka's offsets, matched with the raw copy. ``chunks`` are to be parsed.

    ``offered`` is the number of records that each booked batch was offered. ``snapshot`` pins the raw copy if it was needed.
    """

    def __init__(
        self,
        settings: Settings,
        stream: str,
        snapshot: Snapshot,
        plans: list[BatchPlan],
        offered: dict[BatchKey, int],
        topics: dict[str, TopicQuery],
    ) -> None:
        self._offered = offered
        planned: dict[str, list[Span]] = {}
        for plan in plans:
            for part in plan.ranges:
                planned.setdefault(part.name, []).append((part.start, part.end))
        ends = {name: end for topic in topics.values() for name, end in topic.end.items()}
        self.chunks: list[RawChunk] = []
        self.snapshot = snapshot
        self._complete: dict[str, list[Span]] = {}
        self._missed: dict[str, list[Span]] = {}  # the running query has passed over them and no batch has them
        self._chunks_of: dict[str, list[RawChunk]] = {}
        if not planned and not ends:
            return
        self._raw = RawTable(settings, stream, snapshot)
        self.snapshot = self._raw.snapshot
        for name in sorted({*planned, *ends}):
            spans = sorted(planned.get(name, ()))
            complete = self._complete[name] = self._raw.complete_spans(name, from_offset=spans[0][0] if spans else 0)
            missed = self._missed[name] = [
                part for gap in subtract((0, ends.get(name, 0)), spans) for part in intersect(gap, complete)
            ]
            self._chunks_of[name] = list(self._raw.chunks(name, sorted([*spans, *missed]), complete))
            self.chunks += self._chunks_of[name]

    def missed(self, parsed: dict[RawFile | RawChunk, ParsedFile]) -> tuple[PlannedRange, ...]:
        """Return the ranges that have a record and that no batch took."""
        return tuple(
            PlannedRange(name, *span)
            for name, spans in self._missed.items()
            for span in spans
            if any(_count(entry, part) for entry, part in self._parts(name, span, parsed))
        )

    def occurrences(self, number: int, plan: BatchPlan, parsed: dict[RawFile | RawChunk, ParsedFile]) -> list[Occurrence]:
        """Return what is there of a plan's ranges, and what is not, in the order of reading."""
        found: list[Occurrence] = []
        for name, span in _read_ranges(plan):
            complete = self._complete.get(name, [])
            found += [Occurrence(number, name, *at, entry) for entry, at in self._parts(name, span, parsed)]
            found += [
                Occurrence(number, name, *gap, is_waiting=self._raw.will_reach(name, gap[0])) for gap in subtract(span, complete)
            ]
        if any(one.entry is None for one in found) and not any(one.is_waiting for one in found):
            here = [one for one in found if one.entry is not None]
            # If no record is missing, what seems to be gone is a gap in the offsets.
            records = sum(_count(one.entry, (one.start, one.end)) for one in here if one.entry)
            if records >= self._offered.get((plan.query_id, plan.batch_id), NO_END):
                found = here
        return sorted(found, key=lambda one: (one.name, one.start))

    def _parts(self, name: str, span: Span, parsed: dict[RawFile | RawChunk, ParsedFile]) -> Iterator[tuple[ParsedFile, Span]]:
        """Yield the parsed chunks that have offsets of ``span``, each with these offsets."""
        chunks = self._chunks_of.get(name, [])
        first = bisect_right(chunks, span[0], key=lambda chunk: chunk.end)
        for chunk in chunks[first:]:
            if chunk.start >= span[1]:
                return
            yield parsed[chunk], (max(span[0], chunk.start), min(span[1], chunk.end))


def _read_ranges(plan: BatchPlan) -> Iterator[tuple[str, Span]]:
    """Yield the offsets that a batch read: its ranges without what it set aside."""
    for part in plan.ranges:
        aside = sorted((one.start, one.end) for one in plan.set_aside if one.name == part.name)
        for span in subtract((part.start, part.end), aside):
            yield part.name, span


def batches_lacking_records(wanted: dict[int, int], occurrences: list[Occurrence]) -> frozenset[int]:
    """Return the batches whose ranges have fewer records than ``wanted`` (by batch number): records were removed from the raw copy.

    ``occurrences`` have all ranges of these batches, each with an entry. Counts batch by batch only if all records together are too
    few, because that reads the records.
    """
    by_entry: dict[ParsedFile, list[Occurrence]] = {}
    for found in occurrences:
        if found.entry is not None and found.batch in wanted:
            by_entry.setdefault(found.entry, []).append(found)
    spans = {entry: [(found.start, found.end) for found in taken] for entry, taken in by_entry.items()}
    if sum(_count(entry, *spans[entry]) for entry in spans) >= sum(wanted.values()):
        return frozenset()
    counts: Counter[int] = Counter()
    for entry, taken in by_entry.items():
        for found, count in zip(taken, _counts(entry, spans[entry]), strict=True):
            counts[found.batch] += count
    return frozenset(number for number in wanted if counts[number] < wanted[number])


def _count(entry: ParsedFile, *spans: Span) -> int:
    """Count the records of a chunk in all spans together. Does not read the records if the spans cover the chunk once."""
    ordered = sorted(spans)
    joined = all(before[1] == after[0] for before, after in pairwise(ordered))
    if joined and isinstance(entry.raw, RawChunk) and (ordered[0][0], ordered[-1][1]) == (entry.raw.start, entry.raw.end):
        return entry.records
    return sum(_counts(entry, spans))


def _counts(entry: ParsedFile, spans: Sequence[Span]) -> list[int]:
    """Count the records of a chunk in each span."""
    lines = pq.read_table(entry.parquet, columns=["line"])["line"].to_numpy()  # ascending
    counts: list[int] = np.diff(np.searchsorted(lines, spans))[:, 0].tolist()
    return counts
