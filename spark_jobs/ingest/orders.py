"""Run the stream of orders. They are few, so the driver settles them row by row and merges them, whatever order they arrive in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from spark_jobs.ingest.batch import Batch
from spark_jobs.ingest.contract.spec import ORDER_CONTRACT
from spark_jobs.ingest.dedupe.classify import Classification, Outcome
from spark_jobs.ingest.stage import staged
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.ingest.write import Written
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.stamp import stamped_records
from spark_jobs.lake.tables import ORDERS
from spark_jobs.lake.writes import merge_orders
from spark_jobs.units import to_micros

_FIELDS = [spec.name for spec in ORDER_CONTRACT.fields]
_SHARED = [spec.name for spec in ORDER_CONTRACT.payload if spec.name not in (ORDER_CONTRACT.time_field, "status")]
"""The fields that are the same in all records of an order."""
_PLACED_FIELDS = [name for name in _FIELDS if name not in (ORDER_CONTRACT.id_field, "status", *_SHARED)]
"""The other fields of an order, which its `placed` record sets."""


@dataclass(frozen=True)
class SettledOrders(Classification):
    """The outcome of each record, and ``changed``: the rows to merge, by order_id."""

    changed: list[dict[str, Any]]


class OrdersJob(StreamJob[SettledOrders]):
    """Orders."""

    stream = "orders"

    def classify(self, batch: Batch) -> SettledOrders:
        """See StreamJob."""
        records: list[dict[str, Any]] = []
        for task, first in zip(batch.tasks, batch.first_lines, strict=True):
            for table in staged(task, "rows", *self.references(batch.plan)):
                rows = table.to_pylist()
                records += [{**row, "source_file": task.split.name, "source_line": row["n"] + first} for row in rows]
        return settle_orders(records, self._known(sorted({r["order_id"] for r in records}), batch.history_version))

    def _known(self, ids: list[str], version: int) -> dict[str, dict[str, Any]]:
        """Return the rows of some orders at a version of the table."""
        if not ids:
            return {}
        found = Lake(self.settings).at({ORDERS.name: version}).rows(ORDERS, where_in=("order_id", pa.array(ids)))
        return {row["order_id"]: row for row in found.to_pylist()}

    def contradictions(
        self, batch: Batch, classified: SettledOrders, written: list[Written], ledger: list[dict[str, Any]]
    ) -> Iterator[str]:
        """See StreamJob: orders that are merged already must be as they would be merged now."""
        if batch.committed is None:
            return
        version, transaction = batch.committed.version, batch.transaction
        rows = stamped_records(classified.changed, ORDERS, batch.stamp).to_pylist()
        known = self._known(sorted(row["order_id"] for row in rows), version)
        changed = [row["order_id"] for row in rows if row != {name: known.get(row["order_id"], {}).get(name) for name in row}]
        if changed:
            yield f"order {changed[0]} is not as version {version} of orders has it from this batch"
        own = ("_query_id", pa.array([transaction.query_id]))
        merged = Lake(self.settings).at({ORDERS.name: version}).rows(ORDERS, "_query_id", "_batch_id", where_in=own)
        count = merged["_batch_id"].to_pylist().count(transaction.batch_id)
        if count != len(rows):
            yield f"{len(rows)} orders changed, but {count} in version {version} of orders"

    def commit_accepted(self, batch: Batch, classified: SettledOrders, written: list[Written]) -> None:
        """See StreamJob."""
        rows = stamped_records(classified.changed, ORDERS, batch.stamp)
        merge_orders(rows, self.settings, batch.transaction, batch.plan.to_metadata(batch.transaction))


def settle_orders(records: list[dict[str, Any]], known: dict[str, dict[str, Any]]) -> SettledOrders:
    """Settle a batch against the rows that table `orders` has.

    ``records`` are staged rows (times in microseconds) in the order of the source; ``known`` are rows of the table by order_id
    (times as datetimes). An order takes one `placed` and one `cancelled` record; the second of either is a duplicate, or a
    conflict if its payload differs. A cancellation must agree with the order in all but its time. Cancelled is final.
    """
    outcomes: list[Outcome] = []
    fingerprints: list[int] = []
    rows = {order_id: dict(row) for order_id, row in known.items()}
    touched: set[str] = set()
    for record in records:
        order_id = record["order_id"]
        row = rows.get(order_id)
        outcome = Outcome.ACCEPTED if row is None else _outcome(record, row)
        if outcome is Outcome.ACCEPTED:
            touched.add(order_id)
            if row is None:
                rows[order_id] = _new(record)
            else:
                _add(record, row)
        outcomes.append(outcome)
        fingerprints.append(rows[order_id]["fingerprint"] % 2**64)
    changed = [rows[order_id] for order_id in sorted(touched)]
    return SettledOrders(np.array(outcomes, dtype=np.int8), np.array(fingerprints, dtype=np.uint64), changed)


def _new(record: dict[str, Any]) -> dict[str, Any]:
    cancelled = record["status"] == "cancelled"
    return {
        **{name: record[name] for name in _FIELDS},
        "cancelled_at": record["received_at"] if cancelled else None,
        "has_placed": not cancelled,
        "is_late": record["is_late"],
        "source_file": record["source_file"],
        "source_line": record["source_line"],
        "fingerprint": signed(record["fingerprint"]),
    }


def _outcome(record: dict[str, Any], row: dict[str, Any]) -> Outcome:
    placed = record["status"] == "placed"
    same = all(record[name] == row[name] for name in _SHARED)
    seen = row["has_placed"] if placed else row["cancelled_at"] is not None
    if placed and seen:
        same = same and record["order_time"] == micros(row["order_time"])
    if not same:
        return Outcome.CONFLICT
    return Outcome.DUPLICATE if seen else Outcome.ACCEPTED


def _add(record: dict[str, Any], row: dict[str, Any]) -> None:
    if record["status"] == "cancelled":
        row["status"] = "cancelled"
        row["cancelled_at"] = record["received_at"]
        return
    for name in (*_PLACED_FIELDS, "is_late", "source_file", "source_line"):
        row[name] = record[name]
    row["has_placed"] = True
    row["fingerprint"] = signed(record["fingerprint"])


def micros(value: int | datetime) -> int:
    """Return a time in microseconds since the epoch."""
    return value if isinstance(value, int) else to_micros(value)


def signed(fingerprint: int) -> int:
    """Return the same 64 bits as a BIGINT. An order has the fingerprint of its `placed` record, as soon as it has one."""
    return fingerprint - 2**64 if fingerprint >= 2**63 else fingerprint
