"""Backfill: closed hours by today's rules, on a home that was really ingested by other ones."""

from __future__ import annotations

import os
import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import correct
import lake
import pytest
from crash_points import CORRECTION
from killed import run_code
from pyspark.sql import SparkSession
from store import Disk, Location, variables

from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.backfill import backfill
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import TABLES
from spark_jobs.operate.status import read_status
from spark_jobs.steps import CRASH_VARIABLE, Step
from spark_jobs.traffic.review import review
from spark_jobs.units import HourRange

pytestmark = pytest.mark.homes

ROOT = Path(__file__).resolve().parents[3]
NINE = datetime(2025, 6, 2, 9, tzinfo=UTC)
BOTH = HourRange(NINE, NINE + timedelta(hours=2))
OLD = ("c-cpm,s-1,cpm,1000000,EUR,2000-01-01T00:00:00Z,", "c-cpc,s-1,cpc,1000000,EUR,2000-01-01T00:00:00Z,")
NEW = (
    "c-cpm,s-1,cpc,1000000,EUR,2000-01-01T00:00:00Z,",
    "c-cpc,s-1,cpc,1000000,EUR,2000-01-01T00:00:00Z,",
    "c-new,s-1,cpm,1,EUR,2000-01-01T00:00:00Z,",
)


def _files() -> list[tuple[str, list[dict[str, Any]]]]:
    ahead = "2025-06-02T10:20:00Z"  # further ahead of its receipt than five minutes, less than an hour
    return [
        (
            "events/eu-west/1.jsonl",
            [
                lake.event("a1"),
                lake.event("a2", event_type="click"),
                lake.event("a3", campaign_id="c-new"),
                lake.event("b1", event_time="2025-06-02T09:30:00Z", received_at="2025-06-02T09:30:01Z"),
                lake.event("f1", event_time=ahead),  # rejected, and by a longer skew the first of its id
                lake.event("f2", event_time=ahead, campaign_id="c-cpc", event_type="click"),
            ],
        ),
        (
            "events/us-east/2.jsonl",
            [
                lake.event("f1", event_time="2025-06-02T09:59:00Z", user_id="u-2"),  # accepted, until f1 above is
                lake.event("a1"),
                lake.event("l1", received_at="2025-06-02T11:20:00Z"),  # late, until the grace is longer
                lake.event("late", campaign_id="nobody", event_time="2025-06-02T13:00:00Z", received_at="2025-06-02T15:00:00Z"),
            ],
        ),
        (
            "events/eu-west/3.jsonl",
            [lake.event("z", campaign_id="nobody", event_time="2025-06-02T15:00:00Z", received_at="2025-06-02T15:00:00Z")],
        ),
    ]


def _ingested(spark: SparkSession, made: Settings, place: Location, lakehouse: Path, prices: tuple[str, ...]) -> Settings:
    place.copy(str(lakehouse), made.lakehouse_uri)
    lake.campaigns(made, *prices)
    for at, (name, records) in enumerate(_files()):
        path = lake.land(made, name, records)
        os.utime(path, ns=((1_700_000_000 + at) * 10**9,) * 2)
    run_ingest(made, spark=spark)
    return made


@pytest.fixture(scope="module")
def base(place: Location, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> Settings:
    """A home by the rules of then; nobody changes it."""
    made = place.settings(tmp_path_factory.mktemp("backfill") / "home", max_files_per_batch=1)
    return _ingested(spark, made, place, empty_lakehouse, OLD)


TODAY = {"future_skew": timedelta(hours=1), "hour_grace": timedelta(minutes=30)}


@pytest.fixture(scope="module")
def ideal(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> dict[str, Any]:
    """What a home holds that was ingested by today's rules from the start."""
    made = load_settings(home=tmp_path_factory.mktemp("ideal") / "home", max_files_per_batch=1, **TODAY)
    home = _ingested(spark, made, Disk(), empty_lakehouse, NEW)
    review(home, BOTH)
    return correct.contents(home, identity=False)


@pytest.fixture
def home(place: Location, base: Settings, tmp_path: Path) -> Settings:
    """A copy of the base home, with today's rules."""
    made = place.copied(base, tmp_path / "home").model_copy(update=TODAY)
    lake.campaigns(made, *NEW)
    return made


def _versions(settings: Settings) -> dict[str, int | None]:
    return {name: DeltaLog(settings.table_uri(name)).latest_version() for name in TABLES}


def test_the_dry_run_tells_and_changes_nothing(home: Settings) -> None:
    before = _versions(home)
    told = backfill(home, BOTH, dry_run=True)
    assert _versions(home) == before
    done = backfill(home, BOTH)
    assert (told.dry_run, done.dry_run) == (True, False)
    assert told.changes == done.changes
    by_campaign = {change.campaign_id: change for change in told.changes}
    assert {(c.event_date.isoformat(), c.currency) for c in told.changes} == {("2025-06-02", "EUR")}
    # c-cpm: a1, b1, l1 and the f1 of 09:59 cost 1500 each as cpm; by cpc the click a2 does, and f1 moves to 10:20
    assert (by_campaign["c-cpm"].spend_nanos_before, by_campaign["c-cpm"].spend_nanos_after) == (6_000, 1_500_000)
    assert (by_campaign["c-cpm"].impressions, by_campaign["c-cpm"].clicks) == (0, 0)
    assert (by_campaign["c-cpc"].rows, by_campaign["c-cpc"].clicks) == (1, 1)
    assert by_campaign["c-cpc"].spend_nanos_after - by_campaign["c-cpc"].spend_nanos_before == 1_500_000
    assert (by_campaign["c-new"].spend_nanos_before, by_campaign["c-new"].spend_nanos_after) == (0, 1_500)


def test_restated_hours_are_as_if_ingested_by_todays_rules(home: Settings, ideal: dict[str, Any]) -> None:
    published = set(correct.rows(home, "select * from minute_metrics"))
    report = backfill(home, BOTH, reason="new prices")
    assert report.hours_changed == 2
    assert correct.contents(home, identity=False) == ideal
    assert published <= set(correct.rows(home, "select * from minute_metrics"))  # nothing published is rewritten
    assert read_status(home).conservation_holds
    assert reconcile(home, None).differences == []  # the hour is judged by its new rules
    told = "select kind, reason, cause, sum(spend_nanos)::bigint from restatements group by all"
    delta = sum(change.spend_nanos_after - change.spend_nanos_before for change in report.changes)
    assert correct.rows(home, f"select * from ({told}) where kind = 'backfill'") == [
        ("backfill", "new prices", "rules_changed", delta)
    ]
    # a1 and l1 are of one user, ad and moment, a click came twenty minutes before another: the later ones are repeats
    assert correct.rows(home, f"select kind, reason, cause from ({told}) where kind = 'review'") == [
        ("review", "new prices", "repeat_click"),
        ("review", "new prices", "repeat_impression"),
    ]
    versions = _versions(home)
    again = backfill(home, BOTH)
    assert (again.changes, again.hours_changed) == ([], 0)
    assert _versions(home) == versions


def test_in_any_order_and_overlapping_it_is_the_same(home: Settings, ideal: dict[str, Any]) -> None:
    for hours in (HourRange.of(NINE + timedelta(hours=1)), BOTH, HourRange.of(NINE), BOTH):
        backfill(home, hours)
    assert correct.contents(home, identity=False) == ideal
    assert reconcile(home, None).differences == []


def test_an_ingest_and_other_backfills_may_go_on(spark: SparkSession, home: Settings, ideal: dict[str, Any]) -> None:
    lake.land(
        home, "events/eu-west/4.jsonl", [lake.event("n1"), lake.event("a1"), lake.event("f2", event_time="2025-06-02T10:20:00Z")]
    )
    failures: list[BaseException] = []

    def run() -> None:
        try:
            backfill(home, BOTH)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    run_ingest(home, spark=spark)
    for thread in threads:
        thread.join()
    assert failures == []
    backfill(home, BOTH)
    held = correct.contents(home, identity=False)
    assert reconcile(home, None).differences == []
    assert read_status(home).conservation_holds
    assert len(held["events"]) == len(ideal["events"]) + 1


def test_taken_back_by_the_old_rules(base: Settings, home: Settings) -> None:
    review(home, BOTH)
    before = correct.contents(home)
    backfill(home, BOTH)
    lake.campaigns(home, *OLD)
    old = load_settings(home=home.home_path, lakehouse=home.lakehouse, max_files_per_batch=1)
    backfill(old, BOTH)
    assert correct.contents(old) == before
    assert reconcile(old, None).differences == []


def test_the_rules_of_whoever_came_last_hold_though_it_began_earlier(home: Settings) -> None:
    began = datetime.now(UTC)
    review(home, BOTH)
    before = correct.contents(home)
    backfill(home, BOTH, now=began + timedelta(minutes=5))
    lake.campaigns(home, *OLD)
    old = load_settings(home=home.home_path, lakehouse=home.lakehouse, max_files_per_batch=1)
    backfill(old, BOTH, now=began)  # it waited for the other one, or a clock was put back
    assert correct.contents(old) == before
    assert reconcile(old, None).differences == []
    assert backfill(old, BOTH, now=began).hours_changed == 0


def test_hours_that_are_open_or_wrong_are_refused(home: Settings) -> None:
    versions = _versions(home)
    with pytest.raises(UsageError):
        backfill(home, HourRange.of(NINE + timedelta(hours=6)))
    assert _versions(home) == versions
    correct.delete(home, "events", "event_id = 'a1'")
    versions = _versions(home)
    with pytest.raises(AdtallyError, match="event_lost"):
        backfill(home, BOTH)
    assert _versions(home) == versions


QUICK = [("after", Step.CORRECTED_EVENTS), ("before", Step.HOUR_RULES)]
STEPS = [
    *QUICK,
    *(
        pytest.param(moment, step, marks=pytest.mark.crash)
        for step in CORRECTION
        for moment in ("before", "after")
        # a backfill writes none of the others
        if (moment, step) not in QUICK
        and step not in (Step.RECONCILIATIONS, Step.CORRECTED_REJECTS, Step.CORRECTED_ORDERS, Step.CORRECTED_ORDER_REJECTS)
    ),
]


@pytest.mark.parametrize(("moment", "step"), STEPS)
def test_killed_in_the_middle(home: Settings, ideal: dict[str, Any], moment: str, step: Step) -> None:
    environment = {
        **variables(home),
        "ADTALLY_FUTURE_SKEW": "3600",
        "ADTALLY_HOUR_GRACE": "1800",
        CRASH_VARIABLE: f"{moment}:{step}:0",
    }
    code = """
from datetime import UTC, datetime
from spark_jobs.config import load_settings
from spark_jobs.units import HourRange
from spark_jobs.corrections.backfill import backfill
hours = HourRange(datetime(2025, 6, 2, 9, tzinfo=UTC), datetime(2025, 6, 2, 11, tzinfo=UTC))
backfill(load_settings(), hours)
"""
    assert run_code(code, **environment) == -signal.SIGKILL
    backfill(home, BOTH)
    assert correct.contents(home, identity=False) == ideal
    assert reconcile(home, None).differences == []
    restated = "select sum(spend_nanos) from minute_metrics where _run_id is not null"
    both = f"select (select sum(spend_nanos) from restatements), ({restated})"
    ((told, written),) = correct.rows(home, both)
    assert told == written
