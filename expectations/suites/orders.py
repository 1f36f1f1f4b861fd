"""Table `orders`: an hour is that of order_time."""

from __future__ import annotations

from expectations._gx import gxe
from expectations.suites.common import (
    BATCH_COLUMNS,
    FLAG,
    NUMBER,
    TEXT,
    TIME,
    baseline,
    currency_form,
    id_length,
    known,
    no_row,
    not_null,
    region_form,
    schema,
    unique,
)
from expectations.suites.suite import Suite, check

_PLACE = ("order_id", "source_file", "source_line")

ORDERS = Suite(
    table="orders",
    columns={
        "order_id": TEXT,
        "order_time": TIME,
        "received_at": TIME,
        "region": TEXT,
        "user_id": TEXT,
        "store_id": TEXT,
        "total_micros": NUMBER,
        "currency": TEXT,
        "status": TEXT,
        "cancelled_at": TIME,
        "has_placed": FLAG,
        "is_late": FLAG,
        "fingerprint": NUMBER,
        "source_file": TEXT,
        "source_line": NUMBER,
        "ingested_at": TIME,
        **BATCH_COLUMNS,
    },
    in_hour="order_time >= {start} and order_time < {end}",
    place=_PLACE,
    expectations=(
        *schema(),
        *not_null("order_id", "order_time", "received_at", "region", "user_id", "store_id", "total_micros", "currency", "status"),
        *not_null("has_placed", "is_late", "fingerprint", "source_file", "source_line", "ingested_at", "_query_id", "_batch_id"),
        unique("order_id"),
        id_length("order_id"),
        gxe.ExpectColumnValuesToBeBetween(
            column="total_micros", min_value=0, max_value=10**15, **check("total_micros.range", "total_micros is 0 to 10^15")
        ),
        region_form(_PLACE),
        currency_form(_PLACE),
        known("status", ["placed", "cancelled"], "status is placed or cancelled"),
        no_row(
            _PLACE,
            "cancelled_at.when_cancelled",
            "(status = 'cancelled') <> (cancelled_at is not null)",
            "cancelled_at is there where status is cancelled, and only there",
        ),
        no_row(_PLACE, "has_placed.placed_or_cancelled", "not has_placed and status = 'placed'", "a placed order was seen placed"),
        gxe.ExpectColumnValuesToBeBetween(
            column="source_line", min_value=1, **check("source_line.positive", "source_line counts from 1")
        ),
        *baseline(
            "orders",
            "select count(*) from {batch}",
            {"region": "select region as value, count(*) as weight from {batch} group by all"},
        ),
    ),
)
