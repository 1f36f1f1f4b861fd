"""Durable commits: every commit to a Delta table is made inside ``with committing(...)``.

A commit counts from the moment that its file is in the log, and delta-rs syncs nothing: after a power cut a commit, or a data
file that it names, may be empty. So the data files and their folders are synced before the commit, and the commit before anybody
goes on (to the next table, the ledger, Spark's ``commits/N``). Files that delta-rs writes itself (a merge, a compaction) are synced
right after its commit; ``lake/torn.py`` rolls such a commit back if a power cut comes between.

An object store keeps what it has acknowledged, so there is nothing to sync.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from deltalake import DeltaTable

from spark_jobs import disk
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.roots import local_path
from spark_jobs.steps import Step, crash_point, durable

_synced: dict[str, int] = {}  # table -> the newest version that this process knows to be on the disk


@contextmanager
def committing(
    uri: str, held: DeltaTable, step: Step, batch_id: int = 0, *, files: Sequence[DataFile] | None = None
) -> Iterator[None]:
    """Make one durable commit to the table at ``uri``; the block makes it through delta-rs, based on the snapshot ``held``.

    ``files`` are the data files of the commit, written and synced by DataFileWriter. None: delta-rs writes the files itself.
    """
    base = int(held.version())
    root = local_path(uri)
    with durable(step, batch_id):
        if root is not None:
            _sync_base(root, base)
            if files:
                disk.sync_new_folders({(root / unquote(file.path)).parent for file in files}, root)
        yield
        crash_point("amid", step, batch_id)
        if root is not None:
            sync_commits(uri, base, data=files is None)


def sync_commits(uri: str, base: int, *, data: bool = True) -> None:
    """Write the commits after version ``base`` of a table through to the disk; with ``data`` the data files that they add, too."""
    root = local_path(uri)
    if root is None:
        return
    log = root / "_delta_log"
    found: list[Path] = []
    while (commit := log / f"{base + len(found) + 1:020d}.json").exists():
        found.append(commit)
    if not found:
        return
    if data:
        _sync_data(uri, root, range(base + 1, base + 1 + len(found)))
    for commit in found:  # in order, so that no commit is on the disk before the one that it follows
        disk.sync_file(commit)
    checkpoints = [path for commit in found for path in log.glob(f"{commit.stem}.checkpoint*.parquet")]
    if checkpoints:
        disk.sync_files([*checkpoints, *log.glob("_last_checkpoint")])
    disk.sync_folder(log)
    _synced[str(root)] = base + len(found)


def _sync_base(root: Path, base: int) -> None:
    """Sync the version that a commit follows, if another process made it and may not have synced it yet.

    Raises TableCorruptionError if it is torn.
    """
    if base > _synced.get(str(root), -1):
        log = DeltaLog(str(root))
        if log.commit(base) is not None:  # raises if it is torn: delta-rs would build on it
            disk.sync_file(log.commit_path(base))
        disk.sync_folder(root / "_delta_log")
        _synced[str(root)] = base


def _sync_data(uri: str, root: Path, versions: range) -> None:
    log = DeltaLog(uri)
    paths = [root / unquote(action["path"]) for version in versions if (made := log.commit(version)) for action in made.added]
    there = [path for path in paths if path.exists()]  # a compaction may have been taken back, and its files vacuumed
    disk.sync_files(there)
    if there:
        disk.sync_new_folders({path.parent for path in there}, root)
