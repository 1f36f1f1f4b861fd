"""Landing files for tests, and what the lakehouse holds, without the identity of the batches that wrote it."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from duckdb import DuckDBPyConnection
from pyspark.sql import SparkSession

from spark_jobs.config import Settings
from spark_jobs.lake.duck import connect_delta

_clock = 1_700_000_000_000


def event(event_id: str, **changes: Any) -> dict[str, Any]:
    """A valid event of 2025-06-02T10:00:00Z; a change to None removes the field."""
    record: dict[str, Any] = {
        "event_id": event_id,
        "event_type": "impression",
        "event_time": "2025-06-02T10:00:00Z",
        "received_at": "2025-06-02T10:00:02Z",
        "campaign_id": "c-cpm",
        "ad_id": "a-1",
        "store_id": "s-1",
        "user_id": "u-1",
        "price_micros": 1500,
        "currency": "EUR",
    }
    record.update(changes)
    return {name: value for name, value in record.items() if value is not None}


def order(order_id: str, **changes: Any) -> dict[str, Any]:
    """A valid order."""
    return {
        "order_id": order_id,
        "order_time": "2025-06-02T11:00:00Z",
        "received_at": "2025-06-02T11:00:01Z",
        "user_id": "u-1",
        "store_id": "s-1",
        "total_micros": 12_340_000,
        "currency": "EUR",
        "status": "placed",
        **changes,
    }


def lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def land(settings: Settings, name: str, content: bytes | Iterable[dict[str, Any]]) -> Path:
    """Put a file into the landing folder by the protocol (write, then rename), later than every file before it."""
    global _clock
    _clock += 1000
    data = content if isinstance(content, bytes) else lines(content)
    target = settings.landing_path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(f".{target.name}.tmp")
    hidden.write_bytes(gzip.compress(data) if name.endswith(".gz") and isinstance(content, list) else data)
    os.utime(hidden, ns=(_clock * 10**6, _clock * 10**6))
    hidden.rename(target)
    return target


def campaigns(settings: Settings, *rows: str) -> None:
    """The campaigns CSV; by default a cpm and a cpc campaign, always valid."""
    header = "campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to"
    default = ("c-cpm,s-1,cpm,1000000,EUR,2000-01-01T00:00:00Z,", "c-cpc,s-1,cpc,1000000,EUR,2000-01-01T00:00:00Z,")
    path = settings.landing_path / "campaigns" / "campaigns.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(rows or default)]) + "\n")


def rows(_spark: SparkSession | None, settings: Settings, table: str, columns: str, where: str = "true") -> list[tuple[Any, ...]]:
    """Columns of a table, sorted; by DuckDB, which needs a tenth of Spark's time."""
    with connect_delta(lakehouse=settings.lakehouse_uri) as lake:
        return _rows(lake, settings, table, columns, where)


def _rows(lake: DuckDBPyConnection, settings: Settings, table: str, columns: str, where: str = "true") -> list[tuple[Any, ...]]:
    lake.execute("set timezone = 'UTC'")
    chosen = columns.replace(";", ",")
    path = settings.table_uri(table).replace("'", "''")
    held = lake.execute(f"select {chosen} from delta_scan('{path}') where {where}").fetchall()
    return sorted(held, key=repr)


def ledger(spark: SparkSession, settings: Settings, stream: str = "events") -> Counter[str]:
    """The ledger's sums; checks the conservation law row by row."""
    total: Counter[str] = Counter()
    names = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced", "spend_nanos")
    for values in rows(spark, settings, "batch_ledger", "; ".join(names), f"stream = '{stream}'"):
        row = dict(zip(names, values, strict=True))
        assert row["offered"] == row["accepted"] + row["duplicate"] + row["conflict"] + row["rejected"]
        total.update(row)
    return total


EVENT_COLUMNS = (
    "event_id; event_type; event_time; received_at; region; campaign_id; ad_id; store_id; user_id; impression_id; placement; "
    "price_micros; currency; user_agent; billing_model; spend_nanos; is_late; fingerprint; source_file; source_line"
)


def everything(_spark: SparkSession | None, settings: Settings) -> dict[str, Any]:
    """All tables, free of query ids, batch ids and times of ingestion: equal for equal input, however it was ingested."""
    keys = "event_minute, region, campaign_id, ad_id, store_id, placement, currency"
    minutes = f"{keys}; sum(impressions); sum(clicks); sum(spend_nanos)"
    measures = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced", "spend_nanos")
    hours = f"stream; region; event_hour; {'; '.join(f'sum({name})' for name in measures)}"
    rejected = (
        "outcome; reason_codes; region; source_file; source_line; raw; raw_encoding; record_id; fingerprint; accepted_fingerprint"
    )
    orders = (
        "order_id; order_time; received_at; region; user_id; store_id; total_micros; currency; status; cancelled_at; has_placed"
    )
    with connect_delta(lakehouse=settings.lakehouse_uri) as lake:
        return {
            "events": _rows(lake, settings, "events", EVENT_COLUMNS),
            "minute_metrics": _rows(lake, settings, "minute_metrics", minutes, "true group by all"),
            "record_uuids_twice": _rows(lake, settings, "minute_metrics", "record_uuid", "true group by all having count(*) > 1"),
            "batch_ledger": _rows(lake, settings, "batch_ledger", hours, "true group by all"),
            "rejected_events": _rows(lake, settings, "rejected_events", rejected),
            "rejected_orders": _rows(lake, settings, "rejected_orders", rejected),
            "orders": _rows(lake, settings, "orders", orders),
        }
