"""Money and credit in Dagster and as commands: closed hours reviewed, orders credited, days billed; late records settled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import lake
import pytest
from pyspark.sql import SparkSession

from orchestration.cli import app
from orchestration.definitions import build_definitions
from orchestration.marts import build_marts, query_marts
from orchestration.partitions import range_tags
from spark_jobs.config import Settings, load_settings
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import TABLES
from spark_jobs.units import HourRange
from tests.orchestration.marts.delta_files import utc

pytestmark = pytest.mark.homes

DAY = HourRange(utc("2025-06-02T00:00"), utc("2025-06-03T00:00"))
PRICE = 2_000_000  # micros a click
NEXT_DAY = {"event_time": "2025-06-03T02:00:00Z", "received_at": "2025-06-03T02:00:00Z"}
LEDGER = "select line_type, reason, amount_micros, is_posted from fct_billing_ledger where event_date = '2025-06-02' order by 1, 3"
CREDITS = """
    select touch_event_id, credit_micros from fct_attribution_credits
    where order_id = 'o1' and model = 'linear' and window_days = 7 order by touch_time
"""


def click(event_id: str, time: str, **changes: Any) -> dict[str, Any]:
    """A click that is billed, received a second after ``time`` of 2025-06-02."""
    moment = f"2025-06-02T{time}"
    times = {"event_time": f"{moment}Z", "received_at": f"{moment[:-2]}59Z"}
    return lake.event(event_id, event_type="click", campaign_id="c-cpc", price_micros=PRICE, **{**times, **changes})


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Path:
    """A closed day: two clicks that count, a repeat across the hour, and an order behind them."""
    settings = load_settings(home=tmp_path_factory.mktemp("settled") / "home")
    lake.campaigns(settings)
    lake.land(
        settings,
        "events/eu/a.jsonl",
        [
            click("first", "12:59:59"),
            click("repeat", "13:00:00"),
            click("other-ad", "15:00:00", ad_id="a-2"),
            lake.event("next-day", **NEXT_DAY),
        ],
    )
    moment = {"order_time": "2025-06-02T18:00:00Z", "total_micros": 1_000_001}
    lake.land(settings, "orders/eu/a.jsonl", [lake.order("o1", **moment, received_at="2025-06-03T02:00:00Z")])
    run_ingest(settings, spark=spark)
    return settings.home_path


@pytest.fixture
def home(ingested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A copy of it, which commands and assets take for theirs."""
    shutil.copytree(ingested, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "home"))
    return load_settings()


@pytest.fixture(scope="module")
def definitions(ingested: Path) -> dg.Definitions:
    return build_definitions(load_settings(home=ingested))


def late_click(settings: Settings, spark: SparkSession) -> None:
    """A click of the day comes after it closed: before the first, so that the first becomes its repeat."""
    lake.land(settings, "events/eu/z.jsonl", [click("late", "12:30:00", received_at="2025-06-03T03:00:00Z", ad_id="a-1")])
    run_ingest(settings, spark=spark)


def versions(settings: Settings) -> dict[str, int | None]:
    return {name: DeltaLog(settings.table_uri(name)).latest_version() for name in TABLES}


def why(result: dg.ExecuteInProcessResult) -> list[str]:
    failures = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    return [str(failure.user_failure_data.description if failure.user_failure_data else failure.error) for failure in failures]


def metadata(result: dg.ExecuteInProcessResult, key: str) -> dict[str | None, dict[str, Any]]:
    found = [event.materialization for event in result.get_asset_materialization_events() if event.asset_key == dg.AssetKey(key)]
    return {each.partition: {name: value.value for name, value in each.metadata.items()} for each in found}


def test_a_closed_day_is_reviewed_credited_and_billed(home: Settings, definitions: dg.Definitions, spark: SparkSession) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        job = definitions.resolve_job_def("closed_hours")
        result = job.execute_in_process(instance=instance, raise_on_error=False, tags=range_tags(DAY))
        assert result.success, why(result)
        reviewed = metadata(result, "reviewed_hours")
        assert reviewed["2025-06-02-13:00"]["changed"] == 1  # the repeat, a second behind the first, in the next hour
        assert reviewed["2025-06-02-12:00"]["changed"] == 0
        assert sum(found["orders"] for found in metadata(result, "attributed_orders").values()) >= 1
        marts = definitions.resolve_job_def("closed_hours_marts").execute_in_process(instance=instance, raise_on_error=False)
        assert marts.success, why(marts)
        assert metadata(marts, "billing_lines")[None]["lines"] == 1
        assert query_marts(home, LEDGER)[1] == [("charge", "day_closed", 2 * PRICE, True)]
        assert query_marts(home, CREDITS)[1] == [("first", 500_001), ("other-ad", 500_000)]

        late_click(home, spark)
        settled = definitions.resolve_job_def("settlement").execute_in_process(instance=instance, raise_on_error=False)
        assert settled.success, why(settled)
        [told] = metadata(settled, "settled_records").values()
        assert (told["review_changed"], told["billing_lines"] > 0) == (1, True)
    build_marts(home)
    # the late click counts, the first is its repeat: the day comes to the same, by lines that say why
    lines = query_marts(home, LEDGER)[1]
    assert sum(amount for _, _, amount, _ in lines) == 2 * PRICE
    assert {reason for _, reason, *_ in lines} == {"day_closed", "late", "invalid_traffic"}
    assert all(is_posted for *_, is_posted in lines)
    assert query_marts(home, CREDITS)[1] == [("late", 500_001), ("other-ad", 500_000)]


def test_commands_settle_and_do_nothing_twice(home: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> Any:
        capsys.readouterr()
        assert app.run(list(arguments)) == 0
        return json.loads(capsys.readouterr().out)

    reviewed = call("review", "--json")
    assert sum(hour["changed"] for hour in reviewed["hours"]) == 1
    credited = call("attribute", "--json")
    assert (credited["orders"], credited["credited"], credited["revisions"]) == (1, 1, 1)
    [line] = call("bill", "--json")["lines"]
    assert (line["line_type"], line["amount_micros"], line["campaign_id"]) == ("charge", 2 * PRICE, "c-cpc")
    before = versions(home)
    assert call("review", "--json")["hours"] == []
    assert call("attribute", "--json")["orders"] == 0
    assert call("attribute", "--from", "2025-06-02", "--to", "2025-06-03", "--json")["revisions"] == 0
    assert call("bill", "--json")["lines"] == []
    assert versions(home) == before
    for command, text in (("review", "up to date"), ("attribute", "no order is concerned"), ("bill", "nothing to bill")):
        assert app.run([command]) == 0
        assert text in capsys.readouterr().out


def test_an_ingest_settles_at_its_end(home: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import spark_jobs.ingest.runner as ingest
    from spark_jobs.ingest.batch import IngestReport

    monkeypatch.setattr(ingest, "run_ingest", lambda *_, **__: IngestReport())  # all of it is ingested; no second session
    assert app.run(["ingest", "--no-settle"]) == 0
    before = versions(home)
    assert before["traffic_reviews"] == 0
    assert app.run(["ingest"]) == 0
    told = capsys.readouterr().err
    assert "1 mark changed" in told
    assert "1 order: 1 credited to 2 touches" in told
    assert "1 billing line of 1 closed day" in told
    assert versions(home)["billing_lines"] == 1
