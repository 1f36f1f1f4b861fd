"""A build that makes the days that changed gives the same rows as one that makes all days, whatever happened between.

The tests run in their order, on one home.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from orchestration.marts import build, build_marts, query_marts
from orchestration.marts.dbt_project import MartsError, project_dir
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.mart_days import frozen_folder
from spark_jobs.lake.marts import KEPT_AFTER
from tests.orchestration.marts.histories import FIRST, History

pytestmark = pytest.mark.homes

NOW = datetime(2026, 8, 20, 8, 0, tzinfo=UTC)
DAYS = 70


class Twins:
    """A home whose builds follow the changes, and for each comparison a new one of the same lakehouse, built from all days."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.builds = folder, 0
        self.lake = folder / "lake"
        self.history = History(self.lake)
        self.settings = load_settings(home=folder / "home", lakehouse=str(self.lake))

    def build(self, group: str | None = None) -> build.MartBuild:
        """Build the marts. Dagster takes one result of each node."""
        self.builds += 1
        built = build_marts(self.settings, group, now=NOW + timedelta(minutes=30 * self.builds))
        assert len({node.unique_id for node in built.nodes}) == len(built.nodes)
        return built

    def assert_equal(self) -> None:
        """Compare every mart, row for row, with a full build of the same versions."""
        twin = load_settings(home=self.folder / f"twin-{self.builds}", lakehouse=str(self.lake))
        full = build_marts(twin, is_full=True, now=NOW + timedelta(minutes=30 * self.builds))
        assert full.full_because == "it was asked for"
        for mart, count in full.rows.items():
            if mart not in ("mart_build", "mart_build_history"):
                assert rows_of(self.settings, mart) == rows_of(twin, mart), mart
                assert len(rows_of(twin, mart)[1]) == count


def rows_of(settings: Settings, mart: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    return query_marts(settings, f"select * from {mart} order by all")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Seventy days, a batch of ten days each, built once."""
    made = Twins(tmp_path_factory.mktemp("incremental"))
    made.history.price(5_000)
    for start in range(0, DAYS, 10):
        made.history.batch(list(range(start, start + 10)), 120)
    made.history.order("o1", 1, 30, [25])
    made.history.order("o2", 1, 30, [28, 29])
    made.history.bill(3, 10)
    made.history.recount(3)
    first = made.build()
    assert first.full_because == "nothing is published that a build could start from"
    return made


def test_closed_days_are_frozen_and_the_newest_two_are_open(twins: Twins) -> None:
    with duckdb.connect(str(twins.settings.marts_path), read_only=True) as marts:
        found = "select model, day from days.kept where file is null order by all"
        days = [(FIRST + timedelta(days=number)).date() for number in (DAYS - 2, DAYS - 1)]
        assert [row for row in marts.execute(found).fetchall() if row[0] == "fct_campaign_day"] == [
            ("fct_campaign_day", day) for day in days
        ]
        unknown = "select count(*) from days.kept anti join days.builds using (build_id)"
        assert marts.execute(unknown).fetchall() == [(0,)], "each day says from which versions it was made"


def _late_events(history: History) -> None:
    history.batch([12, 40], 10, is_late=True)


def _new_days(history: History) -> None:
    history.batch([DAYS, DAYS + 1, DAYS - 1], 30)


def _review(history: History) -> None:
    history.review(33)


def _cancellation(history: History) -> None:
    history.order("o2", 2, 30, [])


def _orders(history: History) -> None:
    history.order("o1", 2, 30, [24, 26])
    history.order("o3", 1, 64, [60])


def _price_backfill(history: History) -> None:
    history.price(300, valid_from="2026-03-01T12:00:00+00:00")


def _replaced_prices(history: History) -> None:
    history.price(7, replace=True)


def _bill(history: History) -> None:
    history.bill(12, 44)


def _recount(history: History) -> None:
    history.recount(3)


def _repair(history: History) -> None:
    history.repair(47)


def _junk(history: History) -> None:
    history.batch([5], 1, junk=9)


@pytest.mark.parametrize(
    "changes",
    [
        [_late_events, _new_days, _late_events],
        [_review, _junk, _repair, _recount, _bill],
        [_orders, _cancellation],
        [_price_backfill, _late_events],
        [_replaced_prices, _new_days],
    ],
    ids=lambda changes: "-".join(change.__name__.strip("_") for change in changes),
)
def test_changes_give_the_rows_of_a_full_build(twins: Twins, changes: list[Callable[[History], None]]) -> None:
    """The near-real-time marts after each, then all: each group follows its own last build."""
    for change in changes:
        change(twins.history)
        near = twins.build("near_real_time")
        assert (near.full_because, near.groups) == (None, ("near_real_time",))
        assert near.days <= 4
    both = twins.build()
    assert both.full_because is None
    assert both.days <= 8
    twins.assert_equal()


def test_nothing_is_built_where_nothing_has_changed(twins: Twins) -> None:
    """Compaction moves rows between files: it changes no day."""
    twins.history.compact()
    again = twins.build()
    assert (again.full_because, again.days) == (None, 0)
    assert not [node for node in again.nodes if "fct_" in node.unique_id]


def test_a_killed_build_leaves_the_marts_and_its_files_go(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows_of(twins.settings, "fct_placement_day")
    folder = frozen_folder(twins.settings)
    _late_events(twins.history)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "publish_marts", killed)
        twins.build()
    left = {path for path in folder.rglob("*.parquet") if f"{NOW + timedelta(minutes=30 * twins.builds):%Y%m%dT%H%M}" in path.name}
    assert left
    assert rows_of(twins.settings, "fct_placement_day") == before
    twins.build()
    assert not {path for path in left if path.exists()}
    assert rows_of(twins.settings, "fct_placement_day") != before


def test_marts_of_a_home_that_was_moved_are_read_there(twins: Twins, tmp_path: Path) -> None:
    """The views name the frozen files by their full path: whoever opens the marts first lets them name the new one."""
    before = rows_of(twins.settings, "fct_placement_day")
    original, moved = twins.folder / "home", tmp_path / "moved"
    original.rename(moved)
    try:
        settings = load_settings(home=moved, lakehouse=str(twins.lake))
        assert rows_of(settings, "fct_placement_day") == before
        with duckdb.connect(str(settings.marts_path), read_only=True) as marts:
            assert len(marts.execute("select * from fct_placement_day").fetchall()) == len(before[1])
        assert build_marts(settings, now=NOW + timedelta(minutes=30 * twins.builds)).full_because is None
    finally:
        moved.rename(original)


def test_a_changed_model_builds_all_days(twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is that differs: the message says so, and the new formula holds for all days."""
    project = tmp_path / "dbt_project"
    shutil.copytree(project_dir(), project)
    macro = project / "macros" / "sum_bigint.sql"
    macro.write_text(macro.read_text().replace("sum({{ column }})", "2 * sum({{ column }})"))
    before = query_marts(twins.settings, "select sum(offered) from fct_event_accounting")[1]
    reader = duckdb.connect(str(twins.settings.marts_path), read_only=True)
    rows = reader.execute("select * from fct_placement_day order by all").fetchall()
    for module in ("build", "manifest"):
        monkeypatch.setattr(f"orchestration.marts.{module}.project_dir", lambda: project)
    with pytest.raises(MartsError, match="assert_"):  # it breaks conservation: nothing is published
        twins.build("near_real_time")
    assert query_marts(twins.settings, "select sum(offered) from fct_event_accounting")[1] == before
    macro.write_text(macro.read_text().replace("2 * sum", "sum"))
    pacing = project / "models" / "marts" / "fct_budget_pacing.sql"
    formula = pacing.read_text().replace("minutes_passed * 10 < 1440 * 8", "minutes_passed * 10 < 1440 * 2")
    pacing.write_text(formula)
    alerts = "select count(*) from fct_budget_pacing where is_alert"
    earlier = query_marts(twins.settings, alerts)[1][0][0]
    changed = twins.build("near_real_time")
    assert (changed.full_because, changed.groups) == ("the dbt project has changed since the last build", build.GROUPS)
    with reader:  # of the earlier build, whose frozen files this one does not share
        assert reader.execute("select * from fct_placement_day order by all").fetchall() == rows
    assert 0 < query_marts(twins.settings, alerts)[1][0][0] < earlier
    _late_events(twins.history)
    assert twins.build().full_because is None
    twins.assert_equal()


def test_dropped_files_are_kept_for_an_hour(twins: Twins) -> None:
    """A reader of an earlier build may still have them open."""
    with duckdb.connect(str(twins.settings.marts_path), read_only=True) as marts:
        dropped = dict(marts.execute("select file, dropped_at from days.dropped").fetchall())
    now = NOW.replace(tzinfo=None) + timedelta(minutes=30 * twins.builds)
    assert dropped
    assert all(now - at <= KEPT_AFTER for at in dropped.values())
    assert all((frozen_folder(twins.settings) / name).exists() for name in dropped)
