"""Closed hours in Dagster: ranges in one run, checks that hold up what comes after them, open hours refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from deltalake import DeltaTable, write_deltalake
from lake import campaigns, event, land, order
from pyspark.sql import SparkSession

from expectations import validate_marts
from orchestration.alerts.checks import signal_checks
from orchestration.assets.quality import CHECKED, EXPECTATIONS_CHECK
from orchestration.definitions import build_definitions
from orchestration.marts import query_marts
from orchestration.partitions import key_of, range_tags
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import TABLES
from spark_jobs.operate.watermark import read_closing
from spark_jobs.units import HourRange
from tests.orchestration.marts.delta_files import utc

pytestmark = pytest.mark.homes

CLOSED = HourRange(utc("2025-06-02T10:00"), utc("2025-06-02T12:00"))
OPEN_KEY = "2025-06-02-12:00"


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Path:
    """A home of which the hours of CLOSED are closed, by sources that have come to 13:00. In the second, no campaign is known."""
    settings = load_settings(home=tmp_path_factory.mktemp("ingested"))
    campaigns(settings)
    records = [event(f"a{n}", event_time=f"2025-06-02T10:{n:02}:00Z", received_at=f"2025-06-02T10:{n:02}:01Z") for n in range(20)]
    records += [
        event(f"b{n}", event_time="2025-06-02T11:05:00Z", received_at="2025-06-02T11:05:01Z", campaign_id="c-unknown")
        for n in range(3)
    ]
    records += [event("late", event_time="2025-06-02T10:59:00Z", received_at="2025-06-02T13:00:00Z"), event("a1")]
    land(settings, "events/eu/a.jsonl", records)
    land(settings, "orders/eu/a.jsonl", [order("o1", received_at="2025-06-02T13:00:00Z")])
    run_ingest(settings, spark=spark)
    return settings.home_path


@pytest.fixture
def home(ingested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home of one's own, with the ingested content."""
    shutil.copytree(ingested, tmp_path / "home")
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "home"))
    return load_settings()


@pytest.fixture(scope="module")
def definitions(ingested: Path) -> dg.Definitions:
    return build_definitions(load_settings(home=ingested))


@pytest.fixture
def run(home: Settings, definitions: dg.Definitions) -> Any:
    """Runs a job for a range of hours, or for a key."""
    with dg.DagsterInstance.ephemeral() as instance:

        def run(job: str, hours: HourRange | str, **config: Any) -> dg.ExecuteInProcessResult:
            ranged: dict[str, Any] = {"tags": range_tags(hours)} if isinstance(hours, HourRange) else {"partition_key": hours}
            ops = {"ops": {job if job != "reconciliation" else "reconciled_hours": {"config": config}}} if config else {}
            return definitions.resolve_job_def(job).execute_in_process(
                instance=instance, raise_on_error=False, run_config=ops, **ranged
            )

        yield run


def versions(settings: Settings) -> dict[str, int | None]:
    return {name: DeltaLog(settings.table_uri(name)).latest_version() for name in TABLES}


def materialized(result: dg.ExecuteInProcessResult, key: str) -> dict[str | None, dict[str, Any]]:
    """Partition -> metadata of an asset's materialisations in a run."""
    found = [event.materialization for event in result.get_asset_materialization_events() if event.asset_key == dg.AssetKey(key)]
    return {each.partition: {name: value.value for name, value in each.metadata.items()} for each in found}


def checked(result: dg.ExecuteInProcessResult, key: str, name: str) -> dict[str | None, dg.AssetCheckEvaluation]:
    wanted = dg.AssetCheckKey(dg.AssetKey(key), name)
    return {found.partition: found for found in result.get_asset_check_evaluations() if found.asset_check_key == wanted}


def why(result: dg.ExecuteInProcessResult) -> list[str]:
    """What the steps that failed say to the reader."""
    failures = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    return [str(failure.user_failure_data.description if failure.user_failure_data else failure.error) for failure in failures]


def duplicate_an_increment(settings: Settings) -> None:
    """A fault: an increment of the first hour stands twice."""
    table = DeltaTable(settings.table_uri("minute_metrics"))
    rows = table.to_pyarrow_table()
    write_deltalake(
        table, rows.filter([minute == utc("2025-06-02T10:03") for minute in rows["event_minute"].to_pylist()]), mode="append"
    )


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Path:
    """A home with simulated traffic of four hours: duplicates, conflicts, late, rejected and invalid records, orders.

    Every campaign is known: of seven the simulator leaves none out.
    """
    folder = tmp_path_factory.mktemp("healthy")
    settings = load_settings(home=folder / "home")
    simulate(settings.landing_path, 2000, 7, start=CLOSED.start, days=1 / 6, campaigns=7, ads=40)
    run_ingest(settings, spark=spark)
    return settings.home_path


def test_closed_hours_are_checked_compacted_recounted_and_published_and_no_check_fails(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every asset check, dbt test and expectation passes on a healthy home: over the tables, the marts, and each hour of both."""
    monkeypatch.setenv("ADTALLY_HOME", str(healthy))
    settings = load_settings()
    closing = read_closing(settings)
    assert closing.first_hour is not None and closing.closed_through is not None
    hours = HourRange(closing.first_hour, closing.closed_through)
    keys = {key_of(hour) for hour in hours}
    assert len(keys) >= 3
    definitions = build_definitions(settings)
    with dg.DagsterInstance.ephemeral() as instance:
        result = definitions.resolve_job_def("closed_hours").execute_in_process(
            instance=instance, raise_on_error=False, tags=range_tags(hours)
        )
        assert result.success, why(result)
        marts_result = definitions.resolve_job_def("closed_hours_marts").execute_in_process(instance=instance, raise_on_error=False)
        assert marts_result.success, why(marts_result)
        mart_check = dg.AssetCheckKey(dg.AssetKey("fct_campaign_day"), EXPECTATIONS_CHECK)
        history = instance.event_log_storage.get_asset_check_execution_history(mart_check, 100)
        assert [(each.status.value, each.partition) for each in history] == [("SUCCEEDED", None)]  # planned once, ended once
    for key in CHECKED:
        assert checked(result, key, EXPECTATIONS_CHECK).keys() == keys
    assert materialized(result, "compacted_events").keys() == keys
    recounted = materialized(result, "reconciled_hours")
    assert recounted.keys() == keys
    assert all(row["events_expected"] == row["events_found"] > 0 for row in recounted.values())
    reviewed = sum(row["invalid"] for row in materialized(result, "reviewed_hours").values())
    accounted = f"select sum(invalid_traffic)::bigint from fct_event_accounting where event_hour < '{hours.end:%Y-%m-%d %H:%M}'"
    assert query_marts(settings, accounted)[1] == [(reviewed,)]
    assert reviewed > 0

    found = [*result.get_asset_check_evaluations(), *marts_result.get_asset_check_evaluations()]
    assert [(each.asset_check_key.to_user_string(), each.partition, each.description) for each in found if not each.passed] == []
    signals = {key for check in [signal_checks()] for key in check.check_keys}  # of the running system: no run judges them
    every = set(definitions.resolve_asset_graph().asset_check_keys) - signals
    assert every - {each.asset_check_key for each in found} == set()
    marts = validate_marts(settings.marts_path)
    assert [mart.table for mart in marts if not mart.rows] == []  # of an empty one no row could fail
    marts += [each for hour in hours for each in validate_marts(settings.marts_path, hour=hour)]
    assert [(each.table, each.hour, failed.name) for each in marts for failed in each.failed] == []


def test_a_failed_expectation_holds_up_what_comes_after_it(home: Settings, run: Any) -> None:
    duplicate_an_increment(home)
    before = versions(home)
    result = run("closed_hours", CLOSED)
    assert not result.success
    found = checked(result, "minute_metrics", EXPECTATIONS_CHECK)
    assert {key: (each.passed, each.severity) for key, each in found.items()} == {
        "2025-06-02-10:00": (False, dg.AssetCheckSeverity.ERROR),
        "2025-06-02-11:00": (True, dg.AssetCheckSeverity.WARN),
    }
    assert "record_uuid" in str(found["2025-06-02-10:00"].description)
    warned = checked(result, "ad_events", EXPECTATIONS_CHECK)["2025-06-02-11:00"]  # of an unknown campaign
    assert (warned.passed, warned.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "campaign_id.is_a_campaign" in str(warned.description)
    held_up = ("reviewed_hours", "compacted_events", "reconciled_hours", "attributed_orders")
    assert not [key for key in held_up if materialized(result, key)]
    after = versions(home)
    assert after == before


def test_differences_fail_the_check_until_they_are_repaired(home: Settings, run: Any) -> None:
    duplicate_an_increment(home)
    result = run("reconciliation", CLOSED)
    assert not result.success
    found = checked(result, "reconciled_hours", "recount_equals_stream")
    assert {key: each.passed for key, each in found.items()} == {"2025-06-02-10:00": False, "2025-06-02-11:00": True}
    assert "increment_twice" in str(found["2025-06-02-10:00"].description)
    assert "| 1500 |" in str(found["2025-06-02-10:00"].metadata["found"].value)  # one impression of 1.5 micros a thousand
    for repair in (True, False):
        result = run("reconciliation", CLOSED, repair=repair)
        assert result.success, why(result)
        assert all(each.passed for each in checked(result, "reconciled_hours", "recount_equals_stream").values())


def test_a_dry_run_of_a_backfill_tells_and_writes_nothing(home: Settings, run: Any, definitions: dg.Definitions) -> None:
    campaigns(home, "c-cpm,s-1,cpm,1000000,EUR,2000-01-01T00:00:00Z,", "c-unknown,s-1,cpm,1000000,EUR,2000-01-01T00:00:00Z,")
    before = versions(home)
    assets = [definitions.get_assets_def("backfilled_hours")]
    config = {"ops": {"backfilled_hours": {"config": {"dry_run": True}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            assets, partition_key="2025-06-02-11:00", run_config=config, raise_on_error=False, instance=instance
        )
        assert result.success, why(result)
        assert not result.get_asset_materialization_events()
        assert instance.get_materialized_partitions(dg.AssetKey("backfilled_hours")) == set()
    [event] = [each for each in result.all_events if each.event_type_value == "ASSET_OBSERVATION"]
    observed = event.asset_observation_data.asset_observation
    assert (observed.partition, observed.description) == (
        "2025-06-02-11:00",
        "Dry run, nothing was written: 2025-06-02-11:00 to 2025-06-02-11:00",
    )
    told: dict[str, Any] = {name: value.value for name, value in observed.metadata.items()}
    assert (told["dry_run"], told["rows_changed"]) == (True, 3)
    assert r"| 2025\-06\-02 | c\-unknown | EUR |" in told["changes"] and r"| 0\.0000045 |" in told["changes"]
    assert versions(home)["events"] == before["events"]
    assert versions(home)["minute_metrics"] == before["minute_metrics"]


@pytest.mark.parametrize("asset", ["reviewed_hours", "compacted_events", "reconciled_hours", "backfilled_hours"])
def test_an_open_hour_is_refused_and_nothing_changed(home: Settings, definitions: dg.Definitions, asset: str) -> None:
    before = versions(home)
    tags = range_tags(HourRange(CLOSED.start, utc("2025-06-02T13:00")))
    result = dg.materialize([definitions.get_assets_def(asset)], tags=tags, raise_on_error=False)
    assert not result.success
    [reason] = why(result)
    assert reason == "hour 2025-06-02T12Z is not closed (closed through 2025-06-02T12Z)"
    assert not result.get_asset_materialization_events()
    assert versions(home) == before


def test_an_open_hour_is_not_checked(home: Settings, run: Any) -> None:
    result = run("closed_hours", OPEN_KEY)
    assert not result.success
    assert set(why(result)) == {"hour 2025-06-02T12Z is not closed (closed through 2025-06-02T12Z)"}
    assert not result.get_asset_check_evaluations()


@pytest.mark.parametrize("key", ["1999-01-01-00:00", "today"])
def test_a_partition_that_is_none_is_refused(home: Settings, definitions: dg.Definitions, key: str) -> None:
    with pytest.raises(dg.DagsterUnknownPartitionError, match="Could not find a partition"):
        dg.materialize([definitions.get_assets_def("compacted_events")], partition_key=key, raise_on_error=False)


def test_a_partition_within_an_hour_is_refused(home: Settings, definitions: dg.Definitions) -> None:
    """Dagster takes it for one; nothing is compacted all the same."""
    before = versions(home)
    result = dg.materialize(
        [definitions.get_assets_def("compacted_events")], partition_key="2025-06-02-10:30", raise_on_error=False
    )
    assert why(result) == ["2025-06-02T10:30:00+00:00 is not a whole hour in UTC (as in 2025-06-02T08:00:00Z)"]
    assert versions(home) == before
