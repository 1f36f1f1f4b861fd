"""Creating the tables, upgrading those of an older adtally, and the commits of the ingest's batches.

Tasks write data files (``data_files``); the driver commits them through delta-rs, which takes milliseconds where a commit
through Spark takes about a second (docs/decisions/0003). Everyone else commits through `Lake`. All commits are made durable by
``commit.committing``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.lake.commit import Transaction, commit_files, commit_properties, committing, has_seen, sync_commits, write_files
from spark_jobs.lake.data_files import DataFile, DataFileWriter
from spark_jobs.lake.locks import REWRITE, exclusive
from spark_jobs.lake.log import RETYPED_KEY, DeltaLog
from spark_jobs.lake.reading import read_file_rows, table_files
from spark_jobs.lake.roots import is_local
from spark_jobs.lake.tables import ORDERS, TABLES, Table
from spark_jobs.lake.torn import mend_tables
from spark_jobs.steps import Step

_MERGE_ATTEMPTS = 5


def ensure_tables(settings: Settings) -> None:
    """Create the tables that do not exist yet; give those of an older adtally the columns and types that they lack.

    Sets aside first what a power cut left of a last commit. Safe to run again. Takes the rewrite lock if it has to write the rows
    of a table again with other types. Raises TableCorruptionError if a log is damaged otherwise.
    """
    mend_tables(settings)
    for table in TABLES.values():
        uri = settings.table_uri(table.name)
        if DeltaLog(uri).exists():
            _add_columns(uri, table)
            if _has_other_types(DeltaTable(uri), table):
                with exclusive(settings, REWRITE):
                    _change_types(uri, table)
            continue
        if is_local(uri):
            disk.make_folder(f"{uri}/_delta_log")
        DeltaTable.create(
            uri,
            Schema.from_arrow(table.schema),
            mode="ignore",
            partition_by=list(table.partition_by),
            description=table.grain,
            configuration={"delta.dataSkippingStatsColumns": ",".join(table.stats_columns)},
        )
        sync_commits(uri, -1)


def _add_columns(uri: str, table: Table) -> None:
    held = DeltaTable(uri)
    known = {field.name for field in held.schema().fields}
    missing = [field for field in Schema.from_arrow(table.schema).fields if field.name not in known]
    if missing:
        base = int(held.version())
        held.alter.add_columns(missing)
        sync_commits(uri, base)


def _has_other_types(held: DeltaTable, table: Table) -> bool:
    types = {field.name: field.type for field in held.schema().fields}
    return any(types[field.name] != field.type for field in Schema.from_arrow(table.schema).fields)


def _change_types(uri: str, table: Table) -> None:
    """Write the rows of a table again with the types of the registry, in one commit. Earlier versions stay as they were.

    delta-rs takes a new schema only with an overwrite, and marks what that removes as a change of data. RETYPED_KEY in the commit
    tells the readers of the log that no row has changed.
    """
    held = DeltaTable(uri)
    if not _has_other_types(held, table):  # another process has done it, while this one waited for the lock
        return
    with DataFileWriter(uri, table) as writer:
        for file in table_files(held):
            for rows in read_file_rows(uri, table, file):
                writer.write(rows)
    commit_files(
        held,
        uri,
        table,
        Step.TYPES_CHANGED,
        add=writer.files,
        changes_rows=False,
        info={RETYPED_KEY: "true"},
        mode="overwrite",
        schema=table.schema,
    )


class DeltaSink:
    """Commits batches to one table. Keeps the table open between them, so that a commit reads only the log's new entries."""

    def __init__(self, table: Table, settings: Settings) -> None:
        self.table = table
        self.uri = settings.table_uri(table.name)
        self._held: DeltaTable | None = None

    def _snapshot(self) -> DeltaTable:
        if self._held is None:
            self._held = DeltaTable(self.uri)
        else:
            self._held.update_incremental()
        return self._held

    def has(self, transaction: Transaction) -> bool:
        """Whether the table has the write of a transaction."""
        return has_seen(self._snapshot(), transaction)

    def append(
        self,
        files: Sequence[DataFile],
        step: Step,
        transaction: Transaction,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Add written files, once per transaction. ``metadata`` goes into the commit as JSON (userMetadata)."""
        commit_files(self._snapshot(), self.uri, self.table, step, add=files, transaction=transaction, metadata=metadata)

    def append_rows(self, rows: pa.Table, step: Step, transaction: Transaction) -> None:
        """Write rows as data files, and add these, once per transaction."""
        self.append(write_files(self.uri, self.table, rows), step, transaction)


def merge_orders(rows: pa.Table, settings: Settings, transaction: Transaction, metadata: Mapping[str, object]) -> None:
    """Insert new orders and replace known ones by order_id, once per transaction.

    Tries again if a compaction was committed meanwhile: it leaves the same orders in other files.
    """
    uri = settings.table_uri(ORDERS.name)
    properties = commit_properties(metadata, transaction)
    for attempts_left in reversed(range(_MERGE_ATTEMPTS)):
        held = DeltaTable(uri)
        if has_seen(held, transaction):
            return
        with committing(uri, held, Step.ORDERS, transaction.batch_id):
            if not rows.num_rows:  # the commit carries the batch's plan, even without orders
                held.create_write_transaction([], mode="append", schema=held.schema(), commit_properties=properties)
                return
            merge = (
                held.merge(
                    rows.select(ORDERS.schema.names),
                    predicate="known.order_id = new.order_id",
                    source_alias="new",
                    target_alias="known",
                    commit_properties=properties,
                )
                .when_matched_update_all()
                .when_not_matched_insert_all()
            )
            try:
                merge.execute()
                return
            except CommitFailedError:
                if not attempts_left:
                    raise
