"""Building and publishing the marts, on small Delta tables."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from deltalake import DeltaTable
from filelock import FileLock

from orchestration.marts import build, build_marts, query_marts
from orchestration.marts.dbt_project import MartsError, project_dir, project_hash
from orchestration.marts.pins import SOURCES, pin_versions, table_ids
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError, BusyError, UsageError
from spark_jobs.lake.mart_days import create_views, frozen_folder
from spark_jobs.lake.tables import (
    ATTRIBUTED_ORDERS,
    BATCH_LEDGER,
    BILLING_LINES,
    CAMPAIGNS,
    EVENTS,
    MINUTE_METRICS,
    NAMES,
    RECONCILIATIONS,
)
from spark_jobs.lake.writes import ensure_tables
from tests.orchestration.marts.delta_files import commit
from tests.orchestration.marts.lakes import accepted, first_batch, increment, late_batch, ledger_row, money, touched

pytestmark = pytest.mark.homes

NOW = datetime(2026, 3, 12, 8, 0, tzinfo=UTC)
DAYS = "select event_date, campaign_id, impressions, clicks, invalid_clicks, spend_nanos, spend_micros from fct_campaign_day"
FIRST_DAYS = [
    (date(2026, 3, 10), "c1", 3, 2, 0, 2500, 3),
    (date(2026, 3, 10), "c9", 1, 0, 0, 0, 0),
    (date(2026, 3, 11), "c1", 0, 0, 1, 0, 0),
]
LATE_DAYS = [(date(2026, 3, 10), "c1", 3, 3, 0, 3000, 3), *FIRST_DAYS[1:]]


def settings_in(home: Path) -> Settings:
    return load_settings(home=home, lakehouse=None)


def lake_of(settings: Settings) -> Path:
    return Path(settings.lakehouse_uri)


def days(settings: Settings) -> list[tuple[Any, ...]]:
    return query_marts(settings, f"{DAYS} order by all")[1]


def litter(settings: Settings) -> list[str]:
    """What a build must not leave beside the published file."""
    known = {"marts.duckdb", "frozen", "dbt", ".build.lock"}
    return [path.name for path in settings.marts_path.parent.iterdir() if path.name not in known]


# A quote and braces in the path: they pass through SQL, YAML and a format string on their way.
@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, build.MartBuild, list[str]]:
    """The first build of the first batch, in a folder with an awkward name and in another zone; read only."""
    settings = settings_in(tmp_path_factory.mktemp("marts") / "a {b} o'clock")
    first_batch(lake_of(settings), int96=True)
    names = settings.landing_path / "names" / "n.csv"
    names.parent.mkdir(parents=True)
    names.write_text("kind,id,name\ncampaign,c1,Élan\nad,a9,Red shoes\nstore,s1,Nothing\nstore,s1,The shop\n", "utf-8")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "America/New_York")
        return settings, build_marts(settings, "near_real_time", progress=lines.append, now=NOW), lines


@pytest.fixture
def built(published: tuple[Settings, build.MartBuild, list[str]], tmp_path: Path) -> Settings:
    """A copy of it, to go on from."""
    shutil.copytree(published[0].home_path, tmp_path / "home")
    settings = settings_in(tmp_path / "home")
    with duckdb.connect() as connection:  # else it is a home that was moved
        connection.execute(f"attach '{settings.marts_path}' as marts")
        create_views(connection, "marts", frozen_folder(settings))
    return settings


def test_contents(published: tuple[Settings, build.MartBuild, list[str]]) -> None:
    settings, _, _ = published
    assert days(settings) == FIRST_DAYS
    assert query_marts(settings, "select * from fct_campaign_minute order by all")[1] == [
        (
            datetime(2026, 3, 10, 10, 5),
            date(2026, 3, 10),
            "eu",
            "c1",
            "a1",
            "s1",
            "EUR",
            3,
            2,
            0,
            0,
            2500,
            3,
            0,
            3,
            2,
            0,
            0,
            0,
            3,
            0,
        ),
        (datetime(2026, 3, 10, 23, 59), date(2026, 3, 10), "us", "c9", "a9", "s9", "EUR", 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0),
        (
            datetime(2026, 3, 11, 0, 0),
            date(2026, 3, 11),
            "eu",
            "c1",
            "a1",
            "s1",
            "EUR",
            0,
            0,
            0,
            1,
            0,
            0,
            0,
            0,
            1,
            1250,
            1,
            0,
            1,
            0,
        ),
    ]
    assert query_marts(settings, "select * from fct_event_accounting order by event_hour nulls last")[1] == [
        (datetime(2026, 3, 10, 10, 0), "eu", 8, 5, 2, 0, 1, 0, 0, 0),
        (datetime(2026, 3, 10, 23, 0), "us", 1, 1, 0, 0, 0, 0, 0, 1),
        (datetime(2026, 3, 11, 0, 0), "eu", 1, 1, 0, 0, 0, 0, 1, 0),
        (None, "eu", 2, 0, 0, 0, 2, 0, 0, 0),
    ]
    assert query_marts(settings, "select campaign_id, campaign_name, store_id, is_priced, is_current from dim_campaign order by 1")[
        1
    ] == [
        ("c1", "Élan", "s1", True, True),
        ("c9", "c9", "s9", False, False),
    ]
    assert query_marts(settings, "select ad_id, ad_name, campaign_id, campaigns_seen from dim_ad order by 1")[1] == [
        ("a1", "a1", "c1", 1),
        ("a9", "Red shoes", "c9", 1),
    ]
    stores = query_marts(settings, "select store_id, store_name, campaigns from dim_store order by 1")[1]
    assert stores == [("s1", "The shop", 1), ("s9", "s9", 1)]
    placements = "select placement, campaign_id, impressions, clicks, ctr from fct_placement_day where clicks + impressions > 0"
    assert query_marts(settings, f"{placements} order by 1, 2")[1] == [
        ("feed", "c1", 3, 1, 1 / 3),
        ("feed", "c9", 1, 0, 0),
        (None, "c1", 0, 1, None),
    ]
    sources = "select source_type, source, rule, invalid_clicks, invalid_spend_nanos from fct_invalid_traffic_sources order by 1"
    assert query_marts(settings, sources)[1] == [
        (kind, source, "repeat_click", 1, 1250) for kind, source in (("user", "u1"), ("user_agent", None))
    ]
    rules = "select event_date, ad_id, placement, region, rule, clicks, invalid_clicks, invalid_spend_nanos"
    assert query_marts(settings, f"{rules} from fct_invalid_traffic_day where gross_clicks > 0 order by 1, 3")[1] == [
        (date(2026, 3, 10), "a1", "feed", "eu", "none", 1, 0, 0),
        (date(2026, 3, 10), "a1", None, "eu", "none", 1, 0, 0),
        (date(2026, 3, 11), "a1", "feed", "eu", "repeat_click", 0, 1, 1250),
    ]
    dates = query_marts(settings, "select event_date from dim_date order by 1")[1]
    assert dates == [(date(2026, 3, 10),), (date(2026, 3, 11),)]
    frequency = (
        "select period_start, impressions_per_user, users from fct_user_frequency where period = 'week' and campaign_id = 'c1'"
    )
    assert query_marts(settings, frequency)[1] == [(date(2026, 3, 9), 3, 1)]


def test_build_describes_itself(published: tuple[Settings, build.MartBuild, list[str]]) -> None:
    settings, result, lines = published
    assert result.groups == build.GROUPS  # one was asked for, but nothing was published: all of it
    assert result.versions == {table.name: int(table is NAMES) for table in SOURCES}
    rows = query_marts(settings, "select mart_group, build_id, built_at, git_revision, table_name, delta_version from mart_build")[
        1
    ]
    assert sorted(rows) == sorted(
        (group, result.build_id, NOW.replace(tzinfo=None), result.git_revision, name, int(name == "names"))
        for name in result.versions
        for group in ("near_real_time", "hourly")
    )
    formulas = "select distinct project_version, project_hash, previous_build_id, length(inputs_hash) from mart_build"
    assert query_marts(settings, formulas)[1] == [("0.1.0", project_hash(project_dir()), None, 32)]
    ids = query_marts(settings, "select distinct table_name, table_id from mart_build")[1]
    assert dict(ids) == table_ids(settings)
    assert result.rows["fct_campaign_minute"] == 3
    assert result.path == settings.marts_path
    assert lines[0].startswith("pinned billing_lines at version 0, batch_ledger at version 0")
    assert "pass test assert_spend_is_the_same_at_every_grain in " in " ".join(lines)
    assert result.full_because == "nothing is published that a build could start from"
    assert lines[-1].startswith("published build")


def test_published_file_stands_alone(published: tuple[Settings, build.MartBuild, list[str]]) -> None:
    """No view that reaches into the lakehouse, no staging, no write-ahead log, nothing floating."""
    settings, _, _ = published
    views = query_marts(settings, "select view_name, sql from duckdb_views() where database_name = 'marts' and not internal")[1]
    assert not [name for name, sql in views if settings.lakehouse_uri in sql or "delta_scan" in sql]
    shown = query_marts(settings, "select table_name from information_schema.tables where table_schema = 'main'")[1]
    assert not [name for (name,) in shown if name.startswith(("stg_", "int_"))]
    undescribed = (
        "select table_name, null from duckdb_tables() where schema_name = 'main' and coalesce(comment, '') = '' union all "
        "select view_name, null from duckdb_views() where schema_name = 'main' and not internal and coalesce(comment, '') = '' "
        "union all select table_name, column_name from duckdb_columns() "
        "where schema_name = 'main' and not internal and coalesce(comment, '') = ''"
    )
    assert query_marts(settings, undescribed)[1] == [], "descriptions reach the file as comments"
    types = query_marts(settings, "select distinct data_type from information_schema.columns")[1]
    assert not {kind for (kind,) in types} & {"FLOAT", "TIMESTAMP WITH TIME ZONE"}
    assert litter(settings) == []


def test_second_build_adds_late_events_and_readers_keep_theirs(
    built: Settings, published: tuple[Settings, build.MartBuild, list[str]]
) -> None:
    settings, first = built, published[1]
    with duckdb.connect(str(settings.marts_path), read_only=True) as reader:
        assert reader.execute(f"{DAYS} order by all").fetchall() == FIRST_DAYS
        late_batch(lake_of(settings))
        second = build_marts(settings, now=NOW)
        assert reader.execute(f"{DAYS} order by all").fetchall() == FIRST_DAYS
        assert days(settings) == LATE_DAYS
    assert second.build_id != first.build_id
    history = query_marts(settings, "select build_id, previous_build_id from mart_build_history where mart_group = 'hourly'")[1]
    assert set(history) == {(first.build_id, None), (second.build_id, first.build_id)}
    grown = ("batch_ledger", "minute_metrics", "events", "names")
    assert second.versions == {table.name: int(table.name in grown) for table in SOURCES}
    assert litter(settings) == []


def test_a_group_is_built_and_the_other_stays(built: Settings) -> None:
    settings, lake = built, lake_of(built)
    # a click on a campaign that no dimension knows yet
    commit(lake, MINUTE_METRICS, [increment("u5", 1, "2026-03-10T10:05", clicks=1, campaign_id="c5", ad_id="a5", store_id="s5")])
    commit(lake, EVENTS, accepted(1, "2026-03-10T10:05", "2026-03-10T10:06", campaign_id="c5", ad_id="a5", store_id="s5"))
    commit(lake, BATCH_LEDGER, [ledger_row(1, "2026-03-10T10:00", accepted=1)])
    later = NOW + timedelta(minutes=5)
    result = build_marts(settings, "near_real_time", now=later)
    assert (result.groups, result.versions["batch_ledger"]) == (("near_real_time",), 1)
    assert not any(node.unique_id.startswith(("unit_test.", "model.adtally.dim_")) for node in result.nodes)
    assert (date(2026, 3, 10), "c5", 0, 1, 0, 0, 0) in days(settings)
    assert query_marts(settings, "select campaign_id from dim_campaign order by 1")[1] == [("c1",), ("c9",)]
    told = "select mart_group, built_at, delta_version from mart_build where table_name = 'batch_ledger' order by 1"
    moment = NOW.replace(tzinfo=None)
    assert query_marts(settings, told)[1] == [("hourly", moment, 0), ("near_real_time", moment + timedelta(minutes=5), 1)]
    replaced = "select mart_group, previous_build_id, inputs_hash from mart_build group by all order by 1"
    first, second = query_marts(settings, replaced)[1]
    assert (first[1], second[1] is None) == (None, False)
    assert first[2] != second[2], "another version of the ledger"
    third = build_marts(settings, "hourly", now=later).build_id
    history = (
        "select mart_group, build_id, previous_build_id, json_extract(delta_versions, '$.batch_ledger') from mart_build_history"
    )
    assert query_marts(settings, f"{history} order by 1, built_at")[1] == [
        ("hourly", second[1], None, "0"),
        ("hourly", third, second[1], "1"),
        ("near_real_time", second[1], None, "0"),
        ("near_real_time", result.build_id, second[1], "1"),
    ]
    assert [row[2] for row in query_marts(settings, replaced)[1]] == [second[2], second[2]]
    assert query_marts(settings, "select campaign_id from dim_campaign order by 1")[1] == [("c1",), ("c5",), ("c9",)]
    assert query_marts(settings, told)[1] == [(group, moment + timedelta(minutes=5), 1) for group in sorted(build.GROUPS)]
    assert litter(settings) == []


@pytest.mark.parametrize("wrong", ["no database", "older project", "older adtally", "another table", "frozen file"])
def test_all_days_are_built_if_the_published_marts_do_not_fit(built: Settings, wrong: str) -> None:
    """An older adtally published them, with other columns, or they are damaged."""
    path = built.marts_path
    if wrong == "no database":
        path.write_bytes(b"no database")
    elif wrong == "frozen file":
        next((path.parent / "frozen" / "fct_placement_day").glob("*")).write_bytes(b"half")
    else:
        change = {
            "older project": "update mart_build set project_hash = null where mart_group = 'hourly'",
            "older adtally": "alter table mart_build drop column table_id",
            "another table": "update mart_build set table_id = 'x' where table_name = 'events'",
        }[wrong]
        with duckdb.connect(str(path)) as connection:
            connection.execute(change)
    result = build_marts(built, "near_real_time", now=NOW)
    reasons = {"older project": "project has changed", "another table": "created again", "frozen file": "instead of"}
    assert reasons.get(wrong, "nothing is published") in str(result.full_because)
    assert (result.groups, days(built)) == (build.GROUPS, FIRST_DAYS)


def test_the_hash_of_the_project_is_that_of_its_formulas(tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(project_dir(), project)
    hashes = [project_hash(project_dir())]
    (project / "models" / "marts" / "_more__unit_tests.yml").write_text("version: 2\n")
    (project / "tests" / "assert_more.sql").write_text("select 1 where false\n")
    hashes.append(project_hash(project))
    (project / "macros" / "more.sql").write_text("{% macro more() %}1{% endmacro %}\n")
    hashes.append(project_hash(project))
    (project / "models" / "marts" / "_more.yml").write_text("version: 2\n")
    hashes.append(project_hash(project))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3, "a macro and a contract"


def test_old_builds_leave_the_history(built: Settings) -> None:
    first = query_marts(built, "select distinct build_id from mart_build_history")[1]
    soon = build_marts(built, "hourly", now=NOW + timedelta(days=80)).build_id
    late = build_marts(built, "hourly", now=NOW + timedelta(days=100)).build_id
    kept = query_marts(built, "select build_id from mart_build_history where mart_group = 'hourly' order by built_at")[1]
    assert kept == [(soon,), (late,)]
    assert first[0] not in kept


def test_an_unknown_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of near_real_time, hourly"):
        build_marts(settings_in(tmp_path), "daily")


def test_only_batches_that_were_whole_when_it_began_are_shown(built: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is half written when the versions are pinned; its ledger row and another whole batch come right after."""
    lake = lake_of(built)
    late_batch(lake, with_ledger=False)

    def pin_then_write(given: Settings) -> dict[str, int]:
        pins = pin_versions(given)
        commit(lake, BATCH_LEDGER, [ledger_row(1, "2026-03-10T10:00", accepted=1, late=1, spend_nanos=500)])
        commit(lake, MINUTE_METRICS, [increment("u6", 2, "2026-03-10T10:05", clicks=1, spend_nanos=700)])
        commit(lake, BATCH_LEDGER, [ledger_row(2, "2026-03-10T10:00", accepted=1, spend_nanos=700)])
        return pins

    monkeypatch.setattr(build, "pin_versions", pin_then_write)
    versions = build_marts(built, now=NOW).versions
    assert (versions["minute_metrics"], versions["batch_ledger"]) == (1, 0)
    assert days(built) == FIRST_DAYS


def test_tables_are_pinned_before_what_they_tell_of() -> None:
    """Lines of the billing ledger before the increments that they were made from, the ledger before what its batches wrote."""
    assert SOURCES[:2] == (BILLING_LINES, BATCH_LEDGER)


def test_failed_conservation_leaves_the_published_marts(built: Settings) -> None:
    """The ledger says two clicks, the increments one: the build names the test and publishes nothing."""
    settings = built
    before = settings.marts_path.read_bytes()
    commit(lake_of(settings), MINUTE_METRICS, [increment("u5", 1, "2026-03-10T10:05", clicks=1, spend_nanos=500)])
    commit(lake_of(settings), BATCH_LEDGER, [ledger_row(1, "2026-03-10T10:00", accepted=2, spend_nanos=500)])
    with pytest.raises(MartsError) as caught:
        build_marts(settings, now=NOW)
    message = str(caught.value)
    assert "test assert_increments_match_ledger (2 rows)" in message
    assert "\n" not in message
    assert caught.value.exit_code == 1
    assert settings.marts_path.read_bytes() == before
    assert litter(settings) == []
    assert any(node.status == "fail" for node in caught.value.nodes)
    kept = settings.marts_path.parent / "dbt" / "failed_rows.json"
    assert f"rows in {kept}: side ledger, query_id q, batch_id 1" in message
    [(test, rows)] = [(name, rows) for name, rows in json.loads(kept.read_text()).items() if "match_ledger" in name]
    assert caught.value.rows[test] == rows
    assert sorted((row["side"], row["event_hour"], row["accepted"], row["spend_nanos"]) for row in rows) == [
        ("increments", "2026-03-10 10:00:00", 1, 500),
        ("ledger", "2026-03-10 10:00:00", 2, 500),
    ]


def test_money_and_credit_by_hand(tmp_path: Path) -> None:
    """What `lakes.money` says; then an order whose credits do not sum to it, a line that is lost: neither is published."""
    settings = settings_in(tmp_path)
    lake = lake_of(settings)
    first_batch(lake)
    money(lake)
    build_marts(settings, now=NOW)

    def ask(sql: str) -> list[tuple[Any, ...]]:
        return query_marts(settings, sql)[1]

    assert ask("select line_type, event_date, amount_micros, reason, run_id from fct_billing_ledger order by posting") == [
        ("charge", date(2026, 3, 10), 4, "day_closed", "b1"),
        ("credit", date(2026, 3, 10), -1, "invalid_traffic", "v1"),
    ]
    assert ask("select kind, cause, run_id, clicks, clicks_before, clicks_after, is_after_billing from fct_restatements") == [
        ("review", "repeat_click", "v1", -1, 3, 2, True)
    ]
    assert ask("select model, order_id, touch_event_id, credit_micros from fct_attribution_credits order by all limit 2") == [
        ("first_click", "o1", "t1", 60),
        ("first_click", "o1", "t2", 40),
    ]
    performance = "select event_date, currency, clicks, orders_by_touch_date, revenue_by_touch_date_micros, orders_by_order_date"
    assert ask(f"{performance} from fct_advertiser_performance where campaign_id = 'c1' order by 1") == [
        (date(2026, 3, 10), "EUR", 2, 1.0, 100, 0.0),
        (date(2026, 3, 11), "EUR", 0, 0.0, 0, 0.0),
        (date(2026, 3, 12), "EUR", 0, 0.0, 0, 1.0),
    ]
    before = settings.marts_path.read_bytes()
    commit(lake, ATTRIBUTED_ORDERS, [touched("o3", 1, "t1", 99, 1.0)])
    line = {"line_id": "l3", "event_date": date(2026, 3, 10), "campaign_id": "c1", "store_id": "s1", "currency": "EUR"}
    commit(
        lake, BILLING_LINES, [line | {"line_type": "credit", "amount_micros": 1, "billed_micros": 9, "posting": 3, "reason": "x"}]
    )
    with pytest.raises(MartsError) as caught:
        build_marts(settings, now=NOW)
    assert "assert_credits_sum_to_the_order (5 rows)" in str(caught.value)
    assert "assert_lines_of_the_ledger_chain (1 row)" in str(caught.value)
    assert settings.marts_path.read_bytes() == before


def test_first_build_that_fails_publishes_nothing(tmp_path: Path) -> None:
    """A null where the contract forbids it."""
    settings = settings_in(tmp_path)
    first_batch(lake_of(settings))
    commit(lake_of(settings), MINUTE_METRICS, [increment("u5", 0, "2026-03-10T10:05", currency=None)])
    with pytest.raises(MartsError, match=r"model fct_campaign_(day|minute).*NOT NULL"):
        build_marts(settings, now=NOW)
    assert not settings.marts_path.exists()
    with pytest.raises(AdtallyError, match="adtally marts build"):
        query_marts(settings, "select 1")


def test_empty_tables_make_empty_marts(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    for table in (CAMPAIGNS, MINUTE_METRICS, BATCH_LEDGER, RECONCILIATIONS):
        commit(lake_of(settings), table, [])
    result = build_marts(settings, now=NOW)
    assert {name: count for name, count in result.rows.items() if count} == {
        "mart_build": 2 * len(SOURCES),
        "mart_build_history": 2,
    }


def test_missing_tables_are_named(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    commit(lake_of(settings), CAMPAIGNS, [])
    with pytest.raises(AdtallyError, match=r"batch_ledger, minute_metrics, reconciliations .*run `adtally ingest` first"):
        build_marts(settings)
    assert litter(settings) == []


def test_concurrent_build_is_refused_and_leftovers_are_not_touched(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    folder = settings.marts_path.parent
    (folder / ".build-running").mkdir(parents=True)
    with FileLock(folder / ".build.lock"), pytest.raises(BusyError) as caught:
        build_marts(settings, patience_seconds=0)
    assert caught.value.retryable
    assert (folder / ".build-running").exists()


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    folder = settings.marts_path.parent
    (folder / ".build-dead").mkdir(parents=True)
    (folder / ".build-dead" / "marts.duckdb.wal").write_bytes(b"half")
    (folder / ".build-dead.duckdb").write_bytes(b"half")
    with pytest.raises(AdtallyError, match="adtally ingest"):
        build_marts(settings)
    assert litter(settings) == []


def test_a_table_whose_log_has_no_version_does_not_exist(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    ensure_tables(settings)
    shutil.rmtree(Path(settings.table_uri("campaigns")) / "_delta_log")
    (Path(settings.table_uri("campaigns")) / "_delta_log").mkdir()
    with pytest.raises(AdtallyError, match=r"no marts without the Delta table campaigns in .*adtally ingest"):
        pin_versions(settings)


def test_tables_whose_old_commits_were_cleaned_are_pinned_at_their_checkpoints(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    ensure_tables(settings)
    for table in SOURCES:
        DeltaTable(settings.table_uri(table.name)).create_checkpoint()
        (Path(settings.table_uri(table.name)) / "_delta_log" / f"{0:020d}.json").unlink()
    assert pin_versions(settings) == {table.name: 0 for table in SOURCES}
