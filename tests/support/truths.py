"""What the tables hold after an ingest, against the truth of who sent it."""

from __future__ import annotations

from typing import Any

import correct

from spark_jobs.config import Settings

COUNTS = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced")


def assert_truth(home: Settings, truth: dict[str, Any]) -> None:
    """Every count and every nano of the truth, by region, hour, campaign and currency."""
    sums = ", ".join(f"sum({name})::bigint" for name in COUNTS)
    hour = "strftime({}, '%Y-%m-%dT%H:%M:%SZ')"
    held = correct.rows(
        home, f"select region, {hour.format('event_hour')}, {sums} from batch_ledger where stream = 'events' group by all"
    )
    said = [(row["region"], row["event_hour"], *(row[name] for name in COUNTS)) for row in truth["accounting"]]
    assert held == sorted(said, key=repr), sorted({*held} ^ {*said}, key=repr)[:6]
    measures = ("impressions", "clicks", "spend_nanos")  # what a review calls invalid is not decided by an ingest
    sums = ", ".join(f"sum({name} + invalid_{name})::bigint" for name in measures)
    hour = hour.format("date_trunc('hour', event_minute)")
    held = correct.rows(home, f"select campaign_id, region, {hour}, currency, {sums} from minute_metrics group by all")
    keys = ("campaign_id", "region", "event_hour", "currency")
    said = [
        (*(row[key] for key in keys), *(row[name] + row[f"invalid_{name}"] for name in measures)) for row in truth["campaign_hours"]
    ]
    assert held == sorted(said, key=repr)
    ((rows, ids),) = correct.rows(home, "select count(*), count(distinct event_id) from events")
    assert rows == ids == truth["totals"]["accepted"]
    assert correct.rows(home, "select status, count(*) from orders group by all") == sorted(
        (status, truth["orders"][status]) for status in ("placed", "cancelled")
    )


def assert_copied_once(home: Settings) -> None:
    """Each record that was offered is in the raw copy, once."""
    copies = "select count(*), count(distinct (source_partition, source_offset)) from raw_events"
    offered = "select sum(offered)::bigint from batch_ledger where stream = 'events'"
    ((rows, places),), ((records,),) = correct.rows(home, copies), correct.rows(home, offered)
    assert rows == places == records
