"""dbt's manifest of the project: compiled once for a state of the project, and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from orchestration.marts.dbt_runner import project_dir
from orchestration.marts.lineage import column_lineage
from spark_jobs.config import Settings
from spark_jobs.lake.tables import TABLES

Manifest = dict[str, Any]

COLUMN_LINEAGE = "column_lineage"
"""Where `load_manifest` puts the ColumnLineage of the models."""

_PARSED_BY = ("dbt-core", "dbt-duckdb", "dbt-adapters", "duckdb", "sqlglot")
_DERIVED = {"target", "logs", "dbt_packages"}
_KEPT = 3


def load_manifest(settings: Settings) -> Manifest:
    """The manifest of the project as it is now, from the cache where the same project was parsed by the same dbt before.

    It has the columns that each column is made from under COLUMN_LINEAGE.

    Raises RuntimeError when dbt cannot compile the project.
    """
    project = project_dir()
    folder = settings.jar_cache_path.parent / "dbt"
    path = folder / f"manifest-{_state_of(project)}.json"
    with contextlib.suppress(OSError, ValueError):
        kept: Manifest = json.loads(path.read_text("utf-8"))
        return kept
    compiled = _compile(project)
    compiled[COLUMN_LINEAGE] = column_lineage(compiled, {name: list(table.types) for name, table in TABLES.items()})
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        _keep(json.dumps(compiled), path)
    return compiled


def attach_tests(manifest: Manifest) -> Manifest:
    """``manifest`` with every test of several models attached to one: the last of its marts by name, or else of its models.

    dbt does not say to which model such a test belongs, and Dagster shows a test at one asset.
    """
    for unique_id, node in manifest["nodes"].items():
        parents = [parent for parent in manifest["parent_map"].get(unique_id, []) if parent.startswith("model.")]
        if node["resource_type"] != "test" or node.get("attached_node") or len(parents) < 2:
            continue
        models = sorted((manifest["nodes"][parent] for parent in parents), key=lambda model: (is_mart(model), model["name"]))
        node["config"].setdefault("meta", {}).setdefault("dagster", {}).setdefault("ref", {"name": models[-1]["name"]})
    return manifest


def name_tests(manifest: Manifest) -> Manifest:
    """``manifest`` with tests named and described as a person reads them: `campaign_id_is_in_dim_campaign` of a mart."""
    for node in manifest["nodes"].values():
        if node["resource_type"] == "test":
            name, description = _singular(node) if node.get("test_metadata") is None else _generic(node)
            node["name"] = name
            node["meta"] = {**node.get("meta", {}), "description": node.get("description") or description}
    return manifest


def _singular(node: dict[str, Any]) -> tuple[str, str]:
    """Name and description of a test that is a query: its file's name, and the comment that the file begins with."""
    lines = takewhile(lambda line: line.startswith("--"), str(node["raw_code"]).splitlines())
    return str(node["name"]).removeprefix("assert_"), " ".join(line.removeprefix("--").strip() for line in lines)


def _generic(node: dict[str, Any]) -> tuple[str, str]:
    """Name and description of a test with parameters."""
    kind, of = node["test_metadata"]["name"], node["test_metadata"]["kwargs"]
    column = of.get("column_name") or ""
    if kind == "unique_combination":
        return f"{'_and_'.join(of['columns'])}_are_unique", f"No two rows have the same {', '.join(of['columns'])}."
    if kind == "relationships":
        to = str(of["to"]).split("'")[1]
        return f"{column}_is_in_{to}", f"Each {column} is a {of['field']} of {to}."
    if kind == "accepted_values":
        return f"{column}_is_known", f"Each {column} is one of {', '.join(map(str, of['values']))}."
    if kind in ("unique", "not_null"):
        return f"{column}_is_{kind}", f"{column} is {'unique' if kind == 'unique' else 'never null'}."
    return str(node["name"]), f"dbt's test {kind}" + (f" of {column}" if column else "")


def is_mart(node: dict[str, Any]) -> bool:
    """Whether a node is a model that is published."""
    return bool(node["resource_type"] == "model" and "marts" in node["fqn"])


def _state_of(project: Path) -> str:
    """A hash of all that the manifest depends on: the project's files, and what parses them."""
    state = hashlib.sha256()
    for name in _PARSED_BY:
        state.update(f"{name} {version(name)}\0".encode())
    for path in sorted(project.rglob("*")):
        inside = path.relative_to(project)
        if path.is_file() and not set(inside.parts) & _DERIVED:
            state.update(f"{inside.as_posix()}\0{path.stat().st_size}\0".encode())
            state.update(path.read_bytes())
    return state.hexdigest()[:32]


def _compile(project: Path) -> Manifest:
    from dbt.cli.main import dbtRunner

    with tempfile.TemporaryDirectory(prefix="adtally-dbt-") as work:
        arguments = ["--quiet", "compile", "--no-partial-parse", "--project-dir", str(project), "--profiles-dir", str(project)]
        asks_no_database = ["--no-introspect", "--no-populate-cache"]
        done = dbtRunner().invoke([*arguments, *asks_no_database, "--target-path", work, "--log-path", work])
        if not done.success:
            raise RuntimeError(f"dbt cannot compile the project: {done.exception}")
        manifest: Manifest = json.loads((Path(work) / "manifest.json").read_text("utf-8"))
        return manifest


def _keep(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".manifest-", delete=False) as new:
        new.write(text)
    os.replace(new.name, path)
    older = sorted(path.parent.glob("manifest-*.json"), key=lambda kept: kept.stat().st_mtime, reverse=True)[_KEPT:]
    for kept in older:
        kept.unlink(missing_ok=True)
