"""Corrections: rows that a repair, a backfill or a review adds to and removes from Delta tables.

A run writes and syncs a whole correction under ``corrections_path`` before its first commit, and removes it after the last one.
Each table changes in one commit, once (Delta's txn has the correction's token), so the next process finishes a killed correction.
The manifest has a checksum of each part. A correction that a power cut tore before its first commit is discarded. Callers hold the
rewrite lock and the write locks of the streams.
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

# In the order of the commits: the ledger makes a batch complete; the reasons come last. The column finds a row to remove.
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
    """Rows to remove from a table and rows to add to it, with all of its columns. Equal rows count as often as they occur.

    ``by_key``: ``remove`` has only the key and the partition columns, and every row with one of these keys in one of these
    partitions is removed. Use it for rows that come back with other values: a change of `events` by key adds and removes no key.
    """

    table: Table
    remove: pa.Table
    add: pa.Table
    metadata: dict[str, Any] = field(default_factory=dict)
    by_key: bool = False

    @classmethod
    def append(cls, table: Table, rows: pa.Table | list[dict[str, Any]]) -> TableChange:
        """Return a change that only adds rows."""
        add = pa.Table.from_pylist(rows, table.schema) if isinstance(rows, list) else rows
        return cls(table, table.schema.empty_table(), add)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to commit. The plan of a batch needs a commit even if no row was accepted."""
        return not self.remove.num_rows and not self.add.num_rows and "files" not in self.metadata


@dataclass(frozen=True)
class Correction:
    """The changes that a run decided on for some hours.

    ``token`` names the correction in the transactions of the tables. The run decided on versions ``events_version`` of `events` and
    ``orders_version`` of `orders` (None: the correction does not change the table).
    """

    token: str
    run_id: str
    events_version: int | None
    changes: list[TableChange]
    orders_version: int | None = None


def write_ahead(settings: Settings, correction: Correction) -> None:
    """Write a whole correction to its folder. It is decided once the folder has its final name."""
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
    """Yield the decided corrections that still have commits to make, and remove folders that were never decided.

    Raises TableCorruptionError if a correction was damaged after its first commit.
    """
    for folder in sorted(settings.corrections_path.glob("*"), key=lambda path: path.stat().st_mtime_ns):
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
    """Remove a correction that cannot be read. Raises TableCorruptionError if a table has a commit of it."""
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
    """Read a correction. Raises OSError, ValueError, KeyError, TypeError or ArrowException if it is incomplete or damaged."""
    manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
    for name, checksum in manifest.get("parts", {}).items():
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{name} is not what was written")
    changes = []
    for name, metadata, *by_key in manifest["changes"]:
        remove, add = (pq.read_table(folder / f"{name}.{part}.parquet") for part in ("remove", "add"))
        changes.append(TableChange(TABLES[name], remove, add, metadata, *by_key))
    return Correction(manifest["token"], manifest["run_id"], manifest["events_version"], changes, manifest.get("orders_version"))


def is_outdated(settings: Settings, correction: Correction) -> bool:
    """Return whether a run must decide again: `events` (or `orders`) has newer versions and no commit of the correction.

    Somebody may have sent a record again that the correction would add, and the ingest may have accepted it. Once the events or
    orders of a correction are committed, the rest stays right, because it only concerns batches that have ended.
    """
    lake = Lake(settings)
    changed = [change.table for change in correction.changes]
    return any(
        table in changed and lake.version(table) != version and not lake.has(table, Transaction(correction.token, 0))
        for table, version in ((EVENTS, correction.events_version), (ORDERS, correction.orders_version))
    )


def remove_correction(settings: Settings, correction: Correction) -> None:
    """Remove the folder of a correction that is done or outdated."""
    folder = settings.corrections_path / correction.token
    hidden = folder.with_name(f".{folder.name}.tmp")
    with durable(Step.CORRECTION_DONE):
        disk.replace(folder, hidden)
    shutil.rmtree(hidden)


def carry_out(settings: Settings, correction: Correction) -> None:
    """Make the missing commits of a correction, in order, and remove its folder."""
    changes = {change.table.name: change for change in correction.changes}
    for name, (step, key) in _ORDER.items():
        if name in changes:
            _commit(Lake(settings), changes[name], step, correction.token, key)
    remove_correction(settings, correction)


def append_once(settings: Settings, table: Table, rows: list[dict[str, Any]], step: Step, token: str) -> None:
    """Add rows to a table, once per token."""
    _commit(Lake(settings), TableChange.append(table, rows), step, token, "")


def _commit(lake: Lake, change: TableChange, step: Step, token: str, key: str) -> None:
    table, transaction = change.table, Transaction(token, 0)
    if change.is_empty or lake.has(table, transaction):
        return
    snapshot = lake.pin(table)
    removed: list[TableFile] = []
    rewritten: list[DataFile] = []
    for file, masks in _find_rows(snapshot, change, key):
        removed.append(file)
        with lake.writer(table) as writer:
            for rows, mask in zip(lake.read_file_rows(table, file), masks, strict=True):
                writer.write(rows.filter(pc.invert(mask)))
        rewritten += writer.files
    with lake.writer(table) as writer:
        writer.write(change.add)
    # The files with the changed rows, and those of them that may have keys which the table did not have.
    changed = [file.path for file in writer.files]
    metadata = {**change.metadata, "changed_files": changed, "added_files": [] if change.by_key else changed}
    add = [*rewritten, *writer.files]
    base = snapshot.version(table)
    lake.commit(table, step, base=base, add=add, remove=removed, transaction=transaction, metadata=metadata)


def _find_rows(snapshot: Snapshot, change: TableChange, key: str) -> Iterator[tuple[TableFile, list[pa.Array]]]:
    """Yield each data file with rows to remove, and masks of these rows, one per part of the file. Ignores rows in no file."""
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
        wanted = Counter(map(_row_text, parts))
    keys = pc.unique(remove[key].combine_chunks())
    partitions = {tuple(row[name] for name in table.partition_by) for row in parts}

    def mark(rows: pa.Table) -> pa.Array:
        has_key = pc.is_in(rows[key].combine_chunks(), value_set=keys)
        if change.by_key:
            return has_key
        marked = [False] * rows.num_rows
        for at in pc.indices_nonzero(has_key).to_pylist():
            row = _row_text(rows.slice(at, 1).to_pylist()[0])
            marked[at] = wanted[row] > 0
            wanted[row] -= 1
        return pa.array(marked, pa.bool_())

    for file in snapshot.files(table):
        if tuple(file.values[name] for name in table.partition_by) in partitions:
            masks = [mark(rows) for rows in snapshot.lake.read_file_rows(table, file)]
            if any(pc.any(mask).as_py() for mask in masks):
                yield file, masks


def _row_text(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str)
