"""Events and orders written as the ingest leaves them, without Spark; and what `attributed_orders` says of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from spark_jobs.attribution.rules import MODELS
from spark_jobs.config import Settings
from spark_jobs.corrections.write_ahead import Correction, TableChange, carry_out, write_ahead
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, EVENTS, ORDERS, Table
from spark_jobs.lake.writes import DeltaSink, merge_orders
from spark_jobs.steps import Step

NOON = datetime(2025, 6, 30, 12, tzinfo=UTC)


def event(event_id: str, hours_before: float, **changes: Any) -> dict[str, Any]:
    """A billable click so many hours before NOON."""
    at = NOON - timedelta(hours=hours_before)
    row: dict[str, Any] = {
        "event_id": event_id,
        "event_type": "click",
        "event_time": at,
        "user_id": "u",
        "store_id": "s",
        "campaign_id": "c",
        "ad_id": "a",
    }
    row.update(changes)
    row.update(event_date=row["event_time"].date(), event_hour=row["event_time"].hour)
    return row


def order(order_id: str, hours_before: float = 0, **changes: Any) -> dict[str, Any]:
    """An order placed so many hours before NOON."""
    return {
        "order_id": order_id,
        "order_time": NOON - timedelta(hours=hours_before),
        "user_id": "u",
        "store_id": "s",
        "total_micros": 1000,
        "currency": "EUR",
        "status": "placed",
        "is_late": False,
        **changes,
    }


def _transaction() -> Transaction:
    return Transaction(uuid.uuid4().hex, 0)


def add_events(settings: Settings, rows: Iterable[dict[str, Any]]) -> None:
    """A batch of events."""
    DeltaSink(EVENTS, settings).append_rows(pa.Table.from_pylist(list(rows), EVENTS.schema), Step.EVENTS, _transaction())


def add_orders(settings: Settings, rows: Iterable[dict[str, Any]]) -> None:
    """A batch of orders: new ones and changed ones."""
    merge_orders(pa.Table.from_pylist(list(rows), ORDERS.schema), settings, _transaction(), {})


def held(settings: Settings, table: Table) -> list[dict[str, Any]]:
    """All rows of a table."""
    return list(pa.table(DeltaTable(settings.table_uri(table.name)).to_pyarrow_table()).to_pylist())


def correct(settings: Settings, change: dict[str, dict[str, Any] | None], *, keys: str = "kept") -> None:
    """A correction of events by their id: other values, or None to take the event away."""
    rows = [row for row in held(settings, EVENTS) if row["event_id"] in change]
    after = [{**row, **new} for row in rows if (new := change[row["event_id"]]) is not None]
    remove, add = (pa.Table.from_pylist(part, EVENTS.schema) for part in (rows, after))
    token = uuid.uuid4().hex
    correction = Correction(token, token, 0, [TableChange(EVENTS, remove, add, {"keys": keys})])
    write_ahead(settings, correction)
    carry_out(settings, correction)


def mark(settings: Settings, *event_ids: str, rule: str | None = "repeat_click") -> None:
    """Events found invalid, or billable again, as a review does it."""
    correct(settings, {event_id: {"invalid_traffic_rule": rule} for event_id in event_ids})


def revisions(settings: Settings) -> dict[str, list[tuple[int, str, str]]]:
    """Per order the revisions: number, status, reason."""
    found: dict[str, set[tuple[int, str, str]]] = {}
    for row in held(settings, ATTRIBUTED_ORDERS):
        found.setdefault(row["order_id"], set()).add((row["revision"], row["status"], row["reason"]))
    return {order_id: sorted(parts) for order_id, parts in sorted(found.items())}


def credits(settings: Settings) -> dict[tuple[str, str, int], dict[str, int]]:
    """Per order, model and window the micros by touch, from the latest revisions. Checks that they sum to the total."""
    rows = held(settings, ATTRIBUTED_ORDERS)
    latest: dict[str, int] = {}
    for row in rows:
        latest[row["order_id"]] = max(row["revision"], latest.get(row["order_id"], 0))
    made: dict[tuple[str, str, int], dict[str, int]] = {}
    totals = {}
    for row in rows:
        if row["revision"] != latest[row["order_id"]] or row["touch_event_id"] is None:
            continue
        totals[row["order_id"]] = row["total_micros"]
        for model in MODELS:
            for days, micros in zip(row["window_days"], row[f"{model}_micros"], strict=True):
                if micros is not None:
                    touches = made.setdefault((row["order_id"], model, days), {})
                    assert row["touch_event_id"] not in touches
                    touches[row["touch_event_id"]] = micros
    assert all(sum(part.values()) == totals[key[0]] for key, part in made.items())
    return {key: {touch: micros for touch, micros in part.items() if micros} for key, part in made.items()}


def linear(settings: Settings, days: int = 7) -> dict[str, dict[str, int]]:
    """The credits of model linear, by order."""
    return {key[0]: part for key, part in credits(settings).items() if key[1:] == ("linear", days)}


def rows_of(settings: Settings) -> int:
    """How many rows `attributed_orders` has."""
    return int(pc.count(DeltaTable(settings.table_uri(ATTRIBUTED_ORDERS.name)).to_pyarrow_table()["order_id"]).as_py())
