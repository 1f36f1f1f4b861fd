"""Attribution as a stream, and of real landing folders, held to credits that were computed otherwise."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any

import lake
import pytest
from pyspark.sql import SparkSession

from spark_jobs.attribution import attribute as attribute_frames
from spark_jobs.attribution.job import AttributionReport, attribute
from spark_jobs.attribution.rules import MODELS
from spark_jobs.attribution.stream import AttributionStream
from spark_jobs.config import Settings
from spark_jobs.errors import RuleFileError
from spark_jobs.ingest.runner import run_ingest
from tests.spark_jobs.homes.attribution_lake import credits, linear, mark, revisions, rows_of
from tests.spark_jobs.ingest.test_continuous import Ingest

pytestmark = pytest.mark.homes

WINDOWS = (1, 7, 14, 28, 30)
START = datetime(2011, 3, 1, tzinfo=UTC)


def text(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def journeys(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Clicks of twelve users on two stores over sixty days of 2011, and their orders: tens of touches before each."""
    generator = random.Random(seed)

    def moment() -> datetime:
        return START + timedelta(microseconds=generator.randrange(60 * 86_400) * 1_000_000 + generator.choice([0, 0, 1, 999_999]))

    clicks = []
    for number in range(900):
        user, at = generator.randrange(12), text(moment())
        names = {"campaign_id": f"c{number % 5}", "ad_id": f"a{number % 20}", "user_id": f"u{user}", "store_id": f"s{number % 2}"}
        kind = "impression" if number % 10 == 9 else "click"
        clicks.append(lake.event(f"e{number:04d}", event_type=kind, event_time=at, received_at=at, **names))
    clicks[7]["event_time"] = clicks[7]["received_at"] = clicks[5]["event_time"]
    orders = []
    for number in range(60):
        at = text(moment())
        total = generator.choice([0, 1, 99, 12_340_000, 10**15])
        names = {"user_id": f"u{generator.randrange(14)}", "store_id": f"s{number % 2}"}
        orders.append(lake.order(f"o{number}", order_time=at, received_at=at, total_micros=total, **names))
    return clicks, orders


def independent(clicks: list[dict[str, Any]], orders: list[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, int]]:
    """First, last and linear, straight from the records."""
    by_pair = defaultdict(list)
    for click in clicks:
        if click["event_type"] == "click":
            by_pair[click["user_id"], click["store_id"]].append((datetime.fromisoformat(click["event_time"]), click["event_id"]))
    made: dict[tuple[str, str, int], dict[str, int]] = {}
    for order in orders:
        at, total = datetime.fromisoformat(order["order_time"]), order["total_micros"]
        for days in WINDOWS:
            before = [touch for touch in by_pair[order["user_id"], order["store_id"]] if at - timedelta(days=days) <= touch[0] < at]
            names = [name for _, name in sorted(before)]
            if names:
                each, over = divmod(total, len(names))
                shares = {name: each + (place < over) for place, name in enumerate(names)}
                for model, part in (("first_click", {names[0]: total}), ("last_click", {names[-1]: total}), ("linear", shares)):
                    made[order["order_id"], model, days] = {name: micros for name, micros in part.items() if micros}
    return made


def test_a_landing_folder_of_years_ago(spark: SparkSession, settings: Settings) -> None:
    clicks, orders = journeys(11)
    lake.campaigns(settings)
    generator = random.Random(5)
    landed = list(clicks)
    generator.shuffle(landed)
    for number in range(3):
        lake.land(settings, f"events/eu/{number}.jsonl", landed[number::3])
    lake.land(settings, "orders/eu/0.jsonl", orders)
    run_ingest(settings, spark=spark)
    attribute(settings)
    expected = independent(clicks, orders)
    found = {key: part for key, part in credits(settings).items() if key[1] in ("first_click", "last_click", "linear")}
    assert found == expected
    assert max(len(part) for part in expected.values()) > 20
    before = rows_of(settings)
    assert attribute(settings).orders == 0 and rows_of(settings) == before

    events, placed = (spark.read.format("delta").load(settings.table_uri(name)) for name in ("events", "orders"))
    frames: dict[tuple[str, str, int], dict[str, int]] = defaultdict(dict)
    weights: dict[tuple[str, str, int], float] = defaultdict(float)
    for row in attribute_frames(placed, events).collect():
        key = (row["order_id"], row["model"], row["window_days"])
        weights[key] += row["credit_weight"]
        frames[key] |= {row["touch_event_id"]: row["credit_micros"]} if row["credit_micros"] else {}
    assert dict(frames) == credits(settings)
    assert {key[1] for key in weights} == set(MODELS) and all(abs(total - 1) < 1e-9 for total in weights.values())


def test_the_query_credits_what_each_batch_of_the_ledger_concerns(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    reports: list[AttributionReport] = []

    def wait(number: int) -> list[int]:
        end = time.monotonic() + 60
        while len(reports) < number and time.monotonic() < end:
            time.sleep(0.05)
        return [report.revisions for report in reports]

    lake.land(settings, "events/eu/1.jsonl", [lake.event("a", event_type="click")])
    lake.land(settings, "orders/eu/1.jsonl", [lake.order("o"), lake.order("p", user_id="v")])
    run_ingest(settings, spark=spark)
    query = AttributionStream(settings, reports.append).start(trigger_seconds=1)
    assert wait(1) == [2]
    query.stop()
    lake.land(settings, "events/eu/2.jsonl", [lake.event("late", event_type="click", event_time="2025-06-02T09:00:00Z")])
    run_ingest(settings, spark=spark)
    mark(settings, "a")
    query = AttributionStream(settings, reports.append).start(trigger_seconds=1)
    assert wait(2) == [2, 1]
    query.stop()
    assert {name: set(part) for name, part in linear(settings).items()} == {"o": {"late"}}


def test_a_failure_of_it_is_kept_for_the_ingest(spark: SparkSession, settings: Settings) -> None:
    lake.land(settings, "orders/eu/1.jsonl", [lake.order("o")])
    run_ingest(settings, spark=spark)
    stream = AttributionStream(settings)
    (settings.home_path / ".attribution.lock").unlink(missing_ok=True)
    (settings.home_path / ".attribution.lock").mkdir()
    query = stream.start(trigger_seconds=1)
    end = time.monotonic() + 60
    while query.isActive and time.monotonic() < end:
        time.sleep(0.05)
    assert "attribution.lock" in str(query.exception())
    assert query.exception() is stream.failure and isinstance(stream.failure, OSError)


def test_wrong_rules_are_refused_at_its_start(settings: Settings) -> None:
    settings.rules_path.mkdir(parents=True)
    (settings.rules_path / "attribution.toml").write_text("half_life_days = 0\n")
    with pytest.raises(RuleFileError, match="half_life_days"):
        AttributionStream(settings)


def test_the_continuous_ingest_credits_orders_and_outlives_files_that_turn_bad(settings: Settings) -> None:
    lake.campaigns(settings)
    lake.land(settings, "events/eu/1.jsonl", [lake.event("a", event_type="click")])
    lake.land(settings, "orders/eu/1.jsonl", [lake.order("o")])
    with Ingest(settings) as ingest:
        ingest.wait_for("credit", lambda: linear(settings) == {"o": {"a": 12_340_000}})
        lake.land(settings, "events/eu/2.jsonl", [lake.event("b", event_type="click", event_time="2025-06-02T09:30:00Z")])
        ingest.wait_for("late touch", lambda: len(revisions(settings)["o"]) == 2)
        settings.rules_path.mkdir()
        wrong = settings.rules_path / "attribution.toml", settings.rules_path / "invalid_traffic.toml"
        wrong[0].write_text("half_life = 3\n")
        wrong[1].write_text("[click_rate]\nclicks = 0\n")
        lake.campaigns(settings, "c-cpm,s-1,cpm,many,EUR,2000-01-01T00:00:00Z,")
        lake.land(settings, "events/eu/3.jsonl", [lake.event("c", event_type="click", event_time="2025-06-02T09:40:00Z")])
        lake.land(settings, "orders/eu/3.jsonl", [lake.order("p", user_id="v")])
        said = (
            "attribution.toml: half_life: Extra inputs are not permitted",
            "invalid_traffic.toml: click_rate.clicks: Input should be greater than 0",
            "campaigns/campaigns.csv, line 2: daily_budget_micros is not a whole number",
        )
        ingest.wait_for("notices", lambda: all(text in ingest.errors for text in said))
        ingest.wait_for(
            "both streams", lambda: Counter(batch["stream"] for batch in ingest.batches()) == {"events": 3, "orders": 2}
        )
        for file in wrong:
            file.unlink()
        lake.land(settings, "events/eu/4.jsonl", [lake.event("d", event_type="click", event_time="2025-06-02T09:50:00Z")])
        ingest.wait_for("all touches", lambda: set(linear(settings)["o"]) == {"a", "b", "c", "d"})
        assert all(ingest.errors.count(text) == 1 for text in said)
        assert "rules of attribution: all is right again" in ingest.errors
        assert "Traceback" not in ingest.errors
        assert ingest.terminate() == 0
