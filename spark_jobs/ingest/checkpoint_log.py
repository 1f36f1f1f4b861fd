"""Read what Spark writes into the checkpoint of a query: the plan of each batch, and which batches have ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spark_jobs.errors import TableCorruptionError

_HINT = "docs/runbooks/lost-checkpoint.md says how to start with a new checkpoint without counting twice"


@contextmanager
def refuse_unreadable(problem: str) -> Iterator[None]:
    """Raise TableCorruptionError with ``problem`` if the block meets a file in another format than this Spark version writes."""
    try:
        yield
    except (OSError, AttributeError, ValueError, KeyError, TypeError) as error:
        raise TableCorruptionError(f"{problem}: {error}", hint=_HINT) from None


def read_log(path: Path) -> list[str]:
    """Return the lines of a log file after its first line, the version. Raises ValueError for an unknown version."""
    version, *lines = path.read_text("utf-8").lstrip("\0").splitlines()
    if version != "v1":
        raise ValueError(f"version {version}")
    return lines


def read_offset(checkpoint: Path, batch_id: int) -> tuple[int, dict[str, Any]]:
    """Return when a batch was planned (milliseconds) and the offset of its source after the batch."""
    metadata, offset = read_log(checkpoint / "offsets" / str(batch_id))[:2]
    return int(json.loads(metadata)["batchTimestampMs"]), json.loads(offset)


def has_plan(checkpoint: Path, batch_id: int) -> bool:
    """Return whether the checkpoint still has the offsets before and after a batch."""
    offsets = checkpoint / "offsets"
    return (offsets / str(batch_id)).exists() and (batch_id == 0 or (offsets / str(batch_id - 1)).exists())


def numbers(folder: Path, ending: str = "") -> set[int]:
    """Return the numbers that name files of a folder, before ``ending``. Empty if the folder is missing."""
    try:
        names = [entry.name.removesuffix(ending) for entry in os.scandir(folder) if entry.name.endswith(ending)]
    except FileNotFoundError:
        return set()
    return {int(name) for name in names if name.isdecimal()}
