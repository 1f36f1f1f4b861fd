"""What Dagster knows of: the graph as data, the lineage, and how the code location loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from expectations import MARTS
from orchestration.assets.lakehouse import TABLE_ASSETS
from orchestration.assets.marts import groups_of
from orchestration.assets.quality import MARTS_CHECKED
from orchestration.definitions import build_definitions
from orchestration.marts.build import GROUPS
from orchestration.marts.manifest import is_mart, load_manifest
from orchestration.up.instance import POOLS
from spark_jobs.config import load_settings
from spark_jobs.lake.columns import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
GRAPH = ROOT / "tests" / "cases" / "dagster" / "asset_graph.json"
RENEW = "python -m tests.orchestration.test_definitions"
LOADS_WITHIN_SECONDS = 60  # on a machine that does other things as well; the aim is 10, and the time is printed


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> dg.Definitions:
    return build_definitions(load_settings(home=tmp_path_factory.mktemp("home"), start_date="2026-03-01T00:00:00Z"))


def graph_of(definitions: dg.Definitions) -> dict[str, Any]:
    """Assets with their place in the graph, jobs with their steps, and what starts them."""
    graph = definitions.resolve_asset_graph()
    repository = definitions.get_repository_def()
    assets = {}
    for key in sorted(graph.get_all_asset_keys()):
        node = graph.get(key)
        assets[key.to_user_string()] = {
            "group": node.group_name,
            "parents": sorted(parent.to_user_string() for parent in node.parent_keys),
            "kinds": sorted(node.kinds),
            "hourly": node.partitions_def is not None,
            "executable": node.is_executable,
            "pools": sorted(node.pools or ()) if node.is_executable else [],
            "checks": sorted(check.name for check in graph.asset_check_keys if check.asset_key == key),
        }
    jobs = sorted((job for job in repository.get_all_jobs() if not job.name.startswith("__")), key=lambda job: job.name)
    return {
        "assets": assets,
        "jobs": {job.name: sorted(node.name for node in job.nodes) for job in jobs},
        "schedules": {
            found.name: [found.cron_schedule, found.job_name, found.default_status.value] for found in repository.schedule_defs
        },
        "sensors": {found.name: found.default_status.value for found in repository.sensor_defs},
    }


def test_the_graph_is_as_written_down(definitions: dg.Definitions) -> None:
    found, expected = graph_of(definitions), json.loads(GRAPH.read_text("utf-8"))
    for part in expected:
        differs = {
            name: (expected[part].get(name), found[part].get(name))
            for name in sorted(expected[part].keys() | found[part].keys())
            if expected[part].get(name) != found[part].get(name)
        }
        assert not differs, f"{part} (written down, found); if it is meant, renew {GRAPH.relative_to(ROOT)} with `{RENEW}`"


def test_the_pools_are_those_whose_limits_are_known_from_the_start(definitions: dg.Definitions) -> None:
    jobs = definitions.get_repository_def().get_all_jobs()
    assert {node.definition.pool for job in jobs for node in job.nodes if isinstance(node.definition, dg.OpDefinition)} - {
        None
    } == set(POOLS)


def test_everything_says_what_it_is(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node, name = graph.get(key), key.to_user_string()
        assert node.description, name
        assert list(node.owners) == ["team:ads-data"], name
        assert node.group_name != "default", name
    assert [key.to_user_string() for key in graph.asset_check_keys if not graph.get_check_spec(key).description] == []
    repository = definitions.get_repository_def()
    described = {found.name: found.description for found in repository.schedule_defs}
    described |= {found.name: found.description for found in repository.sensor_defs}
    assert all(described.values()), described


def test_the_runbooks_that_are_named_are_there(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    texts = [graph.get(key).description or "" for key in graph.get_all_asset_keys()]
    texts += [graph.get_check_spec(key).description or "" for key in graph.asset_check_keys]
    texts += [sensor.description or "" for sensor in definitions.get_repository_def().sensor_defs]
    named = {word.strip("`.,") for text in texts for word in text.split() if word.startswith("`docs/runbooks/")}
    assert len(named) > 5
    assert not {name for name in named if not (ROOT / name).is_file()}


def test_every_mart_goes_back_to_the_landing_files(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    marts = [key for key in graph.get_all_asset_keys() if graph.get(key).group_name == "marts"]
    assert len(marts) >= 8
    for mart in marts:
        above, waiting = set(), set(graph.get(mart).parent_keys)
        while waiting:
            key = waiting.pop()
            above.add(key.to_user_string())
            waiting |= set(graph.get(key).parent_keys)
        if not mart.path[-1].startswith("mart_build"):  # these read no table, but name the versions of all
            assert "landing_files" in above, mart


def test_columns_of_tables_and_marts_are_shown(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for name, column, kind in (("ad_events", "spend_nanos", "bigint"), ("fct_campaign_day", "spend_micros", "hugeint")):
        schema = graph.get(dg.AssetKey(name)).metadata["dagster/column_schema"]
        columns = {found.name: found.type for found in (schema.value if isinstance(schema, dg.MetadataValue) else schema).columns}
        assert columns[column] == kind


def test_every_column_of_a_table_is_described() -> None:
    lacking = {name for asset in TABLE_ASSETS for name in asset.table.types if not COLUMNS.get(name)}
    assert lacking == set()
    assert set(COLUMNS) == {name for asset in TABLE_ASSETS for name in asset.table.types}  # no column that is gone


def test_what_is_computed_says_where_its_code_is(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        if graph.get(key).is_executable:
            references = graph.get(key).metadata["dagster/code_references"].code_references
            paths = [Path(reference.file_path) for reference in references]
            expected = f"{key.path[-1]}.sql" if "dbt" in graph.get(key).kinds else ".py"
            assert [path for path in paths if path.is_file() and path.name.endswith(expected)], key
            assert graph.get(key).code_version, key


def test_sensors_tick_rarely(definitions: dg.Definitions) -> None:
    """A tick costs the daemon and the code server about 0.15 CPU seconds, also when nothing happens."""
    sensors = definitions.get_repository_def().sensor_defs
    assert sum(60 / (sensor.minimum_interval_seconds or 30) for sensor in sensors) <= 8.5  # per minute


def test_a_group_of_marts_needs_no_mart_of_another(definitions: dg.Definitions) -> None:
    """Else a build of the group would build that one as well, and mart_build would not say so."""
    manifest = load_manifest(load_settings())
    groups = {node["name"]: set(groups_of(node)) for node in manifest["nodes"].values() if is_mart(node)}
    for group in GROUPS:
        selected = {key.path[-1] for key in definitions.resolve_job_def(f"marts_{group}").asset_layer.selected_asset_keys}
        assert {name for name, own in groups.items() if group in own} <= selected
        assert not {name for name, own in groups.items() if group not in own} & selected


def test_a_run_with_partitions_has_only_checks_with_partitions(definitions: dg.Definitions) -> None:
    """Of each other check, Dagster would plan an execution a partition, of which all but one are skipped."""
    for job in definitions.get_repository_def().get_all_jobs():
        if job.partitions_def is not None and not job.name.startswith("__"):
            checks = [job.asset_layer.asset_graph.get_check_spec(key) for key in job.asset_layer.asset_graph.asset_check_keys]
            assert [spec.key.to_user_string() for spec in checks if spec.partitions_def is None] == [], job.name


def test_tests_of_dbt_are_named_as_a_person_reads_them(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    described = {key.to_user_string(): graph.get_check_spec(key).description for key in graph.asset_check_keys}
    assert described["dim_ad:campaign_id_is_in_dim_campaign"] == "Each campaign_id is a campaign_id of dim_campaign."
    assert described["fct_event_accounting:event_hour_and_region_are_unique"] == "No two rows have the same event_hour, region."
    assert str(described["fct_event_accounting:every_offered_event_has_one_outcome"]).startswith("offered = accepted + duplicate")
    tests = [node for node in load_manifest(load_settings())["nodes"].values() if node["resource_type"] == "test"]
    of_dbt = [key for key in graph.asset_check_keys if "dagster_dbt/unique_id" in (graph.get_check_spec(key).metadata or {})]
    assert len(of_dbt) == len(tests) > 40  # no two of an asset have one name


def test_the_marts_with_expectations_are_those_with_a_suite() -> None:
    assert set(MARTS_CHECKED) == set(MARTS)


@pytest.mark.usefixtures("definitions")  # they compile the manifest where that is not done yet, which imports dbt
def test_a_cold_interpreter_loads_the_definitions(tmp_path: Path) -> None:
    """In another folder, without a DAGSTER_HOME; without Spark, Great Expectations and dbt, which take seconds to import."""
    code = (
        "import sys; from orchestration.definitions import defs; "
        "print(len(defs.resolve_asset_graph().get_all_asset_keys())); "
        "print([name for name in ('pyspark', 'great_expectations', 'pandas', 'dbt') if name in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT), "ADTALLY_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].isdigit()
    assert done.stdout.splitlines()[1] == "[]"
    assert "Warning" not in done.stderr
    print(f"the definitions load in {seconds:.1f} s")
    assert seconds < LOADS_WITHIN_SECONDS


if __name__ == "__main__":
    made = build_definitions(load_settings(start_date="2026-03-01T00:00:00Z"))
    GRAPH.write_text(json.dumps(graph_of(made), indent=2) + "\n", "utf-8")
