"""Makes commits to Delta tables durable, each once per transaction.

delta-rs syncs nothing: after a power cut a commit, or a data file that it names, may be empty. So `committing` syncs the data files
and their folders before the commit, and the commit before the job continues (with the next table, the ledger, Spark's
``commits/N``). Files that delta-rs writes itself (a merge, a compaction) are synced right after its commit; ``lake/torn.py`` rolls
such a commit back if a power cut comes between. An object store needs no sync.

A commit to an object store may fail though it took effect, because the answer was lost. So each commit has a nonce: if it fails,
the commits after its base are searched for the nonce.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from deltalake import CommitProperties, DeltaTable
from deltalake import Transaction as AppTransaction
from deltalake.exceptions import CommitFailedError, DeltaError

from spark_jobs import disk
from spark_jobs.errors import StoreError
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.failures import translate_store_errors
from spark_jobs.lake.fencing import fences, mark_leases_dirty
from spark_jobs.lake.leases import Lease
from spark_jobs.lake.locations import local_path
from spark_jobs.lake.log import NONCE_KEY, DeltaLog, note_commit
from spark_jobs.lake.reading import open_table
from spark_jobs.lake.tables import TABLES
from spark_jobs.lake.transactions import newest_transaction, note_transactions
from spark_jobs.steps import Step, crash_point, durable

WRITE_ERRORS = (DeltaError, OSError, StoreError)
"""The errors of a commit that fails, apart from TableCorruptionError."""

_ATTEMPTS = 60  # of a commit, while other writers are faster
_ATTEMPTS_AFTER_FAILURE = 3  # of a commit, while the store fails: delta-rs has repeated each request already
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.02, 0.2
_FENCERS = 8  # tables fenced at once
_synced: dict[str, int] = {}  # table -> the newest version that this process knows to be on the disk


@dataclass(frozen=True)
class Transaction:
    """The identity of a write: the id of the streaming query (from its checkpoint) and the batch id.

    A commit stores it as Delta's transaction identifier (txn). A table skips a write that it has seen, so a batch that runs again
    writes nothing twice. A new checkpoint has a new query id, so its writes are never skipped.
    """

    query_id: str
    batch_id: int


def has_seen(uri: str, held: DeltaTable, transaction: Transaction) -> bool:
    """Return whether the table at ``uri``, opened as ``held``, has the write of a transaction."""
    last = newest_transaction(uri, held, transaction.query_id)
    return last is not None and last >= transaction.batch_id


@contextmanager
def committing(
    uri: str,
    held: DeltaTable,
    step: Step,
    batch_id: int = 0,
    *,
    files: Sequence[DataFile] | None = None,
    transaction: Transaction | None = None,
    metadata: Mapping[str, object] | None = None,
    info: Mapping[str, str] | None = None,
    rebases: bool = True,
    tries: Attempts | None = None,
) -> Iterator[CommitProperties]:
    """Make the commit of the block durable. The block commits through delta-rs to the table at ``uri``, on the version of ``held``.

    Yields what delta-rs is to write into the commit: the transaction, the fences of the leases that this process holds,
    ``metadata`` as JSON in userMetadata, ``info`` and a nonce in the commitInfo. ``files`` are the data files of the commit,
    written and synced by DataFileWriter. None: delta-rs writes the files itself. ``rebases`` False: the commit is refused if it is
    not the next version. ``tries``: the commit may be attempted again.

    An error of the block is ignored if the commit took effect. Raises LeaseLostError if another process has taken over a lease.
    """
    base = int(held.version())
    root = local_path(uri)
    tries = tries or Attempts()
    tries.begin(base)
    custom: dict[str, Any] = {**(info or {}), NONCE_KEY: tries.nonce}
    if metadata is not None:
        custom["userMetadata"] = json.dumps(metadata)
    transactions = fences(uri, held) | ({} if transaction is None else {transaction.query_id: transaction.batch_id})
    properties = CommitProperties(
        custom_metadata=custom,
        app_transactions=[AppTransaction(*one) for one in transactions.items()] or None,
        max_commit_retries=None if rebases else 0,
    )
    with durable(step, batch_id):
        if root is not None:
            _sync_base(root, base)
            if files:
                disk.sync_new_folders({(root / unquote(file.path)).parent for file in files}, root)
        try:
            with translate_store_errors("commit to", uri):
                yield properties
        except WRITE_ERRORS as error:
            if isinstance(error, StoreError):  # the commit may still take effect, after this process has released its leases
                mark_leases_dirty(uri)
            try:
                if not tries.took_effect(uri):
                    raise
            except StoreError:
                raise error from None
        crash_point("amid", step, batch_id)
        if root is None:
            made = max(base + 1, int(held.version()))  # if the list lags, delta-rs does not see its own commit
            note_commit(uri, made)
            note_transactions(uri, base, made, transactions)
        else:
            sync_commits(uri, base, data=files is None)


class Attempts:
    """The attempts of one commit. They have one nonce, so an attempt that took effect late is not made twice.

    tries = Attempts()
    while not tries.took_effect(uri):
        held = ...
        try:
            with committing(..., tries=tries) as properties:
                ...
            break
        except WRITE_ERRORS as error:
            tries.wait_or_raise(error)
    """

    def __init__(self) -> None:
        self.nonce = uuid.uuid4().hex
        self._base: int | None = None  # of the first attempt
        self._conflicts = 0
        self._failures = 0

    def begin(self, base: int) -> None:
        """Note the version on which an attempt builds."""
        self._base = base if self._base is None else min(base, self._base)

    def took_effect(self, uri: str) -> bool:
        """Return whether an attempt is in the log of the table at ``uri``."""
        if self._base is None:
            return False
        log, version = DeltaLog(uri), self._base + 1
        while (commit := log.commit(version)) is not None:
            if commit.info.get(NONCE_KEY) == self.nonce:
                return True
            version += 1
        return False

    def wait_or_raise(self, error: Exception, *, conflicts: bool = True) -> None:
        """Wait before the next attempt, or raise the error of the last one if another cannot help.

        ``conflicts`` False: another writer's commit makes this one wrong. After an error of the store the commit may still take
        effect.
        """
        if isinstance(error, CommitFailedError):
            self._conflicts += 1
            if not conflicts or self._conflicts == _ATTEMPTS:
                raise error
        else:
            self._failures += 1
            if not (isinstance(error, StoreError) and error.retryable) or self._failures == _ATTEMPTS_AFTER_FAILURE:
                raise error
        time.sleep(min(_PAUSE_SECONDS * self._conflicts, _LONGEST_PAUSE_SECONDS))


def commit_fence(lease: Lease) -> None:
    """Commit the token of a lease to every table that exists, so that no commit of an earlier holder takes effect any more.

    Raises LeaseLostError if the lease has been taken over meanwhile.
    """
    with ThreadPoolExecutor(_FENCERS, thread_name_prefix="fence") as pool:
        list(pool.map(_fence, [f"{lease.lakehouse}/{name}" for name in TABLES]))


def _fence(uri: str) -> None:
    if not DeltaLog(uri).exists():
        return
    tries = Attempts()
    while not tries.took_effect(uri):
        held = open_table(uri)
        try:
            with committing(uri, held, Step.FENCES, files=(), rebases=False, tries=tries) as properties:
                held.create_write_transaction([], mode="append", schema=held.schema(), commit_properties=properties)
            break
        except WRITE_ERRORS as error:
            tries.wait_or_raise(error)


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
