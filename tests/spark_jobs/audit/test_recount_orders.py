"""The recount of orders: agrees with any ingest, finds what was planted, puts it right once. Homes are made without Spark."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import correct
import lake
import pytest
import sparkless
from crash_points import CORRECTION
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed import run_code

from services.simulator.chaos.traffic import Shape, Traffic
from spark_jobs.attribution.job import attribute
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import ReconcileReport, reconcile
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.status import read_status
from spark_jobs.steps import CRASH_VARIABLE, Step
from spark_jobs.units import HourRange
from tests.spark_jobs.homes.attribution_lake import credits, revisions
from tests.spark_jobs.homes.faults import ORDER_FAULTS, ORDER_FAULTS_TOGETHER, land_orders

pytestmark = pytest.mark.homes


def causes(report: ReconcileReport) -> tuple[str, ...]:
    return tuple(sorted({found.cause for found in report.differences}))


FAULTS_BY_NAME = {fault.name: fault for fault in ORDER_FAULTS}
assert FAULTS_BY_NAME.keys() == {name for names in ORDER_FAULTS_TOGETHER for name in names}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> Settings:
    """A home with orders of every kind in batches of two files; nobody changes it."""
    made = load_settings(home=tmp_path_factory.mktemp("orders") / "home")
    shutil.copytree(empty_lakehouse, made.lakehouse_uri)
    land_orders(made)
    sparkless.ingest(made, files_per_batch=2)
    return made


@pytest.fixture
def home(base: Settings, tmp_path: Path) -> Settings:
    """A copy of the base home to tamper with."""
    return correct.copied(base, tmp_path / "home")


@pytest.fixture(scope="module")
def truth(base: Settings) -> dict[str, Any]:
    """What the base home holds."""
    return correct.contents(base)


def test_clean_data_has_no_difference(base: Settings) -> None:
    report = reconcile(base, None, run_id="clean")
    assert report.differences == []
    ((orders,),) = correct.rows(base, "select count(*) from orders")
    assert orders == sum(hour.orders_expected for hour in report.hours) == sum(hour.orders_found for hour in report.hours) == 8
    outcomes = (
        "select sum(accepted)::bigint, sum(duplicate)::bigint, sum(conflict)::bigint, sum(rejected)::bigint, sum(late)::bigint"
    )
    assert correct.rows(base, f"{outcomes} from batch_ledger") == [(12, 2, 3, 4, 7)]


def test_a_recount_of_everything_removes_what_it_does_not_use(home: Settings) -> None:
    reconcile(home, None)
    used = sorted(path.name for path in home.recount_path.rglob("*.parquet"))
    assert used
    (home.recount_path / "parsed" / "orders" / "unused.parquet").write_bytes(b"of a file that is gone")
    reconcile(home, HourRange.of(datetime(2025, 6, 2, 11, tzinfo=UTC)))
    assert (home.recount_path / "parsed" / "orders" / "unused.parquet").exists()
    assert reconcile(home, None).differences == []
    assert sorted(path.name for path in home.recount_path.rglob("*.parquet")) == used


@pytest.mark.parametrize("names", ORDER_FAULTS_TOGETHER, ids=lambda names: names[0])
def test_faults_are_found_and_put_right_once(home: Settings, truth: dict[str, Any], names: tuple[str, ...]) -> None:
    expected: set[str] = set()
    for fault in (FAULTS_BY_NAME[name] for name in names):
        assert not expected & set(fault.causes)
        fault.plant(home)
        expected |= set(fault.causes)
    repaired = reconcile(home, None, repair=True, run_id="r")
    assert set(causes(repaired)) == expected
    assert repaired.remaining == []
    assert correct.contents(home) == truth
    status = read_status(home)
    assert status.conservation_holds, status.problems
    said = correct.rows(home, "select distinct layer, cause from reconciliations where is_repaired")
    assert {cause for _, cause in said} == expected
    assert {layer for layer, _ in said} <= {"orders", "rejected_orders", "orders_ledger"}
    assert reconcile(home, None).differences == []


def test_only_the_hours_asked_are_told(home: Settings, truth: dict[str, Any]) -> None:
    correct.update(home, "orders", "order_id = 'o3'", total_micros="1")
    hours = HourRange.of(datetime(2025, 6, 2, 13, tzinfo=UTC))
    (found,) = reconcile(home, hours).differences
    assert (found.layer, found.cause, found.event_hour, found.rows_different) == ("orders", "order_altered", hours.start, 1)
    assert "order o3" in found.detail and found.detail.endswith(": total_micros")
    assert reconcile(home, HourRange.of(datetime(2025, 6, 2, 11, tzinfo=UTC))).differences == []
    # its cancellation lies in an hour of its own, where it is told too
    assert causes(reconcile(home, HourRange.of(datetime(2025, 6, 2, 20, tzinfo=UTC)), repair=True)) == ("order_altered",)
    assert correct.contents(home) == truth


def test_files_that_the_checkpoint_calls_read_and_no_batch_has_are_brought_back(settings: Settings, tmp_path: Path) -> None:
    """As after `adtally --home ../data ingest` of a version that left files alone whose path it could not place."""
    land_orders(settings)
    sparkless.ingest(settings)
    records = [
        *(lake.order("m1"), lake.order("m1"), lake.order("m2", order_time="2025-06-02T08:00:00Z", total_micros=0)),
        *(lake.order("o5", order_time="2025-06-02T15:30:00Z", received_at="2025-06-02T16:00:00Z", status="cancelled"),),
        *(lake.order("o2"), lake.order("m3", store_id="")),
    ]
    missed = lake.land(settings, "orders/eu-west/missed.jsonl", records)
    checkpoint = sparkless.Checkpoint(settings, "orders")
    checkpoint.end(checkpoint.plan([missed]))
    assert causes(reconcile(settings, None)) == ("file_missed",)
    assert reconcile(settings, None, repair=True).remaining == []
    assert read_status(settings).conservation_holds
    assert reconcile(settings, None).differences == []
    twin = correct.copied(settings, tmp_path / "twin")
    for part in ("lakehouse", "checkpoints"):
        shutil.rmtree(twin.home_path / part)
    ensure_tables(twin)
    sparkless.ingest(twin, files_per_batch=1)
    both = [correct.contents(each, identity=False) for each in (settings, twin)]
    for held in both:
        held["orders"] = [row for row in held["orders"] if row[0] != "o7"]  # its received_at is the time of its ingestion
    assert both[0] == both[1]


def test_a_batch_that_was_killed_waits_for_its_query_or_is_finished(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [lake.order("k1"), lake.order("o1", status="cancelled"), lake.order("o9", user_id="x"), lake.order("k2", currency="")]
    late = lake.land(home, "orders/us-east/late.jsonl", records)
    # a copy of a home lies elsewhere: its query has seen the files of the first one
    checkpoint = sparkless.Checkpoint(home, "orders")
    batch = checkpoint.plan([late])
    with pytest.raises(KeyboardInterrupt):
        sparkless.run(home, "orders", batch, fail_after=Step.ORDERS, monkeypatch=monkeypatch)
    assert reconcile(home, None).differences == []  # the next ingest finishes it
    shutil.rmtree(home.checkpoints_path / "orders")
    found = reconcile(home, None, repair=True)
    assert set(causes(found)) == {"batch_unfinished_without_checkpoint"}
    assert found.remaining == []
    assert read_status(home).conservation_holds
    assert reconcile(home, None).differences == []


@pytest.mark.parametrize("name", ["eu-west/1.jsonl", "us-east/2.jsonl", "us-east/5.jsonl", "eu-west/3.jsonl"])
def test_a_file_that_is_gone_is_said_and_nothing_is_taken_back(home: Settings, truth: dict[str, Any], name: str) -> None:
    (home.landing_path / "orders" / name).unlink()
    report = reconcile(home, None, repair=True)
    assert causes(report) == ("raw_missing",)
    assert len(report.remaining) == len(report.differences)
    assert correct.contents(home) == truth
    # and what is there is judged all the same
    sure = {"eu-west/1.jsonl": "o9", "us-east/2.jsonl": "o9", "us-east/5.jsonl": "o5", "eu-west/3.jsonl": "o9"}[name]
    correct.update(home, "orders", f"order_id = '{sure}'", store_id="'other'")
    assert causes(reconcile(home, None, repair=True)) == ("order_altered", "raw_missing")
    assert correct.contents(home) == truth


def test_plans_that_are_gone(home: Settings, truth: dict[str, Any]) -> None:
    """A home that is older than the recount of orders, and whose log Delta has cleaned: its rows stand for themselves."""
    DeltaTable(home.table_uri("orders")).create_checkpoint()
    for version in range(2):  # that of the first batch
        (Path(home.table_uri("orders")) / "_delta_log" / f"{version:020d}.json").unlink()
    assert reconcile(home, None, repair=True).differences == []
    assert correct.contents(home) == truth
    correct.update(home, "orders", "order_id = 'o9'", store_id="'other'")  # of a batch whose plan is there
    assert causes(reconcile(home, None, repair=True)) == ("order_altered",)
    assert correct.contents(home) == truth


def test_after_a_repair_the_ingest_and_a_replay_go_on_as_before(settings: Settings) -> None:
    land_orders(settings)
    sparkless.ingest(settings, files_per_batch=2)
    correct.delete(settings, "orders", "order_id = 'o1'")
    correct.append(settings, "orders", "select * replace ('made-up' as order_id) from orders where order_id = 'o5'")
    assert causes(reconcile(settings, None, repair=True)) == ("order_lost", "order_unknown")
    lake.land(settings, "orders/eu-west/resent.jsonl", [lake.order("o1"), lake.order("made-up")])
    (report,) = sparkless.ingest(settings)
    assert (report.accepted, report.duplicate) == (1, 1)
    held = correct.contents(settings)
    shutil.rmtree(settings.checkpoints_path / "orders")
    assert sum(report.accepted for report in sparkless.ingest(settings)) == 0
    assert correct.contents(settings)["orders"] == held["orders"]
    assert reconcile(settings, None).differences == []


STEPS = [
    (moment, step)
    for step in (Step.CORRECTION_DECIDED, Step.CORRECTED_ORDERS, Step.CORRECTED_ORDER_REJECTS, Step.CORRECTED_LEDGER)
    for moment in ("before", "after")
] + [("before", Step.RECONCILIATIONS), ("before", Step.CORRECTION_DONE), ("after", Step.CORRECTION_DONE)]
QUICK = [("after", Step.CORRECTED_ORDERS)]


def test_the_steps_are_those_of_a_correction() -> None:
    assert {step for _, step in STEPS} <= set(CORRECTION)


@pytest.mark.parametrize(
    ("moment", "step"), [pytest.param(*point, marks=() if point in QUICK else pytest.mark.crash) for point in STEPS]
)
def test_killed_at_every_step_of_a_repair(home: Settings, truth: dict[str, Any], moment: str, step: Step) -> None:
    correct.delete(home, "orders", "order_id = 'o1'")
    correct.update(home, "orders", "order_id = 'o3'", status="'placed'")
    correct.append(home, "orders", "select * replace ('made-up' as order_id) from orders where order_id = 'o5'")
    correct.delete(home, "rejected_orders", "source_line = 0")
    correct.delete(home, "batch_ledger", "stream = 'orders' and event_hour = '2025-06-02T11:00:00Z'")
    code = (
        "from spark_jobs.config import load_settings; from spark_jobs.corrections.reconcile import reconcile; "
        f"reconcile(load_settings(home={str(home.home_path)!r}), None, repair=True, run_id='killed')"
    )
    assert run_code(code, **{CRASH_VARIABLE: f"{moment}:{step}:0"}) == -signal.SIGKILL
    reconcile(home, None, repair=True, run_id="after")
    assert correct.contents(home) == truth
    assert reconcile(home, None).differences == []
    assert not any((home.home_path / "corrections").iterdir())


def test_a_correction_that_was_overtaken_is_decided_anew(home: Settings) -> None:
    """Killed before its first commit, and the lost order was sent again before the next run: it is not put back as well."""
    correct.delete(home, "orders", "order_id = 'o9'")
    code = (
        "from spark_jobs.config import load_settings; from spark_jobs.corrections.reconcile import reconcile; "
        f"reconcile(load_settings(home={str(home.home_path)!r}), None, repair=True, run_id='killed')"
    )
    assert run_code(code, **{CRASH_VARIABLE: f"after:{Step.CORRECTION_DECIDED}:0"}) == -signal.SIGKILL
    original = json.loads((home.landing_path / "orders/us-east/5.jsonl").read_text().splitlines()[0])
    again = lake.land(home, "orders/us-east/again.jsonl", [original])
    checkpoint = sparkless.Checkpoint(home, "orders")
    batch = checkpoint.plan([again])
    sparkless.run(home, "orders", batch)
    checkpoint.end(batch)
    reconcile(home, None, repair=True)
    assert correct.rows(home, "select count(*) from orders where order_id = 'o9'") == [(1,)]
    assert reconcile(home, None).differences == []


SHAPES = st.builds(
    Shape,
    seed=st.integers(0, 2**32 - 1),
    records=st.integers(200, 600),
    event_files=st.just(1),
    order_files=st.integers(1, 6),
    runs=st.sampled_from((1, 2)),
    files_per_batch=st.sampled_from((1, 2, 100)),
    split_bytes=st.sampled_from((4096, 16 * 1024 * 1024)),
)


@settings(max_examples=4, deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(shape=SHAPES)
def test_the_recount_agrees_with_any_orders_and_finds_any_change(
    shape: Shape, tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path
) -> None:
    home = load_settings(home=tmp_path_factory.mktemp("any") / "home", split_bytes=shape.split_bytes)
    shutil.copytree(empty_lakehouse, home.lakehouse_uri)
    for files in Traffic(shape).runs():
        for file in (file for file in files if file.name.startswith("orders/")):
            sparkless.land(home, file.name, file.stored, file.modified_ms)
        sparkless.ingest(home, files_per_batch=shape.files_per_batch)
    whole = reconcile(home, None)
    assert whole.differences == []
    ids = [name for (name,) in correct.rows(home, "select order_id from orders")]
    assert sum(hour.orders_found for hour in whole.hours) == len(ids)
    if not ids:
        return
    truth = correct.contents(home)
    rng = random.Random(shape.seed)
    where = f"order_id = '{rng.choice(ids)}'"
    change = rng.choice(("user_id", "region", "source_file", "currency", "_query_id"))
    changes: list[Callable[[], None]] = [
        lambda: correct.delete(home, "orders", where),
        lambda: correct.update(home, "orders", where, **{change: "'x'"}),
        lambda: correct.update(home, "orders", where, has_placed="not has_placed"),
        lambda: correct.append(home, "orders", f"from orders where {where}"),
    ]
    rng.choice(changes)()
    assert len(reconcile(home, None).differences) == 1
    assert reconcile(home, None, repair=True).remaining == []
    assert correct.contents(home) == truth
    shutil.rmtree(home.home_path)


def test_credits_follow_a_repair(settings: Settings) -> None:
    lake.campaigns(settings)
    click = {"event_type": "click", "campaign_id": "c-cpc"}
    lake.land(settings, "events/eu-west/1.jsonl", [lake.event("e1", **click), lake.event("e2", ad_id="a-2", **click)])
    lake.land(settings, "orders/eu-west/1.jsonl", [lake.order("o1"), lake.order("o2"), lake.order("o3", user_id="nobody")])
    sparkless.ingest(settings, "events")
    sparkless.ingest(settings)
    attribute(settings)
    truth = credits(settings)
    assert {key[0] for key in truth} == {"o1", "o2"}
    correct.delete(settings, "orders", "order_id = 'o1'")
    correct.append(settings, "orders", "select * replace ('made-up' as order_id) from orders where order_id = 'o2'")
    correct.update(settings, "orders", "order_id = 'o2'", total_micros="1000")
    attribute(settings)
    assert {key[0] for key in credits(settings)} == {"o2", "made-up"}
    assert credits(settings) != truth
    correct.append(settings, "orders", "select * replace ('unseen' as order_id) from orders where order_id = 'o2'")
    assert causes(reconcile(settings, None, repair=True)) == ("order_altered", "order_lost", "order_unknown")
    attribute(settings)
    assert credits(settings) == truth
    assert revisions(settings)["made-up"] == [(1, "placed", "order"), (2, "cancelled", "order_removed")]
    assert "unseen" not in revisions(settings)  # it came and went between two runs
    assert attribute(settings).revisions == 0


@pytest.mark.parametrize(
    ("broken", "by", "layers"),
    [
        ("_SHARED", ("user_id", "store_id", "currency"), {"rejected_orders", "orders_ledger"}),
        ("_add", lambda record, row: None, {"orders"}),
        ("signed", lambda fingerprint: 7, {"orders", "rejected_orders"}),
    ],
)
def test_a_rule_that_the_ingest_breaks_is_found(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, broken: str, by: Any, layers: set[str]
) -> None:
    monkeypatch.setattr(f"spark_jobs.ingest.orders.{broken}", by)
    land_orders(settings)
    sparkless.ingest(settings)
    assert {found.layer for found in reconcile(settings, None).differences} == layers


def test_a_rule_that_the_recount_breaks_is_found(base: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spark_jobs.audit.recount_orders._FINGERPRINT", "7")
    assert {found.layer for found in reconcile(base, None).differences} == {"orders", "rejected_orders"}
