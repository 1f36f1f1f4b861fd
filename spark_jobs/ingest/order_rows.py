"""Orders: one row an order, whatever the order in which its records arrive."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spark_jobs.ingest.dedupe.classify import Outcome
from spark_jobs.units import to_micros

_SHARED = ("user_id", "store_id", "total_micros", "currency")


@dataclass
class Settled:
    """Per record (in the order given) its outcome and the fingerprint that holds its id; ``changed`` are the rows to merge."""

    outcome: list[Outcome] = field(default_factory=list)
    accepted_fingerprint: list[int] = field(default_factory=list)
    changed: list[dict[str, Any]] = field(default_factory=list)


def settle_orders(records: list[dict[str, Any]], known: dict[str, dict[str, Any]]) -> Settled:
    """Settle a batch against the rows that table `orders` holds.

    ``records`` are staged rows (times in microseconds) in the order of the source; ``known`` are rows of the table by order_id
    (times as datetimes). An order takes one `placed` and one `cancelled` record; the second of either is a duplicate, or a
    conflict if its payload differs. A cancellation must agree with the order in all but its time. Cancelled is final.
    """
    settled = Settled()
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
        settled.outcome.append(outcome)
        settled.accepted_fingerprint.append(rows[order_id]["fingerprint"] % 2**64)
    settled.changed = [rows[order_id] for order_id in sorted(touched)]
    return settled


def _new(record: dict[str, Any]) -> dict[str, Any]:
    cancelled = record["status"] == "cancelled"
    return {
        **{name: record[name] for name in ("order_id", "order_time", "received_at", "region", "status", *_SHARED)},
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
    for name in ("order_time", "received_at", "region", "is_late", "source_file", "source_line"):
        row[name] = record[name]
    row["has_placed"] = True
    row["fingerprint"] = signed(record["fingerprint"])


def micros(value: Any) -> Any:
    """Microseconds since the epoch of a time that is a number already or a datetime."""
    return value if isinstance(value, int) else to_micros(value)


def signed(fingerprint: int) -> int:
    """The same 64 bits as a BIGINT. The fingerprint of an order is that of its `placed` record, once it has one."""
    return fingerprint - 2**64 if fingerprint >= 2**63 else fingerprint
