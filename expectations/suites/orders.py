"""Table `orders`: an hour is that of order_time."""

from __future__ import annotations

from expectations.checks import Suite, baseline, groups, not_null, rows, schema, unique
from expectations.suites.common import BATCH_COLUMNS, CURRENCY, FLAG, ID_LENGTH, NUMBER, REGION, TEXT, TIME

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
    keys={name: name for name in ("region", "currency", "status")},
    sums={"ids": "list(hash(order_id))"},
    shown=("order_id", "source_file", "source_line"),
    checks=(
        *schema(),
        *not_null("order_id", "order_time", "received_at", "region", "user_id", "store_id", "total_micros", "currency", "status"),
        *not_null("has_placed", "is_late", "fingerprint", "source_file", "source_line", "ingested_at", "_query_id", "_batch_id"),
        unique("order_id"),
        rows("length", "order_id", ID_LENGTH.format("order_id"), "order_id has 1 to 128 characters"),
        rows("range", "total_micros", "total_micros not between 0 and 1000000000000000", "total_micros is 0 to 10^15"),
        groups("form", "region", REGION, "region is 1 to 32 of a-z, 0-9 and -"),
        groups("form", "currency", CURRENCY, "currency is three capitals"),
        groups("known", "status", "status not in ('placed', 'cancelled')", "status is placed or cancelled"),
        rows(
            "when_cancelled",
            "cancelled_at",
            "(status = 'cancelled') <> (cancelled_at is not null)",
            "cancelled_at is there where status is cancelled, and only there",
        ),
        rows("placed_or_cancelled", "has_placed", "not has_placed and status = 'placed'", "a placed order was seen placed"),
        rows("positive", "source_line", "source_line < 1", "source_line counts from 1"),
        *baseline("orders", ("region",)),
    ),
    shares={"region": "select region, sum(rows) from grouped group by all"},
    volume="select coalesce(sum(rows), 0) from grouped",
)
