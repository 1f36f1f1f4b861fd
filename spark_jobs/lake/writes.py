"""Creates the tables, upgrades those of an older adtally, and commits the ingest's batches (docs/decisions/0003)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
from deltalake import DeltaTable, Schema

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.lake.commit import WRITE_ERRORS, Attempts, Transaction, committing, has_seen, sync_commits
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locations import is_local
from spark_jobs.lake.locks import REWRITE, exclusive
from spark_jobs.lake.log import RETYPED_KEY
from spark_jobs.lake.reading import open_table, table_files
from spark_jobs.lake.store import delta_options
from spark_jobs.lake.tables import ORDERS, TABLES, Table
from spark_jobs.lake.torn import mend_tables
from spark_jobs.steps import Step


def ensure_tables(settings: Settings) -> None:
    """Create missing tables, and add missing columns and types to tables of an older adtally.

    First sets aside torn last commits. Safe to run again. Takes the rewrite lock to rewrite the rows of a table with other types.
    Raises TableCorruptionError if a log is damaged otherwise.
    """
    mend_tables(settings)
    lake = Lake(settings)
    for table in TABLES.values():
        uri = lake.uri(table)
        if lake.exists(table):
            if _has_other_types(_add_columns(uri, table), table):
                with exclusive(settings, REWRITE):
                    _change_types(lake, table)
            continue
        if is_local(uri):
            disk.make_folder(f"{uri}/_delta_log")
        try:
            DeltaTable.create(
                uri,
                Schema.from_arrow(table.schema),
                mode="ignore",
                partition_by=list(table.partition_by),
                storage_options=delta_options(uri),
                description=table.grain,
                configuration={"delta.dataSkippingStatsColumns": ",".join(table.stats_columns)},
            )
        except WRITE_ERRORS:
            if not lake.exists(table):  # another process was faster, or the answer of the store was lost
                raise
        sync_commits(uri, -1)


def _add_columns(uri: str, table: Table) -> DeltaTable:
    """Return the table with all columns of the registry."""
    tries = Attempts()
    while True:
        held = open_table(uri)
        known = {field.name for field in held.schema().fields}
        missing = [field for field in Schema.from_arrow(table.schema).fields if field.name not in known]
        if not missing:
            return held
        base = int(held.version())
        try:
            held.alter.add_columns(missing)
        except WRITE_ERRORS as error:  # another process may have been faster, or the answer of the store was lost
            tries.wait_or_raise(error)
        sync_commits(uri, base)


def _has_other_types(held: DeltaTable, table: Table) -> bool:
    types = {field.name: field.type for field in held.schema().fields}
    return any(types[field.name] != field.type for field in Schema.from_arrow(table.schema).fields)


def _change_types(lake: Lake, table: Table) -> None:
    """Rewrite the rows of a table with the types of the registry, in one commit. Earlier versions stay as they were.

    delta-rs takes a new schema only with an overwrite, and marks the removed files as a change of data. RETYPED_KEY in the commit
    tells readers of the log that no row has changed.
    """
    held = open_table(lake.uri(table))
    if not _has_other_types(held, table):  # another process has changed them while this one waited for the lock
        return
    with lake.writer(table) as writer:
        for file in table_files(held):
            for rows in lake.read_file_rows(table, file):
                writer.write(rows)
    lake.commit(
        table,
        Step.TYPES_CHANGED,
        base=int(held.version()),
        add=writer.files,
        info={RETYPED_KEY: "true"},
        changes_rows=False,
        mode="overwrite",
        schema=table.schema,
    )


class DeltaSink:
    """Commits batches to one table, each once per transaction."""

    def __init__(self, table: Table, settings: Settings) -> None:
        self.table = table
        self._lake = Lake(settings)
        self.uri = self._lake.uri(table)

    def has(self, transaction: Transaction) -> bool:
        """Return whether the table has the write of a transaction."""
        return self._lake.has(self.table, transaction)

    def append(
        self, files: Sequence[DataFile], step: Step, transaction: Transaction, metadata: Mapping[str, object] | None = None
    ) -> None:
        """Add written files. ``metadata`` goes into the commit as JSON (userMetadata)."""
        self._lake.commit(self.table, step, add=files, transaction=transaction, metadata=metadata)

    def write(self, rows: pa.Table) -> list[DataFile]:
        """Write rows as data files, for `append`."""
        with self._lake.writer(self.table) as writer:
            writer.write(rows)
        return writer.files

    def append_rows(self, rows: pa.Table, step: Step, transaction: Transaction) -> None:
        """Write rows as data files and add them."""
        self._lake.append(self.table, rows, step, transaction=transaction)


def merge_orders(rows: pa.Table, settings: Settings, transaction: Transaction, metadata: Mapping[str, object]) -> None:
    """Insert new orders and replace known ones by order_id, once per transaction.

    Tries again if a compaction was committed meanwhile: it leaves the same orders in other files.
    """
    uri = settings.table_uri(ORDERS.name)
    tries = Attempts()
    while True:
        held = open_table(uri)
        if has_seen(uri, held, transaction):
            return
        try:
            with committing(
                uri, held, Step.ORDERS, transaction.batch_id, transaction=transaction, metadata=metadata, tries=tries
            ) as properties:
                if not rows.num_rows:  # the commit carries the batch's plan, even without orders
                    held.create_write_transaction([], mode="append", schema=held.schema(), commit_properties=properties)
                else:
                    (
                        held.merge(
                            rows.select(ORDERS.schema.names),
                            predicate="known.order_id = new.order_id",
                            source_alias="new",
                            target_alias="known",
                            commit_properties=properties,
                        )
                        .when_matched_update_all()
                        .when_not_matched_insert_all()
                        .execute()
                    )
            return
        except WRITE_ERRORS as error:
            tries.wait_or_raise(error)
