"""Where the columns of the marts come from."""

from __future__ import annotations

from typing import Any

import pytest

from orchestration.marts.lineage import column_lineage
from orchestration.marts.manifest import COLUMN_LINEAGE, load_manifest
from spark_jobs.config import load_settings
from spark_jobs.lake.tables import TABLES


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return load_manifest(load_settings())


def test_a_mart_of_the_project_down_to_the_delta_tables(manifest: dict[str, Any]) -> None:
    lineage = manifest[COLUMN_LINEAGE]
    increments = "model.adtally.int_increments__completed"
    assert sorted(map(tuple, lineage["model.adtally.fct_campaign_day"]["spend"])) == [
        (increments, "currency"),
        (increments, "spend_nanos"),
    ]
    reached, seen = {("model.adtally.fct_campaign_day", "gross_clicks")}, set()
    while reached:
        unique_id, column = reached.pop()
        seen.add((unique_id, column))
        reached |= {(parent, of) for parent, of in lineage.get(unique_id, {}).get(column, [])} - seen
    table = "source.adtally.lakehouse.minute_metrics"
    assert {one for one in seen if one[0].startswith("source.")} == {(table, "clicks"), (table, "invalid_clicks")}


def test_every_column_that_is_declared_has_a_lineage_to_columns_that_are_there(manifest: dict[str, Any]) -> None:
    lineage = manifest[COLUMN_LINEAGE]
    models = {unique_id: node for unique_id, node in manifest["nodes"].items() if node["resource_type"] == "model"}
    assert lineage.keys() == models.keys()
    for unique_id, node in models.items():
        assert set(node["columns"]) <= set(lineage[unique_id]), unique_id
        for parent, column in (tuple(one) for found in lineage[unique_id].values() for one in found):
            there = lineage[parent] if parent in lineage else TABLES[parent.split(".")[-1]].types
            assert column in there, (unique_id, parent, column)


def test_joins_unions_stars_and_calls() -> None:
    model = {"resource_type": "model", "depends_on": {"nodes": ["source.p.s.a", "source.p.s.b"]}, "relation_name": "m"}
    sql = """
        with both as (select * from delta_scan('a') union all select y, x from delta_scan('b'))
        select x, coalesce(b.y, 0) + x as total, count(*) as n from both join delta_scan('b') as b using (x) group by all
    """
    sources = {f"source.p.s.{name}": {"name": name, "relation_name": f"delta_scan('{name}')"} for name in "ab"}
    found = column_lineage(
        {"nodes": {"model.p.m": {**model, "compiled_code": sql}}, "sources": sources}, {"a": ["x", "y"], "b": ["x", "y"]}
    )
    a, b = "source.p.s.a", "source.p.s.b"
    assert found["model.p.m"]["n"] == []
    assert found["model.p.m"]["total"] == [(a, "x"), (b, "x"), (b, "y")]
