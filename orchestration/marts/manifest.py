"""dbt's manifest of the project: parsed once for a state of the project, and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestration.marts.dbt_runner import project_dir
from spark_jobs.config import Settings

Manifest = dict[str, Any]

_PARSED_BY = ("dbt-core", "dbt-duckdb", "dbt-adapters", "duckdb")
_DERIVED = {"target", "logs", "dbt_packages"}
_KEPT = 3


def load_manifest(settings: Settings) -> Manifest:
    """The manifest of the project as it is now, from the cache where the same project was parsed by the same dbt before.

    Raises RuntimeError when dbt cannot parse the project.
    """
    project = project_dir()
    folder = settings.jar_cache_path.parent / "dbt"
    path = folder / f"manifest-{_state_of(project)}.json"
    with contextlib.suppress(OSError, ValueError):
        kept: Manifest = json.loads(path.read_text("utf-8"))
        return kept
    text = _parse(project)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        _keep(text, path)
    parsed: Manifest = json.loads(text)
    return parsed


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


def _parse(project: Path) -> str:
    from dbt.cli.main import dbtRunner

    with tempfile.TemporaryDirectory(prefix="adtally-dbt-") as work:
        arguments = ["--quiet", "parse", "--no-partial-parse", "--project-dir", str(project), "--profiles-dir", str(project)]
        done = dbtRunner().invoke([*arguments, "--target-path", work, "--log-path", work])
        if not done.success:
            raise RuntimeError(f"dbt cannot parse the project: {done.exception}")
        return (Path(work) / "manifest.json").read_text("utf-8")


def _keep(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".manifest-", delete=False) as new:
        new.write(text)
    os.replace(new.name, path)
    older = sorted(path.parent.glob("manifest-*.json"), key=lambda kept: kept.stat().st_mtime, reverse=True)[_KEPT:]
    for kept in older:
        kept.unlink(missing_ok=True)
