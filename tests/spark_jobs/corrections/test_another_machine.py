"""A repair and a backfill whose machine dies in the middle: another one, with an empty home, finishes them."""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import correct
import lake
import sparkless
from killed import run_code
from store import EVERYWHERE, Location, variables

from spark_jobs.corrections.backfill import backfill
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.operate.watermark import close_by_hand
from spark_jobs.steps import CRASH_VARIABLE, Step
from spark_jobs.units import HourRange
from tests.spark_jobs.homes.faults import land_orders

HOURS = HourRange(datetime(2025, 6, 2, 9, tzinfo=UTC), datetime(2025, 6, 2, 11, tzinfo=UTC))
_REPAIR = """
from spark_jobs.config import load_settings
from spark_jobs.corrections.reconcile import reconcile
reconcile(load_settings(), None, repair=True)
"""
_BACKFILL = """
from datetime import UTC, datetime
from spark_jobs.config import load_settings
from spark_jobs.corrections.backfill import backfill
from spark_jobs.units import HourRange
backfill(load_settings(), HourRange(datetime(2025, 6, 2, 9, tzinfo=UTC), datetime(2025, 6, 2, 11, tzinfo=UTC)))
"""


@EVERYWHERE
def test_another_machine_finishes_a_repair_and_a_backfill(place: Location, tmp_path: Path, empty_lakehouse: Path) -> None:
    first, second, third = place.machines(tmp_path, 3)
    place.copy(str(empty_lakehouse), first.lakehouse_uri)
    lake.campaigns(first)
    lake.land(first, "events/eu-west/1.jsonl", [lake.event("t1"), lake.event("t2", event_type="click"), lake.event("t1")])
    lake.land(first, "events/us-east/2.jsonl", [lake.event("t3", event_time="2025-06-02T09:30:00Z")])
    land_orders(first)
    for stream in ("events", "orders"):
        sparkless.ingest(first, stream, files_per_batch=1)
    close_by_hand(first, HOURS.end + timedelta(hours=1), reason="test", closed_by="test")
    truth = correct.contents(first)

    correct.delete(first, "events", "event_id = 't1'")
    correct.update(first, "orders", "order_id = 'o5'", total_micros="1")
    assert run_code(_REPAIR, **variables(second), **{CRASH_VARIABLE: f"after:{Step.CORRECTED_EVENTS}:0"}) == -signal.SIGKILL
    assert reconcile(third, None, repair=True).remaining == []
    assert correct.contents(third) == truth
    assert reconcile(first, None).differences == []

    lake.campaigns(first, "c-cpm,s-1,cpc,1000000,EUR,2000-01-01T00:00:00Z,")
    assert run_code(_BACKFILL, **variables(third), **{CRASH_VARIABLE: f"after:{Step.CORRECTED_EVENTS}:0"}) == -signal.SIGKILL
    backfill(second, HOURS)
    assert correct.rows(first, "select event_type, sum(spend_nanos)::bigint from events group by all") == [
        ("click", 1_500_000),
        ("impression", 0),
    ]
    assert reconcile(third, None).differences == []
