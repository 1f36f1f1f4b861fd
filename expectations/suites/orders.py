"""Table `orders`, by the hour of order_time."""

from __future__ import annotations

from expectations._gx import gxe
from expectations.suites.common import (
    BATCH_COLUMNS,
    baseline,
    column_types,
    currency_form,
    id_length,
    known,
    no_rows,
    not_null,
    region_form,
    schema,
    unique,
)
from expectations.suites.suite import Suite, check

_PLACE = ("order_id", "source_file", "source_line")

ORDERS = Suite(
    table="orders",
    columns=column_types(f"""
        order_id VARCHAR, order_time TIMESTAMPTZ, received_at TIMESTAMPTZ, region VARCHAR, user_id VARCHAR, store_id VARCHAR,
        total_micros BIGINT, currency VARCHAR, status VARCHAR, cancelled_at TIMESTAMPTZ, has_placed BOOLEAN, is_late BOOLEAN,
        fingerprint BIGINT, source_file VARCHAR, source_line BIGINT, ingested_at TIMESTAMPTZ, {BATCH_COLUMNS}
    """),
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
        *no_rows(
            _PLACE,
            {
                "cancelled_at.when_cancelled": (
                    "(status = 'cancelled') <> (cancelled_at is not null)",
                    "cancelled_at is there where status is cancelled, and only there",
                ),
                "has_placed.placed_or_cancelled": ("not has_placed and status = 'placed'", "a placed order was seen placed"),
            },
        ),
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
