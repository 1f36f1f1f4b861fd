"""Each expectation of the marts is broken once; the clean file and its hours are valid."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml

from expectations import MARTS, validate_marts
from expectations.errors import UnknownTableError, UnreadableTableError

CASES: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "cases" / "expectations" / "marts.json").read_text("utf-8")
)
CONTRACTS = {  # mart -> its columns, as dbt enforces them before publishing
    model["name"]: ", ".join(f"{column['name']} {column['data_type']}" for column in model["columns"])
    for file in (Path(__file__).parents[2] / "dbt_project" / "models" / "marts").glob("*models.yml")
    for model in yaml.safe_load(file.read_text("utf-8"))["models"]
    if model["name"] in MARTS and model["config"]["contract"]["enforced"]
}
HOUR = datetime(2025, 6, 2, 10, tzinfo=UTC)

_CLEAN = """
insert into fct_campaign_minute by name
select timestamp '2025-06-02 10:00:00' + interval 20 minutes * n as event_minute, event_minute::date as event_date,
    if(n % 2 = 0, 'eu', 'us') as region, 'c-' || n % 3 as campaign_id, 'a-1' as ad_id, 's-1' as store_id, 'EUR' as currency,
    10 as impressions, 1 as clicks, 0 as invalid_impressions, 0 as invalid_clicks, 1500 as spend_nanos, 2 as spend_micros,
    10 as gross_impressions, 1 as gross_clicks, 0 as invalid_spend_nanos, 0 as invalid_spend_micros, 2 as gross_spend_micros
from (select unnest(range(6)) as n);
insert into fct_campaign_day by name
select event_date, campaign_id, store_id, currency, sum(impressions)::bigint as impressions, sum(clicks)::bigint as clicks,
    sum(invalid_impressions)::bigint as invalid_impressions, sum(invalid_clicks)::bigint as invalid_clicks,
    sum(spend_nanos)::bigint as spend_nanos, round(sum(spend_nanos) / 1000)::bigint as spend_micros,
    sum(gross_impressions)::bigint as gross_impressions, sum(gross_clicks)::bigint as gross_clicks,
    0 as invalid_spend_nanos, 0 as invalid_spend_micros, round(sum(spend_nanos) / 1000)::bigint as gross_spend_micros
from fct_campaign_minute group by all;
insert into fct_billing_ledger by name
select md5(campaign_id || amount) as line_id, type as line_type, event_date, campaign_id, store_id, currency,
    amount as amount_micros, 3 as billed_micros, spend_nanos, type <> 'accrual' as is_posted,
    'late' as reason, if(is_posted, 'r-1', null) as run_id,
    if(is_posted, timestamp '2025-06-03 01:00:00', null) as billed_at
from fct_campaign_day, (values ('charge', 4), ('credit', -2), ('adjustment', 2), ('accrual', -1)) as lines(type, amount);
insert into fct_budget_pacing by name
select event_date, event_minute, campaign_id, currency, 1000 as daily_budget_micros, 2 as spent_micros, 0.5 as day_share,
    0 as history_days, 0.5 as expected_share, 5 as overspend_micros, 3 as overspend_from_lag_micros, false as is_alert
from fct_campaign_minute;
insert into fct_attribution_credits by name
select 'o-' || n as order_id, model, 7 as window_days, 'c-1' as campaign_id, 'a-1' as ad_id, 's-1' as store_id, 'u-1' as user_id,
    't-' || touch as touch_event_id, 'click' as touch_type, timestamp '2025-05-26 11:00:00' as touch_time,
    timestamp '2025-06-02 10:30:00' + interval 15 minutes * n as order_time, 0.5 as credit_weight, 50 as credit_micros,
    'EUR' as currency, 1 as revision
from range(2) as orders(n), range(2) as touches(touch), (values ('linear'), ('position_based')) as models(model);
insert into fct_advertiser_attribution by name
select date '2025-06-02' as event_date, 's-1' as store_id, 'c-1' as campaign_id, 'EUR' as currency, model, 7 as window_days,
    2 as orders_by_touch_date, 200 as revenue_by_touch_date_micros, 2 as orders_by_order_date, 200 as revenue_by_order_date_micros
from (values ('linear'), ('position_based')) as models(model);
insert into fct_advertiser_performance by name
select * exclude (invalid_spend_nanos), 0.1 as ctr, 1 as cpc_micros, 2 as orders_by_touch_date, 200 as revenue_by_touch_date_micros,
    2 as orders_by_order_date, 200 as revenue_by_order_date_micros
from fct_campaign_day;
insert into fct_late_arrivals by name
select timestamp '2025-06-02 10:00:00' as event_hour, 'eu' as region, 10 as events, 1 as late, 0 as p50_seconds, 50 as p95_seconds,
    60 as p99_seconds, 70 as p100_seconds, 0.5 as completeness_0_min, 0.9 as completeness_1_min, 1 as completeness_5_min,
    1 as completeness_15_min, 1 as completeness_60_min, 1 as completeness_24_h;
insert into fct_restatements by name
select event_date, campaign_id, currency, 'late' as kind, 'late_event' as cause, 'q:1' as run_id,
    timestamp '2025-06-03 01:00:00' as restated_at, false as is_after_billing, 0 as impressions, 1 as clicks,
    0 as invalid_impressions, 0 as invalid_clicks, 1500 as spend_nanos, 0 as invalid_spend_nanos,
    4 as impressions_before, 4 as impressions_after,
    1 as clicks_before, 2 as clicks_after, 1 as spend_micros_before, 3 as spend_micros_after
from fct_campaign_day;
insert into fct_placement_day by name
select event_date, placement, 'eu' as region, campaign_id, 'a-1' as ad_id, store_id, currency, impressions, clicks,
    invalid_impressions, invalid_clicks,
    spend_nanos, spend_micros, 0.1 as ctr
from fct_campaign_day, (values ('feed'), (null)) as placements(placement);
insert into fct_user_frequency by name
select period, period_start, 'c-1' as campaign_id, seen as impressions_per_user, 3 as users, 3 * seen as impressions, 1 as clicks
from (values ('day', date '2025-06-02'), ('day', date '2025-06-03'), ('week', date '2025-06-02')) as periods(period, period_start),
    range(3) as times(seen);
insert into fct_invalid_traffic_day by name
select event_date, campaign_id, 'a-1' as ad_id, store_id, null as placement, 'eu' as region, rule, currency,
    if(rule = 'none', 10, 0) as impressions, if(rule = 'none', 1, 0) as clicks,
    if(rule = 'none', 0, 10) as invalid_impressions, if(rule = 'none', 0, 1) as invalid_clicks,
    10 as gross_impressions, 1 as gross_clicks, 1500 as spend_nanos, 0 as invalid_spend_nanos
from fct_campaign_day, (values ('none'), ('repeat_click')) as rules(rule);
insert into fct_invalid_traffic_sources by name
select date '2025-06-02' as event_date, source_type, if(source_type = 'user_agent', null, 's-' || rule) as source, rule,
    'EUR' as currency, 1 as campaigns, 2 as invalid_impressions, 1 as invalid_clicks, 500 as invalid_spend_nanos
from (values ('user'), ('user_agent')) as types(source_type),
    (values ('listed_user'), ('repeat_click')) as rules(rule);
insert into fct_event_accounting values (timestamp '2025-06-02 10:00:00', 'eu', 12, 10, 1, 0, 1, 2, 0, 1);
insert into fct_reconciliation by name
select 'r-1' as run_id, timestamp '2025-06-02 12:00:00' as run_at, timestamp '2025-06-02 10:00:00' as event_hour, layer, cause,
    rows_different, 10 as rows_expected, 10 - rows_different as rows_found, 5 as nanos_expected, 5 as nanos_found,
    false as is_repaired, true as is_latest
from (values (null, 'none', 0), ('events', 'lost_rows', 2)) as findings(layer, cause, rows_different);
insert into mart_build by name
select 'hourly' as mart_group, 'b-1' as build_id, timestamp '2025-06-02 12:00:00' as built_at, table_name, 3 as delta_version
from (values ('campaigns'), ('batch_ledger')) as tables(table_name);
"""
_DAYS = """
create schema days;
create table days.models as from (values
    ('fct_campaign_day', 'event_date'), ('fct_campaign_minute', 'event_date'), ('fct_event_accounting', 'cast(event_hour as date)')
) as models(model, day);
create table days.kept as
select model, unnest([date '2025-06-02', date '2025-06-03', date '0001-01-01']) as day,
    timestamp '2025-06-02 12:00:00' as changed_at
from days.models;
"""


def published(path: Path, statements: list[str]) -> Path:
    """A file of marts, changed by these statements."""
    with duckdb.connect(str(path)) as connection:
        for mart, columns in CONTRACTS.items():
            connection.execute(f"create table {mart} ({columns})")
        for statement in (_CLEAN, _DAYS, *statements):
            connection.execute(statement)
    return path


@pytest.mark.parametrize(("mart", "case"), [pytest.param(m, c, id=f"{m}: {c['name']}") for m in CASES for c in CASES[m]])
def test_broken_marts_fail_their_expectations_and_no_others(tmp_path: Path, mart: str, case: dict[str, Any]) -> None:
    path = published(tmp_path / "marts.duckdb", case["sql"])
    (found,) = validate_marts(path, marts=[mart])
    assert {result.name for result in found.failed} == set(case["fails"])
    assert all(result.failing_rows for result in found.failed)


def test_every_mart_has_a_contract() -> None:
    assert set(CONTRACTS) == set(MARTS)


@pytest.mark.parametrize("mart", MARTS)
def test_every_expectation_is_broken_by_a_case(mart: str) -> None:
    assert set(MARTS[mart].names) == {name for case in CASES[mart] for name in case["fails"]}


@pytest.mark.parametrize("hour", [None, HOUR], ids=["all", "an hour"])
def test_clean_marts_are_valid(tmp_path: Path, hour: datetime | None) -> None:
    found = validate_marts(published(tmp_path / "marts.duckdb", []), hour=hour, docs=tmp_path / "quality")
    assert [each.table for each in found] == list(MARTS)
    assert [result for each in found for result in each.failed] == []
    rows = {each.table: each.rows for each in found}
    assert rows["fct_campaign_minute"] == (6 if hour is None else 3)
    assert rows["fct_campaign_day"] == 3  # the hour's day


def test_a_fault_in_another_hour_is_not_that_of_this_one(tmp_path: Path) -> None:
    path = published(
        tmp_path / "marts.duckdb",
        ["update fct_campaign_minute set clicks = -1 where event_minute >= timestamp '2025-06-02 11:00:00'"],
    )
    assert [each.success for each in validate_marts(path, hour=HOUR, marts=["fct_campaign_minute"])] == [True]
    assert [each.success for each in validate_marts(path, marts=["fct_campaign_minute"])] == [False]


@pytest.mark.parametrize(
    ("days_since", "is_found"), [(0, True), (2, False)], ids=["of the last day", "of an earlier day, whose rows were checked then"]
)
def test_only_days_that_builds_of_the_last_day_made_are_checked(tmp_path: Path, days_since: int, is_found: bool) -> None:
    """A fault of another day, which a build made so many days before the newest change."""
    faults = (
        "insert into fct_campaign_minute by name select * replace (date '2025-05-01' as event_date, "
        "event_minute - interval 32 days as event_minute, -1 as clicks) from fct_campaign_minute limit 1"
    )
    made = (
        "insert into days.kept select model, date '2025-05-01', timestamp '2025-06-02 12:00:00' - "
        f"interval {days_since} days from days.models"
    )
    path = published(tmp_path / "marts.duckdb", [faults, made])
    found = validate_marts(path, marts=["fct_campaign_day", "fct_campaign_minute"])
    assert [not each.success for each in found] == [is_found, is_found], "the day differs from the sum of its minutes, too"
    assert found[1].rows == 6 + is_found


def test_rows_without_a_time_are_checked(tmp_path: Path) -> None:
    fault = "update fct_event_accounting set event_hour = null, region = null"
    path = published(tmp_path / "marts.duckdb", ["alter table fct_event_accounting alter region drop not null", fault])
    assert not validate_marts(path, marts=["fct_event_accounting"])[0].success


def test_marts_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(UnreadableTableError, match=r"the marts at .*none[.]duckdb cannot be checked"):
        validate_marts(tmp_path / "none.duckdb")
    with pytest.raises(UnknownTableError, match="there is no suite for 'fct_nothing'"):
        validate_marts(published(tmp_path / "marts.duckdb", []), marts=["fct_nothing"])
