"""Corrections: rows that a repair, a backfill or a review adds to and removes from Delta tables, written ahead of the commits.

A correction is written whole and synced under ``corrections_path`` before the first of its commits, and removed after the last one.
Each of its tables changes in one commit, once (Delta's txn has the correction's own token), so the next process finishes a
correction that was killed. The manifest has a checksum of each part: a correction that a power cut left incomplete, before any of
its commits, is discarded. Callers hold the rewrite lock and the write locks of the streams.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.failure import one_line
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.lake import Lake, Snapshot
from spark_jobs.lake.reading import TableFile
from spark_jobs.lake.tables import (
    BATCH_LEDGER,
    EVENTS,
    HOUR_RULES,
    MINUTE_METRICS,
    ORDERS,
    RECONCILIATIONS,
    REJECTED_EVENTS,
    REJECTED_ORDERS,
    RESTATEMENTS,
    TABLES,
    TRAFFIC_REVIEWS,
    Table,
)
from spark_jobs.steps import Step, durable

# In the order of the commits: the ledger makes a batch complete, what says why comes last. With the column that finds a row.
_ORDER: dict[str, tuple[Step, str]] = {
    EVENTS.name: (Step.CORRECTED_EVENTS, "event_id"),
    REJECTED_EVENTS.name: (Step.CORRECTED_REJECTS, "source_file"),
    MINUTE_METRICS.name: (Step.CORRECTED_METRICS, "record_uuid"),
    ORDERS.name: (Step.CORRECTED_ORDERS, "order_id"),
    REJECTED_ORDERS.name: (Step.CORRECTED_ORDER_REJECTS, "source_file"),
    BATCH_LEDGER.name: (Step.CORRECTED_LEDGER, "_query_id"),
    RESTATEMENTS.name: (Step.RESTATEMENTS, "run_id"),
    HOUR_RULES.name: (Step.HOUR_RULES, "run_id"),
    TRAFFIC_REVIEWS.name: (Step.TRAFFIC_REVIEWS, "run_id"),
    RECONCILIATIONS.name: (Step.RECONCILIATIONS, "run_id"),
}
_MANIFEST = "manifest.json"
_log = logging.getLogger("adtally")


@dataclass(frozen=True)
class TableChange:
    """Rows to take out of a table and to put in: all its columns, each row as often as it is meant.

    ``by_key``: ``remove`` has the key and the partition columns only, and all rows go that have one of these keys in one of these
    partitions. For rows that are put back with other values: of `events`, no key comes or goes by it.
    """

    table: Table
    remove: pa.Table
    add: pa.Table
    metadata: dict[str, Any] = field(default_factory=dict)
    by_key: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether there is nothing to do. The plan of a batch has to stand in a commit though no row was accepted."""
        return not self.remove.num_rows and not self.add.num_rows and "files" not in self.metadata


@dataclass(frozen=True)
class Correction:
    """What a run decided for some hours.

    ``token`` names it in the transactions of the tables; ``events_version`` and ``orders_version`` are the versions of `events` and
    `orders` that it was decided on (None: it does not change the table).
    """

    token: str
    run_id: str
    events_version: int | None
    changes: list[TableChange]
    orders_version: int | None = None


def write_ahead(settings: Settings, correction: Correction) -> None:
    """Put the whole correction down; it counts from the moment that its folder has its name."""
    folder = settings.corrections_path / correction.token
    hidden = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    disk.make_folder(hidden)
    parts: dict[str, str] = {}
    for change in correction.changes:
        for part, rows in (("remove", change.remove), ("add", change.add)):
            path = hidden / f"{change.table.name}.{part}.parquet"
            pq.write_table(rows, path)
            parts[path.name] = _checksum(path)
    disk.sync_files(hidden / name for name in parts)
    manifest = {
        "token": correction.token,
        "run_id": correction.run_id,
        "events_version": correction.events_version,
        "orders_version": correction.orders_version,
        "changes": [[change.table.name, change.metadata, change.by_key] for change in correction.changes],
        "parts": parts,
    }
    disk.write_file(hidden / _MANIFEST, json.dumps(manifest).encode())  # which syncs the folder, too
    with durable(Step.CORRECTION_DECIDED):
        disk.replace(hidden, folder)


def unfinished_corrections(settings: Settings) -> Iterator[Correction]:
    """Corrections that were decided and not carried out to the end. What was never decided whole is removed.

    Raises TableCorruptionError if one was damaged after the first of its commits.
    """
    if not settings.corrections_path.exists():
        return
    for folder in sorted(settings.corrections_path.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        if folder.name.startswith("."):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            correction = _read(folder)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            _discard(settings, folder, error)
            continue
        yield correction


def _discard(settings: Settings, folder: Path, error: Exception) -> None:
    """Remove a correction that cannot be read, if no table has a commit of it: it was never decided whole."""
    lake = Lake(settings)
    begun = [name for name in _ORDER if lake.has(TABLES[name], Transaction(folder.name, 0))]
    if begun:
        raise TableCorruptionError(
            f"the correction {folder} cannot be read ({one_line(error, 200)}), and {', '.join(begun)} has its changes",
            hint="remove the folder, then `adtally reconcile --repair` does the rest; docs/runbooks/power-cut.md",
        )
    _log.warning("adtally: correction %s was torn by a power cut before its first commit and is discarded", folder.name)
    shutil.rmtree(folder)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(folder: Path) -> Correction:
    """A correction. Raises OSError, ValueError, KeyError, TypeError or ArrowException if it is not there whole."""
    manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
    for name, checksum in manifest.get("parts", {}).items():
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{name} is not what was written")
    changes = []
    for name, metadata, *by_key in manifest["changes"]:
        remove, add = (pq.read_table(folder / f"{name}.{part}.parquet") for part in ("remove", "add"))
        changes.append(TableChange(TABLES[name], remove, add, metadata, *by_key))
    return Correction(manifest["token"], manifest["run_id"], manifest["events_version"], changes, manifest.get("orders_version"))


def is_overtaken(settings: Settings, correction: Correction) -> bool:
    """Whether a correction has no commit yet and `events` (or `orders`) has newer versions: then it must be decided again.

    A record that it would add may have been sent again and accepted meanwhile. Once its events or orders are committed, the rest
    of it stays right, for it only concerns batches that have ended.
    """
    lake = Lake(settings)
    changed = [change.table for change in correction.changes]
    return any(
        table in changed and lake.version(table) != version and not lake.has(table, Transaction(correction.token, 0))
        for table, version in ((EVENTS, correction.events_version), (ORDERS, correction.orders_version))
    )


def forget(settings: Settings, correction: Correction) -> None:
    """Remove a correction that is done or overtaken."""
    folder = settings.corrections_path / correction.token
    with durable(Step.CORRECTION_DONE):
        disk.replace(folder, folder.with_name(f".{folder.name}.tmp"))
    shutil.rmtree(folder.with_name(f".{folder.name}.tmp"))


def carry_out(settings: Settings, correction: Correction) -> None:
    """Make the missing commits of a correction, in order, and remove it."""
    changes = {change.table.name: change for change in correction.changes}
    for name, (step, key) in _ORDER.items():
        if name in changes:
            _commit(Lake(settings), changes[name], step, Transaction(correction.token, 0), key)
    forget(settings, correction)


def append_once(settings: Settings, table: Table, rows: pa.Table, step: Step, token: str) -> None:
    """Add rows to a table, once per token."""
    _commit(Lake(settings), TableChange(table, table.schema.empty_table(), rows), step, Transaction(token, 0), "")


def _commit(lake: Lake, change: TableChange, step: Step, transaction: Transaction, key: str) -> None:
    table = change.table
    if change.is_nothing or lake.has(table, transaction):
        return
    snapshot = lake.pin(table)
    removed: list[TableFile] = []
    rewritten: list[DataFile] = []
    for file in _files_with(snapshot, change, key):
        removed.append(file.entry)
        with lake.writer(table) as writer:
            for batch in file.without_rows():
                writer.write(batch)
        rewritten += writer.files
    with lake.writer(table) as writer:
        writer.write(change.add)
    # The files with the changed rows, and those of them that may have keys which the table did not have.
    changed = [file.path for file in writer.files]
    metadata = {**change.metadata, "changed_files": changed, "added_files": [] if change.by_key else changed}
    lake.commit(
        table,
        step,
        base=snapshot.version(table),
        add=[*rewritten, *writer.files],
        remove=removed,
        transaction=transaction,
        metadata=metadata,
    )


class _File:
    """A data file, some of whose rows are to be removed."""

    def __init__(self, lake: Lake, table: Table, entry: TableFile) -> None:
        self.entry = entry
        self._lake = lake
        self._table = table
        self._going: list[pa.Array] = []

    def find(self, wanted: Counter[str], keys: pa.Array, key: str) -> bool:
        """Mark the rows of ``wanted`` that this file has, and take them out of ``wanted``."""
        found = False
        for batch in self._batches():
            going = [False] * batch.num_rows
            for at in pc.indices_nonzero(pc.is_in(batch[key], value_set=keys)).to_pylist():
                row = _row_text(batch.slice(at, 1).to_pylist()[0])
                if wanted[row] > 0:
                    wanted[row] -= 1
                    going[at] = found = True
            self._going.append(pa.array(going))
        return found

    def find_keys(self, keys: pa.Array, key: str) -> bool:
        """Mark the rows that have one of ``keys``."""
        self._going = [pc.is_in(batch[key].combine_chunks(), value_set=keys) for batch in self._batches()]
        return any(pc.any(going).as_py() for going in self._going)

    def without_rows(self) -> Iterator[pa.Table]:
        """The rows that stay."""
        for batch, going in zip(self._batches(), self._going, strict=True):
            yield batch.filter(pc.invert(going))

    def _batches(self) -> Iterator[pa.Table]:
        return self._lake.read_file_rows(self._table, self.entry)


def _files_with(snapshot: Snapshot, change: TableChange, key: str) -> Iterator[_File]:
    """The data files with rows that are to be removed. Ignores a row that no file has any more."""
    table, remove = change.table, change.remove
    if not remove.num_rows:
        return
    if change.by_key:
        (key,) = table.key
        parts = remove.group_by(list(table.partition_by)).aggregate([]).to_pylist()
        wanted: Counter[str] = Counter()
    else:
        remove = remove.select(table.schema.names).cast(table.schema)
        parts = remove.to_pylist()
        wanted = Counter(_row_text(row) for row in parts)
    keys = pc.unique(remove[key].combine_chunks())
    partitions = {tuple(row[name] for name in table.partition_by) for row in parts}
    for entry in snapshot.files(table):
        if tuple(entry.values[name] for name in table.partition_by) in partitions:
            file = _File(snapshot.lake, table, entry)
            if file.find_keys(keys, key) if change.by_key else file.find(wanted, keys, key):
                yield file


def _row_text(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str)
