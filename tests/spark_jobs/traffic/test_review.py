"""Invalid traffic in a real lakehouse: marks, money and restatements, whatever the order of arrival; without Spark's part."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import correct
import lake
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as with_settings
from hypothesis import strategies as st
from killed import run_code
from local import LocalEvents

from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.backfill import backfill
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.operate.watermark import close_by_hand
from spark_jobs.steps import CRASH_VARIABLE, Step
from spark_jobs.traffic.review import review
from spark_jobs.units import HourRange

pytestmark = pytest.mark.homes

ROOT = Path(__file__).resolve().parents[3]
CASES = [
    case for path in sorted((ROOT / "tests" / "cases" / "invalid_traffic").glob("*.json")) for case in json.loads(path.read_text())
]
COST = {"click": 1_500_000, "impression": 1500}
MARKS = "event_id, invalid_traffic_rule, invalid_traffic_rules, spend_nanos, invalid_spend_nanos"
VERSIONS = ("events", "minute_metrics", "batch_ledger", "restatements", "traffic_reviews", "rule_sets")


def record(told: dict[str, Any]) -> dict[str, Any]:
    """An event of a case, as it is landed."""
    known = {"id", "type", "time", "user", "ad", "agent", "hits", "rule"}
    time = told["time"] if "T" in told["time"] else f"2025-06-02T{told['time']}Z"
    fields = {
        "event_type": told["type"],
        "event_time": time,
        "received_at": time,
        "campaign_id": "c-cpc" if told["type"] == "click" else "c-cpm",
        "user_id": told.get("user", "u-1"),
        "ad_id": told.get("ad", "a-1"),
        "user_agent": told.get("agent"),
    }
    return lake.event(told["id"], **{**fields, **{name: value for name, value in told.items() if name not in known}})


def expected(told: dict[str, Any]) -> tuple[Any, ...]:
    hits = told.get("hits")
    rule = told.get("rule", hits[0] if hits else None)
    cost = 0 if told.get("campaign_id") == "c-none" else COST[told["type"]]
    return (told["id"], rule, hits, 0 if rule else cost, cost if rule else 0)


def check_totals(settings: Settings) -> None:
    """Events, increments, ledger and restatements say the same of what is billed and what is not."""
    of_events = correct.rows(
        settings,
        """
        select count(*) filter (event_type = 'impression' and invalid_traffic_rule is null),
            count(*) filter (event_type = 'click' and invalid_traffic_rule is null),
            count(*) filter (event_type = 'impression' and invalid_traffic_rule is not null),
            count(*) filter (event_type = 'click' and invalid_traffic_rule is not null),
            sum(spend_nanos)::bigint, sum(invalid_spend_nanos)::bigint from events
        """,
    )
    measures = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")
    sums = ", ".join(f"sum({name})::bigint" for name in measures)
    assert correct.rows(settings, f"select {sums} from minute_metrics") == of_events
    ((*_, invalid_impressions, invalid_clicks, spend, _),) = of_events
    booked = correct.rows(settings, "select sum(invalid_traffic)::bigint, sum(spend_nanos)::bigint from batch_ledger")
    assert booked == [(invalid_impressions + invalid_clicks, spend)]
    corrected = correct.rows(settings, f"select {sums} from minute_metrics where _run_id is not null")
    assert correct.rows(settings, f"select {sums} from restatements") == corrected
    assert not correct.rows(settings, "select record_uuid from minute_metrics group by all having count(*) > 1")


@pytest.fixture
def homes(tmp_path: Path, empty_lakehouse: Path) -> Callable[[], Settings]:
    """Makes homes with empty tables and the usual prices."""
    numbers = count()

    def make() -> Settings:
        made = load_settings(home=tmp_path / str(next(numbers)))
        shutil.copytree(empty_lakehouse, made.lakehouse_uri)
        lake.campaigns(made)
        return made

    return make


def with_rules(settings: Settings, case: dict[str, Any]) -> Settings:
    settings.rules_path.mkdir(parents=True)
    (settings.rules_path / "invalid_traffic.toml").write_text(case.get("rules", ""))
    if "list" in case:
        (settings.rules_path / "listed.txt").write_text("\n".join(case["list"]))
    return settings


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_hand_worked_cases(homes: Callable[[], Settings], case: dict[str, Any]) -> None:
    """In one batch; and in several, the last first, with a review before the last of them."""
    told = sorted(map(expected, case["events"]), key=repr)
    records = [record(event) for event in case["events"]]
    at_once, in_turn = (with_rules(homes(), case) for _ in range(2))
    LocalEvents(at_once).take(records)
    stream = LocalEvents(in_turn)
    turned = records[::-1]
    stream.take(turned[: len(turned) // 2])
    review(in_turn)
    stream.take(turned[len(turned) // 2 :])
    for home in (at_once, in_turn):
        review(home)
        assert correct.rows(home, f"select {MARKS} from events") == told
        check_totals(home)
        before = versions(home)
        assert not review(home).hours
        assert versions(home) == before, "the second run changes nothing"
    assert not reconcile(in_turn, None).differences


def versions(settings: Settings) -> dict[str, int | None]:
    from spark_jobs.lake.log import DeltaLog

    return {name: DeltaLog(settings.table_uri(name)).latest_version() for name in VERSIONS}


def click(name: str, time: str, **changes: Any) -> dict[str, Any]:
    return record({"id": name, "type": "click", "time": time, **changes})


def test_a_late_click_flips_the_marks_of_what_it_comes_before(homes: Callable[[], Settings]) -> None:
    """Two clicks an hour and more apart; a third between them, sent days later, takes the second one's place."""
    home = homes()
    stream = LocalEvents(home)
    stream.take([click("a", "12:00:00"), click("c", "13:10:00")])
    first = review(home)
    assert [(hour.invalid, hour.changed) for hour in first.hours] == [(0, 0), (0, 0)]
    stream.take([click("b", "12:50:00", received_at="2025-06-02T20:00:00Z")])
    report = review(home, run_id="late")
    assert {hour.event_hour.hour: (hour.events, hour.invalid, hour.changed, hour.spend_nanos_change) for hour in report.hours} == {
        12: (2, 1, 1, -1_500_000),
        13: (1, 1, 1, -1_500_000),
    }
    told = "kind, cause, event_hour, clicks, invalid_clicks, spend_nanos, invalid_spend_nanos"
    rows = correct.rows(home, f"select {told} from restatements where run_id = 'late'")
    assert rows == [
        ("review", "repeat_click", datetime(2025, 6, 2, hour, tzinfo=UTC), -1, 1, -1_500_000, 1_500_000) for hour in (12, 13)
    ]
    check_totals(home)
    assert not reconcile(home, None).differences


def test_a_late_impression_gives_a_click_back(homes: Callable[[], Settings]) -> None:
    home = with_rules(homes(), {"rules": '[unmatched_click]\nmode = "invalid"\n'})
    stream = LocalEvents(home)
    stream.take([click("a", "12:00:00", impression_id="i")])
    assert review(home).hours[0].spend_nanos_change == -1_500_000
    stream.take([record({"id": "i", "type": "impression", "time": "2025-06-01T12:00:00Z"})])
    report = review(home)
    assert {hour.event_hour.day: hour.spend_nanos_change for hour in report.hours} == {1: 0, 2: 1_500_000}
    restated = "select cause, sum(invalid_clicks)::bigint, count(*) from restatements group by all"
    assert correct.rows(home, restated) == [("unmatched_click", 0, 2)]
    check_totals(home)


def test_what_comes_after_a_review_is_judged_by_its_batch_until_the_next(homes: Callable[[], Settings]) -> None:
    home = homes()
    stream = LocalEvents(home)
    stream.take([click("a", "12:00:00")])
    review(home)
    stream.take([click("b", "12:00:01"), click("c", "12:00:02", agent="curl/8")])
    assert correct.rows(home, "select event_id, invalid_traffic_rule from events") == [
        ("a", None),
        ("b", None),
        ("c", "crawler_user_agent"),
    ]
    assert not reconcile(home, None).differences
    review(home)
    assert ("b", "repeat_click") in correct.rows(home, "select event_id, invalid_traffic_rule from events")
    assert not reconcile(home, None).differences


def test_an_hour_keeps_the_rules_of_its_first_review_until_a_backfill(homes: Callable[[], Settings]) -> None:
    home = homes()
    stream = LocalEvents(home)
    stream.take([click("a", "12:00:00"), click("b", "12:30:00")])
    review(home)
    with_rules(home, {"rules": "[repeat_click]\nwindow_seconds = 60\n"})
    stream.take([click("d", "15:00:00"), click("e", "15:30:00"), click("c", "12:40:00")])
    review(home)
    marks = "select event_id, invalid_traffic_rule from events"
    assert correct.rows(home, marks) == [
        ("a", None),
        ("b", "repeat_click"),
        ("c", "repeat_click"),
        ("d", None),
        ("e", None),
    ]
    assert len(correct.rows(home, "select distinct rule_set from events")) == 2
    assert not reconcile(home, None).differences
    noon = datetime(2025, 6, 2, 12, tzinfo=UTC)
    close_by_hand(home, noon + timedelta(hours=8), reason="test", closed_by="test")
    done = backfill(home, HourRange.of(noon), run_id="bf", reason="a shorter window")
    assert [(hour.event_hour, hour.changed, hour.rewritten, hour.spend_nanos_change) for hour in done.reviewed] == [
        (noon, 2, 3, 3_000_000)
    ]
    assert {rule for _, rule in correct.rows(home, marks)} == {None}
    assert len(correct.rows(home, "select distinct rule_set from events")) == 1
    told = "select kind, reason, cause, sum(spend_nanos)::bigint from restatements where run_id = 'bf' group by all"
    assert correct.rows(home, told) == [("review", "a shorter window", "repeat_click", 3_000_000)]
    check_totals(home)
    assert not reconcile(home, None).differences
    before = versions(home)
    assert not any(hour.rewritten for hour in backfill(home, HourRange.of(noon)).reviewed)
    assert versions(home) == before and not review(home).hours


def test_rule_sets_from_before_there_were_exempt_users_judge_as_they_did(homes: Callable[[], Settings]) -> None:
    home = with_rules(homes(), {"rules": "exempt_users = []\n"})
    stream = LocalEvents(home)
    stream.take([click("a", "12:00:00", user="unknown"), click("b", "12:30:00", user="unknown")])
    review(home)
    [(content,)] = correct.rows(home, "select content from rule_sets where kind = 'invalid_traffic'")
    assert "exempt" not in content  # as an older release wrote it
    (home.rules_path / "invalid_traffic.toml").unlink()
    later = {"c": "12:40:00", "d": "15:00:00", "e": "15:01:00"}
    stream.take([click(name, time, user="unknown") for name, time in later.items()])
    review(home)
    marks = "select event_id, invalid_traffic_rule from events"
    repeat = "repeat_click"
    assert correct.rows(home, marks) == [("a", None), ("b", repeat), ("c", repeat), ("d", None), ("e", None)]
    assert not reconcile(home, None).differences
    noon = datetime(2025, 6, 2, 12, tzinfo=UTC)
    close_by_hand(home, noon + timedelta(hours=8), reason="test", closed_by="test")
    done = backfill(home, HourRange.of(noon), reason="strangers are no repeats")
    assert [hour.spend_nanos_change for hour in done.reviewed] == [3_000_000]
    assert {rule for _, rule in correct.rows(home, marks)} == {None}
    check_totals(home)
    assert not reconcile(home, None).differences


def test_a_batch_that_has_not_ended_is_left_for_the_next_review(homes: Callable[[], Settings]) -> None:
    """Its events stand in the table, its line in the ledger does not: the run that ends it has yet to count them."""
    home = homes()
    stream = LocalEvents(home)
    stream.take([click("a", "12:00:00")])
    stream.take([click("b", "12:00:01")])
    ended = correct.select(home, "select * from batch_ledger where _batch_id = 1")
    correct.delete(home, "batch_ledger", "_batch_id = 1")
    report = review(home)
    assert [(hour.events, hour.invalid) for hour in report.hours] == [(1, 0)]
    from deltalake import write_deltalake

    from spark_jobs.lake.tables import BATCH_LEDGER

    write_deltalake(home.table_uri("batch_ledger"), ended.cast(BATCH_LEDGER.schema), mode="append")
    assert [(hour.events, hour.invalid) for hour in review(home).hours] == [(2, 1)]
    check_totals(home)
    assert not reconcile(home, None).differences


def test_a_fault_in_the_marks_is_named_and_repaired_once(homes: Callable[[], Settings]) -> None:
    home = homes()
    LocalEvents(home).take([click("a", "12:00:00"), click("b", "12:00:01"), click("c", "12:00:02", agent="curl/8")])
    review(home)
    good = correct.contents(home)
    correct.update(home, "events", "event_id = 'b'", invalid_traffic_rule="null", spend_nanos="1500000", invalid_spend_nanos="0")
    correct.update(home, "events", "event_id = 'c'", invalid_traffic_rules="null")
    correct.update(home, "events", "event_id = 'a'", rule_set="'another'")
    correct.update(home, "minute_metrics", "invalid_clicks = 1 and _run_id is null", invalid_clicks="0")
    correct.update(home, "batch_ledger", "_run_id is null", invalid_traffic="0")
    found = reconcile(home, None).differences
    assert {(one.layer, one.cause, one.rows_different) for one in found} == {
        ("events", "mark_wrong", 3),
        ("minute_metrics", "increment_altered", 1),
        ("batch_ledger", "ledger_altered", 1),
    }
    assert not reconcile(home, None, repair=True).remaining
    assert not reconcile(home, None, repair=True).differences
    assert correct.contents(home) == good
    assert not review(home).hours


STEPS = (
    *(Step.RULE_SETS, Step.CORRECTION_DECIDED, Step.CORRECTED_EVENTS, Step.CORRECTED_METRICS, Step.CORRECTED_LEDGER),
    *(Step.RESTATEMENTS, Step.TRAFFIC_REVIEWS, Step.CORRECTION_DONE),
)


def test_a_review_that_is_killed_anywhere_comes_to_the_same(homes: Callable[[], Settings], tmp_path: Path) -> None:
    home = homes()
    LocalEvents(home).take([click("a", "12:59:59"), click("b", "13:00:00"), click("c", "12:00:02", agent="curl/8")])
    with_rules(home, {"rules": "[repeat_click]\nwindow_seconds = 7200\n"})  # so the review has a rule set to keep
    whole = correct.copied(home, tmp_path / "whole")
    review(whole, run_id="r")
    good, summed = correct.contents(whole), restated(whole)
    script = (
        "from spark_jobs.config import load_settings as s; from spark_jobs.traffic.review import review; review(s(), run_id='r')"
    )
    points = [("before", Step.CORRECTION_DECIDED), *(("after", step) for step in STEPS)]  # after one is before the next
    for number, (moment, step) in enumerate(points):
        killed = correct.copied(home, tmp_path / f"killed-{number}")
        environment = {"ADTALLY_HOME": str(killed.home_path), CRASH_VARIABLE: f"{moment}:{step}:0"}
        assert run_code(script, **environment) == -signal.SIGKILL, (moment, step)
        review(killed, run_id="r")
        assert correct.contents(killed) == good and restated(killed) == summed, (moment, step)
        assert not review(killed).hours


def restated(settings: Settings) -> list[tuple[Any, ...]]:
    return correct.rows(settings, "select * exclude restated_at from restatements") + correct.rows(
        settings, "select event_hour, rule_set, inputs, events, invalid, changed from traffic_reviews"
    )


def test_events_of_a_table_from_before_there_were_rules(homes: Callable[[], Settings]) -> None:
    """Plans without a rule set, nulls in the columns that the table did not have: nothing differs, and a review judges them."""
    home = homes()

    class Before(LocalEvents):
        def newest_references(self) -> tuple[int, str | None]:
            return super().newest_references()[0], None

    Before(home).take([click("a", "12:00:00", agent="curl/8"), click("b", "13:00:00")])
    correct.update(home, "events", "true", invalid_spend_nanos="null")
    correct.update(home, "minute_metrics", "true", invalid_spend_nanos="null")
    assert not reconcile(home, None).differences
    assert sum(hour.invalid for hour in review(home).hours) == 1
    check_totals(home)
    assert not reconcile(home, None).differences


TRAFFIC = st.lists(
    st.tuples(
        st.sampled_from(["click", "click", "impression"]),
        st.sampled_from([0, 1, 59, 60, 61, 1800, 3599, 3600, 3601, 5400, 7199, 7200]),
        st.sampled_from(["u-1", "u-2"]),
        st.sampled_from(["a-1", "a-2"]),
        st.sampled_from([None, "curl/8"]),
    ),
    min_size=2,
    max_size=10,
)


@with_settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(traffic=TRAFFIC, order=st.randoms(use_true_random=False), cuts=st.sets(st.integers(1, 9), max_size=2))
def test_the_order_of_arrival_and_the_reviews_between_do_not_matter(
    homes: Callable[[], Settings], traffic: list[tuple[Any, ...]], order: Any, cuts: set[int]
) -> None:
    rules = {"rules": '[click_rate]\nclicks = 3\n[unmatched_click]\nmode = "mark"\nwindow_seconds = 3600\n'}
    start = datetime(2025, 6, 2, 12, tzinfo=UTC)
    events = [
        record(
            {
                "id": f"e{number}",
                "type": kind,
                "time": f"{start + timedelta(seconds=at):%Y-%m-%dT%H:%M:%SZ}",
                "user": user,
                "ad": ad,
                "agent": agent,
                "impression_id": f"e{(number + 1) % len(traffic)}",
            }
        )
        for number, (kind, at, user, ad, agent) in enumerate(traffic)
    ]
    at_once, mixed = (with_rules(homes(), rules) for _ in range(2))
    LocalEvents(at_once).take(events)
    review(at_once)
    order.shuffle(events)
    stream = LocalEvents(mixed)
    batch: list[dict[str, Any]] = []
    for number, event in enumerate(events):
        batch.append(event)
        if number in cuts:
            stream.take(batch)
            batch = []
            review(mixed)
    stream.take(batch or [events[0]])
    review(mixed)
    marks = f"select {MARKS}, rule_set from events"
    assert correct.rows(mixed, marks) == correct.rows(at_once, marks)
    totals = "select event_minute, ad_id, sum(columns('^(in.*|clicks|impr.*|spend.*)$'))::bigint from minute_metrics group by all"
    assert correct.rows(mixed, totals) == correct.rows(at_once, totals)
    check_totals(mixed)
    assert not reconcile(mixed, None).differences
