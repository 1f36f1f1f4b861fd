"""Idempotent Delta commits. Nothing else in the package changes a table.

Tasks write data files (``data_files``); the driver commits them here through delta-rs, which takes milliseconds where a
commit through Spark takes about a second (docs/decisions/0003).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, write_deltalake
from deltalake import Transaction as AppTransaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from spark_jobs.config import Settings
from spark_jobs.delta_log import DeltaLog
from spark_jobs.sinks.data_files import DataFile, DataFileWriter
from spark_jobs.steps import Step, durable
from spark_jobs.tables import CAMPAIGNS, ORDERS, TABLES, Table

_MERGE_ATTEMPTS = 5


@dataclass(frozen=True)
class Transaction:
    """A write's identity: the streaming query's id (it lives in the checkpoint) and the batch id.

    It stands in the commit as Delta's own transaction identifier (txn). A write whose batch the table has seen for the query is
    skipped. So a batch that runs again writes nothing twice, and a fresh checkpoint, having a fresh id, is never skipped.
    """

    query_id: str
    batch_id: int


def ensure_tables(settings: Settings) -> None:
    """Create the tables that do not exist yet and add the columns that an older adtally did not know. Safe to run again."""
    for table in TABLES.values():
        uri = settings.table_uri(table.name)
        if DeltaLog(uri).exists():
            _add_columns(uri, table)
            continue
        DeltaTable.create(
            uri,
            Schema.from_arrow(table.schema),
            mode="ignore",
            partition_by=list(table.partition_by),
            description=table.grain,
            configuration={"delta.dataSkippingStatsColumns": ",".join(table.stats_columns)},
        )


def _add_columns(uri: str, table: Table) -> None:
    held = DeltaTable(uri)
    known = {field.name for field in held.schema().fields}
    missing = [field for field in Schema.from_arrow(table.schema).fields if field.name not in known]
    if missing:
        held.alter.add_columns(missing)


class DeltaSink:
    """Commits of transactions to one table; keeps the table's snapshot between them."""

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

    def append(
        self,
        files: Sequence[DataFile],
        step: Step,
        transaction: Transaction,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Add written files, once per transaction. ``metadata`` goes into the commit as JSON (userMetadata)."""
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(f.path, f.size, f.partition, now, data_change=True, stats=f.stats) for f in files
        ]
        with durable(step, transaction.batch_id):
            held = self._snapshot()
            if has_seen(held, transaction):
                return
            held.create_write_transaction(
                actions,
                mode="append",
                schema=held.schema(),
                partition_by=list(self.table.partition_by),
                commit_properties=commit_properties(metadata, transaction),
            )

    def append_rows(self, rows: pa.Table, step: Step, transaction: Transaction) -> None:
        """Write rows that are at hand as files, and add them, once per transaction."""
        with DataFileWriter(self.uri, self.table) as writer:
            writer.write(rows)
        self.append(writer.files, step, transaction)


def merge_orders(rows: pa.Table, settings: Settings, transaction: Transaction, metadata: Mapping[str, object]) -> None:
    """Insert new orders and replace known ones by order_id, once per transaction.

    Where a compaction put files together meanwhile, the merge is made again on what it left: the same orders in other files.
    """
    uri = settings.table_uri(ORDERS.name)
    properties = commit_properties(metadata, transaction)
    with durable(Step.ORDERS, transaction.batch_id):
        for attempts_left in reversed(range(_MERGE_ATTEMPTS)):
            held = DeltaTable(uri)
            if has_seen(held, transaction):
                return
            if not rows.num_rows:  # the plan has to stand in a commit all the same
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


def replace_campaigns(rows: pa.Table, settings: Settings, metadata: Mapping[str, object]) -> None:
    """Replace the whole content of `campaigns` in one commit."""
    with durable(Step.CAMPAIGNS):
        write_deltalake(
            settings.table_uri(CAMPAIGNS.name),
            rows.select(CAMPAIGNS.schema.names),
            mode="overwrite",
            commit_properties=commit_properties(metadata),
        )


def append_decision(table: Table, rows: pa.Table, settings: Settings, step: Step) -> None:
    """Add an operator's decision to a table of such."""
    with durable(step):
        write_deltalake(settings.table_uri(table.name), rows, mode="append")


def has_seen(held: DeltaTable, transaction: Transaction) -> bool:
    """Whether a table has the write of a transaction."""
    last = held.transaction_version(transaction.query_id)
    return last is not None and last >= transaction.batch_id


def commit_properties(metadata: Mapping[str, object] | None, transaction: Transaction | None = None) -> CommitProperties:
    """User metadata (JSON) and the transaction, as delta-rs takes them."""
    return CommitProperties(
        custom_metadata=None if metadata is None else {"userMetadata": json.dumps(metadata)},
        app_transactions=None if transaction is None else [AppTransaction(transaction.query_id, transaction.batch_id)],
    )
