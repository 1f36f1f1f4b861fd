"""Reconciliation of a home that was really ingested: clean data has no difference, a planted fault is found and put right once."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import correct
import lake
import pytest
from crash_points import CORRECTION
from edited import edit_marts
from killed import run_code
from pyspark.sql import SparkSession
from store import Location, variables

from orchestration.marts import build_marts
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import ReconcileReport, reconcile
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.operate.status import read_status
from spark_jobs.steps import CRASH_VARIABLE, Step
from spark_jobs.traffic.review import review
from spark_jobs.units import HourRange
from tests.spark_jobs.homes.faults import FAULTS, MADE_UP, NOT_TOGETHER, OF_ONE, ONE, Fault, land_orders

pytestmark = pytest.mark.homes

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def base(place: Location, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> Settings:
    """A home with every kind of record, in several batches and hours; nobody changes it."""
    made = place.settings(tmp_path_factory.mktemp("reconcile") / "home", max_files_per_batch=3)
    place.copy(str(empty_lakehouse), made.lakehouse_uri)
    simulate(made.landing_path, 1_500, seed=5, lines_per_file=250)
    lake.land(made, "events/eu-west/twice.jsonl", [lake.event("t1"), lake.event("t1"), lake.event("t2", campaign_id="nobody")])
    lake.land(
        made,
        "events/us-east/moved.jsonl",
        [lake.event("t1", event_time="2025-06-02T07:30:00Z"), lake.event("t1", user_id="u-9"), lake.event("t3", received_at=None)],
    )
    lake.land(made, "events/eu-west/broken.jsonl.gz", b"no gzip")
    lake.land(made, "events/eu-west/cut.jsonl.gz", gzip.compress(lake.lines([lake.event("t4"), lake.event("t5")]))[:-9])
    land_orders(made)
    lake.land(made, "events/eu-west/bad.jsonl", b'{"event_id":"x"}\n\nnonsense\n' + lake.lines([lake.event("t6", currency="none")]))
    run_ingest(made, spark=spark)
    return made


@pytest.fixture
def home(place: Location, base: Settings, tmp_path: Path) -> Settings:
    """A copy of the base home to tamper with."""
    return place.copied(base, tmp_path / "home")


def _causes(report: ReconcileReport) -> tuple[str, ...]:
    return tuple(sorted({found.cause for found in report.differences}))


def test_clean_data_has_no_difference(base: Settings) -> None:
    report = reconcile(base, None, run_id="clean")
    assert report.differences == []
    held = correct.rows(base, "select count(*), sum(spend_nanos)::bigint from events")
    assert [(sum(h.events_expected for h in report.hours), sum(h.nanos_expected for h in report.hours))] == held
    said = correct.rows(base, "select cause, count(*) from reconciliations where run_id = 'clean' group by all")
    assert said == [("none", len(report.hours))]
    reconcile(base, None, run_id="clean")  # a run says once what it found
    assert correct.rows(base, "select cause, count(*) from reconciliations where run_id = 'clean' group by all") == said


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_and_put_right_once(home: Settings, truth: dict[str, Any], fault: Fault) -> None:
    fault.plant(home)
    repaired = reconcile(home, None, repair=True, run_id="r")
    assert _causes(repaired) == fault.causes
    assert repaired.remaining == []
    assert correct.contents(home) == truth
    status = read_status(home)
    assert status.conservation_holds, status.problems
    assert correct.rows(home, "select distinct cause from reconciliations where is_repaired") == [(c,) for c in fault.causes]
    again = reconcile(home, None)
    assert again.differences == []


@pytest.fixture(scope="module")
def truth(base: Settings) -> dict[str, Any]:
    """What the base home holds."""
    return correct.contents(base)


def test_without_repair_nothing_changes(home: Settings) -> None:
    correct.delete(home, "events", ONE)
    correct.update(home, "minute_metrics", "campaign_id = 'nobody'", spend_nanos="spend_nanos + 5")
    before = correct.contents(home)
    hours = HourRange.of(datetime(2025, 6, 2, 10, tzinfo=UTC))
    found = reconcile(home, hours)
    assert [(d.layer, d.cause, d.rows_different, d.is_repaired) for d in found.differences] == [
        ("events", "event_lost", 1, False),
        ("minute_metrics", "increment_altered", 1, False),
    ]
    lost, altered = found.differences
    assert (lost.event_hour, lost.campaign_id, lost.rows_expected, lost.rows_found) == (hours.start, "c-cpm", 1, 0)
    assert altered.nanos_found - altered.nanos_expected == 5
    assert found.hours[0].events_expected - found.hours[0].events_found == 1
    assert correct.contents(home) == before
    # an hour beside it has none
    assert reconcile(home, HourRange.of(datetime(2025, 6, 2, 11, tzinfo=UTC))).differences == []


def test_what_was_put_right_says_why_with_its_money(home: Settings) -> None:
    spent = correct.rows(home, f"select sum(impressions)::bigint, sum(spend_nanos)::bigint from minute_metrics where {OF_ONE}")
    correct.delete(home, "minute_metrics", OF_ONE)
    names = correct.rows(home, "select record_uuid from minute_metrics")
    reconcile(home, None, repair=True, run_id="why")
    told = "sum(impressions)::bigint, sum(spend_nanos)::bigint"
    where = "run_id = 'why' and kind = 'repair' and cause = 'increment_missing'"
    assert correct.rows(home, f"select {told} from restatements where {where}") == spent
    assert correct.rows(home, "select distinct _run_id from minute_metrics where _run_id is not null") == [("why",)]
    # a lost increment comes back under its own name
    lost = "select record_uuid from minute_metrics where _run_id is not null"
    assert correct.rows(home, lost) and not set(correct.rows(home, lost)) & set(names)


def test_a_file_that_is_gone_is_said_and_nothing_is_taken_back(home: Settings, truth: dict[str, Any]) -> None:
    gone = home.landing_path / "events" / "eu-west" / "twice.jsonl"
    gone.unlink()
    report = reconcile(home, None, repair=True)
    assert _causes(report) == ("raw_missing",)
    assert [d.is_repaired for d in report.differences] == [False] * len(report.differences)
    assert correct.contents(home) == truth


def _small(spark: SparkSession, home: Settings) -> None:
    """A small home that lies where it was ingested: an ingest of it can go on, that of a copy reads all files again."""
    lake.campaigns(home)
    for at, records in enumerate(([lake.event("t1"), lake.event("t1"), lake.event("t2")], [lake.event("t1", user_id="u-9")])):
        path = lake.land(home, f"events/eu-west/{at}.jsonl", records)
        os.utime(path, ns=(at * 10**9,) * 2)
    run_ingest(home, spark=spark)


def test_a_missed_file_becomes_a_batch_of_its_own(
    spark: SparkSession, settings: Settings, empty_lakehouse: Path, tmp_path: Path
) -> None:
    home = settings
    _small(spark, home)
    records = [lake.event("m1"), lake.event("t1"), lake.event("m2", event_time="2025-06-02T08:00:00Z"), lake.event("m3", ad_id="")]
    # the query has it in its own list, as after a crash of a defective version, but no batch has
    path = lake.land(home, "events/eu-west/missed.jsonl", records)
    log = home.checkpoints_path / "events" / "sources" / "0"
    last = max(log.glob("[0-9]*"), key=lambda entry: int(entry.stem))
    entry = json.loads(last.read_text().splitlines()[-1])
    entry |= {"path": path.as_uri(), "timestamp": path.stat().st_mtime_ns // 10**6}
    last.write_text(last.read_text().rstrip("\n") + "\n" + json.dumps(entry) + "\n")
    report = reconcile(home, None, repair=True)
    assert _causes(report) == ("file_missed",)
    assert report.remaining == []
    assert read_status(home).conservation_holds
    assert reconcile(home, None).differences == []
    twin = load_settings(home=tmp_path / "twin", max_files_per_batch=1)
    shutil.copytree(empty_lakehouse, twin.lakehouse_uri)
    _small(spark, twin)
    lake.land(twin, "events/eu-west/missed.jsonl", records)
    run_ingest(twin, spark=spark)
    for each in (home, twin):  # what was missed is marked by the review, as a repair judges no traffic
        review(each)
    assert correct.contents(home, identity=False) == correct.contents(twin, identity=False)


def test_after_a_repair_the_ingest_and_a_replay_go_on_as_before(spark: SparkSession, settings: Settings) -> None:
    home = settings
    _small(spark, home)
    correct.delete(home, "events", ONE)
    correct.append(home, "events", MADE_UP.replace("'t1'", "'t2'"))
    assert _causes(reconcile(home, None, repair=True)) == ("event_lost", "event_unknown")
    resent = [lake.event("t1"), lake.event("t1", ad_id="other"), lake.event("made-up", campaign_id="nobody")]
    lake.land(home, "events/eu-west/resent.jsonl", resent)
    report = run_ingest(home, spark=spark)
    assert (report.accepted, report.duplicate, report.conflict) == (1, 1, 1)  # the key index knows what is there, and what is not
    assert reconcile(home, None).differences == []
    held = correct.contents(home)
    shutil.rmtree(home.checkpoints_path / "events")
    assert run_ingest(home, spark=spark).accepted == 0
    assert correct.contents(home)["events"] == held["events"]
    assert correct.contents(home)["minute_metrics"] == held["minute_metrics"]
    assert reconcile(home, None).differences == []


def test_a_batch_whose_checkpoint_is_gone_is_finished(place: Location, spark: SparkSession, base: Settings, tmp_path: Path) -> None:
    killed = place.settings(tmp_path / "killed", max_files_per_batch=3)
    shutil.copytree(base.landing_path, killed.landing_path)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **variables(killed),
        "ADTALLY_MAX_FILES_PER_BATCH": "3",
        CRASH_VARIABLE: f"after:{Step.EVENTS}:1",
    }
    command = [sys.executable, "-m", "spark_jobs", "ingest"]
    assert subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    waiting = reconcile(killed, None)
    assert waiting.differences == []  # the next ingest will finish it
    shutil.rmtree(killed.checkpoints_path / "events")
    found = reconcile(killed, None, repair=True)
    assert "batch_unfinished_without_checkpoint" in _causes(found)
    assert found.remaining == []
    run_ingest(killed, spark=spark)
    assert reconcile(killed, None).differences == []
    assert read_status(killed).conservation_holds
    assert correct.contents(killed, identity=False)["minute_metrics"] == correct.contents(base, identity=False)["minute_metrics"]


# those of orders are killed in tests/spark_jobs/audit/test_recount_orders.py
NOT_OF_EVENTS = (Step.HOUR_RULES, Step.CORRECTED_ORDERS, Step.CORRECTED_ORDER_REJECTS)
STEPS = [(moment, step) for step in CORRECTION for moment in ("before", "after") if step not in NOT_OF_EVENTS]


QUICK = [("after", Step.CORRECTION_DECIDED), ("after", Step.CORRECTED_EVENTS), ("before", Step.RESTATEMENTS)]


@pytest.mark.parametrize(
    ("moment", "step"), [pytest.param(*point, marks=() if point in QUICK else pytest.mark.crash) for point in STEPS]
)
def test_killed_at_every_step_of_a_repair(home: Settings, truth: dict[str, Any], moment: str, step: Step) -> None:
    correct.delete(home, "events", "event_hour = 10")
    correct.append(home, "events", MADE_UP.replace("'t1'", "'t4'"))
    correct.delete(home, "minute_metrics", OF_ONE)
    correct.delete(home, "rejected_events", "source_line = 0")
    correct.delete(home, "batch_ledger", "stream = 'events' and event_hour = '2025-06-02T10:00:00Z'")
    code = (
        "from spark_jobs.config import load_settings; from spark_jobs.corrections.reconcile import reconcile; "
        "reconcile(load_settings(), None, repair=True, run_id='killed')"
    )
    assert run_code(code, **variables(home), **{CRASH_VARIABLE: f"{moment}:{step}:0"}) == -signal.SIGKILL
    reconcile(home, None, repair=True, run_id="after")
    assert correct.contents(home) == truth
    assert reconcile(home, None).differences == []
    twice = "select run_id, event_hour, region, campaign_id, currency, cause from restatements group by all having count(*) > 1"
    assert correct.rows(home, twice) == []
    # whichever run it was that put it right, it is said once
    said = correct.rows(home, "select sum(impressions + clicks)::bigint from restatements")
    assert said == correct.rows(home, "select sum(impressions + clicks)::bigint from minute_metrics where _run_id is not null")
    assert not any((home.home_path / "corrections").iterdir())


def test_what_was_parsed_and_the_plans_may_be_deleted(home: Settings) -> None:
    reconcile(home, None)
    (home.recount_path / "plans.json").write_text("{")
    assert reconcile(home, None).differences == []
    shutil.rmtree(home.recount_path)
    assert reconcile(home, None).differences == []


def test_hours_and_campaigns_are_told_apart(home: Settings) -> None:
    hours = correct.rows(home, "select distinct date_trunc('hour', event_time) from events")
    start = min(hours)[0]
    span = HourRange(start, start + timedelta(hours=2))
    assert [result.hour for result in reconcile(home, span).hours] == [start, start + timedelta(hours=1)]


@pytest.mark.parametrize("seed", [1, 2])
def test_several_faults_at_once(home: Settings, truth: dict[str, Any], seed: int) -> None:
    chosen = random.Random(seed).sample([fault for fault in FAULTS if fault.name not in NOT_TOGETHER], 4)
    for fault in chosen:
        fault.plant(home)
    report = reconcile(home, None, repair=True)
    assert set(_causes(report)) >= {chosen[0].causes[0]}
    assert report.remaining == []
    assert correct.contents(home) == truth
    assert reconcile(home, None).differences == []


def test_a_mart_that_contradicts_its_versions_is_told(home: Settings) -> None:
    build_marts(home)
    assert reconcile(home, None).differences == []
    with edit_marts(home.marts_path) as marts:
        marts.execute(
            "update fct_campaign_minute set spend_nanos = spend_nanos + 1, clicks = clicks + 1 where campaign_id = 'nobody'"
        )
        marts.execute("update fct_event_accounting set late = late + 1 where event_hour = '2025-06-02 07:00:00'")
    found = reconcile(home, None, repair=True)
    assert [(d.event_hour, d.layer, d.cause, d.campaign_id, d.nanos_found - d.nanos_expected) for d in found.remaining] == [
        (datetime(2025, 6, 2, 7, tzinfo=UTC), "marts", "mart_differs", None, 0),
        (datetime(2025, 6, 2, 10, tzinfo=UTC), "marts", "mart_differs", "nobody", 1),
    ]
    made_up = "select * replace ('0-0' as record_uuid, 'a-0' as ad_id, 'us-east' as region) from minute_metrics"
    correct.append(home, "minute_metrics", f"{made_up} where {OF_ONE} limit 1")
    reconcile(home, None, repair=True)
    build_marts(home)  # takes in negative increments and sums that come to nothing
    assert reconcile(home, None).differences == []
