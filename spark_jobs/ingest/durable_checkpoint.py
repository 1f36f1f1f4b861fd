"""Keep Spark's checkpoint of a query: sync or copy it before a batch commits, repair it before Spark opens it.

Spark writes ``metadata``, ``sources/0/N`` and ``offsets/N`` before a batch and ``commits/N`` after it, and syncs none of them.
Before its first commit, a batch syncs what Spark wrote for it. So a torn file of the checkpoint belongs to a batch that no
table has yet, or is a ``commits/N`` whose batch runs again and is recognised by its transaction. Such files are set aside.
With a remote lakehouse the batch copies these files there instead (``lake/checkpoint_copy.py``), and a start brings the copy back.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from spark_jobs import disk
from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.checkpoint_log import numbers
from spark_jobs.lake.checkpoint_copy import CheckpointCopy

_HINT = "docs/runbooks/power-cut.md; docs/runbooks/lost-checkpoint.md says how to start with a new checkpoint"
_log = logging.getLogger("adtally")


@dataclass(frozen=True)
class CheckpointState:
    """The query of a checkpoint, and its newest batch that was planned and that has ended (-1: none)."""

    query_id: str
    planned: int
    ended: int


class CheckpointSync:
    """Syncs the files of one query's checkpoint, each once, or copies them, if there is a ``copy`` in a remote lakehouse."""

    def __init__(self, checkpoint: Path, copy: CheckpointCopy | None = None) -> None:
        self.copy = copy
        self._checkpoint = checkpoint
        self._synced: set[Path] = set()

    def before_start(self) -> None:
        """Bring the copy back and set torn files aside. Raises TableCorruptionError if an ended batch needs a torn file."""
        if self.copy is not None:
            self.copy.bring_back()
        set_aside_torn(self._checkpoint)

    def before_commit(self) -> None:
        """Sync or copy what Spark has written since the last call. To be called in each batch before its first commit.

        Raises LeaseLostError if another machine has copied another plan of the batch.
        """
        if self.copy is not None:
            self.copy.add_new()
            return
        folders = [self._checkpoint, *(self._checkpoint / name for name in ("offsets", "commits", "sources/0", "sources"))]
        new = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
        new = [path for path in new if path not in self._synced and not path.name.endswith(disk.TEMPORARY_ENDING)]
        disk.sync_files(new)
        for folder in {path.parent for path in new}:
            disk.sync_folder(folder)
        if not self._synced:
            disk.sync_new_folders([folder for folder in folders if folder.is_dir()], self._checkpoint.parent.parent)
        self._synced.update(new)


def read_query_id(checkpoint: Path) -> str:
    """Return the id of the query of a checkpoint. Raises TableCorruptionError if it cannot be read."""
    path = checkpoint / "metadata"
    try:
        return str(json.loads(path.read_text("utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableCorruptionError(f"{path} does not name the query: {error}", hint=_HINT) from None


def read_state(checkpoint: Path) -> CheckpointState | None:
    """Return the state of a checkpoint; None if it has no query yet. Raises TableCorruptionError if its id cannot be read."""
    if not (checkpoint / "metadata").exists():
        return None
    query_id = read_query_id(checkpoint)
    planned, ended = (max(numbers(checkpoint / part), default=-1) for part in ("offsets", "commits"))
    return CheckpointState(query_id, planned, ended)


def set_aside_torn(checkpoint: Path) -> list[str]:
    """Set aside and log torn files; Spark plans their batches again. Raises TableCorruptionError if an ended batch needs one."""
    metadata, offsets, commits, lists = (checkpoint / name for name in ("metadata", "offsets", "commits", "sources/0"))
    torn_commits = list(_torn_tail(commits))
    ended = max((int(path.name) for path in _numbered(commits) if path not in torn_commits), default=-1)
    has_metadata = metadata.exists() and _is_whole(metadata)
    torn_metadata = [metadata] if metadata.exists() and not has_metadata else []
    torn_lists = [*_torn_tail(lists), *(path for path in lists.glob("*.compact") if not _is_whole(path))]
    torn_offsets = list(_torn_tail(offsets))
    planned = [path for path in _numbered(offsets) if int(path.name) > ended and path not in torn_offsets]
    # Spark plans these batches again
    torn_offsets += [path for path in planned if not has_metadata or any(_needs(path, one) for one in torn_lists)]
    needed = [path for path in torn_offsets if int(path.name) <= ended]
    if ended >= 0:
        needed += [*(one for one in torn_lists if _needs(offsets / str(ended), one)), *([] if has_metadata else [metadata])]
    if needed:
        raise TableCorruptionError(f"{needed[0]} cannot be read, and batch {ended} that needs it has ended", hint=_HINT)
    lines = []
    for path in (*torn_commits, *torn_metadata, *torn_lists, *torn_offsets):
        disk.replace(path, path.with_name(f".torn-{path.name}-{time.time_ns()}"))
        path.with_name(f".{path.name}.crc").unlink(missing_ok=True)
        lines.append(f"{path} was torn by a power cut and set aside; its batch is planned or ended again")
        _log.warning("adtally: %s", lines[-1])
    for folder in (checkpoint, offsets, commits, lists):
        for path in folder.glob(".*.crc"):
            if not path.stat().st_size:  # Spark reads a file without checksum as it is
                path.unlink()
    return lines


def _needs(offset: Path, file_list: Path) -> bool:
    """Return whether a planned batch reads the files in a list of the source's log."""
    try:
        last = json.loads(offset.read_text("utf-8").splitlines()[2])["logOffset"]
        return int(file_list.name.removesuffix(".compact")) <= int(last)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return True  # a topic, whose first offsets are in list 0, or a missing offset


def _numbered(folder: Path) -> list[Path]:
    """Return the numbered files of a folder, the newest first."""
    return [folder / str(number) for number in sorted(numbers(folder), reverse=True)]


def _torn_tail(folder: Path) -> Iterator[Path]:
    return takewhile(lambda path: not _is_whole(path), _numbered(folder))


def _is_whole(path: Path) -> bool:
    """Return whether a file has the form that Spark writes: a version, then JSON or "-" per line; ``metadata`` is only JSON."""
    try:
        lines = path.read_text("utf-8").lstrip("\0").splitlines()
        if path.name != "metadata" and lines.pop(0) != "v1":
            return False
        return bool(lines or path.suffix == ".compact") and all(line == "-" or isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, IndexError):
        return False
