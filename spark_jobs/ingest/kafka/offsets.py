"""The offsets of a batch, as Spark's Kafka source wrote them into the checkpoint before the batch began."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from spark_jobs.errors import TableCorruptionError

_HINT = "docs/runbooks/lost-checkpoint.md says how to start with a new checkpoint without counting twice"


@dataclass(frozen=True)
class BatchOffsets:
    """What a batch was planned with: the time of planning in microseconds, and the first and the end offset of each partition."""

    planned_us: int
    start: dict[int, int]
    end: dict[int, int]


def read_batch_offsets(checkpoint: Path, batch_id: int, topic: str) -> BatchOffsets:
    """The offsets of batch ``batch_id`` of the query with this checkpoint. A partition that is new begins at 0.

    Raises TableCorruptionError where the checkpoint does not have the form that this Spark version writes.
    """
    planned_ms, end = _offsets(checkpoint / "offsets" / str(batch_id), topic)
    start = _offsets(checkpoint / "offsets" / str(batch_id - 1), topic)[1] if batch_id else _initial(checkpoint, topic)
    return BatchOffsets(planned_ms * 1000, {number: start.get(number, 0) for number in end}, end)


def finished_offsets(checkpoint: Path, topic: str) -> dict[int, int]:
    """The end offset of each partition up to which the query with this checkpoint has finished its batches; none: {}.

    Raises TableCorruptionError as ``read_batch_offsets`` does.
    """
    done = [int(path.name) for path in (checkpoint / "commits").glob("*") if path.name.isdecimal()]
    return _offsets(checkpoint / "offsets" / str(max(done)), topic)[1] if done else {}


def _offsets(path: Path, topic: str) -> tuple[int, dict[int, int]]:
    try:
        version, metadata, offsets = path.read_text("utf-8").splitlines()[:3]
        if version != "v1":
            raise ValueError(version)
        return int(json.loads(metadata)["batchTimestampMs"]), _of_topic(offsets, topic)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableCorruptionError(f"{path} does not hold the offsets of topic {topic}: {error}", hint=_HINT) from None


def _initial(checkpoint: Path, topic: str) -> dict[int, int]:
    path = checkpoint / "sources" / "0" / "0"
    try:
        version, offsets = path.read_text("utf-8").lstrip("\0").splitlines()[:2]
        if version != "v1":
            raise ValueError(version)
        return _of_topic(offsets, topic)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableCorruptionError(f"{path} does not hold the first offsets of topic {topic}: {error}", hint=_HINT) from None


def _of_topic(offsets: str, topic: str) -> dict[int, int]:
    """``{"topic":{"0":123}}`` as partition to offset."""
    return {int(number): int(offset) for number, offset in json.loads(offsets)[topic].items()}
