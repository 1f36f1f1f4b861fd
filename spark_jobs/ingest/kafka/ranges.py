"""Name partitions, and cut the offsets of a batch into the splits that tasks read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

PREFIX = "kafka"
_NAME = re.compile(rf"{PREFIX}/([a-z0-9-]{{1,32}})/([a-zA-Z0-9._-]{{1,249}}(?:~[0-9]{{1,6}})?)/([0-9]{{1,9}})")
SPLIT_OFFSETS = 500_000  # large, because each split costs a new start of reading


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


def plan_offset_splits(ranges: Iterable[OffsetRange], options: dict[str, str], size: int = SPLIT_OFFSETS) -> list[OffsetSplit]:
    """Return the splits of a batch of one cluster, in the order of its records."""
    splits: list[OffsetSplit] = []
    for one in sorted(ranges):
        partition = partition_of(one.name)
        assert partition is not None
        topic = partition.topic.partition("~")[0]
        for start in range(one.start, one.end, size):
            end = min(start + size, one.end)
            splits.append(OffsetSplit(len(splits), one.name, partition.cluster, topic, partition.number, start, end, options))
    return splits
