"""Find batches whose landing files changed after their first commit, and finish them without the files.

Such a batch cannot run again: it would reject and skip other records than planned. Its accepted records are in their table, and
this module writes what derives from them. Of the other records, the batch counts those that it committed before it was killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.batch import COUNTS, Plan
from spark_jobs.ingest.durable_checkpoint import read_query_id
from spark_jobs.ingest.event_columns import increment_columns, increments
from spark_jobs.ingest.files.landing import file_states, relative_name
from spark_jobs.ingest.source import FilesSource
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import WRITE_LOCKS, exclusive
from spark_jobs.lake.log import Commit, DeltaLog
from spark_jobs.lake.reading import read_files
from spark_jobs.lake.stamp import Stamp, stamped, stamped_records
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, MINUTE_METRICS, ORDERS, REJECTED_TABLES, STREAMS
from spark_jobs.lake.writes import DeltaSink
from spark_jobs.steps import Step
from spark_jobs.units import floor_hour, from_micros

RegionHour = tuple[str, datetime | None]
"""A region and an event hour (None: the records had no readable time)."""
Cells = dict[RegionHour, dict[str, Any]]
"""The counts of the ledger's columns, by region and hour."""


@dataclass(frozen=True)
class StuckBatch:
    """An incomplete batch of a stream, its first commit, and the names of its files that changed or vanished."""

    stream: str
    commit: Commit
    transaction: Transaction
    plan: Plan
    changed: list[str]


def stuck_batches(settings: Settings) -> Iterator[StuckBatch]:
    """Find the batches that no ingest can finish because a landing file changed or vanished."""
    ledger = DeltaSink(BATCH_LEDGER, settings)
    for stream in STREAMS:
        try:
            query_id = read_query_id(checkpoints_to_read(settings) / stream)
        except TableCorruptionError:
            continue
        log = DeltaLog(settings.table_uri(stream))
        newest = next((commit for commit in log.commits_backwards() if commit.txn and commit.txn[0] == query_id), None)
        if newest is None or newest.txn is None or ledger.has(transaction := Transaction(*newest.txn)):
            continue
        plan = Plan.from_commit(newest, FilesSource(settings, stream).place)
        changed = plan.changed_files(file_states(plan.files))
        if changed:
            names = [relative_name(file.path, settings.landing_uri) for file in changed]
            yield StuckBatch(stream, newest, transaction, plan, names)


def finish(settings: Settings, batch: StuckBatch) -> None:
    """Complete a batch from its accepted records: write their increments and their rows of the ledger, each once."""
    transaction = batch.transaction
    stamp = Stamp(transaction.query_id, transaction.batch_id, batch.plan.limits.ingested_us)
    with exclusive(settings, WRITE_LOCKS[batch.stream]):
        if batch.stream == "events":
            rows = _events(settings, batch.commit)
            sums = increments(rows)
            metrics = stamped(increment_columns(sums, stamp.query_id, stamp.batch_id), MINUTE_METRICS, stamp)
            DeltaSink(MINUTE_METRICS, settings).append_rows(metrics, Step.MINUTE_METRICS, transaction)
            cells = _cells_of_events(rows)
        else:
            cells = _cells_of_orders(settings, batch.commit)
        _count_rejects(settings, batch, cells)
        nothing: dict[str, Any] = dict.fromkeys((*COUNTS, "invalid_traffic", "unpriced", "spend_nanos"), 0)
        nothing |= {"stream": batch.stream, "source": "files"}
        lines = [{"region": region, "event_hour": hour, **nothing, **counts} for (region, hour), counts in cells.items()]
        ledger = stamped_records(lines or [nothing], BATCH_LEDGER, stamp)
        DeltaSink(BATCH_LEDGER, settings).append_rows(ledger, Step(f"{batch.stream}_ledger"), transaction)


def _events(settings: Settings, commit: Commit) -> pa.Table:
    """Read the events that a commit added, with event_time in microseconds."""
    schema = pa.schema([field for field in EVENTS.schema if field.name not in EVENTS.partition_by])
    rows = read_files(settings.table_uri(EVENTS.name), [action["path"] for action in commit.data_added], schema)
    micros = rows["event_time"].cast(pa.int64())
    return rows.set_column(rows.schema.get_field_index("event_time"), "event_time", micros)


def _cells_of_events(rows: pa.Table) -> Cells:
    names = ("region", "event_time", "received_at", "is_late", "invalid_traffic_rule", "billing_model", "spend_nanos")
    cells: Cells = {}
    for row in rows.select(names).to_pylist():
        counts = _count_accepted(cells, row, from_micros(row["event_time"]), 1)
        counts["invalid_traffic"] += row["invalid_traffic_rule"] is not None
        counts["unpriced"] += row["billing_model"] is None
        counts["spend_nanos"] += int(row["spend_nanos"])
    return cells


def _cells_of_orders(settings: Settings, commit: Commit) -> Cells:
    """Count the accepted records of a commit of orders: a row has an accepted `placed`, an accepted `cancelled` record, or both."""
    before, after = (_orders(settings, version) for version in (commit.version - 1, commit.version))
    cells: Cells = {}
    for order_id, row in after.items():
        accepted = _records(row) - _records(before.get(order_id))
        if accepted:
            _count_accepted(cells, row, row["order_time"], accepted)
    return cells


def _count_accepted(cells: Cells, row: dict[str, Any], at: datetime, records: int) -> dict[str, Any]:
    counts = cells.setdefault((row["region"], floor_hour(at)), Counter())
    counts["offered"] += records
    counts["accepted"] += records
    counts["late"] += bool(row["is_late"])
    counts["max_received_at"] = max(row["received_at"], counts["max_received_at"] or row["received_at"])
    return counts


def _count_rejects(settings: Settings, batch: StuckBatch, cells: Cells) -> None:
    """Add the rejected and conflicting records that the batch committed, if it did."""
    table = REJECTED_TABLES[batch.stream]
    names = ("outcome", "region", "record_time", "records", "_batch_id", "_query_id")
    own_query = ("_query_id", pa.array([batch.transaction.query_id]))
    for row in Lake(settings).pin(table).rows(table, *names, where_in=own_query).to_pylist():
        if row["_batch_id"] == batch.transaction.batch_id:
            hour = None if row["record_time"] is None else floor_hour(row["record_time"])
            counts = cells.setdefault((row["region"], hour), Counter())
            records = row["records"] or 1
            counts["offered"] += records
            counts["conflict" if row["outcome"] == "conflict" else "rejected"] += records


def _orders(settings: Settings, version: int) -> dict[str, dict[str, Any]]:
    return {row["order_id"]: row for row in Lake(settings).at({ORDERS.name: version}).rows(ORDERS).to_pylist()}


def _records(order: dict[str, Any] | None) -> int:
    return 0 if order is None else bool(order["has_placed"]) + (order["cancelled_at"] is not None)
