"""The marts, as assets with the lineage that dbt declares, built beside and published in one rename."""

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.assets.lakehouse import NAMES
from orchestration.marts import build_marts
from orchestration.marts.dbt_runner import project_dir
from spark_jobs.config import load_settings

_ASSET_OF_TABLE = {table: asset for asset, table in NAMES.items()}


@cache
def manifest() -> dict[str, Any]:
    """Dbt's manifest of the project, parsed once a process."""
    from dbt.cli.main import dbtRunner

    with tempfile.TemporaryDirectory(prefix="adtally-dbt-") as work:
        folder = str(project_dir())
        arguments = ["--quiet", "parse", "--project-dir", folder, "--profiles-dir", folder]
        done = dbtRunner().invoke([*arguments, "--target-path", work, "--log-path", work])
        if not done.success:
            raise RuntimeError(f"dbt cannot parse the project: {done.exception}")
        parsed: dict[str, Any] = json.loads((Path(work) / "manifest.json").read_text("utf-8"))
        return parsed


def _upstream(parsed: dict[str, Any], node: str) -> set[str]:
    """Assets directly above a mart: other marts, and Delta tables, through whatever models lie between."""
    found: set[str] = set()
    for parent in parsed["parent_map"].get(node, []):
        if parent.startswith("source."):
            found.add(_ASSET_OF_TABLE[parsed["sources"][parent]["name"]])
        elif parent.startswith("model."):
            model = parsed["nodes"][parent]
            found |= {model["name"]} if _is_mart(model) else _upstream(parsed, parent)
    return found


def _is_mart(node: dict[str, Any]) -> bool:
    return bool(node["resource_type"] == "model" and "marts" in node["fqn"])


def mart_specs() -> list[dg.AssetSpec]:
    """A spec a mart, with dbt's description and its lineage down to the Delta tables."""
    parsed = manifest()
    return [
        dg.AssetSpec(
            node["name"], deps=sorted(_upstream(parsed, unique_id)), description=node["description"], kinds={"dbt", "duckdb"}
        )
        for unique_id, node in sorted(parsed["nodes"].items())
        if _is_mart(node)
    ]


@dg.multi_asset(name="marts", group_name="marts", specs=mart_specs(), pool="marts")
def marts(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
    """Build every mart from pinned Delta versions, test them, and publish them together."""
    built = build_marts(load_settings(), progress=context.log.info)
    for key in context.selected_asset_keys:
        metadata = {"build_id": built.build_id, "rows": built.rows.get(key.path[-1]), "seconds": built.seconds}
        yield dg.MaterializeResult(asset_key=key, metadata={k: v for k, v in metadata.items() if v is not None})
