"""Read the files of a batch from the log that Spark's file source writes before the batch begins.

The frame of the batch is no substitute: it leaves out empty files, and a file's time of modification may change between a kill and
the restart, while the log stays the same for as long as the batch can run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_jobs.ingest.checkpoint_log import numbers, read_log, read_offset, refuse_unreadable
from spark_jobs.ingest.files.landing import FILE_ENDINGS, LandingFile, uri_path


@dataclass(frozen=True)
class BatchFiles:
    """The files of a batch, in the order of their records, and the time of planning in microseconds."""

    planned_us: int
    files: list[LandingFile]


def read_batch_files(
    checkpoint: Path, batch_id: int, place: Callable[[str], str] = str, listed_at: Callable[[str], str] = str
) -> BatchFiles:
    """Return the files of a batch. A missing file has size 0.

    ``place`` maps a path in the checkpoint to the present path, ``listed_at`` to the path whose size is the file's.

    Raises TableCorruptionError if the checkpoint is not in the format of this Spark version.
    """
    planned_ms, end = _offset(checkpoint, batch_id)
    start = _offset(checkpoint, batch_id - 1)[1] if batch_id else -1
    listed = [file for log_id in range(start + 1, end + 1) for file in _listed_files(checkpoint, log_id)]
    files = [LandingFile(ms, place(path), _size(listed_at(path))) for ms, path in listed]
    return BatchFiles(planned_ms * 1000, sorted(files))


def planned_at_ms(checkpoint: Path, batch_id: int) -> int:
    """Return the time of a batch's plan in milliseconds. Raises as ``read_batch_files`` does."""
    return _offset(checkpoint, batch_id)[0]


def read_finished_files(checkpoint: Path) -> dict[str, int]:
    """Return the files of all finished batches: path to planned modification time (ms). Raises as ``read_batch_files`` does."""
    finished = max(numbers(checkpoint / "commits"), default=None)
    if finished is None:
        return {}
    end = _offset(checkpoint, finished)[1]
    log = checkpoint / "sources" / "0"
    compacted = max(numbers(log, ".compact"), default=-1)
    lists = [f"{compacted}.compact"] if compacted >= 0 else []
    lists += map(str, range(compacted + 1, end + 1))
    entries = (entry for name in lists for entry in _entries(log / name) if entry["batchId"] <= end)
    return {uri_path(entry["path"]): int(entry["timestamp"]) for entry in entries}


def has_read_all(checkpoint: Path, folder: Path) -> bool:
    """Return whether Spark's file source has read all of ``folder``: it would neither plan a batch nor finish one.

    False if in doubt, as with a link or a folder that cannot be listed. Raises as ``read_batch_files`` does.
    """
    planned, ended = (max(numbers(checkpoint / part), default=-1) for part in ("offsets", "commits"))
    if planned != ended or not (checkpoint / "metadata").exists():
        return False
    log = checkpoint / "sources" / "0"
    end = _offset(checkpoint, planned)[1] if planned >= 0 else -1
    if max(numbers(log) | numbers(log, ".compact"), default=-1) != end:  # a list was written, and its batch was not planned yet
        return False
    read = read_finished_files(checkpoint)
    try:
        return all(path in read for path in _listed_by_spark(folder))
    except OSError:
        return False


def count_files(folder: Path) -> int:
    """Return how many files Spark's file source lists in ``folder``; 0 if it cannot be listed."""
    try:
        return sum(1 for _ in _listed_by_spark(folder))
    except OSError:
        return 0


def _listed_by_spark(folder: Path) -> Iterator[str]:
    """Yield what Spark's file source may list as a file below ``folder``, and links to folders."""
    folders = [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if _is_hidden_from_spark(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.endswith(FILE_ENDINGS) or entry.is_dir():
                    yield entry.path


def _is_hidden_from_spark(name: str) -> bool:
    """Return whether Spark skips an entry by its name (`HadoopFSUtils.shouldFilterOutPathName`)."""
    if name.startswith("_"):
        return "=" not in name and not name.startswith(("_common_metadata", "_metadata"))
    return name.startswith(".")


def read_finished_batches(checkpoint: Path) -> list[int]:
    """Return the finished batches whose plan the checkpoint still has (Spark keeps the last hundred)."""
    offsets = numbers(checkpoint / "offsets")
    return sorted(number for number in numbers(checkpoint / "commits") & offsets if number == 0 or number - 1 in offsets)


def _entries(path: Path) -> list[dict[str, Any]]:
    with refuse_unreadable(f"{path} is not the list of a file source"):
        entries: list[dict[str, Any]] = json.loads(f"[{','.join(read_log(path))}]")  # at once: a compacted list has all files
        return entries


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def _offset(checkpoint: Path, batch_id: int) -> tuple[int, int]:
    with refuse_unreadable(f"{checkpoint / 'offsets' / str(batch_id)} is not a file source's offset"):
        planned_ms, offset = read_offset(checkpoint, batch_id)
        return planned_ms, int(offset["logOffset"])


def _listed_files(checkpoint: Path, log_id: int) -> list[tuple[int, str]]:
    """Return (time of modification in ms, path) of the files of one id of the log, from its own or a compacted list."""
    folder = checkpoint / "sources" / "0"
    path = folder / str(log_id)
    with refuse_unreadable(f"{path} is not the list of a file source"):
        compacted = min((number for number in numbers(folder, ".compact") if number >= log_id), default=log_id)
        lines = read_log(path if path.exists() else folder / f"{compacted}.compact")
        files = _files_of(lines, log_id)
        if not files:  # the source only writes a list when it has found files
            raise ValueError(f"no file of {log_id}")
        return files


def _files_of(lines: list[str], log_id: int) -> list[tuple[int, str]]:
    """Return the files of one id of a list. Reads it from its end, because the ids are in order and the newest are wanted."""
    files = []
    for entry in map(json.loads, reversed(lines)):
        if entry["batchId"] < log_id:
            break
        if entry["batchId"] == log_id:
            files.append((int(entry["timestamp"]), uri_path(entry["path"])))
    return files[::-1]
