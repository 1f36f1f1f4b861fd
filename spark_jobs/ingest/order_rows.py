"""Orders: one row an order, whatever the order in which its records arrive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from spark_jobs.ingest.contract.spec import ORDER_CONTRACT
from spark_jobs.ingest.dedupe.classify import Classification, Outcome
from spark_jobs.units import to_micros

_FIELDS = [spec.name for spec in ORDER_CONTRACT.fields]
_SHARED = [spec.name for spec in ORDER_CONTRACT.payload if spec.name not in (ORDER_CONTRACT.time_field, "status")]
"""What the records of one order have in common."""
_OF_PLACED = [name for name in _FIELDS if name not in (ORDER_CONTRACT.id_field, "status", *_SHARED)]
"""What a `placed` record says of its order, beyond that."""


@dataclass(frozen=True)
class SettledOrders(Classification):
    """The outcome of each record, and ``changed``: the rows to merge, by order_id."""

    changed: list[dict[str, Any]]


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
        if row is None:
            rows[order_id] = _new(record)
            outcome = Outcome.ACCEPTED
        else:
            outcome = _outcome(record, row)
            if outcome is Outcome.ACCEPTED:
                _add(record, row)
        if outcome is Outcome.ACCEPTED:
            touched.add(order_id)
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
    for name in (*_OF_PLACED, "is_late", "source_file", "source_line"):
        row[name] = record[name]
    row["has_placed"] = True
    row["fingerprint"] = signed(record["fingerprint"])


def micros(value: Any) -> Any:
    """Return the microseconds since the epoch of a time, given as such or as a datetime."""
    return value if isinstance(value, int) else to_micros(value)


def signed(fingerprint: int) -> int:
    """Return the same 64 bits as a BIGINT. An order has the fingerprint of its `placed` record, as soon as it has one."""
    return fingerprint - 2**64 if fingerprint >= 2**63 else fingerprint
