"""Name partitions, read the offsets of a batch from Spark's checkpoint, and cut them into the splits that tasks read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spark_jobs.ingest.checkpoint_log import numbers, read_log, read_offset, refuse_unreadable

PREFIX = "kafka"
_NAME = re.compile(rf"{PREFIX}/([a-z0-9-]{{1,32}})/([a-zA-Z0-9._-]{{1,249}}(?:~[0-9]{{1,6}})?)/([0-9]{{1,9}})")
_SPLIT_OFFSETS = 500_000  # large, because each split costs a new start of reading


class Partition(NamedTuple):
    """A partition of a topic of a cluster. Tables have its ``name`` in source_file, and a record's offset in source_line.

    Offsets of a topic that was deleted and created again begin at 0. So ``topic`` is a label: the name, and from the second topic
    of that name on the name and ``~2`` and so on, which no topic's name can have.
    """

    cluster: str
    topic: str
    number: int

    @property
    def name(self) -> str:
        """kafka/<cluster>/<topic>/<partition>."""
        return f"{PREFIX}/{self.cluster}/{self.topic}/{self.number}"


def partition_of(name: str) -> Partition | None:
    """Return the partition with a ``Partition.name``; None if the name is a file's."""
    found = _NAME.fullmatch(name)
    return Partition(found[1], found[2], int(found[3])) if found else None


@dataclass(frozen=True, order=True)
class OffsetRange:
    """Offsets [start, end) of the partition ``name``. A batch has its records in the order (name, offset)."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class OffsetSplit:
    """The ``number``-th split of a batch: offsets [start, end) of a partition. ``region`` is for records without a region.

    ``options`` are the client's settings; they may hold secrets.
    """

    number: int
    name: str
    region: str
    topic: str
    partition: int
    start: int
    end: int
    options: dict[str, str] = field(repr=False)

    def __str__(self) -> str:
        """Return the partition's name and the offsets."""
        return f"{self.name} offsets {self.start} to {self.end - 1}"


def plan_offset_splits(ranges: Iterable[OffsetRange], options: dict[str, str]) -> list[OffsetSplit]:
    """Return the splits of a batch of one cluster, in the order of its records."""
    splits: list[OffsetSplit] = []
    for one in sorted(ranges):
        partition = partition_of(one.name)
        assert partition is not None
        topic = partition.topic.partition("~")[0]
        for start in range(one.start, one.end, _SPLIT_OFFSETS):
            end = min(start + _SPLIT_OFFSETS, one.end)
            splits.append(OffsetSplit(len(splits), one.name, partition.cluster, topic, partition.number, start, end, options))
    return splits


@dataclass(frozen=True)
class BatchOffsets:
    """The time of planning in microseconds, and the first and the end offset of each partition."""

    planned_us: int
    start: dict[int, int]
    end: dict[int, int]


def read_batch_offsets(checkpoint: Path, batch_id: int, topic: str) -> BatchOffsets:
    """Return the offsets of a batch. A partition that is new begins at 0.

    Raises TableCorruptionError if the checkpoint is not in the format of this Spark version.
    """
    planned_ms, end = _offsets(checkpoint, batch_id, topic)
    start = _offsets(checkpoint, batch_id - 1, topic)[1] if batch_id else _first_offsets(checkpoint, topic)
    return BatchOffsets(planned_ms * 1000, {number: start.get(number, 0) for number in end}, end)


def finished_offsets(checkpoint: Path, topic: str) -> dict[int, int]:
    """Return the end offsets of the newest finished batch; empty if there is none. Raises as ``read_batch_offsets`` does."""
    finished = max(numbers(checkpoint / "commits"), default=None)
    return {} if finished is None else _offsets(checkpoint, finished, topic)[1]


def _offsets(checkpoint: Path, batch_id: int, topic: str) -> tuple[int, dict[int, int]]:
    with refuse_unreadable(f"{checkpoint / 'offsets' / str(batch_id)} does not hold the offsets of topic {topic}"):
        planned_ms, offsets = read_offset(checkpoint, batch_id)
        return planned_ms, _by_partition(offsets[topic])


def _first_offsets(checkpoint: Path, topic: str) -> dict[int, int]:
    path = checkpoint / "sources" / "0" / "0"
    with refuse_unreadable(f"{path} does not hold the first offsets of topic {topic}"):
        return _by_partition(json.loads(read_log(path)[0])[topic])


def _by_partition(offsets: dict[str, Any]) -> dict[int, int]:
    return {int(number): int(offset) for number, offset in offsets.items()}
