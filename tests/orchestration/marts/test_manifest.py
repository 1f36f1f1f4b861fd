"""dbt's manifest is compiled once for a state of the project, and never stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestration.marts import manifest
from orchestration.marts.dbt_project import project_dir
from spark_jobs.config import Settings, load_settings

EMPTY: dict[str, Any] = {"nodes": {}, "sources": {}}
KEPT = {**EMPTY, "column_lineage": {}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, and a count of how often it is compiled, which takes seconds and is not what is tested."""
    copy = tmp_path / "dbt_project"
    shutil.copytree(project_dir(), copy)
    monkeypatch.setattr(manifest, "project_dir", lambda: copy)
    return copy


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found: list[Path] = []

    def compile_it(project: Path) -> dict[str, Any]:
        found.append(project)
        return dict(EMPTY)

    monkeypatch.setattr(manifest, "_compile", compile_it)
    return found


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", cache_dir=tmp_path / "cache")


def test_the_same_project_is_parsed_once(settings: Settings, project: Path, compiled: list[Path]) -> None:
    assert manifest.load_manifest(settings) == manifest.load_manifest(settings) == KEPT
    assert len(compiled) == 1
    (project / "target").mkdir(exist_ok=True)
    (project / "target" / "manifest.json").write_text("derived")
    manifest.load_manifest(settings)
    assert len(compiled) == 1


@pytest.mark.parametrize("change", ["content", "new file", "renamed", "removed", "another dbt"])
def test_whatever_changes_is_parsed_anew(
    settings: Settings, project: Path, compiled: list[Path], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest.load_manifest(settings)
    model = project / "models" / "marts" / "dim_ad.sql"
    if change == "content":
        model.write_text(model.read_text() + "-- x\n")
    elif change == "new file":
        (project / "models" / "new.sql").write_text("select 1")
    elif change == "renamed":
        model.rename(model.with_name("dim_advert.sql"))
    elif change == "removed":
        model.unlink()
    else:
        monkeypatch.setattr(manifest, "version", lambda name: "99")
    manifest.load_manifest(settings)
    assert len(compiled) == 2


def test_a_cache_that_is_broken_or_cannot_be_written_costs_time_only(
    settings: Settings, project: Path, compiled: list[Path]
) -> None:
    manifest.load_manifest(settings)
    [kept] = (settings.jar_cache_path.parent / "dbt").glob("manifest-*.json")
    kept.write_text('{"nodes": ')
    assert manifest.load_manifest(settings) == KEPT
    assert json.loads(kept.read_text()) == KEPT
    shutil.rmtree(kept.parent)
    kept.parent.write_text("a file where the folder should be")
    assert manifest.load_manifest(settings) == KEPT
    assert len(compiled) == 3


def test_few_manifests_are_kept(settings: Settings, project: Path, compiled: list[Path]) -> None:
    for number in range(5):
        (project / "models" / "new.sql").write_text(f"select {number}")
        manifest.load_manifest(settings)
    kept = sorted((settings.jar_cache_path.parent / "dbt").iterdir())
    assert [path.suffix for path in kept] == [".json"] * 3


def test_tests_of_several_models_are_shown_at_one() -> None:
    def model(name: str, folder: str) -> dict[str, Any]:
        return {"name": name, "resource_type": "model", "fqn": ["adtally", folder, name], "config": {}}

    def test(**more: Any) -> dict[str, Any]:
        return {"resource_type": "test", "fqn": [], "config": {}, **more}

    nodes = {f"model.{name}": model(name, folder) for name, folder in (("fct_a", "marts"), ("fct_b", "marts"), ("stg", "staging"))}
    nodes |= {"test.two": test(), "test.one": test(), "test.generic": test(attached_node="model.stg")}
    parents = {
        "test.two": ["model.fct_b", "model.stg", "model.fct_a"],
        "test.one": ["model.stg"],
        "test.generic": ["model.stg", "model.fct_a"],
    }
    attached = manifest.attach_tests({"nodes": nodes, "parent_map": parents})["nodes"]
    assert attached["test.two"]["config"] == {"meta": {"dagster": {"ref": {"name": "fct_b"}}}}
    assert attached["test.one"]["config"] == attached["test.generic"]["config"] == {}
