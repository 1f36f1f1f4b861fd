"""Explanations of a small home's marts: each level adds up, says where things lie, and names what does not add up."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import duckdb
import lake
import pytest
from edited import edit_marts
from pyspark.sql import SparkSession

from orchestration.cli import app
from orchestration.explain import Node, as_json, explain_billing_line, explain_campaign_day, explain_credit
from orchestration.explain.view import GROUP_OF_MART, MEASURES
from orchestration.marts import build_marts, query_marts
from orchestration.marts.dbt_project import project_dir
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.operate.settle import settle

pytestmark = pytest.mark.homes

DAY = date(2025, 6, 2)


@pytest.fixture(scope="module")
def home(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A day and a half of traffic, settled; then a dear click of the closed day that came late, settled again; the marts."""
    settings = load_settings(home=tmp_path_factory.mktemp("explained"))
    simulate(settings.landing_path, 2_500, 7, days=1.5, campaigns=6, ads=20, click_rate=0.2, conversion=0.3, lines_per_file=800)
    run_ingest(settings, spark=spark)
    settle(settings)
    campaign = asked(settings, _BILLED_BY_CLICK)[0]
    late = lake.event("late", event_type="click", event_time="2025-06-02T10:00:00Z", received_at="2025-06-05T10:00:00Z", **campaign)
    target = settings.landing_path / "events" / "eu-west" / "zz-late.jsonl"
    target.write_bytes(lake.lines([{**late, "user_id": "somebody", "price_micros": 5_000_000}]))
    run_ingest(settings, spark=spark)
    settle(settings)
    build_marts(settings)
    return settings


_BILLED_BY_CLICK = """
    select campaign_id, store_id, currency, any_value(ad_id) as ad_id from {events}
    where billing_model = 'cpc' and event_type = 'click' and event_date = '2025-06-02' group by all order by 1 limit 1
"""


def asked(settings: Settings, sql: str) -> list[dict[str, Any]]:
    from spark_jobs.lake.duck import connect_delta

    with connect_delta() as connection:
        connection.execute("set timezone = 'UTC'")
        cursor = connection.execute(sql.format(events=f"delta_scan('{settings.table_uri('events')}')"))
        names = [column[0] for column in cursor.description or []]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def one(settings: Settings, sql: str) -> Any:
    return query_marts(settings, sql)[1][0]


def nodes(node: Node, what: str) -> Iterator[Node]:
    if node.what.startswith(what):
        yield node
    for part in node.parts:
        yield from nodes(part, what)


# A campaign's day


def test_a_day_adds_up_and_shows_where_it_lies(home: Settings) -> None:
    campaign, currency = one(home, "select campaign_id, currency from fct_billing_ledger where reason = 'late'")
    found = explain_campaign_day(home, campaign, DAY, sample=1_000)
    assert list(found.all_problems()) == []
    row = next(nodes(found, "row"))
    names = ", ".join(("currency", *MEASURES, "spend_micros"))
    mart = one(home, f"select {names} from fct_campaign_day where campaign_id = '{campaign}' and event_date = '{DAY}'")
    assert tuple(row.facts[name] for name in names.split(", ")) == mart and row.facts["currency"] == currency
    batches = list(nodes(row, "batch "))
    for name in MEASURES:
        assert sum(batch.facts[name] for batch in batches) == row.facts[name]
        for batch in batches:
            assert sum(part.facts[name] for part in nodes(batch, "file ")) == batch.facts[name]
    assert len(batches) == 2  # the second ingest brought the late click
    events = [*nodes(row, "impression "), *nodes(row, "click ")]
    counted = sum(row.facts[name] for name in ("impressions", "clicks", "invalid_impressions", "invalid_clicks"))
    assert len(events) == counted
    for event in events:
        assert landed(home, event.facts["source_file"], event.facts["source_line"])["event_id"] == event.what.split()[1]
    late = next(nodes(row, "late")).facts
    assert late["late_spend_nanos"] >= 5_000_000_000 and late["of_events"] == counted
    assert any(event.what == "click late" and event.facts["is_late"] for event in events)


def landed(settings: Settings, source_file: str, line: int) -> dict[str, Any]:
    content = (settings.landing_path / source_file).read_bytes()
    text = gzip.decompress(content) if source_file.endswith(".gz") else content
    record: dict[str, Any] = json.loads(text.split(b"\n")[line - 1])
    return record


def test_the_dearest_days_add_up(home: Settings) -> None:
    _, rows = query_marts(home, "select campaign_id, event_date from fct_campaign_day order by spend_nanos desc limit 5")
    for campaign, day in rows:
        assert list(explain_campaign_day(home, campaign, day, sample=0).all_problems()) == []


def test_corrections_are_named_with_their_run_and_rules(home: Settings) -> None:
    campaign, run = one(
        home, "select campaign_id, run_id from fct_restatements where kind = 'review' and event_date = date '2025-06-02' limit 1"
    )
    found = explain_campaign_day(home, campaign, DAY)
    correction = next(nodes(found, f"correction run {run}"))
    assert correction.facts["kinds"] == ["review"] and correction.facts["causes"]
    assert any(part.facts["run_id"] == run for part in nodes(found, "review: "))
    rules = next(nodes(found, "rule set "))
    assert len(rules.facts["rule_set"]) == 64 and rules.facts["says"]["click_rate"] == "invalid clicks=60"
    assert rules.facts["says"]["crawler_patterns"].endswith(" entries")
    assert next(nodes(found, "reviews of")).facts["runs"] >= 1


def test_what_came_after_the_build_is_not_told(home: Settings, spark: SparkSession, tmp_path: Path) -> None:
    """The versions that the build names are read: the lake may have gone on."""
    copy = copied(home, tmp_path)
    campaign = one(copy, "select campaign_id from fct_billing_ledger where reason = 'late'")[0]
    before = as_json(explain_campaign_day(copy, campaign, DAY))
    more = lake.event("after", event_time="2025-06-02T10:30:00Z", received_at="2025-06-05T11:00:00Z", campaign_id=campaign)
    (copy.landing_path / "events" / "eu-west" / "zzz.jsonl").write_bytes(lake.lines([more]))
    run_ingest(copy, spark=spark)
    assert as_json(explain_campaign_day(copy, campaign, DAY)) == before


def copied(settings: Settings, folder: Path) -> Settings:
    """The home with its tables and marts, to be spoilt."""
    shutil.copytree(settings.home_path, folder / "home")
    return load_settings(home=folder / "home")


def spoil(settings: Settings, statement: str) -> None:
    with duckdb.connect(str(settings.marts_path)) as marts:
        marts.execute(statement)


@pytest.mark.parametrize("measure", ["impressions", "spend_nanos", "invalid_clicks"])
def test_a_mart_that_is_wrong_is_seen(home: Settings, tmp_path: Path, measure: str, capsys: pytest.CaptureFixture[str]) -> None:
    copy = marts_only(home, tmp_path)
    campaign = one(copy, f"select campaign_id from fct_campaign_day where event_date = '{DAY}' order by spend_nanos desc limit 1")[
        0
    ]
    spoil(copy, f"update fct_campaign_day set {measure} = {measure} + 1 where campaign_id = '{campaign}'")
    problems = list(explain_campaign_day(copy, campaign, DAY).all_problems())
    assert any(problem.startswith(f"row: {measure} is ") and "in its increments" in problem for problem in problems)
    arguments = ["explain", "fct_campaign_day", "--campaign", campaign, "--date", str(DAY)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADTALLY_LAKEHOUSE", home.lakehouse_uri)
        assert app.run(["--home", str(copy.home_path), *arguments]) == 1
    assert "it does not add up" in capsys.readouterr().out


def marts_only(settings: Settings, folder: Path) -> Settings:
    """A home of its own whose marts can be spoilt, on the same lakehouse."""
    copy = load_settings(home=folder / "copy", lakehouse=settings.lakehouse_uri, landing=settings.landing_path)
    copy.marts_path.parent.mkdir(parents=True)
    shutil.copyfile(settings.marts_path, copy.marts_path)
    with edit_marts(copy.marts_path):
        pass  # now without the frozen days of the home
    return copy


# An order's credit


def test_an_order_with_several_touches(home: Settings) -> None:
    order = one(
        home,
        "select order_id from fct_attribution_credits where model = 'linear' and window_days = 7 group by 1 "
        "order by count(*) desc, order_id limit 1",
    )[0]
    found = explain_credit(home, order)
    assert list(found.all_problems()) == []
    record = next(nodes(found, "order "), None) or next(nodes(found, "order"))
    assert landed(home, record.facts["source_file"], record.facts["source_line"])["order_id"] == order
    linear = next(nodes(found, "linear, 7 days"))
    assert len(linear.parts) > 1 and sum(part.facts["credit_micros"] for part in linear.parts) == record.facts["total_micros"]
    for touch in next(nodes(found, "touches")).parts:
        assert landed(home, touch.facts["source_file"], touch.facts["source_line"])["event_id"] == touch.what.split()[1]
    assert next(nodes(found, "revision 1")).facts["reason"] == "order"
    only = explain_credit(home, order, model="last_click", window=7)
    assert [part.what for part in only.parts if "days" in part.what] == ["last_click, 7 days"]


def test_an_order_without_credit_says_why(home: Settings) -> None:
    found = asked(home, f"select order_id from delta_scan('{home.table_uri('orders')}') where status = 'cancelled' limit 1")
    explained = explain_credit(home, found[0]["order_id"])
    assert list(explained.all_problems()) == []
    assert next(nodes(explained, "no credit")).facts["because"] == "a cancelled order has no credit"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("credit_micros = credit_micros + 1", "the credits come to"),
        ("credit_weight = credit_weight * 0.5", "the weights come to 0.5"),
        ("revision = revision + 1", "the newest that the build saw"),
        ("touch_event_id = 'nowhere'", "the touch nowhere of order"),
    ],
)
def test_a_credit_that_is_wrong_is_seen(home: Settings, tmp_path: Path, change: str, said: str) -> None:
    copy = marts_only(home, tmp_path)
    order = one(copy, "select min(order_id) from fct_attribution_credits")[0]
    spoil(copy, f"update fct_attribution_credits set {change} where order_id = '{order}' and model = 'last_click'")
    assert any(said in problem for problem in explain_credit(copy, order).all_problems())


# A line of the ledger


def test_a_line_of_each_reason_adds_up(home: Settings) -> None:
    _, rows = query_marts(home, "select any_value(line_id), reason from fct_billing_ledger group by reason")
    assert {reason for _, reason in rows} >= {"day_closed", "late", "not_billed_yet"}
    for line, _ in rows:
        assert list(explain_billing_line(home, line, sample=0).all_problems()) == []


def test_a_late_line_beside_its_charge(home: Settings) -> None:
    line, amount = one(home, "select line_id, amount_micros from fct_billing_ledger where reason = 'late'")
    assert amount == 5_000_000
    found = explain_billing_line(home, line)
    kinds = [part.what for part in next(nodes(found, "lines of the day")).parts]
    assert kinds == ["charge", "adjustment (this one)"]
    assert next(nodes(found, "increments as ingested")).facts["batches"] == 2


@pytest.mark.parametrize("column", ["amount_micros", "billed_micros"])
def test_a_line_that_is_wrong_is_seen(home: Settings, tmp_path: Path, column: str) -> None:
    copy = marts_only(home, tmp_path)
    line = one(copy, "select line_id from fct_billing_ledger where reason = 'late'")[0]
    spoil(copy, f"update fct_billing_ledger set {column} = {column} + 1 where line_id = '{line}'")
    assert any("billed_micros is" in problem for problem in explain_billing_line(copy, line).all_problems())


# How it is asked


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("fct_campaign_day", "--campaign", "nobody", "--date", "2025-06-02"), 1, "fct_campaign_day has no campaign 'nobody'"),
        (("fct_campaign_day", "--campaign", "c00001", "--date", "2020-01-01"), 1, "it has days from 2025-06-02 to 2025-06-0"),
        (("fct_campaign_day", "--campaign", "c00001", "--date", "yesterday"), 2, "--date 'yesterday' is not a time"),
        (("fct_attribution_credits", "--order", "none"), 1, "there is no order 'none'"),
        (("fct_attribution_credits", "--order", "none", "--model", "best"), 2, "there is no model 'best'"),
        (("fct_billing_ledger", "--line", "it's"), 1, "fct_billing_ledger has no line"),
    ],
)
def test_what_is_not_there(
    home: Settings, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], status: int, said: str
) -> None:
    assert app.run(["--home", str(home.home_path), "explain", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_without_marts(tmp_path: Path) -> None:
    with pytest.raises(AdtallyError, match="no marts yet"):
        explain_campaign_day(load_settings(home=tmp_path), "c1", DAY)


def test_json_is_what_the_tree_shows(home: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    campaign = one(home, "select campaign_id from fct_billing_ledger where reason = 'late'")[0]
    arguments = ["--home", str(home.home_path), "explain", "fct_campaign_day", "--campaign", campaign, "--date", "2025-06-02"]
    assert app.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adds_up"] and found["parts"][0]["delta_versions"]["events"] >= 1
    assert datetime.fromisoformat(found["parts"][0]["at"]).replace(tzinfo=UTC) <= datetime.now(UTC)
    assert app.run(arguments) == 0
    tree = capsys.readouterr().out
    assert found["parts"][0]["id"] in tree and "every level adds up to the one above" in tree


def test_marts_are_looked_up_in_the_group_that_builds_them() -> None:
    text = "".join(path.read_text() for path in (project_dir() / "models" / "marts").glob("*.yml"))
    for mart, group in GROUP_OF_MART.items():
        found = re.search(rf"- name: {mart}\n.*?tags: \[([a-z_, ]+)\]", text, re.DOTALL)
        assert found and found[1] == group
