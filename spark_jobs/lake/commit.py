"""Makes commits to Delta tables durable, each once per transaction.

delta-rs syncs nothing: after a power cut a commit, or a data file that it names, may be empty. So `committing` syncs the data files
and their folders before the commit, and the commit before the job continues (with the next table, the ledger, Spark's
``commits/N``). Files that delta-rs writes itself (a merge, a compaction) are synced right after its commit; ``lake/torn.py`` rolls
such a commit back if a power cut comes between. An object store needs no sync.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from deltalake import CommitProperties, DeltaTable
from deltalake import Transaction as AppTransaction
from deltalake.exceptions import DeltaError

from spark_jobs import disk
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.roots import local_path
from spark_jobs.steps import Step, crash_point, durable

WRITE_ERRORS = (DeltaError, OSError)
"""The errors of a commit that fails, apart from TableCorruptionError."""

_synced: dict[str, int] = {}  # table -> the newest version that this process knows to be on the disk


@dataclass(frozen=True)
class Transaction:
    """The identity of a write: the id of the streaming query (from its checkpoint) and the batch id.

    A commit stores it as Delta's transaction identifier (txn). A table skips a write that it has seen, so a batch that runs again
    writes nothing twice. A new checkpoint has a new query id, so its writes are never skipped.
    """

    query_id: str
    batch_id: int


def has_seen(held: DeltaTable, transaction: Transaction) -> bool:
    """Return whether a table has the write of a transaction."""
    last = held.transaction_version(transaction.query_id)
    return last is not None and last >= transaction.batch_id


def commit_properties(
    metadata: Mapping[str, object] | None, transaction: Transaction | None = None, info: Mapping[str, str] | None = None
) -> CommitProperties:
    """Return the user metadata (JSON), the transaction and further entries of the commitInfo in delta-rs' form."""
    custom = dict(info or {})
    if metadata is not None:
        custom["userMetadata"] = json.dumps(metadata)
    return CommitProperties(
        custom_metadata=custom or None,
        app_transactions=None if transaction is None else [AppTransaction(transaction.query_id, transaction.batch_id)],
    )


@contextmanager
def committing(
    uri: str, held: DeltaTable, step: Step, batch_id: int = 0, *, files: Sequence[DataFile] | None = None
) -> Iterator[None]:
    """Make the commit of the block durable. The block commits through delta-rs to the table at ``uri``, on the version of ``held``.

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
    """Sync the commits after version ``base`` of a table; with ``data`` also the data files that they add."""
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
    for commit in found:  # in order, so that no commit is on the disk before the previous one
        disk.sync_file(commit)
    checkpoints = [path for commit in found for path in log.glob(f"{commit.stem}.checkpoint*.parquet")]
    if checkpoints:
        disk.sync_files([*checkpoints, *log.glob("_last_checkpoint")])
    disk.sync_folder(log)
    _synced[str(root)] = base + len(found)


def _sync_base(root: Path, base: int) -> None:
    """Sync the version before a commit, if another process made it and may not have synced it. Raises TableCorruptionError."""
    if base > _synced.get(str(root), -1):
        log = DeltaLog(str(root))
        if log.commit(base) is not None:  # raises if the commit is torn: delta-rs would build on it
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
