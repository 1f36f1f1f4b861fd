"""Spark's checkpoint of a query across a power cut: synced before a batch commits anything, mended before Spark opens it.

Spark writes ``metadata``, ``sources/0/N`` and ``offsets/N`` before a batch and ``commits/N`` after it, and syncs none of them. The
batch syncs what was written for it before its first commit, so a file of the checkpoint that is torn belongs to a batch of which no
table has anything, or is a ``commits/N`` whose batch runs again and is recognised by its transaction. Such files are set aside.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spark_jobs import disk
from spark_jobs.errors import TableCorruptionError

_HINT = "docs/runbooks/power-cut.md; docs/runbooks/lost-checkpoint.md says how to start with a new checkpoint"
_log = logging.getLogger("adtally")


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says: the query's id, and the newest batch that was planned and the newest that ended (-1: none)."""

    query_id: str
    planned: int
    ended: int


class CheckpointSync:
    """Syncs the files of one query's checkpoint, each once."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._synced: set[Path] = set()

    def before_commit(self) -> None:
        """Write through what Spark has written since the last call. Each batch calls it before its first commit."""
        folders = [self._checkpoint, *(self._checkpoint / name for name in ("offsets", "commits", "sources/0", "sources"))]
        new = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
        new = [path for path in new if path not in self._synced and not path.name.endswith(disk.TEMPORARY_ENDING)]
        disk.sync_files(new)
        for folder in {path.parent for path in new}:
            disk.sync_folder(folder)
        if not self._synced:
            disk.sync_new_folders([folder for folder in folders if folder.is_dir()], self._checkpoint.parent.parent)
        self._synced.update(new)


def read_state(checkpoint: Path) -> CheckpointState | None:
    """What the checkpoint says; None if there is no query yet. Raises TableCorruptionError if its id cannot be read."""
    path = checkpoint / "metadata"
    if not path.exists():
        return None
    try:
        query_id = str(json.loads(path.read_text("utf-8"))["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise TableCorruptionError(f"{path} does not name the query: {error}", hint=_HINT) from None
    planned, ended = (max((number for number, _ in _numbered(checkpoint / part)), default=-1) for part in ("offsets", "commits"))
    return CheckpointState(query_id, planned, ended)


def set_aside_torn(checkpoint: Path) -> list[str]:
    """Set aside the torn newest files of a checkpoint, so that Spark plans their batch again; returns a line for each, and logs it.

    Raises TableCorruptionError if a file is torn that an ended batch needs.
    """
    torn: list[Path] = []
    metadata, offsets, lists = checkpoint / "metadata", checkpoint / "offsets", checkpoint / "sources" / "0"
    commits = list(_torn_tail(checkpoint / "commits"))
    torn += commits
    ended = max((number for number, path in _numbered(checkpoint / "commits") if path not in commits), default=-1)
    if metadata.exists() and not _is_whole(metadata):
        torn.append(metadata)
    torn_lists = list(_torn_tail(lists)) + [path for path in lists.glob("*.compact") if not _is_whole(path)]
    torn_offsets = list(_torn_tail(offsets))
    planned = [path for number, path in _numbered(offsets) if number > ended and path not in torn_offsets]
    if metadata in torn:
        torn_offsets += planned
    elif torn_lists:  # what was planned by them is planned again
        torn_offsets += [path for path in planned if any(_needs(path, _number(one)) for one in torn_lists)]
    torn += [*torn_lists, *torn_offsets]
    lost = [path for path in torn_offsets if int(path.name) <= ended]
    if ended >= 0:
        lost += [one for one in torn_lists if _needs(offsets / str(ended), _number(one))]
        lost += [metadata] if metadata in torn else []
    if lost:
        raise TableCorruptionError(f"{lost[0]} cannot be read, and batch {ended} that needs it has ended", hint=_HINT)
    said = []
    for path in torn:
        disk.replace(path, path.with_name(f".torn-{path.name}-{time.time_ns()}"))
        path.with_name(f".{path.name}.crc").unlink(missing_ok=True)
        said.append(f"{path} was torn by a power cut and set aside; its batch is planned or ended again")
    for folder in (checkpoint, offsets, checkpoint / "commits", lists):
        for path in folder.glob(".*.crc"):
            if not path.stat().st_size:  # without it Spark reads the file itself
                path.unlink()
    for line in said:
        _log.warning("adtally: %s", line)
    return said


def _number(path: Path) -> int:
    return int(path.name.removesuffix(".compact"))


def _needs(offset: Path, number: int) -> bool:
    """Whether a planned batch reads what list ``number`` of the source's log names."""
    try:
        return number <= int(json.loads(offset.read_text("utf-8").splitlines()[2])["logOffset"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return True  # of a topic, whose first offsets stand in list 0; or an offset that is not there


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    """The files of a folder that have a number for their name, the newest first."""
    found = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    for path in sorted(found, key=lambda path: -int(path.name)):
        yield int(path.name), path


def _torn_tail(folder: Path) -> Iterator[Path]:
    for _, path in _numbered(folder):
        if _is_whole(path):
            return
        yield path


def _is_whole(path: Path) -> bool:
    """Whether a file of a checkpoint reads as Spark writes it: a version, then JSON or "-" a line; ``metadata`` is JSON alone."""
    try:
        lines = path.read_text("utf-8").lstrip("\0").splitlines()
        if path.name != "metadata" and lines.pop(0) != "v1":
            return False
        return bool(lines or path.suffix == ".compact") and all(line == "-" or isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, IndexError):
        return False
