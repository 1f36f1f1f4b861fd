from __future__ import annotations

import ast
import gzip
import json
import tomllib
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from services import simulator
from services.simulator import SimulationError, SimulationShares, Truth, simulate
from spark_jobs.ingest.names import read_names
from tests.services.simulator.recount import (
    accepted_events,
    invalid_rules,
    offered_lines,
    read_object,
    recount_billing,
    recount_credit,
    recount_events,
    recount_orders,
)

EVENTS = 12_000
OUTCOMES = ("accepted", "duplicate", "conflict", "rejected")


@pytest.fixture(scope="module")
def landing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulated") / "landing"


@pytest.fixture(scope="module")
def truth(landing: Path) -> Truth:
    return simulate(landing, EVENTS, 20250602, conversion=0.6, campaigns=40, ads=300, click_rate=0.06)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes of every file, and mtimes of all but the truth."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), 0 if path.name == "truth.json" else path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_seed_gives_the_same_bytes_and_mtimes(tmp_path: Path) -> None:
    first = simulate(tmp_path / "first", 3_000, 5)
    second = simulate(tmp_path / "second", 3_000, 5)
    other = simulate(tmp_path / "other", 3_000, 6)
    assert first == second != other
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")


@pytest.mark.parametrize("events", [1, 2, 7, 100, 999])
def test_offers_exactly_so_many_lines_and_a_true_truth_of_them(tmp_path: Path, events: int) -> None:
    told: list[tuple[int, int]] = []
    found = simulate(tmp_path / "out", events, 1, progress=lambda done, total: told.append((done, total)))
    assert len(offered_lines(tmp_path / "out", "events")) == events == found.totals["offered"]
    assert told[-1] == (events, events)
    assert recount_events(tmp_path / "out") == (found.accounting, found.campaign_hours)


def test_truth_equals_a_recount_of_the_files(landing: Path, truth: Truth) -> None:
    accounting, campaign_hours = recount_events(landing)
    assert truth.accounting == accounting
    assert truth.campaign_hours == campaign_hours
    assert truth.orders == recount_orders(landing)
    assert truth.billing == recount_billing(campaign_hours, landing)
    assert_credit_equals_a_recount(landing, truth)


def assert_credit_equals_a_recount(landing: Path, truth: Truth, from_topics: bool = False) -> None:
    """Order by order for the models of the default window, per campaign for all windows and the models of whole shares."""
    invalid = invalid_rules(landing, from_topics=from_topics)
    expected = recount_credit(landing, invalid, from_topics)
    models = ("last_click", "first_click", "linear")
    listed = {
        (model, 7, row["order_id"]): [tuple(credit) for credit in row[model]]
        for row in truth.attribution["orders"]
        for model in models
    }
    assert listed == {key: value for key, value in expected.items() if key[1] == 7}
    events = accepted_events(landing, from_topics)
    sums: Counter[tuple[str, int, str]] = Counter()
    counts: Counter[tuple[str, int, str]] = Counter()
    for (model, window, _order), given in expected.items():
        for campaign in {events[event_id]["campaign_id"] for event_id, _ in given}:
            counts[model, window, campaign] += 1
        for event_id, micros in given:
            sums[model, window, events[event_id]["campaign_id"]] += micros
    found: Counter[tuple[str, int, str]] = Counter()
    orders: Counter[tuple[str, int, str]] = Counter()
    whole: Counter[tuple[str, int]] = Counter()
    for row in truth.attribution["campaigns"]:
        whole[row["model"], row["window_days"]] += row["credit_micros"]
        if row["model"] in models:
            found[row["model"], row["window_days"], row["campaign_id"]] += row["credit_micros"]
            orders[row["model"], row["window_days"], row["campaign_id"]] += row["orders"]
    assert found == sums and orders == counts
    for model in ("first_click", "linear", "position_based", "time_decay"):  # whatever the model, all of an order is shared out
        assert all(whole[model, window] == whole["last_click", window] for window in (1, 7, 14, 28, 30))


@pytest.mark.parametrize("seed", range(4))
def test_truth_equals_a_recount_whatever_the_cut_and_the_shares(tmp_path: Path, seed: int) -> None:
    shares = SimulationShares(0.03, 0.03, 0.03, 0.03, 0.06, 0.05, 0.04, 0.02, 0.06, 0.05, 0.02, 0.03, 0.02)
    found = simulate(
        tmp_path / "out",
        2_500,
        seed,
        shares=shares,
        days=[0.1, 1.0, 2.0, 8.0][seed],
        lines_per_file=[7, 100, 900, 10_000][seed],
        campaigns=[1, 4, 9, 30][seed],
        ads=30,
        users=2,
        click_rate=0.5,
        conversion=0.9,
    )
    assert recount_events(tmp_path / "out") == (found.accounting, found.campaign_hours)
    assert recount_orders(tmp_path / "out") == found.orders
    assert recount_billing(found.campaign_hours, tmp_path / "out") == found.billing
    assert_credit_equals_a_recount(tmp_path / "out", found)


def test_every_record_ends_in_one_outcome(truth: Truth) -> None:
    for row in [*truth.accounting, truth.totals, *truth.orders["accounting"]]:
        assert row["offered"] == sum(row[name] for name in OUTCOMES)
    for row in truth.accounting:
        assert row["late"] <= row["accepted"] >= row["unpriced"]
        assert row["invalid_traffic"] <= row["accepted"]
    measures = ("impressions", "clicks", "invalid_impressions", "invalid_clicks")
    for name in measures:
        assert truth.totals[name] == sum(row[name] for row in truth.campaign_hours)
    assert sum(truth.totals[name] for name in measures) == truth.totals["accepted"]
    invalid = truth.totals["invalid_impressions"] + truth.totals["invalid_clicks"]
    assert invalid == truth.totals["invalid_traffic"] == sum(truth.totals["invalid_by_rule"].values())
    assert sum(truth.totals["lines_by_intent"].values()) == EVENTS


def test_truth_file_is_the_truth(landing: Path, truth: Truth) -> None:
    assert Truth.load(landing / "truth.json") == truth
    content = json.loads((landing / "truth.json").read_text())
    content["version"] = 99
    (landing.parent / "other.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="version"):
        Truth.load(landing.parent / "other.json")


def test_shares_are_about_as_asked(landing: Path, truth: Truth) -> None:
    shares = SimulationShares()
    resent = shares.resend_same_file + shares.resend_later_file + shares.resend_days_later + shares.resend_other_region
    expected = {
        "duplicate": resent * EVENTS,
        "conflict": shares.conflict * EVENTS,
        "rejected": (shares.broken + shares.future) * EVENTS,
        "late": shares.late * EVENTS,
        "bot_impressions": shares.bots * EVENTS,
    }
    for name, number in expected.items():
        assert truth.totals[name] == pytest.approx(number, rel=0.25, abs=10), name
    assert truth.totals["unpriced"] > 0
    assert truth.totals["bot_clicks"] > 0
    assert set(truth.totals["spend_nanos_by_currency"]) == {"EUR", "USD", "GBP"}
    records = [read_object(line) for _folder, line in offered_lines(landing, "events")]
    present = Counter(name for record in records if record for name in record)
    for name in ("region", "placement", "price_micros", "user_agent"):
        assert 0.5 * EVENTS < present[name] < EVENTS, name
    assert present["sdk"] and present["debug"] and present["note"]
    times = [str(record["event_time"]) for record in records if record and "event_time" in record]
    fractions = Counter(len(time[19:].rstrip("Z").split("+")[0].lstrip(".")) for time in times)
    assert set(fractions) == set(range(7))
    assert 0.01 * EVENTS < sum(time.endswith("+02:00") for time in times) < 0.1 * EVENTS


def test_every_rule_is_hit_on_both_sides_of_its_edge(landing: Path, truth: Truth) -> None:
    """Repeats at the same microsecond, just within and exactly at the window, over the hour's change; 60 clicks and 61."""
    invalid = invalid_rules(landing)
    by_rule = Counter(rules[0] for rules in invalid.values())
    assert truth.totals["invalid_by_rule"] == {"listed_user": 0, **by_rule}
    assert Counter(rule for rules in invalid.values() for rule in rules) == Counter(truth.totals["hits_by_rule"])
    assert set(by_rule) == {"crawler_user_agent", "repeat_click", "repeat_impression", "click_rate"}
    journeys: dict[tuple[str, str, str], list[datetime]] = {}
    clicks: Counter[tuple[str, str]] = Counter()
    for event in accepted_events(landing).values():
        journeys.setdefault((event["user_id"], event["ad_id"], event["event_type"]), []).append(event["time"])
        clicks[event["user_id"], f"{event['time']:%d %H}"] += event["event_type"] == "click"
    for kind, window in (("impression", 60_000_000), ("click", 3_600_000_000)):
        distances: Counter[int] = Counter()
        over_the_hour = 0
        for (_user, _ad, what), times in journeys.items():
            for first, second in pairwise(sorted(times) if what == kind else []):
                distances[(second - first) // timedelta(microseconds=1)] += 1
                over_the_hour += first.hour != second.hour and second - first < timedelta(microseconds=window)
        assert all(distances[us] for us in (0, 1, window - 1, window, window + 1)), kind
        assert over_the_hour, kind
    assert 60 in clicks.values() and 61 in clicks.values()


def test_listed_users_come_with_their_list(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = simulate(out, 3_000, 3, listed_users=4)
    rules = tomllib.loads((out / "rules" / "invalid_traffic.toml").read_text())
    listed = frozenset((out / "rules" / rules["list_file"]).read_text().split())
    assert len(listed) == 4 and found.totals["invalid_by_rule"]["listed_user"] > 0
    assert recount_events(out, listed) == (found.accounting, found.campaign_hours)
    assert not (tmp_path / "none" / "rules").exists()
    plain = simulate(tmp_path / "none", 3_000, 3)
    assert not (tmp_path / "none" / "rules").exists() and plain.totals["invalid_by_rule"]["listed_user"] == 0


def test_orders_have_none_one_and_many_touches(truth: Truth) -> None:
    touches = [len(row["linear"]) for row in truth.attribution["orders"]]
    assert 0 in touches and 1 in touches and max(touches) >= 5
    totals = truth.attribution["totals"]
    assert totals["placed"] == len(touches) == truth.orders["placed"] and totals["cancelled"] == truth.orders["cancelled"]
    assert totals["several_touches"] == sum(number > 1 for number in touches) > 20
    assert totals["credited_by_window"]["7"] == sum(number > 0 for number in touches) > totals["credited_by_window"]["1"]


def test_clicks_follow_impressions_and_orders_follow_clicks(landing: Path) -> None:
    shown: dict[str, dict[str, Any]] = {}
    clicked: list[dict[str, Any]] = []
    for _folder, line in offered_lines(landing, "events"):
        record = read_object(line)
        if record and record.get("event_type") == "impression":
            shown.setdefault(str(record.get("event_id")), record)
        elif record and record.get("event_type") == "click":
            clicked.append(record)
    same = ("ad_id", "campaign_id", "store_id", "user_id", "currency")
    followed = [
        all(click.get(name) == shown[click["impression_id"]].get(name) for name in same)
        for click in clicked
        if click["impression_id"] in shown
    ]
    assert len(followed) > 0.98 * len(clicked) > 200
    assert sum(followed) > 0.97 * len(followed)
    journeys = {(click.get("user_id"), click.get("store_id")) for click in clicked}
    orders = [record for _folder, line in offered_lines(landing, "orders") if (record := read_object(line))]
    assert sum((order.get("user_id"), order.get("store_id")) in journeys for order in orders) > 0.95 * len(orders) > 100


def test_orders_have_every_outcome(truth: Truth) -> None:
    for name in OUTCOMES:
        assert sum(row[name] for row in truth.orders["accounting"]) > 0, name
    assert truth.orders["placed"] > truth.orders["cancelled"] > 0


def test_everything_has_a_name(landing: Path) -> None:
    named = read_names(landing)  # as the pipeline reads them
    assert len({(row["kind"], row["name"]) for row in named}) == len(named)
    seen = {(kind, event[f"{kind}_id"]) for event in accepted_events(landing).values() for kind in ("campaign", "ad", "store")}
    assert seen <= {(row["kind"], row["id"]) for row in named}


def test_hourly_weights_are_those_of_every_region(tmp_path: Path) -> None:
    weights = [0.0] * 24
    weights[5], weights[6] = 1.0, 3.0
    found = simulate(tmp_path / "out", 4_000, 1, days=2.0, hourly_weights=weights)
    shown: Counter[tuple[str, str]] = Counter()
    for row in found.campaign_hours:
        shown[row["region"], row["event_hour"][11:13]] += row["impressions"]
    for region in ("eu-west", "us-east"):
        assert shown[region, "06"] / shown[region, "05"] == pytest.approx(3, rel=0.2)
    assert sum(shown[region, hour] for region, hour in shown if hour in ("05", "06")) > 0.99 * sum(shown.values())
    assert recount_events(tmp_path / "out")[1] == found.campaign_hours


def test_files_follow_the_landing_protocol(landing: Path, truth: Truth) -> None:
    paths = [path for path in landing.rglob("*") if path.is_file()]
    assert not [path for path in paths if path.name.startswith((".", "_"))]
    assert {path.suffix for path in landing.glob("events/*/*")} == {".jsonl", ".gz"}
    assert {path.suffix for path in landing.glob("orders/*/*")} == {".jsonl"}
    assert {path.parent.name for path in landing.glob("events/*/*")} == {"eu-west", "us-east"}
    data = sorted(landing.glob("[eo]*/*/*"), key=lambda path: path.stat().st_mtime_ns)
    stamps = [path.stat().st_mtime_ns for path in data]
    assert len(set(stamps)) == len(stamps) == sum(truth.totals["files"].values())
    assert all(stamp % 1_000_000 == 0 for stamp in stamps)
    ends = []
    for path in data:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        received = [
            datetime.fromisoformat(record["received_at"])
            for line in content.splitlines()
            if (record := read_object(line)) and str(record.get("received_at", "")).endswith("Z")
        ]
        assert received == sorted(received)
        ends.append(received[-1])
        stamp = datetime.fromtimestamp(path.stat().st_mtime_ns / 1e9, UTC)
        assert (stamp - received[-1]).total_seconds() > -0.001
    assert len(ends) > 24


def test_boundaries_are_hit(landing: Path) -> None:
    """An event exactly on a billing change, exactly at the end of the grace, exactly at the allowed skew."""
    changes = set()
    for row in (landing / "campaigns" / "campaigns.csv").read_text().splitlines()[1:]:
        campaign, *_rest, valid_from, _valid_to = row.split(",")
        changes.add((campaign, datetime.fromisoformat(valid_from)))
    hits: Counter[str] = Counter()
    for _folder, line in offered_lines(landing, "events"):
        record = read_object(line)
        try:
            assert record is not None
            time, received = (datetime.fromisoformat(record[name]) for name in ("event_time", "received_at"))
            lag = (received - time).total_seconds()
        except (AssertionError, KeyError, TypeError, ValueError):
            continue
        hour = time.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        hits["billing change"] += (record.get("campaign_id"), time) in changes
        hits["end of grace"] += (received - hour).total_seconds() == 75 * 60
        hits["just before"] += (received - hour).total_seconds() == 75 * 60 - 0.001
        hits["allowed skew"] += lag == -300
        hits["more"] += lag < -300
    wanted = ("billing change", "end of grace", "just before", "allowed skew", "more")
    assert all(hits[name] > 0 for name in wanted), hits


def test_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "left.jsonl").write_text("{}\n")
    with pytest.raises(SimulationError, match="not an empty folder"):
        simulate(tmp_path, 10, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"events": 0},
        {"start": datetime(2025, 6, 2)},
        {"days": 1.0, "rate": 2.0},
        {"days": 0.0},
        {"rate": -1.0},
        {"campaigns": 0},
        {"ads": 3},
        {"users": 1},
        {"click_rate": 1.5},
        {"gz_share": -0.1},
        {"listed_users": -1},
        {"lines_per_file": 0},
        {"hourly_weights": [1.0] * 23},
        {"hourly_weights": [0.0] * 24},
        {"hourly_weights": [1.0] * 23 + [-1.0]},
    ],
    ids=str,
)
def test_refuses_wrong_arguments(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(SimulationError):
        simulate(tmp_path / "out", **({"events": 10, "seed": 1} | wrong))
    assert not (tmp_path / "out").exists()


def test_refuses_wrong_shares() -> None:
    with pytest.raises(SimulationError, match="late"):
        SimulationShares(late=-0.1)
    with pytest.raises(SimulationError, match=r"0\.5"):
        SimulationShares(broken=0.3, conflict=0.3)


def test_rate_sets_the_duration(tmp_path: Path) -> None:
    found = simulate(tmp_path / "out", 3_600, 1, rate=1.0)
    assert found.args["days"] == pytest.approx(1 / 24)


def test_imports_nothing_of_the_pipeline() -> None:
    """The truth is worth something only if it shares no code with what it judges; tests/test_layout.py follows further imports."""
    modules = set()
    for path in Path(str(simulator.__file__)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(str(node.module).split(".")[0])
    assert not modules & {"spark_jobs", "orchestration", "expectations", "pyspark", "dagster"}
