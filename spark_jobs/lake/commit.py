"""Commits to Delta tables: `commit_files` makes those of files that we wrote, `committing` makes every commit durable.

A commit counts from the moment that its file is in the log, and delta-rs syncs nothing: after a power cut a commit, or a data
file that it names, may be empty. So the data files and their folders are synced before the commit, and the commit before anybody
continues (with the next table, the ledger, Spark's ``commits/N``). Files that delta-rs writes itself (a merge, a compaction) are
synced right after its commit; ``lake/torn.py`` rolls such a commit back if a power cut comes between.

An object store keeps what it has acknowledged, so there is nothing to sync.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake import Transaction as AppTransaction
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, RemoveAction

from spark_jobs import disk
from spark_jobs.lake.data_files import DataFile, DataFileWriter
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.reading import TableFile
from spark_jobs.lake.roots import local_path
from spark_jobs.lake.tables import Table
from spark_jobs.steps import Step, crash_point, durable

WRITE_ERRORS = (DeltaError, OSError)
"""What a commit raises that could not be made, apart from TableCorruptionError."""

_synced: dict[str, int] = {}  # table -> the newest version that this process knows to be on the disk


@dataclass(frozen=True)
class Transaction:
    """The identity of a write: the streaming query's id (it is in the checkpoint) and the batch id.

    A commit stores it as Delta's transaction identifier (txn). A table that has seen the batch of the query skips the write, so a
    batch that runs again writes nothing twice, and a fresh checkpoint, which has a fresh id, is never skipped.
    """

    query_id: str
    batch_id: int


def has_seen(held: DeltaTable, transaction: Transaction) -> bool:
    """Whether a table has the write of a transaction."""
    last = held.transaction_version(transaction.query_id)
    return last is not None and last >= transaction.batch_id


def commit_files(
    held: DeltaTable,
    uri: str,
    table: Table,
    step: Step,
    *,
    add: Sequence[DataFile] = (),
    remove: Iterable[TableFile] = (),
    restore: Iterable[TableFile] = (),
    changes_rows: bool = True,
    transaction: Transaction | None = None,
    metadata: Mapping[str, object] | None = None,
    info: Mapping[str, str] | None = None,
    mode: Literal["append", "overwrite"] = "append",
    schema: pa.Schema | None = None,
    batch_id: int | None = None,
) -> bool:
    """Make one commit, based on the snapshot ``held``; returns whether it was made: not if the table has seen ``transaction``.

    ``add`` are files that DataFileWriter wrote, ``remove`` files of the table, ``restore`` files of an earlier version.
    ``changes_rows`` False: the commit only moves rows between files. ``mode`` overwrite removes all files that the table has.
    ``metadata`` becomes the user metadata as JSON, ``info`` further entries of the commitInfo. ``schema`` replaces the table's.
    ``batch_id``, by default the transaction's, names the step for crash tests.
    """
    if transaction is not None and has_seen(held, transaction):
        return False
    now = int(time.time() * 1000)
    actions: list[AddAction | RemoveAction] = [
        RemoveAction(file.path, changes_rows, now, file.size, file.partition) for file in remove
    ]
    actions += [
        AddAction(file.path, file.size, file.partition, now, data_change=changes_rows, stats=json.dumps({"numRecords": file.rows}))
        for file in restore
    ]
    actions += [AddAction(file.path, file.size, file.partition, now, data_change=changes_rows, stats=file.stats) for file in add]
    if batch_id is None:
        batch_id = transaction.batch_id if transaction else 0
    with committing(uri, held, step, batch_id, files=add):
        held.create_write_transaction(
            actions,
            mode=mode,
            schema=held.schema() if schema is None else Schema.from_arrow(schema),
            partition_by=list(table.partition_by),
            commit_properties=commit_properties(metadata, transaction, info),
        )
    return True


def commit_properties(
    metadata: Mapping[str, object] | None, transaction: Transaction | None = None, info: Mapping[str, str] | None = None
) -> CommitProperties:
    """The user metadata (JSON), the transaction and further entries of the commitInfo, as delta-rs takes them."""
    custom = dict(info or {})
    if metadata is not None:
        custom["userMetadata"] = json.dumps(metadata)
    return CommitProperties(
        custom_metadata=custom or None,
        app_transactions=None if transaction is None else [AppTransaction(transaction.query_id, transaction.batch_id)],
    )


def write_files(uri: str, table: Table, rows: pa.Table) -> list[DataFile]:
    """Write rows as data files of a table. They count for nothing until a commit names them."""
    with DataFileWriter(uri, table) as writer:
        writer.write(rows)
    return writer.files


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
