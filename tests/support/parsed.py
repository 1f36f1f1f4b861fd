"""Parsed rows, as the contract's validators give them: what the transforms take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from spark_jobs.ingest.contract.spec import CONTRACTS
from spark_jobs.ingest.contract.vectorised import parsed_schema

BASE: dict[str, dict[str, Any]] = {
    "events": {
        "event_id": "e",
        "event_type": "impression",
        "event_time": 1_748_858_400_000_000,  # 2025-06-02T10:00:00Z
        "received_at": 1_748_858_402_000_000,
        "region": "eu",
        "campaign_id": "c",
        "ad_id": "a",
        "store_id": "s",
        "user_id": "u",
        "impression_id": None,
        "placement": None,
        "price_micros": 1500,
        "currency": "EUR",
        "user_agent": None,
    },
    "orders": {
        "order_id": "o",
        "order_time": 1_748_858_400_000_000,
        "received_at": 1_748_858_402_000_000,
        "region": "eu",
        "user_id": "u",
        "store_id": "s",
        "total_micros": 1500,
        "currency": "EUR",
        "status": "placed",
    },
}


def parsed(stream: str, rows: Iterable[dict[str, Any]]) -> pa.Table:
    """A table of parsed rows, n counting from 0; each is the base with these changes."""
    schema = parsed_schema(CONTRACTS[stream])
    full = [{"n": n, **BASE[stream], **row} for n, row in enumerate(rows)]
    assert all(set(row) == set(schema.names) for row in full)
    return pa.Table.from_pylist(full, schema=schema)
