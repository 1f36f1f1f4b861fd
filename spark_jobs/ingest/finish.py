"""Find batches whose landing files changed after their first commit, and finish them without the files.

Such a batch cannot run again: it would reject and skip other records than it was planned with. Its accepted records are in their
table, so what is derived from them is written. Of the other records, the batch counts those that it committed before it was killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.batch import COUNTS, Plan
from spark_jobs.ingest.durable_checkpoint import read_query_id
from spark_jobs.ingest.event_columns import increment_columns, increments
from spark_jobs.ingest.files.fingerprint import file_states
from spark_jobs.ingest.files.landing import relative_name
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import WRITE_LOCKS, exclusive
from spark_jobs.lake.log import Commit, DeltaLog
from spark_jobs.lake.reading import read_files
from spark_jobs.lake.stamp import Stamp, stamped, stamped_records
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, MINUTE_METRICS, ORDERS, REJECTED_TABLES, STREAMS
from spark_jobs.lake.writes import DeltaSink
from spark_jobs.steps import Step
from spark_jobs.units import floor_hour, from_micros, to_micros

_TABLES = {"events": EVENTS, "orders": ORDERS}
_LEDGER_STEPS = {"events": Step.EVENTS_LEDGER, "orders": Step.ORDERS_LEDGER}


RegionHour = tuple[str, datetime | None]
"""A region and an event hour (None: the records had no readable time)."""


@dataclass(frozen=True)
class StuckBatch:
    """An incomplete batch of a stream, its first commit, and the names of its files that are not what they were."""

    stream: str
    commit: Commit
    changed: list[str]

    @property
    def plan(self) -> Plan:
        """What the batch was planned with."""
        return Plan.from_commit(self.commit)

    @property
    def transaction(self) -> Transaction:
        """The batch's identity."""
        assert self.commit.txn is not None  # stuck_batches found the commit by it
        return Transaction(*self.commit.txn)


def stuck_batches(settings: Settings) -> Iterator[StuckBatch]:
    """Find the batches that no ingest can finish because a landing file changed or vanished."""
    ledger = DeltaSink(BATCH_LEDGER, settings)
    for stream in STREAMS:
        query_id = _query_id(settings, stream)
        log = DeltaLog(settings.table_uri(_TABLES[stream].name))
        newest = next((c for c in log.commits_backwards() if c.txn and c.txn[0] == query_id), None) if query_id else None
        if newest is None or newest.txn is None or ledger.has(Transaction(*newest.txn)):
            continue
        plan = Plan.from_commit(newest)
        changed_files = plan.changed_files(file_states(file.path for file in plan.files))
        changed = [relative_name(file.path, settings.landing_path) for file in changed_files]
        if changed:
            yield StuckBatch(stream, newest, changed)


def _query_id(settings: Settings, stream: str) -> str | None:
    with suppress(TableCorruptionError):
        return read_query_id(settings.checkpoints_path / stream)
    return None


def finish(settings: Settings, batch: StuckBatch) -> None:
    """Complete a batch from its accepted records: write their increments and their rows of the ledger, each once."""
    transaction, stamp = batch.transaction, Stamp(*_identity(batch), batch.plan.limits.ingested_us)
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
        nothing = dict.fromkeys((*COUNTS, "invalid_traffic", "unpriced", "spend_nanos"), 0)
        lines = [
            {"stream": batch.stream, "source": "files", "region": region, "event_hour": hour, **nothing, **counts}
            for (region, hour), counts in cells.items()
        ] or [{"stream": batch.stream, "source": "files", **nothing}]
        ledger = stamped_records(lines, BATCH_LEDGER, stamp)
        DeltaSink(BATCH_LEDGER, settings).append_rows(ledger, _LEDGER_STEPS[batch.stream], transaction)


def _identity(batch: StuckBatch) -> tuple[str, int]:
    return batch.transaction.query_id, batch.transaction.batch_id


def _events(settings: Settings, commit: Commit) -> pa.Table:
    """Read the events that a commit added, with event_time in microseconds."""
    schema = pa.schema([field for field in EVENTS.schema if field.name not in EVENTS.partition_by])
    rows = read_files(settings.table_uri(EVENTS.name), [action["path"] for action in commit.data_added], schema)
    micros = rows["event_time"].cast(pa.int64())
    return rows.set_column(rows.schema.get_field_index("event_time"), "event_time", micros)


def _cells_of_events(rows: pa.Table) -> dict[RegionHour, dict[str, Any]]:
    names = ("region", "event_time", "received_at", "is_late", "invalid_traffic_rule", "billing_model", "spend_nanos")
    cells: dict[RegionHour, dict[str, Any]] = {}
    for row in rows.select(names).to_pylist():
        counts = cells.setdefault((row["region"], floor_hour(from_micros(row["event_time"]))), Counter())
        counts["offered"] += 1
        counts["accepted"] += 1
        counts["late"] += bool(row["is_late"])
        counts["invalid_traffic"] += row["invalid_traffic_rule"] is not None
        counts["unpriced"] += row["billing_model"] is None
        counts["spend_nanos"] += int(row["spend_nanos"])
        counts["max_received_at"] = max(row["received_at"], counts["max_received_at"] or row["received_at"])
    return cells


def _cells_of_orders(settings: Settings, commit: Commit) -> dict[RegionHour, dict[str, Any]]:
    """Count the records behind a commit of orders, whose rows say whether `placed` and `cancelled` have come."""
    before, after = (_orders(settings, version) for version in (commit.version - 1, commit.version))
    cells: dict[RegionHour, dict[str, Any]] = {}
    for order_id, row in after.items():
        accepted = _records(row) - _records(before.get(order_id))
        if accepted:
            counts = cells.setdefault((row["region"], floor_hour(from_micros(to_micros(row["order_time"])))), Counter())
            counts["offered"] += accepted
            counts["accepted"] += accepted
            counts["late"] += bool(row["is_late"])
            counts["max_received_at"] = max(row["received_at"], counts["max_received_at"] or row["received_at"])
    return cells


def _count_rejects(settings: Settings, batch: StuckBatch, cells: dict[RegionHour, dict[str, Any]]) -> None:
    """Add the rejected and conflicting records that the batch committed, if it did."""
    query_id, batch_id = _identity(batch)
    table = REJECTED_TABLES[batch.stream]
    names = ("outcome", "region", "record_time", "records", "_batch_id", "_query_id")
    found = Lake(settings).pin(table).rows(table, *names, where_in=("_query_id", pa.array([query_id])))
    for row in found.to_pylist():
        if row["_batch_id"] == batch_id:
            hour = None if row["record_time"] is None else floor_hour(from_micros(to_micros(row["record_time"])))
            counts = cells.setdefault((row["region"], hour), Counter())
            records = row["records"] or 1
            counts["offered"] += records
            counts["conflict" if row["outcome"] == "conflict" else "rejected"] += records


def _orders(settings: Settings, version: int) -> dict[str, dict[str, Any]]:
    return {row["order_id"]: row for row in Lake(settings).at({ORDERS.name: version}).rows(ORDERS).to_pylist()}


def _records(order: dict[str, Any] | None) -> int:
    return 0 if order is None else bool(order["has_placed"]) + (order["cancelled_at"] is not None)
