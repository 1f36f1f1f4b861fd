"""Compiles dbt's manifest of the project once for each state of the project, and keeps it in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from orchestration.marts.dbt_project import project_dir
from orchestration.marts.lineage import column_lineage
from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.lake.tables import TABLES

Manifest = dict[str, Any]

COLUMN_LINEAGE = "column_lineage"
"""Where `load_manifest` puts the ColumnLineage of the models."""

_PARSED_BY = ("dbt-core", "dbt-duckdb", "dbt-adapters", "duckdb", "sqlglot")
_DERIVED = {"target", "logs", "dbt_packages"}
_KEPT = 3
_GENERIC_TESTS = {
    "unique_combination": ("{joined}_are_unique", "No two rows have the same {listed}."),
    "relationships": ("{column}_is_in_{to}", "Each {column} is a {field} of {to}."),
    "accepted_values": ("{column}_is_known", "Each {column} is one of {values}."),
    "unique": ("{column}_is_unique", "{column} is unique."),
    "not_null": ("{column}_is_not_null", "{column} is never null."),
}
"""Name and description of a test with parameters, by dbt's name of the test."""


def load_manifest(settings: Settings) -> Manifest:
    """Return the manifest of the project, with each column's lineage under COLUMN_LINEAGE.

    Compiles the project only if the cache has no manifest of its present files. Raises RuntimeError if dbt cannot compile it.
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
        disk.write_file(path, json.dumps(compiled).encode())
        for older in sorted(folder.glob("manifest-*.json"), key=lambda kept: kept.stat().st_mtime)[:-_KEPT]:
            older.unlink(missing_ok=True)
    return compiled


def attach_tests(manifest: Manifest) -> Manifest:
    """Attach every test of several models to one: the last of its marts by name, else of its models. Returns the manifest.

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
    """Give tests names and descriptions for people, such as `campaign_id_is_in_dim_campaign`. Returns the manifest."""
    for node in manifest["nodes"].values():
        if node["resource_type"] == "test":
            name, description = _singular(node) if node.get("test_metadata") is None else _generic(node)
            node["name"] = name
            node["meta"] = {**node.get("meta", {}), "description": node.get("description") or description}
    return manifest


def _singular(node: dict[str, Any]) -> tuple[str, str]:
    """Return name and description of a test that is a query: its file's name, and the comment that the file begins with."""
    lines = takewhile(lambda line: line.startswith("--"), str(node["raw_code"]).splitlines())
    return str(node["name"]).removeprefix("assert_"), " ".join(line.removeprefix("--").strip() for line in lines)


def _generic(node: dict[str, Any]) -> tuple[str, str]:
    """Return name and description of a test with parameters."""
    kind, of = node["test_metadata"]["name"], node["test_metadata"]["kwargs"]
    column, columns = of.get("column_name") or "", of.get("columns", [])
    if kind not in _GENERIC_TESTS:
        return str(node["name"]), f"dbt's test {kind}" + (f" of {column}" if column else "")
    words = {
        "column": column,
        "joined": "_and_".join(columns),
        "listed": ", ".join(columns),
        "to": of["to"].split("'")[1] if "to" in of else "",
        "field": of.get("field"),
        "values": ", ".join(map(str, of.get("values", []))),
    }
    name, description = _GENERIC_TESTS[kind]
    return name.format(**words), description.format(**words)


def is_mart(node: Mapping[str, Any]) -> bool:
    """Return whether a node is a model that is published."""
    return bool(node["resource_type"] == "model" and "marts" in node["fqn"])


def _state_of(project: Path) -> str:
    """Return a hash of all that the manifest depends on: the project's files, and what parses them."""
    state = hashlib.sha256(repr([(name, version(name)) for name in _PARSED_BY]).encode())
    for path in sorted(project.rglob("*")):
        inside = path.relative_to(project)
        if path.is_file() and not set(inside.parts) & _DERIVED:
            state.update(f"{inside.as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return state.hexdigest()[:32]


def _compile(project: Path) -> Manifest:
    with tempfile.TemporaryDirectory(prefix="adtally-dbt-") as work:
        invoke_dbt(project, Path(work), "compile", "--no-partial-parse", "--no-introspect", "--no-populate-cache")
        manifest: Manifest = json.loads((Path(work) / "manifest.json").read_text("utf-8"))
        return manifest


def invoke_dbt(project: Path, work: Path, *arguments: str) -> None:
    """Run a command of dbt that builds nothing, in this process; it writes its files into ``work``. Raises RuntimeError."""
    from dbt.cli.main import dbtRunner

    paths = ["--project-dir", str(project), "--profiles-dir", str(project), "--target-path", str(work), "--log-path", str(work)]
    done = dbtRunner().invoke(["--quiet", *arguments, *paths])
    if not done.success:
        raise RuntimeError(f"`dbt {arguments[0]}` failed: {done.exception}")
