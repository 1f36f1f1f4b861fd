"""Corrections: rows that a repair, a backfill or a review adds to and removes from Delta tables.

A run writes a whole correction to ``<state_uri>/corrections`` before its first commit, and removes it after the last one. Each
table changes in one commit, once (Delta's txn has the correction's token), so the next process finishes a killed correction.
The manifest has a checksum of each part. A correction that a power cut tore before its first commit is discarded. Callers hold the
rewrite lock and the write locks of the streams.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.failure import one_line
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.lake import Lake, Snapshot
from spark_jobs.lake.places import Place, open_place
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
_DONE = b"{}"  # the manifest of a finished correction
_THREADS = 8
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
    ``orders_version`` of `orders` (None: the correction does not change the table). ``act`` is its entry in the audit log
    (`acts.act_info`); its last commit carries it.
    """

    token: str
    run_id: str
    events_version: int | None
    changes: list[TableChange]
    orders_version: int | None = None
    act: dict[str, str] = field(default_factory=dict)


def write_ahead(settings: Settings, correction: Correction) -> None:
    """Write a whole correction. It is decided once its manifest is there."""
    place, token = _place(settings), correction.token
    tables = [
        (f"{change.table.name}.{part}.parquet", rows)
        for change in correction.changes
        for part, rows in (("remove", change.remove), ("add", change.add))
    ]

    def write(part: tuple[str, pa.Table]) -> tuple[str, str]:
        name, rows = part
        buffer = io.BytesIO()
        pq.write_table(rows, buffer)
        place.write(f"{token}/{name}", buffer.getvalue())
        return name, _checksum(buffer.getvalue())

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="write-ahead") as pool:
        parts = dict(pool.map(write, tables))
    manifest = {
        "token": correction.token,
        "run_id": correction.run_id,
        "events_version": correction.events_version,
        "orders_version": correction.orders_version,
        "changes": [[change.table.name, change.metadata, change.by_key] for change in correction.changes],
        "parts": parts,
        "act": correction.act,
    }
    with durable(Step.CORRECTION_DECIDED):
        place.write(f"{token}/{_MANIFEST}", json.dumps(manifest).encode())


def decided_corrections(settings: Settings) -> list[str]:
    """Return the tokens of the corrections that are decided and not finished, the oldest first."""
    place = _place(settings)
    found = [file for file in place.list() if file.name.endswith(f"/{_MANIFEST}") and not file.name.startswith(".")]
    tokens = [file.name.split("/")[0] for file in sorted(found, key=lambda file: file.modified)]
    return [token for token in tokens if not _is_done(place, token)]


def _is_done(place: Place, token: str) -> bool:
    try:
        return place.read(f"{token}/{_MANIFEST}") == _DONE
    except FileNotFoundError:
        return True  # another process has just removed it


def has_unfinished(settings: Settings) -> bool:
    """Return whether there is a correction to finish or to discard."""
    return any(True for _ in _place(settings).list())


def unfinished_corrections(settings: Settings) -> Iterator[Correction]:
    """Yield the decided corrections that still have commits to make. Removes the rest of others: of a run killed before it decided.

    Raises TableCorruptionError if a correction was damaged after its first commit.
    """
    place = _place(settings)
    decided = decided_corrections(settings)
    for token in {file.name.split("/")[0] for file in place.list()}.difference(decided):
        if token.startswith(".") or place.find(f"{token}/{_MANIFEST}") is not None:
            place.delete_folder(token)  # of an older adtally, or finished
        else:
            _discard(settings, token, "it has no manifest")
    for token in decided:
        try:
            correction = _read(place.below(token))
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            _discard(settings, token, one_line(error, 200))
            continue
        yield correction


def _place(settings: Settings) -> Place:
    """Return where corrections are kept: in ADTALLY_HOME, or in a remote lakehouse, where any machine can finish them."""
    return open_place(settings.state_uri).below("corrections")


def _discard(settings: Settings, token: str, problem: str) -> None:
    """Remove a correction that cannot be read. Raises TableCorruptionError if a table has a commit of it."""
    lake, place = Lake(settings), _place(settings)
    begun = [name for name in _ORDER if lake.has(TABLES[name], Transaction(token, 0))]
    if begun:
        raise TableCorruptionError(
            f"the correction {place.uri}/{token} cannot be read ({problem}), and {', '.join(begun)} has its changes",
            hint="remove the folder, then `adtally reconcile --repair` does the rest; docs/runbooks/power-cut.md",
        )
    if place.find(f"{token}/{_MANIFEST}") is not None:
        _log.warning("adtally: correction %s was torn by a power cut before its first commit and is discarded", token)
    place.delete_folder(token)


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(place: Place) -> Correction:
    """Read a correction. Raises OSError, ValueError, KeyError, TypeError or ArrowException if it is incomplete or damaged."""
    manifest = json.loads(place.read(_MANIFEST))
    checksums = manifest.get("parts", {})

    def rows(name: str) -> pa.Table:
        data = place.read(name)
        if name in checksums and _checksum(data) != checksums[name]:
            raise ValueError(f"{name} is not what was written")
        return pq.read_table(pa.BufferReader(data))

    changes = []
    for name, metadata, *by_key in manifest["changes"]:
        remove, add = (rows(f"{name}.{part}.parquet") for part in ("remove", "add"))
        changes.append(TableChange(TABLES[name], remove, add, metadata, *by_key))
    return Correction(
        manifest["token"],
        manifest["run_id"],
        manifest["events_version"],
        changes,
        orders_version=manifest.get("orders_version"),
        act=manifest.get("act", {}),
    )


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
    """Remove a correction that is finished, or that a run must decide again."""
    place, token = _place(settings), correction.token
    with durable(Step.CORRECTION_DONE):
        place.write(f"{token}/{_MANIFEST}", _DONE)  # from here on the rest only waits for its removal
    names = [file.name for file in place.list(token)]
    place.delete(sorted(names, key=f"{token}/{_MANIFEST}".__eq__))  # the manifest last


def carry_out(settings: Settings, correction: Correction) -> None:
    """Make the missing commits of a correction, in order, and remove its folder."""
    lake = Lake(settings)
    changes = {change.table.name: change for change in correction.changes if not change.is_empty}
    last = next((name for name in reversed(_ORDER) if name in changes), "")
    for name, (step, key) in _ORDER.items():
        if name in changes:
            _commit(lake, changes[name], step, correction.token, key, correction.act if name == last else None)
    remove_correction(settings, correction)


def append_once(settings: Settings, table: Table, rows: list[dict[str, Any]], step: Step, token: str) -> None:
    """Add rows to a table, once per token."""
    _commit(Lake(settings), TableChange.append(table, rows), step, token, "")


def _commit(lake: Lake, change: TableChange, step: Step, token: str, key: str, info: dict[str, str] | None = None) -> None:
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
    base = snapshot.version(table) if removed else None
    lake.commit(table, step, base=base, add=add, remove=removed, transaction=transaction, metadata=metadata, info=info)


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

    columns = [(name, {values[at] for values in partitions}) for at, name in enumerate(table.partition_by)]
    chosen = [(name, set(map(str, values))) for name, values in columns if None not in values]
    for file in snapshot.files(table, *chosen):
        if tuple(file.values[name] for name in table.partition_by) in partitions:
            masks = [mark(rows) for rows in snapshot.lake.read_file_rows(table, file)]
            if any(pc.any(mask).as_py() for mask in masks):
                yield file, masks


def _row_text(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str)
