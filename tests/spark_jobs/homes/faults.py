"""What a hand, a crash or a defect does to a home that has event t1 of ad a-1 in eu-west, and what reconciliation says of it.

ORDER_FAULTS are of a home that lands ORDER_FILES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import correct
import lake

from spark_jobs.config import Settings
from spark_jobs.lake.reading import open_table


@dataclass(frozen=True)
class Fault:
    """What a hand, a crash or a defect does to a home, and the causes that reconciliation tells."""

    name: str
    plant: Callable[[Settings], None]
    causes: tuple[str, ...]


def _restored(settings: Settings, table: str) -> None:
    """The table as it was two versions ago."""
    held = open_table(settings.table_uri(table))
    held.restore(held.version() - 2)


def _without_batch(settings: Settings, batch: int) -> None:
    for table in ("events", "minute_metrics", "rejected_events"):
        correct.delete(settings, table, f"_batch_id = {batch}")
    correct.delete(settings, "batch_ledger", f"stream = 'events' and _batch_id = {batch}")


ONE = "event_id = 't1'"
# both want the same rows, or leave nothing for the other to take
NOT_TOGETHER = (
    "a batch is lost from all tables but its plan",
    "events is restored to an older version",
    "minute_metrics is restored to an older version",
)
OF_ONE = "ad_id = 'a-1' and region = 'eu-west'"
MADE_UP = "select * replace ('made-up' as event_id) from events where event_id = 't1'"
ELSEWHERE = """
    select * replace (event_time - interval 4 hour as event_time, event_hour - 4 as event_hour, source_line + 100 as source_line)
    from events where event_id = 't1'
"""
FAULTS = [
    Fault("a row of events is deleted", lambda s: correct.delete(s, "events", ONE), ("event_lost",)),
    Fault("events is restored to an older version", lambda s: _restored(s, "events"), ("event_lost",)),
    Fault("a row of events stands twice", lambda s: correct.append(s, "events", f"from events where {ONE}"), ("event_twice",)),
    Fault(
        "a whole hour of events stands twice",
        lambda s: correct.append(s, "events", "from events where event_hour = (select mode(event_hour) from events)"),
        ("event_twice",),
    ),
    Fault("the price of an event is changed", lambda s: correct.update(s, "events", ONE, spend_nanos="7"), ("event_altered",)),
    Fault("the user of an event is changed", lambda s: correct.update(s, "events", ONE, user_id="'u-0'"), ("event_altered",)),
    Fault("an event is made up", lambda s: correct.append(s, "events", MADE_UP), ("event_unknown",)),
    Fault(
        "an id is accepted again in an hour long closed",
        lambda s: correct.append(s, "events", ELSEWHERE),
        ("id_accepted_twice",),
    ),
    Fault("an increment is deleted", lambda s: correct.delete(s, "minute_metrics", OF_ONE), ("increment_missing",)),
    Fault(
        "increments stand twice",
        lambda s: correct.append(s, "minute_metrics", f"from minute_metrics where {OF_ONE}"),
        ("increment_twice",),
    ),
    Fault(
        "an increment is changed",
        lambda s: correct.update(s, "minute_metrics", OF_ONE, impressions="impressions + 3", spend_nanos="1"),
        ("increment_altered",),
    ),
    Fault(
        "an increment is made up",
        lambda s: correct.append(
            s,
            "minute_metrics",
            f"select * replace ('0-0' as record_uuid, 'a-0' as ad_id) from minute_metrics where {OF_ONE} limit 1",
        ),
        ("increment_unknown",),
    ),
    Fault("minute_metrics is restored to an older version", lambda s: _restored(s, "minute_metrics"), ("increment_missing",)),
    Fault(
        "rows of the ledger are deleted",
        lambda s: correct.delete(s, "batch_ledger", "stream = 'events' and event_hour = '2025-06-02T10:00:00Z'"),
        ("ledger_missing",),
    ),
    Fault(
        "the ledger of a batch is deleted",
        lambda s: correct.delete(s, "batch_ledger", "stream = 'events' and _batch_id = 1"),
        ("ledger_missing",),
    ),
    Fault(
        "the ledger is changed so that it still adds up",
        lambda s: correct.update(
            s, "batch_ledger", "stream = 'events' and duplicate > 0", offered="offered + 1", duplicate="duplicate + 1"
        ),
        ("ledger_altered",),
    ),
    Fault(
        "the ledger is changed so that it does not add up",
        lambda s: correct.update(s, "batch_ledger", "stream = 'events' and _batch_id = 0", accepted="accepted - 1"),
        ("ledger_altered", "ledger_missing"),
    ),
    Fault(
        "rows of the ledger stand twice",
        lambda s: correct.append(s, "batch_ledger", "from batch_ledger where stream = 'events' and _batch_id = 0"),
        ("ledger_twice",),
    ),
    Fault(
        "rejected and conflicting records are deleted",
        lambda s: correct.delete(s, "rejected_events", "true"),
        ("rejected_lost",),
    ),
    Fault(
        "a rejected record stands twice",
        lambda s: correct.append(s, "rejected_events", "from rejected_events where source_line = 0"),
        ("rejected_twice",),
    ),
    Fault(
        "a rejected record is made up",
        lambda s: correct.append(
            s, "rejected_events", "select * replace (4711 as source_line) from rejected_events where source_line = 0"
        ),
        ("rejected_unknown",),
    ),
    Fault(
        "a batch is lost from all tables but its plan",
        lambda s: _without_batch(s, 1),
        ("event_lost", "increment_missing", "ledger_missing", "rejected_lost"),
    ),
]


def _order(number: int, **changes: Any) -> dict[str, Any]:
    received = {"received_at": f"2025-06-02T1{number}:00:05Z"}
    return lake.order(f"o{number}", **({"order_time": f"2025-06-02T1{number}:00:00Z"} | received | changes))


_CANCELLED = {"status": "cancelled", "received_at": "2025-06-03T00:00:00Z"}
# placed, cancelled, cancelled before it was placed, only cancelled, conflicting in money and in time, duplicate, broken, late
ORDER_FILES: dict[str, bytes | list[dict[str, Any]]] = {
    "orders/eu-west/1.jsonl": [
        *(_order(1), _order(1), _order(2), _order(3, **_CANCELLED, order_time="2025-06-02T20:00:00Z")),
        *(_order(4, **_CANCELLED), _order(5, region="eu-west", received_at="2025-06-05T00:00:00Z")),
    ],
    "orders/us-east/2.jsonl": [
        *(_order(3), _order(1, **_CANCELLED), _order(2, total_micros=7), _order(1, order_time="2025-06-02T11:00:01Z")),
        *(_order(1, **_CANCELLED, user_id="u-2"), _order(6, region=None), {**_order(7), "received_at": None}),
    ],
    "orders/eu-west/3.jsonl": b"nonsense\n\n" + lake.lines([_order(8, currency="none"), _order(2), _order(6, **_CANCELLED)]),
    "orders/eu-west/4.jsonl.gz": b"no gzip",
    "orders/us-east/5.jsonl": [_order(9), _order(2, **_CANCELLED)],
}


def land_orders(settings: Settings) -> None:
    """Land ORDER_FILES."""
    for name, content in ORDER_FILES.items():
        lake.land(settings, name, content)


def _without_order_batch(settings: Settings, batch: int) -> None:
    for table in ("orders", "rejected_orders"):
        correct.delete(settings, table, f"_batch_id = {batch}")
    correct.delete(settings, "batch_ledger", f"stream = 'orders' and _batch_id = {batch}")


def _of_orders(where: str) -> str:
    return f"stream = 'orders' and {where}"


ORDER_FAULTS = [
    Fault("an order is deleted", lambda s: correct.delete(s, "orders", "order_id = 'o1'"), ("order_lost",)),
    Fault("orders is restored to an older version", lambda s: _restored(s, "orders"), ("order_altered", "order_lost")),
    Fault("an order stands twice", lambda s: correct.append(s, "orders", "from orders where order_id = 'o1'"), ("order_twice",)),
    Fault(
        "an order is made up",
        lambda s: correct.append(s, "orders", "select * replace ('made-up' as order_id) from orders where order_id = 'o5'"),
        ("order_unknown",),
    ),
    Fault(
        "the total of an order is changed",
        lambda s: correct.update(s, "orders", "order_id = 'o5'", total_micros="1"),
        ("order_altered",),
    ),
    Fault(
        "a cancellation is taken back",
        lambda s: correct.update(s, "orders", "order_id = 'o3'", status="'placed'", cancelled_at="null"),
        ("order_altered",),
    ),
    Fault(
        "an order is moved into another hour",
        lambda s: correct.update(s, "orders", "order_id = 'o5'", order_time="order_time - interval '7 hours'"),
        ("order_altered",),
    ),
    Fault(
        "the fingerprint of an order is changed",
        lambda s: correct.update(s, "orders", "order_id = 'o2'", fingerprint="fingerprint + 1"),
        ("order_altered",),
    ),
    Fault(
        "an order is given to another batch",
        lambda s: correct.update(s, "orders", "order_id = 'o9'", _batch_id="0"),
        ("order_altered",),
    ),
    Fault(
        "rejected and conflicting orders are deleted",
        lambda s: correct.delete(s, "rejected_orders", "true"),
        ("rejected_lost",),
    ),
    Fault(
        "a rejected order stands twice",
        lambda s: correct.append(s, "rejected_orders", "from rejected_orders where source_line = 0"),
        ("rejected_twice",),
    ),
    Fault(
        "a rejected order is made up",
        lambda s: correct.append(
            s, "rejected_orders", "select * replace (4711 as source_line) from rejected_orders where outcome = 'conflict' limit 1"
        ),
        ("rejected_unknown",),
    ),
    Fault(
        "the fingerprint that a conflict lost to is changed",
        lambda s: correct.update(s, "rejected_orders", "record_id = 'o2'", accepted_fingerprint="fingerprint"),
        ("rejected_lost", "rejected_unknown"),
    ),
    Fault(
        "rows of the ledger of orders are deleted",
        lambda s: correct.delete(s, "batch_ledger", _of_orders("event_hour = '2025-06-02T11:00:00Z'")),
        ("ledger_missing",),
    ),
    Fault(
        "the ledger of orders is changed so that it still adds up",
        lambda s: correct.update(s, "batch_ledger", _of_orders("duplicate > 0"), offered="offered + 1", duplicate="duplicate + 1"),
        ("ledger_altered",),
    ),
    Fault(
        "the ledger of orders is changed so that it does not add up",
        lambda s: correct.update(s, "batch_ledger", _of_orders("accepted > 0 and _batch_id = 0"), accepted="accepted - 1"),
        ("ledger_altered", "ledger_missing"),
    ),
    Fault(
        "rows of the ledger of orders stand twice",
        lambda s: correct.append(s, "batch_ledger", "from batch_ledger where stream = 'orders' and _batch_id = 0"),
        ("ledger_twice",),
    ),
    Fault(
        "a batch of orders is lost from all tables but its plan",
        lambda s: _without_order_batch(s, 0),
        ("ledger_missing", "order_lost", "rejected_lost"),
    ),
]

# planted at a time, in this order: none takes away what another wants, and no two of a group have one cause
ORDER_FAULTS_TOGETHER = (
    (
        *("an order is deleted", "an order is made up", "the total of an order is changed"),
        *("rejected and conflicting orders are deleted", "rows of the ledger of orders are deleted"),
    ),
    (
        *("an order stands twice", "a cancellation is taken back", "a rejected order stands twice"),
        "the ledger of orders is changed so that it still adds up",
    ),
    ("an order is moved into another hour", "a rejected order is made up", "rows of the ledger of orders stand twice"),
    ("the fingerprint of an order is changed", "the ledger of orders is changed so that it does not add up"),
    ("an order is given to another batch", "the fingerprint that a conflict lost to is changed"),
    ("orders is restored to an older version",),
    ("a batch of orders is lost from all tables but its plan",),
)
