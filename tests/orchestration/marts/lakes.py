"""A small lakehouse whose numbers can be added up by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spark_jobs.lake.tables import (
    ATTRIBUTED_ORDERS,
    BATCH_LEDGER,
    BILLING_LINES,
    CAMPAIGNS,
    EVENTS,
    MINUTE_METRICS,
    RECONCILIATIONS,
    RESTATEMENTS,
)
from tests.orchestration.marts.delta_files import commit, utc


def increment(uid: str, batch: int, minute: str, **values: Any) -> dict[str, Any]:
    """A row of minute_metrics with zeros and the usual key where nothing else is said."""
    return {
        "record_uuid": uid,
        "event_minute": utc(minute),
        "event_date": utc(minute).date(),
        "region": "eu",
        "campaign_id": "c1",
        "ad_id": "a1",
        "store_id": "s1",
        "placement": "feed",
        "currency": "EUR",
        "impressions": 0,
        "clicks": 0,
        "invalid_impressions": 0,
        "invalid_clicks": 0,
        "spend_nanos": 0,
        "invalid_spend_nanos": 0,
        "_query_id": "q",
        "_batch_id": batch,
        **values,
    }


def accepted(batch: int, time: str, received: str, count: int = 1, **values: Any) -> list[dict[str, Any]]:
    """``count`` clicks of table events at a time, received at another, of campaign c1 where nothing else is said."""
    moment = utc(time)
    row = {
        "event_type": "click",
        "event_time": moment,
        "received_at": utc(received),
        "region": "eu",
        "campaign_id": "c1",
        "ad_id": "a1",
        "store_id": "s1",
        "user_id": "u1",
        "placement": "feed",
        "currency": "EUR",
        "is_late": False,
        "spend_nanos": 0,
        "invalid_spend_nanos": 0,
        "event_date": moment.date(),
        "event_hour": moment.hour,
        "_query_id": "q",
        "_batch_id": batch,
        **values,
    }
    return [{"event_id": f"e-{batch}-{time}-{row['region']}-{row['event_type']}-{number}", **row} for number in range(count)]


def ledger_row(batch: int, hour: str | None, **values: Any) -> dict[str, Any]:
    """A row of batch_ledger with zeros; ``offered`` is the sum of the outcomes unless it is said."""
    row: dict[str, Any] = {
        "stream": "events",
        "source": "files",
        "region": "eu",
        "event_hour": None if hour is None else utc(hour),
        **dict.fromkeys(("accepted", "duplicate", "conflict", "rejected", "late", "invalid_traffic", "unpriced"), 0),
        "spend_nanos": 0,
        "max_received_at": utc("2026-03-10T12:00"),
        "ingested_at": utc("2026-03-10T12:00"),
        "_query_id": "q",
        "_batch_id": batch,
        **values,
    }
    row.setdefault("offered", row["accepted"] + row["duplicate"] + row["conflict"] + row["rejected"])
    return row


def first_batch(lake: Path, *, int96: bool = False) -> None:
    """Version 0 of the tables: one complete batch.

    c1 (cpc, store s1) had 3 impressions and 2 clicks for 2,500 nanos in one minute over two placements, and 1 invalid
    click (1,250 nanos, not billed) in the next day's first minute. c9 has no row: 1 impression in the us, free.
    """
    commit(
        lake,
        CAMPAIGNS,
        [
            {
                "campaign_id": "c1",
                "store_id": "s1",
                "billing_model": "cpc",
                "daily_budget_micros": 5_000_000,
                "currency": "EUR",
                "valid_from": utc("2026-01-01T00:00"),
                "valid_to": None,
                "source_file": "campaigns.csv",
            }
        ],
        int96=int96,
    )
    commit(
        lake,
        MINUTE_METRICS,
        [
            increment("u1", 0, "2026-03-10T10:05", impressions=3, clicks=1, spend_nanos=1250),
            increment("u2", 0, "2026-03-10T10:05", clicks=1, spend_nanos=1250, placement=None),
            increment("u3", 0, "2026-03-11T00:00", invalid_clicks=1, invalid_spend_nanos=1250),
            increment("u4", 0, "2026-03-10T23:59", impressions=1, region="us", campaign_id="c9", ad_id="a9", store_id="s9"),
        ],
        int96=int96,
    )
    commit(
        lake,
        BATCH_LEDGER,
        [
            ledger_row(0, "2026-03-10T10:00", accepted=5, duplicate=2, rejected=1, spend_nanos=2500),
            ledger_row(0, "2026-03-11T00:00", accepted=1, invalid_traffic=1),
            ledger_row(0, "2026-03-10T23:00", accepted=1, unpriced=1, region="us"),
            ledger_row(0, None, rejected=2),
            ledger_row(0, "2026-03-10T10:00", accepted=4, stream="orders", source="orders"),
        ],
        int96=int96,
    )
    commit(lake, RECONCILIATIONS, [], int96=int96)
    other: dict[str, Any] = {"campaign_id": "c9", "ad_id": "a9", "store_id": "s9"}
    events = [
        *accepted(0, "2026-03-10T10:05", "2026-03-10T10:06", 3, event_type="impression"),
        *accepted(0, "2026-03-10T10:05", "2026-03-10T10:06", spend_nanos=1250),
        *accepted(0, "2026-03-10T10:05", "2026-03-10T10:06", spend_nanos=1250, event_id="e-0-none", placement=None),
        *accepted(0, "2026-03-11T00:00", "2026-03-11T00:00:30", invalid_traffic_rule="repeat_click", invalid_spend_nanos=1250),
        *accepted(0, "2026-03-10T23:59", "2026-03-11T00:00:01", region="us", event_type="impression", **other),
    ]
    commit(lake, EVENTS, events, int96=int96)


def late_batch(lake: Path, *, with_ledger: bool = True) -> None:
    """A second batch: one late click of 500 nanos in the first batch's minute. ``with_ledger`` False: half-written."""
    commit(lake, MINUTE_METRICS, [increment("u5", 1, "2026-03-10T10:05", clicks=1, spend_nanos=500)])
    commit(lake, EVENTS, accepted(1, "2026-03-10T10:05", "2026-03-10T11:30", is_late=True, spend_nanos=500))
    if with_ledger:
        commit(lake, BATCH_LEDGER, [ledger_row(1, "2026-03-10T10:00", accepted=1, late=1, spend_nanos=500)])


def touched(order: str, revision: int, touch: str | None, micros: int = 0, weight: float = 0.0, **values: Any) -> dict[str, Any]:
    """A row of attributed_orders: an order of 100 micros of 2026-03-12, and its share for one touch, in every model and 7 days."""
    models = ("last_click", "first_click", "linear", "position_based", "time_decay")
    row = {
        "order_id": order,
        "revision": revision,
        "status": "placed",
        "order_time": utc("2026-03-12T09:00"),
        "user_id": "u1",
        "store_id": "s1",
        "currency": "EUR",
        "total_micros": 100,
        "touch_event_id": touch,
        "window_days": [7],
        "rule_set": "r",
    }
    if touch is not None:
        row |= {"touch_type": "click", "touch_time": utc("2026-03-10T10:05"), "campaign_id": "c1", "ad_id": "a1"}
        row |= {f"{model}_micros": [micros] for model in models} | {f"{model}_weights": [weight] for model in models}
    return row | values


def money(lake: Path) -> None:
    """After first_batch: 10 March billed, an order credited to two clicks and another cancelled, a review of 10 March."""
    charge = {
        "line_id": "l1",
        "line_type": "charge",
        "event_date": utc("2026-03-10").date(),
        "campaign_id": "c1",
        "store_id": "s1",
        "currency": "EUR",
        "amount_micros": 4,
        "billed_micros": 4,
        "spend_nanos": 3500,
        "reason": "day_closed",
        "run_id": "b1",
        "metrics_version": 0,
        "posting": 1,
        "billed_at": utc("2026-03-11T01:00"),
    }
    credit = {
        **charge,
        "line_id": "l2",
        "line_type": "credit",
        "amount_micros": -1,
        "billed_micros": 3,
        "spend_nanos": 2500,
        "run_id": "v1",
        "reason": "invalid_traffic",
        "rule_set": "h",
        "posting": 2,
        "billed_at": utc("2026-03-11T03:00"),
    }
    commit(lake, BILLING_LINES, [charge, credit])
    review = {
        "run_id": "v1",
        "kind": "review",
        "cause": "repeat_click",
        "event_hour": utc("2026-03-10T10:00"),
        "region": "eu",
        "campaign_id": "c1",
        "currency": "EUR",
        "impressions": 0,
        "clicks": -1,
        "invalid_impressions": 0,
        "invalid_clicks": 1,
        "spend_nanos": -1000,
        "invalid_spend_nanos": 1000,
        "rule_set": "h",
        "restated_at": utc("2026-03-11T02:00"),
    }
    commit(lake, RESTATEMENTS, [review])
    orders = [
        *(touched("o1", 1, "t0", 100, 1.0), touched("o1", 2, "t1", 60, 0.6), touched("o1", 2, "t2", 40, 0.4)),
        *(touched("o2", 1, "t1", 100, 1.0), touched("o2", 2, None, status="cancelled")),
    ]
    commit(lake, ATTRIBUTED_ORDERS, orders)
