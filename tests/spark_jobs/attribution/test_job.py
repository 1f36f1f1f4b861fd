"""Attribution of what is ingested: only what is concerned, whatever the order of arrival, killed anywhere, run twice."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from killed import run_code

from spark_jobs.attribution import job as module
from spark_jobs.attribution.job import attribute
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import BusyError, RuleFileError
from spark_jobs.lake.locks import ATTRIBUTION, SECONDS, Patience, exclusive
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, EVENTS, RULE_SETS
from spark_jobs.steps import CRASH_VARIABLE
from spark_jobs.units import HourRange
from tests.spark_jobs.homes.attribution_lake import (
    NOON,
    add_events,
    add_orders,
    correct,
    credits,
    event,
    held,
    linear,
    mark,
    order,
    revisions,
    rows_of,
)

ROOT = Path(__file__).resolve().parents[3]


def version(settings: Settings) -> int | None:
    return DeltaLog(settings.table_uri(ATTRIBUTED_ORDERS.name)).latest_version()


def nothing_to_do(settings: Settings) -> None:
    """A further run looks at no order and writes nothing; nor does one that has lost its indexes."""
    before = (version(settings), rows_of(settings))
    assert attribute(settings).orders == 0
    assert (version(settings), rows_of(settings)) == before
    shutil.rmtree(settings.home_path / "attribution_index", ignore_errors=True)
    assert attribute(settings).orders == 0
    assert (version(settings), rows_of(settings)) == before


def test_orders_of_a_user_that_is_nobody_are_credited_to_nobody(settings: Settings) -> None:
    settings.rules_path.mkdir(parents=True)
    rules = settings.rules_path / "attribution.toml"
    rules.write_text("exempt_users = []\n")
    users = ("u", "Unknown", "00000000-0000-0000-0000-000000000000")
    add_events(settings, [event(f"t{n}", 1, user_id=user) for n, user in enumerate(users)])
    add_orders(settings, [order("before", user_id="Unknown")])
    attribute(settings)
    assert linear(settings) == {"before": {"t1": 1000}}
    [stored] = held(settings, RULE_SETS)
    assert "exempt" not in stored["content"]  # as an older release wrote it
    rules.unlink()
    add_orders(settings, [order(f"o{n}", user_id=user) for n, user in enumerate(users)])
    report = attribute(settings)
    assert (report.orders, report.credited, report.unattributed) == (3, 1, 2)
    assert linear(settings) == {"before": {"t1": 1000}, "o0": {"t0": 1000}}
    add_events(settings, [event("late", 2, user_id="Unknown")])
    attribute(settings)
    # an order keeps its rule set, here one that exempts nobody
    assert linear(settings) == {"before": {"t1": 500, "late": 500}, "o0": {"t0": 1000}}
    nothing_to_do(settings)
    attribute(settings, HourRange.of(NOON))
    assert linear(settings) == {"o0": {"t0": 1000}}


def test_orders_are_credited_once(settings: Settings) -> None:
    add_events(settings, [event("a", 30), event("b", 1), event("x", 1, store_id="other"), event("after", -1)])
    add_orders(settings, [order("o"), order("none", user_id="nobody"), order("late", user_id="v", is_late=True)])
    report = attribute(settings, run_id="run", now=NOON)
    counted = (
        report.run_id,
        report.orders,
        report.credited,
        report.unattributed,
        report.cancelled,
        report.revisions,
        report.touches,
    )
    assert counted == ("run", 3, 1, 2, 0, 3, 2)
    found = credits(settings)
    assert found[("o", "linear", 1)] == {"b": 1000} and found[("o", "linear", 7)] == {"a": 500, "b": 500}
    assert found[("o", "last_click", 30)] == {"b": 1000} and found[("o", "first_click", 30)] == {"a": 1000}
    assert revisions(settings) == {
        "late": [(1, "placed", "late_order")],
        "none": [(1, "placed", "order")],
        "o": [(1, "placed", "order")],
    }
    rows = [row for row in held(settings, ATTRIBUTED_ORDERS) if row["order_id"] == "o"]
    assert {(row["touches"], row["rule_set"], row["_run_id"], row["attributed_at"]) for row in rows} == {
        (2, held(settings, RULE_SETS)[0]["rule_set"], "run", NOON)
    }
    nothing_to_do(settings)


def test_a_late_touch_concerns_the_orders_behind_it_alone(settings: Settings) -> None:
    add_events(settings, [event("a", 10)])
    add_orders(settings, [order("before", 6), order("behind", 1), order("far", -24 * 30), order("other", 1, user_id="v")])
    attribute(settings)
    add_events(settings, [event("late", 5), event("far_back", 24 * 31)])
    report = attribute(settings)
    assert (report.orders, report.revisions) == (1, 1)  # "far" lies 30 days and 5 hours behind it
    assert linear(settings)["behind"] == {"a": 500, "late": 500} and linear(settings)["before"] == {"a": 1000}
    assert revisions(settings)["behind"] == [(1, "placed", "order"), (2, "placed", "late_touch")]
    assert [len(found) for name, found in revisions(settings).items() if name != "behind"] == [1, 1, 1]
    nothing_to_do(settings)


@pytest.mark.parametrize(
    ("after_touch", "is_concerned"),
    [
        (timedelta(0), False),
        (timedelta(microseconds=1), True),
        (timedelta(days=30), True),
        (timedelta(days=30, microseconds=1), False),
    ],
)
def test_the_edges_of_who_is_concerned(settings: Settings, after_touch: timedelta, is_concerned: bool) -> None:
    add_orders(settings, [order("o", order_time=NOON + after_touch)])
    attribute(settings)
    add_events(settings, [event("late", 0)])
    report = attribute(settings)
    assert (report.orders, report.revisions) == (is_concerned, is_concerned)
    assert credits(settings).get(("o", "linear", 30)) == ({"late": 1000} if is_concerned else None)


def test_a_touch_found_invalid_is_taken_back_and_may_return(settings: Settings) -> None:
    add_events(settings, [event("a", 10), event("b", 9.9), event("c", 1), event("other", 9, user_id="v")])
    add_orders(settings, [order("o"), order("p", 0, user_id="v")])
    attribute(settings)
    mark(settings, "b")
    report = attribute(settings)
    assert (report.orders, report.revisions) == (1, 1)
    assert linear(settings)["o"] == {"a": 500, "c": 500}
    nothing_to_do(settings)
    mark(settings, "b", rule=None)
    attribute(settings)
    assert linear(settings)["o"] == {"a": 334, "b": 333, "c": 333}
    assert [reason for _, _, reason in revisions(settings)["o"]] == ["order", "touch_invalid", "late_touch"]
    assert len(revisions(settings)["p"]) == 1
    nothing_to_do(settings)


def test_a_touch_invalid_from_the_start_never_counts(settings: Settings) -> None:
    add_events(settings, [event("a", 2), event("bad", 1, invalid_traffic_rule="crawler_user_agent")])
    add_orders(settings, [order("o")])
    attribute(settings)
    assert linear(settings) == {"o": {"a": 1000}}
    mark(settings, "bad", rule=None)
    attribute(settings)
    assert linear(settings) == {"o": {"a": 500, "bad": 500}}


def test_events_that_a_correction_takes_away_or_changes(settings: Settings) -> None:
    add_events(settings, [event("gone", 3), event("moved", 2.9), event("stays", 2.8)])
    add_orders(settings, [order("o"), order("p", user_id="v")])
    attribute(settings)
    correct(settings, {"gone": None, "moved": {"user_id": "v"}}, keys="changed")
    report = attribute(settings)
    assert report.orders == 2
    assert linear(settings) == {"o": {"stays": 1000}, "p": {"moved": 1000}}
    nothing_to_do(settings)


def test_cancelled_before_and_after(settings: Settings) -> None:
    add_events(settings, [event("a", 2)])
    add_orders(settings, [order("never", status="cancelled"), order("later"), order("kept")])
    report = attribute(settings)
    assert (report.credited, report.cancelled) == (2, 1)
    add_orders(settings, [order("later", status="cancelled")])
    report = attribute(settings)
    assert (report.orders, report.cancelled, report.revisions) == (1, 1, 1)
    assert linear(settings) == {"kept": {"a": 1000}}
    add_events(settings, [event("late", 1)])
    attribute(settings)
    assert linear(settings) == {"kept": {"a": 500, "late": 500}}
    assert revisions(settings)["never"] == [(1, "cancelled", "order")]
    assert revisions(settings)["later"] == [(1, "placed", "order"), (2, "cancelled", "cancelled")]
    nothing_to_do(settings)


def test_a_cancellation_that_came_first_gives_the_order_its_time_later(settings: Settings) -> None:
    add_orders(settings, [order("o", 5, status="cancelled"), order("p", 0)])
    attribute(settings)
    add_orders(settings, [order("o", 1, status="cancelled", user_id="u")])
    add_events(settings, [event("a", 3)])
    assert attribute(settings).orders == 2
    assert linear(settings) == {"p": {"a": 1000}}
    nothing_to_do(settings)


def test_rules_hold_from_then_on_and_for_a_range_anew(settings: Settings) -> None:
    add_events(settings, [event("a", 24 * 10), event("b", 24 * 3), event("c", 1)])
    add_orders(settings, [order("old"), order("old_later", -2)])
    attribute(settings)
    before = credits(settings)
    settings.rules_path.mkdir()
    (settings.rules_path / "attribution.toml").write_text("half_life_days = 1\n")
    nothing_to_do(settings)
    add_orders(settings, [order("new")])
    add_events(settings, [event("late", 48)])
    report = attribute(settings)
    assert (report.orders, report.revisions) == (3, 3)
    after = credits(settings)
    assert after[("old", "time_decay", 30)] != after[("new", "time_decay", 30)]  # each by its own rules
    assert after[("old", "linear", 30)] == after[("new", "linear", 30)] != before[("old", "linear", 30)]
    report = attribute(settings, HourRange.of(NOON))
    assert (report.orders, report.revisions) == (2, 1)  # "new" comes out the same
    assert credits(settings)[("old", "time_decay", 30)] == after[("new", "time_decay", 30)]
    assert credits(settings)[("old_later", "time_decay", 30)] == after[("old_later", "time_decay", 30)]
    assert [reason for _, _, reason in revisions(settings)["old"]] == ["order", "late_touch", "rules"]
    assert len(held(settings, RULE_SETS)) == 2
    assert attribute(settings, HourRange.of(NOON)).revisions == 0
    nothing_to_do(settings)


def test_view_through_counts_impressions_that_were_there_before(settings: Settings) -> None:
    add_events(
        settings, [event("i", 2, event_type="impression"), event("j", 2, event_type="impression", user_id="v"), event("k", 3)]
    )
    add_orders(settings, [order("o"), order("p", user_id="v")])
    attribute(settings)
    assert linear(settings) == {"o": {"k": 1000}}
    settings.rules_path.mkdir()
    (settings.rules_path / "attribution.toml").write_text("view_through = true\n")
    attribute(settings, HourRange.of(NOON))
    assert linear(settings) == {"o": {"k": 1000}, "p": {"j": 1000}}
    add_events(settings, [event("l", 1, event_type="impression", user_id="v")])
    attribute(settings)
    assert linear(settings)["p"] == {"j": 500, "l": 500}
    nothing_to_do(settings)


def test_a_range_does_not_move_what_is_processed(settings: Settings) -> None:
    add_events(settings, [event("a", 2)])
    add_orders(settings, [order("o"), order("p", -5)])
    assert attribute(settings, HourRange.of(NOON)).orders == 1
    assert set(linear(settings)) == {"o"}
    assert attribute(settings).revisions == 1
    assert set(linear(settings)) == {"o", "p"}
    nothing_to_do(settings)


def test_compaction_of_every_table_changes_nothing(settings: Settings) -> None:
    for number in range(3):
        add_events(settings, [event(f"a{number}", 2)])
        add_orders(settings, [order(f"o{number}")])
        attribute(settings)
    before = credits(settings)
    for table in (EVENTS.name, "orders", ATTRIBUTED_ORDERS.name):
        DeltaTable(settings.table_uri(table)).optimize.compact()
    nothing_to_do(settings)
    assert credits(settings) == before


def test_what_cannot_be_followed_is_looked_at_whole(settings: Settings) -> None:
    add_events(settings, [event("a", 2), event("b", 1)])
    add_orders(settings, [order("o"), order("p", user_id="v")])
    attribute(settings)
    mark(settings, "b")
    add_events(settings, [event("v", 1, user_id="v")])
    log = Path(settings.table_uri(EVENTS.name)) / "_delta_log"
    DeltaTable(settings.table_uri(EVENTS.name)).create_checkpoint()
    (log / f"{1:020d}.json").unlink()
    (log / f"{2:020d}.json").unlink()
    report = attribute(settings)
    assert (report.orders, report.revisions) == (2, 2)
    assert linear(settings) == {"o": {"a": 1000}, "p": {"v": 1000}}
    assert revisions(settings)["p"][-1][2] == "recount"
    nothing_to_do(settings)


def test_indexes_behind_and_ahead(settings: Settings, tmp_path: Path) -> None:
    index = settings.home_path / "attribution_index"
    add_events(settings, [event("a", 2)])
    add_orders(settings, [order("o")])
    attribute(settings)
    shutil.copytree(index, tmp_path / "early")
    mark(settings, "a")
    add_events(settings, [event("b", 1)])
    attribute(settings)
    shutil.rmtree(index)
    shutil.copytree(tmp_path / "early", index)  # behind
    add_events(settings, [event("c", 0.5)])
    attribute(settings)
    assert linear(settings) == {"o": {"b": 500, "c": 500}}
    for run in index.glob("*/run-*.arrow"):
        run.write_bytes(b"broken")
    add_events(settings, [event("d", 0.4)])
    attribute(settings)
    assert set(linear(settings)["o"]) == {"b", "c", "d"}
    nothing_to_do(settings)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_and_run_again(settings: Settings, moment: str) -> None:
    add_events(settings, [event("a", 2)])
    add_orders(settings, [order("o"), order("p", -1)])
    attribute(settings)
    add_events(settings, [event("b", 1)])
    add_orders(settings, [order("q")])
    program = (
        "from spark_jobs.config import load_settings; from spark_jobs.attribution.job import attribute; attribute(load_settings())"
    )
    environment = {"ADTALLY_HOME": str(settings.home_path), CRASH_VARIABLE: f"{moment}:attributed_orders:0"}
    assert run_code(program, **environment) == -signal.SIGKILL
    report = attribute(settings)
    assert report.revisions == (3 if moment == "before" else 0)
    assert linear(settings) == {name: {"a": 500, "b": 500} for name in ("o", "p", "q")}
    assert [len(found) for found in revisions(settings).values()] == [2, 2, 1]
    nothing_to_do(settings)


def test_in_small_pieces_it_is_the_same(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    add_events(settings, [event(f"e{n}", n / 7, user_id=f"u{n % 3}") for n in range(60)])
    add_orders(settings, [order(f"o{n}", user_id=f"u{n % 4}") for n in range(11)])
    monkeypatch.setattr(module, "ORDERS_AT_ONCE", 4)
    monkeypatch.setattr(module, "_TOUCHES_AT_ONCE", 25)
    report = attribute(settings)
    found = credits(settings)
    assert (report.orders, report.credited, report.revisions) == (11, 9, 11)
    assert len(found[("o0", "linear", 7)]) == 19  # not the one at the order's own time
    monkeypatch.undo()
    assert attribute(settings, HourRange.of(NOON)).revisions == 0


Step = Callable[[Settings], None]


def _clicks(settings: Settings, rows: list[dict[str, Any]], invalid: list[str]) -> None:
    add_events(settings, rows)
    mark(settings, *invalid)


def _orders(settings: Settings, rows: list[dict[str, Any]]) -> None:
    add_orders(settings, rows)
    add_orders(settings, [{**rows[0], "status": "cancelled"}])


def steps(seed: int) -> list[Step]:
    """Batches of clicks and orders, marks and cancellations; each concerns records of its own or comes after them in any order."""
    generator = random.Random(seed)
    made: list[Step] = []
    for number in range(4):
        clicks = [event(f"c{number}-{n}", generator.choice([0, 1, 24, 200, 720]) + n, user_id=f"u{n % 2}") for n in range(6)]
        marked = [click["event_id"] for click in clicks[:2]]
        placed = [order(f"o{number}-{n}", generator.randint(0, 40), user_id=f"u{n % 2}", total_micros=10**9 + n) for n in range(3)]
        made.append(partial(_clicks, rows=clicks, invalid=marked))
        made.append(partial(_orders, rows=placed))
    return made


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_arrival_and_the_batches_never_matter(settings: Settings, tmp_path: Path, seed: int) -> None:
    copies = [load_settings(home=tmp_path / f"copy{number}") for number in range(2)]
    for copy in copies:
        shutil.copytree(settings.lakehouse_uri, copy.lakehouse_uri)
    for step in steps(seed):
        step(settings)
    attribute(settings)
    expected = credits(settings)
    assert expected
    for number, copy in enumerate(copies):
        shuffled = steps(seed)
        random.Random(seed * 10 + number).shuffle(shuffled)
        for step in shuffled:
            step(copy)
            if number == 0:
                attribute(copy)
        attribute(copy)
        assert credits(copy) == expected
        nothing_to_do(copy)


def test_wrong_use(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, Patience.SOME, 0.1)
    with exclusive(settings, ATTRIBUTION), pytest.raises(BusyError, match="another attribution"):
        attribute(settings)
    settings.rules_path.mkdir()
    (settings.rules_path / "attribution.toml").write_text("window_days = [7, 1]\n")
    with pytest.raises(RuleFileError, match=r"attribution\.toml: window_days: .*ascending"):
        attribute(settings)
