"""The marts as assets: what a run builds, and what it says where a test of dbt failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from orchestration.assets.marts import group_of_marts, groups_of
from orchestration.definitions import build_definitions
from orchestration.marts.build import GROUPS
from orchestration.marts.manifest import is_mart, load_manifest
from spark_jobs.config import load_settings
from spark_jobs.lake.tables import BATCH_LEDGER, MINUTE_METRICS
from tests.orchestration.marts.delta_files import commit
from tests.orchestration.marts.lakes import first_batch, increment, ledger_row


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return load_manifest(load_settings())


def test_every_mart_is_in_a_group(manifest: dict[str, Any]) -> None:
    marts = {node["name"]: groups_of(node) for node in manifest["nodes"].values() if is_mart(node)}
    assert all(marts.values())
    assert marts["mart_build"] == list(GROUPS)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["fct_campaign_day"], "near_real_time"),
        (["fct_campaign_day", "mart_build", "int_increments__completed"], "near_real_time"),
        (["dim_ad", "dim_store"], "hourly"),
        (["dim_ad", "fct_campaign_day"], None),
        (["mart_build"], None),
        (["stg_lakehouse__campaigns"], None),
        ([], None),
    ],
)
def test_what_is_group_of_marts_decides_what_is_built(manifest: dict[str, Any], names: list[str], group: str | None) -> None:
    assert group_of_marts(manifest, names) == group


def test_a_failed_test_shows_its_rows_and_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger says two clicks, the increments one."""
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path))
    settings = load_settings()
    lake = Path(settings.lakehouse_uri)
    first_batch(lake)
    commit(lake, MINUTE_METRICS, [increment("u5", 1, "2026-03-10T10:05", clicks=1, spend_nanos=500)])
    commit(lake, BATCH_LEDGER, [ledger_row(1, "2026-03-10T10:00", accepted=2, spend_nanos=500)])
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_definitions(settings).resolve_job_def("marts_near_real_time")
        result = job.execute_in_process(instance=instance, raise_on_error=False)
    assert not result.success
    assert result.get_asset_materialization_events() == []
    assert not settings.marts_path.exists()
    checks = {found.check_name: found for found in result.get_asset_check_evaluations()}
    failed = checks["increments_match_ledger"]
    assert (failed.passed, failed.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert failed.description == "test assert_increments_match_ledger (2 rows)"
    assert failed.metadata["failing_rows"].value == 2
    rows: Any = failed.metadata["first_rows"].value
    assert sorted((row["side"], row["accepted"]) for row in rows) == [("increments", 1), ("ledger", 2)]
    assert checks["record_uuid_is_unique"].passed
    [failure] = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert failure.user_failure_data is not None
    assert "assert_increments_match_ledger (2 rows)" in str(failure.user_failure_data.description)
