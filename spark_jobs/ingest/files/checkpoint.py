"""The files of a batch, as Spark's file source wrote them down before the batch began.

The checkpoint's own log is read, not the batch's frame: the frame leaves out empty files, and a file's time of modification may
change between a kill and the restart, while the log says the same for as long as the batch can run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.files.landing import LandingFile, local_path

_VERSION = "v1"
_HINT = "docs/runbooks/lost-checkpoint.md says how to start with a new checkpoint without counting twice"


@dataclass(frozen=True)
class BatchFiles:
    """What a batch was planned with: its files, in the order of their records, and the time of planning in microseconds."""

    planned_us: int
    files: list[LandingFile]


def read_batch_files(checkpoint: Path, batch_id: int, place: Callable[[str], str] = str) -> BatchFiles:
    """The files of batch ``batch_id`` of the query with this checkpoint. A file that is gone by now has size 0.

    ``place`` says where a file lies that the checkpoint calls so.

    Raises TableCorruptionError where the checkpoint does not have the form that this Spark version writes.
    """
    planned_ms, end = _offset(checkpoint, batch_id)
    start = _offset(checkpoint, batch_id - 1)[1] if batch_id else -1
    listed = [file for log_id in range(start + 1, end + 1) for file in _files(checkpoint, log_id)]
    files = [LandingFile(ms, path, _size(path)) for ms, path in ((ms, place(path)) for ms, path in listed)]
    return BatchFiles(planned_ms * 1000, sorted(files, key=lambda file: file.order))


def read_finished_files(checkpoint: Path) -> dict[str, int]:
    """Paths of the files of all batches that the query with this checkpoint has finished; empty where there is none.

    With the time of modification that each was planned with, in milliseconds.

    Raises TableCorruptionError as ``read_batch_files`` does.
    """
    finished = _newest(checkpoint / "commits", "")
    if finished is None:
        return {}
    end = _offset(checkpoint, finished)[1]
    log = checkpoint / "sources" / "0"
    compacted = _newest(log, ".compact")
    own = range(0 if compacted is None else compacted + 1, end + 1)
    names = [*([] if compacted is None else [f"{compacted}.compact"]), *map(str, own)]
    entries = (entry for name in names for entry in _entries(log / name) if entry["batchId"] <= end)
    return {local_path(entry["path"]): int(entry["timestamp"]) for entry in entries}


def read_finished_batches(checkpoint: Path) -> list[int]:
    """The finished batches of which the checkpoint still has the plan (Spark keeps the last hundred)."""
    commits, offsets = _numbers(checkpoint / "commits"), _numbers(checkpoint / "offsets")
    return sorted(number for number in commits & offsets if number == 0 or number - 1 in offsets)


def _newest(folder: Path, ending: str) -> int | None:
    """The highest number that a file of the folder has for its name, before ``ending``."""
    return max(_numbers(folder, ending), default=None)


def _numbers(folder: Path, ending: str = "") -> set[int]:
    try:
        names = [entry.name.removesuffix(ending) for entry in os.scandir(folder) if entry.name.endswith(ending)]
    except FileNotFoundError:
        return set()
    return {int(name) for name in names if name.isdecimal()}


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        version, *lines = path.read_text("utf-8").splitlines()
        if version != _VERSION:
            raise ValueError(f"version {version}")
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise TableCorruptionError(f"{path} is not the list of a file source: {error}", hint=_HINT) from None


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def _offset(checkpoint: Path, batch_id: int) -> tuple[int, int]:
    path = checkpoint / "offsets" / str(batch_id)
    try:
        version, metadata, offset = path.read_text("utf-8").splitlines()[:3]
        if version != _VERSION:
            raise ValueError(version)
        return int(json.loads(metadata)["batchTimestampMs"]), int(json.loads(offset)["logOffset"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableCorruptionError(f"{path} is not a file source's offset: {error}", hint=_HINT) from None


def _files(checkpoint: Path, log_id: int) -> list[tuple[int, str]]:
    """(time of modification in ms, path) of the files of one id of the source's log.

    From its own list, or from the compacted one that took it in.
    """
    folder = checkpoint / "sources" / "0"
    own = folder / str(log_id)
    if own.exists():
        source = own
    else:
        compacted = [int(path.stem) for path in folder.glob("*.compact") if path.stem.isdecimal()]
        source = folder / f"{min((number for number in compacted if number >= log_id), default=log_id)}.compact"
    try:
        version, *lines = source.read_text("utf-8").splitlines()
        if version != _VERSION:
            raise ValueError(f"version {version}")
        entries = [entry for entry in map(json.loads, lines) if entry["batchId"] == log_id]
        files = [(int(entry["timestamp"]), local_path(entry["path"])) for entry in entries]
        if not files:  # the source only writes an id down when it has found files
            raise ValueError(f"no file of {log_id}")
    except (OSError, AttributeError, ValueError, KeyError, TypeError) as error:
        raise TableCorruptionError(f"{own} is not the list of a file source: {error}", hint=_HINT) from None
    return files
