"""Read the offsets of a batch as Spark's Kafka source wrote them into the checkpoint before the batch began."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_jobs.ingest.checkpoint_log import numbers, read_log, read_offset, refuse_unreadable


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
    """Return the end offset of each partition after the newest finished batch; empty if there is none.

    Raises TableCorruptionError as ``read_batch_offsets`` does.
    """
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
