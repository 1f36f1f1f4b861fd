"""reconcile, backfill, compact, vacuum and hours as a person types them, on a home with real events."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import lake
import pytest
from deltalake import DeltaTable
from edited import edit_marts
from pyspark.sql import SparkSession
from terminal import Adtally

from orchestration.marts import build_marts, query_marts
from spark_jobs.config import Settings, load_settings
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import TABLES
from spark_jobs.lake.writes import ensure_tables

pytestmark = pytest.mark.homes

DAY = ("--from", "2025-06-02T10:00:00Z", "--to", "2025-06-02T12:00:00Z")


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Path:
    """A home with an hour of clicks and impressions, closed, and one that is open."""
    settings = load_settings(home=tmp_path_factory.mktemp("ingested") / "home", max_files_per_batch=1)
    ensure_tables(settings)
    lake.campaigns(settings)
    for number in range(3):
        lake.land(
            settings,
            f"events/eu/{number}.jsonl",
            [
                *(lake.event(f"i{number}-{n}", ad_id=f"a{n % 3}") for n in range(20)),
                lake.event(f"c{number}", event_type="click", campaign_id="c-cpc", price_micros=2_000_000),
                lake.event("i0-0", ad_id="a0"),
            ],
        )
    later = "2025-06-02T13:30:00Z"
    lake.land(settings, "events/eu/9.jsonl", [lake.event("later", event_time=later, received_at=later)])
    lake.land(settings, "orders/eu/1.jsonl", [lake.order("o1", order_time=later, received_at=later)])
    run_ingest(settings, spark=spark)
    build_marts(settings)
    return settings.home_path


@pytest.fixture
def home(ingested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A copy of it, which the command takes for its own."""
    shutil.copytree(ingested, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "home"))
    return load_settings(home=tmp_path / "home")


def versions(settings: Settings) -> dict[str, int | None]:
    return {name: DeltaLog(settings.table_uri(name)).latest_version() for name in TABLES}


@pytest.mark.parametrize("command", ["reconcile", "backfill", "compact"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "2025-06-02T10:30:00Z", "--to", "2025-06-02T12:00:00Z"], "is not a whole hour in UTC"),
        (["--from", "2025-06-02T12:00:00Z", "--to", "2025-06-02T12:00:00Z"], "holds no hour"),
        (["--from", "soon", "--to", "2025-06-02T12:00:00Z"], "--from 'soon' is not a time"),
        (
            ["--from", "2025-06-02T10:00:00Z", "--to", "2025-06-02T14:00:00Z"],
            "hour 2025-06-02T13Z is not closed (closed through",
        ),
    ],
)
def test_wrong_ranges_are_refused_and_change_nothing(
    home: Settings, adtally: Adtally, command: str, words: list[str], message: str
) -> None:
    before = versions(home)
    done = adtally(command, *words)
    assert done.status == 2
    assert message in done.error
    assert versions(home) == before


@pytest.mark.parametrize("command", ["reconcile", "compact"])
def test_half_a_range_is_none(home: Settings, adtally: Adtally, command: str) -> None:
    done = adtally(command, "--from", "2025-06-02")
    assert (done.status, done.error) == (2, "--from and --to go together (the range ends before --to)")


def test_clean_data_is_equal_to_the_recount(home: Settings, adtally: Adtally) -> None:
    done = adtally("reconcile", *DAY)
    assert (done.status, "2 hours, 63 accepted events" in done.out) == (0, True), done
    assert "equal to the row and the nano" in done.out


def test_lost_clicks_are_found_repaired_and_stay_repaired(home: Settings, adtally: Adtally) -> None:
    assert adtally("query", "select sum(clicks) from fct_campaign_day", "--format", "csv", "--no-build").out.split() == [
        "sum(clicks)",
        "3",
    ]
    DeltaTable(home.table_uri("minute_metrics")).delete("clicks > 0")
    found = adtally("reconcile")
    assert found.status == 1, found
    assert "increment_missing" in found.out and "left" in found.out
    assert adtally("marts", "build").status == 1  # dbt's conservation test refuses to publish the loss
    repaired = adtally("reconcile", "--repair", "--json")
    assert repaired.status == 0, repaired
    report = json.loads(repaired.out)
    assert {(d["cause"], d["is_repaired"]) for d in report["differences"]} == {("increment_missing", True)}
    again = adtally("reconcile", "--repair")
    assert (again.status, "equal to the row and the nano" in again.out) == (0, True), again
    assert adtally("marts", "build").status == 0
    assert query_marts(home, "select sum(clicks), sum(spend_nanos) from fct_campaign_day where campaign_id = 'c-cpc'")[1] == [
        (3, 3 * 2_000_000 * 1000)
    ]
    runs = query_marts(home, "select cause, is_repaired, is_latest from fct_reconciliation where event_hour = '2025-06-02 10:00'")[
        1
    ]
    assert ("increment_missing", True, False) in runs and ("none", False, True) in runs
    assert adtally("status").status == 0


def test_an_edited_mart_is_found_and_built_anew(home: Settings, adtally: Adtally) -> None:
    with edit_marts(home.marts_path) as marts:
        marts.execute("update fct_campaign_minute set clicks = clicks + 5, spend_nanos = spend_nanos + 7 where clicks > 0")
    found = adtally("reconcile", "--json")
    assert found.status == 1
    assert {(d["layer"], d["cause"]) for d in json.loads(found.out)["differences"]} == {("marts", "mart_differs")}
    assert adtally("reconcile", "--repair").status == 0
    assert adtally("reconcile").status == 0
    assert query_marts(home, "select sum(clicks)::int from fct_campaign_minute")[1] == [(3,)]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-50]), id="cut"),
        pytest.param(lambda path: path.write_bytes(bytes(path.stat().st_size)), id="zeros"),
    ],
)
def test_marts_of_a_version_that_lost_a_file_are_told_and_built_anew(
    home: Settings, adtally: Adtally, damage: Callable[[Path], None]
) -> None:
    assert adtally("marts", "build").status == 0
    lost = next(Path(home.table_uri("minute_metrics")).rglob("*.parquet"))
    damage(lost)
    repaired = adtally("fsck", "--repair")
    assert repaired.status == 0, repaired
    found = adtally("reconcile", "--json")
    assert found.status == 1
    (difference,) = json.loads(found.out)["differences"]
    assert (difference["layer"], difference["cause"], difference["event_hour"]) == ("marts", "mart_differs", None)
    assert lost.name in difference["detail"]
    assert adtally("reconcile", "--repair").status == 0
    assert adtally("reconcile").status == 0
    assert query_marts(home, "select sum(clicks)::int from fct_campaign_minute")[1] == [(3,)]


def test_a_backfill_says_what_it_would_change_then_changes_it_once(home: Settings, adtally: Adtally) -> None:
    lake.campaigns(
        home, "c-cpm,s-1,cpm,1000000,EUR,2000-01-01T00:00:00Z,", "c-cpc,s-1,cpm,1000000,EUR,2000-01-01T00:00:00Z,"
    )  # clicks of c-cpc cost nothing now
    before = versions(home)
    tried = adtally("backfill", *DAY, "--dry-run", "--json")
    assert tried.status == 0, tried
    (change,) = json.loads(tried.out)["changes"]
    assert (change["campaign_id"], change["event_date"], change["rows"]) == ("c-cpc", "2025-06-02", 3)
    assert (change["spend_nanos_before"], change["spend_nanos_after"]) == (6_000_000_000, 0)
    assert {name: version for name, version in versions(home).items() if name != "campaigns"} == {
        name: version for name, version in before.items() if name != "campaigns"
    }
    done = adtally("backfill", *DAY, "--reason", "c-cpc is cpm")
    assert done.status == 0 and "c-cpc" in done.out, done
    again = adtally("backfill", *DAY)
    assert again.status == 0 and "0 hours changed" in again.out, again
    assert adtally("marts", "build").status == 0
    assert query_marts(home, "select sum(spend_nanos)::bigint from fct_campaign_day where campaign_id = 'c-cpc'")[1] == [(0,)]
    assert adtally("reconcile").status == 0
    assert adtally("status").status == 0


def test_compact_and_vacuum(home: Settings, adtally: Adtally) -> None:
    done = adtally("compact", *DAY, "--json")
    assert done.status == 0, done
    (hour,) = [part for part in json.loads(done.out)["tables"] if part["table"] == "events"]
    assert (hour["files_before"], hour["files_after"], hour["rows"]) == (3, 1, 63)
    assert "nothing to compact" in adtally("compact", *DAY).out
    tried = adtally("vacuum", "--dry-run")
    assert tried.status == 0 and "Would be deleted" in tried.out, tried
    refused = adtally("vacuum", "--retention", "1s")
    assert refused.status == 2 and refused.error
    assert adtally("reconcile").status == 0


def test_hours_are_closed_by_hand(home: Settings, adtally: Adtally) -> None:
    assert "every hour that ends at or before 2025-06-02T13:00Z" in adtally("hours", "list").out
    refused = adtally("hours", "close", "--through", "2025-06-02T13:00:00Z", "--reason", "x")
    assert (refused.status, "closed already" in refused.error) == (2, True)
    assert adtally("hours", "close", "--through", "2025-06-02T14:00:00Z", "--reason", " ").status == 2
    done = adtally("hours", "close", "--through", "2025-06-02T14:00:00Z", "--reason", "eu is down", "--json")
    assert datetime.fromisoformat(json.loads(done.out)["closed_through"]).hour == 14
    assert adtally("reconcile", "--from", "2025-06-02T10:00:00Z", "--to", "2025-06-02T14:00:00Z").status == 0
