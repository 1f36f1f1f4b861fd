"""The dbt project as it stands: it parses without a lakehouse, and every mart is guarded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import duckdb
import pytest

from orchestration.marts.dbt_project import project_dir
from orchestration.marts.docs_site import build_docs
from orchestration.marts.manifest import invoke_dbt, load_manifest
from orchestration.marts.pins import SOURCES
from orchestration.marts.workspace import BUILD_TABLES
from spark_jobs.config import load_settings

RATIOS = {"credit_weight", "orders_by_touch_date", "orders_by_order_date", "ctr", "roas", "roas_by_order_date"} | {
    "day_share",
    "expected_share",
}
# Micros without a decimal beside them: rates, of which a minor unit is too coarse, and a check sum over currencies.
_NOT_READ = {"cpc", "cpm", "micros_difference"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Manifest of the project, compiled where there is no lakehouse."""
    return load_manifest(load_settings(cache_dir=tmp_path_factory.mktemp("cache")))


def marts(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    nodes = manifest["nodes"].items()
    found = {key: node for key, node in nodes if node["resource_type"] == "model" and "marts" in node["fqn"]}
    assert found
    return found


def test_sources_are_those_that_are_pinned(manifest: dict[str, Any]) -> None:
    assert {source["name"] for source in manifest["sources"].values()} == {table.name for table in SOURCES}


def test_dbt_builds_the_project_and_its_unit_tests_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build runs the compiled SQL itself. dbt runs it too, here on empty tables, with the unit tests that judge the SQL."""
    work = tmp_path / "work.duckdb"
    with duckdb.connect(str(work)) as connection:
        for schema in ("lakehouse", "build"):
            connection.execute(f"create schema {schema}")
        for table in SOURCES:
            rows = table.schema.empty_table()
            connection.register("rows", rows)
            connection.execute(f"create table lakehouse.{table.name} as from rows")
        for name, columns in BUILD_TABLES.items():
            connection.execute(f"create table build.{name} ({columns})")
        connection.execute("insert into build.days select unnest(range(date '2026-03-01', date '2026-04-01', interval 1 day))")
    monkeypatch.setenv("ADTALLY_DBT_MARTS_PATH", str(tmp_path / "marts.duckdb"))
    monkeypatch.setenv("ADTALLY_DBT_WORK_PATH", str(work))
    invoke_dbt(project_dir(), tmp_path / "target", "build", "--no-partial-parse")
    results = json.loads((tmp_path / "target" / "run_results.json").read_text("utf-8"))["results"]
    statuses = {(result["unique_id"].split(".")[0], result["status"]) for result in results}
    assert statuses - {("exposure", "no-op")} == {("model", "success"), ("test", "pass"), ("unit_test", "pass")}


def test_every_mart_has_an_enforced_contract_and_an_exposure(manifest: dict[str, Any]) -> None:
    exposed = {key for exposure in manifest["exposures"].values() for key in exposure["depends_on"]["nodes"]}
    for key, node in marts(manifest).items():
        assert node["config"]["contract"]["enforced"], key
        assert node["description"], key
        assert all(column["description"] and column["data_type"] for column in node["columns"].values()), key
        assert key in exposed, key


def test_every_mart_has_a_unit_test(manifest: dict[str, Any]) -> None:
    tested = {test["model"] for test in manifest["unit_tests"].values()}
    # mart_build holds what the build was told; the Python tests compare it.
    assert {node["name"] for node in marts(manifest).values()} - tested == {"mart_build"}


def test_the_semantic_definitions_run_on_the_marts(manifest: dict[str, Any]) -> None:
    """Every entity, dimension and measure is SQL over columns of its mart; every measure is that of a metric of the same name."""
    found = manifest["semantic_models"].values()
    measures: set[str] = set()
    with duckdb.connect() as connection:
        for model in found:
            name = model["node_relation"]["alias"]
            [node] = [node for node in marts(manifest).values() if node["name"] == name]
            columns = ", ".join(f"{column['name']} {column['data_type']}" for column in node["columns"].values())
            connection.execute(f"create table if not exists {name} ({columns})")
            groups = [one["expr"] or one["name"] for one in (*model["entities"], *model["dimensions"])]
            sums = [f"{one['agg']}({one['expr'] or one['name']})" for one in model["measures"]]
            shown = connection.execute(f"select {', '.join([*sums, *groups])} from {name} group by {', '.join(groups)}").description
            kinds = [str(column[1]) for column in shown or []]
            of_nanos = ["nanos" in sum_of for sum_of in sums]
            amounts = {kind for kind, is_amount in zip(kinds, of_nanos, strict=False) if is_amount}
            assert amounts <= {"DECIMAL(38,9)"}, f"{name}: amounts are exact"
            assert "currency" in groups or not re.search("nanos|micros", " ".join(sums)), f"{name}: an amount has a currency"
            measures |= {one["name"] for one in model["measures"]}
    metrics = {metric["name"]: metric for metric in manifest["metrics"].values()}
    assert {name for name, metric in metrics.items() if metric["type"] == "simple"} == measures
    assert {"net_spend", "gross_spend", "invalid_spend", "impressions", "clicks", "ctr", "roas", "invalid_share"} <= set(metrics)
    assert all(metric["description"] and metric["label"] for metric in metrics.values())


def test_the_time_spine_is_a_mart(manifest: dict[str, Any]) -> None:
    [spine] = [node for node in manifest["nodes"].values() if node.get("time_spine")]
    assert (spine["name"], spine["time_spine"]["standard_granularity_column"]) == ("dim_date", "event_date")


def test_the_docs_are_one_page_that_needs_no_network(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, lakehouse=None)
    page = build_docs(settings).path
    assert page == build_docs(settings).path, "a second run replaces it"
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]
    text = page.read_text("utf-8")
    assert not re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?(?:https?:)?//[^"' >]+""", text)
    assert "fct_invalid_traffic_day" in text and "The tables that `adtally marts build` publishes" in text
    assert str(project_dir()) not in text, "nor says where it was made"


def test_severity_is_always_written(manifest: dict[str, Any]) -> None:
    tests = [node for node in manifest["nodes"].values() if node["resource_type"] == "test"]
    assert tests
    for node in tests:
        assert "severity" in node["unrendered_config"], node["name"]


def test_money_and_counts_are_whole_numbers(manifest: dict[str, Any]) -> None:
    """Floating point is for shares and ratios alone."""
    columns = [(name, column["data_type"]) for node in marts(manifest).values() for name, column in node["columns"].items()]
    assert {kind for _, kind in columns} <= {
        "varchar",
        "bigint",
        "hugeint",
        "timestamp",
        "date",
        "boolean",
        "double",
        "decimal(38,4)",
    }
    assert {name for name, kind in columns if kind == "double"} == RATIOS | {name for name, _ in columns if "completeness" in name}
    money = {(name, kind) for name, kind in columns if re.search("nanos|micros", name)}
    for key, node in marts(manifest).items():
        names = set(node["columns"])
        for rounded in (name for name, column in node["columns"].items() if column["data_type"] == "decimal(38,4)"):
            exact = {f"{rounded}_micros", f"{rounded}_nanos", re.sub("_(before|after)$", r"_micros_\1", rounded)} & names
            assert exact, f"{key}.{rounded} has no whole number beside it"
    read_by_people = {re.sub("_micros", "", name) for name, _ in money if "micros" in name} - _NOT_READ
    assert read_by_people <= {name for name, kind in columns if kind == "decimal(38,4)"}, "a decimal stands beside micros"
    assert {name for name, kind in money if kind != "hugeint"} == {"daily_budget_micros", "credit_micros"}, "sums have 128 bits"
