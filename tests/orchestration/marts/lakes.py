"""A small lakehouse whose numbers can be added up by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spark_jobs.tables import BATCH_LEDGER, CAMPAIGNS, EVENTS, MINUTE_METRICS, RECONCILIATIONS
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
    return [{"event_id": f"e-{batch}-{time}-{row['region']}-{number}", **row} for number in range(count)]


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
    events = [
        *accepted(0, "2026-03-10T10:05", "2026-03-10T10:06", 5),
        *accepted(0, "2026-03-11T00:00", "2026-03-11T00:00:30", invalid_traffic_rule="repeat_click"),
        *accepted(0, "2026-03-10T23:59", "2026-03-11T00:00:01", region="us", campaign_id="c9", event_type="impression"),
    ]
    commit(lake, EVENTS, events, int96=int96)


def late_batch(lake: Path, *, with_ledger: bool = True) -> None:
    """A second batch: one late click of 500 nanos in the first batch's minute. ``with_ledger`` False: half-written."""
    commit(lake, MINUTE_METRICS, [increment("u5", 1, "2026-03-10T10:05", clicks=1, spend_nanos=500)])
    commit(lake, EVENTS, accepted(1, "2026-03-10T10:05", "2026-03-10T11:30", is_late=True, spend_nanos=500))
    if with_ledger:
        commit(lake, BATCH_LEDGER, [ledger_row(1, "2026-03-10T10:00", accepted=1, late=1, spend_nanos=500)])
