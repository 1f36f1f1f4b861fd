"""What a hand, a crash or a defect does to a home that has event t1 of ad a-1 in eu-west, and what reconciliation says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import correct
from deltalake import DeltaTable

from spark_jobs.config import Settings


@dataclass(frozen=True)
class Fault:
    """What a hand, a crash or a defect does to a home, and the causes that reconciliation tells."""

    name: str
    plant: Callable[[Settings], None]
    causes: tuple[str, ...]


def _restored(settings: Settings, table: str) -> None:
    """The table as it was two versions ago."""
    held = DeltaTable(settings.table_uri(table))
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
