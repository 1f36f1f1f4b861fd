"""What an installed adtally needs beside its modules, and the front door of a checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from orchestration.marts import dbt_project
from orchestration.marts.dbt_project import project_dir
from spark_jobs.errors import MachineError
from tests.test_layout import imported

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel() -> dict[str, Any]:
    """The wheel's part of pyproject.toml."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    found: dict[str, Any] = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    return found


def test_the_wheel_has_every_package_that_it_imports(wheel: dict[str, Any]) -> None:
    shipped = set(wheel["only-include"])
    own = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for package in sorted(shipped & own):
        for path in (ROOT / package).rglob("*.py"):
            assert imported(path) & own <= shipped, path
    assert own - shipped == {"benchmarks"}


def test_the_wheel_has_the_dbt_project_where_the_package_looks_for_it(
    wheel: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "dbt_project" in wheel["only-include"]
    installed = tmp_path / wheel["sources"]["dbt_project"]
    shutil.copytree(ROOT / "dbt_project", installed)
    monkeypatch.setattr(dbt_project, "__file__", str(tmp_path / "orchestration" / "marts" / "dbt_project.py"))
    assert project_dir() == installed
    shutil.rmtree(installed)
    with pytest.raises(MachineError, match="the dbt project is not installed"):
        project_dir()


def test_a_checkout_has_the_dbt_project_beside_the_package() -> None:
    assert project_dir() == ROOT / "dbt_project"


def test_make_alone_lists_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # -r -R: the rules of this Makefile only
    done = subprocess.run(["make", "-r", "-R"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    listed = dict(re.findall(r"^  make ([a-z0-9-]+) +(\S.*)$", done.stdout, re.MULTILINE))
    targets = re.findall(r"^\.PHONY: ([a-z0-9-]+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {"help", "demo", "test", "lint", "clean"} <= set(targets)
    assert list(listed) == targets


def test_the_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"^    make ([a-z0-9-]+)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_the_folders_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    folders = re.findall(r"^\| `([\w/]+)/` \|", text, re.MULTILINE)
    assert len(folders) >= 7
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [name for name in (*folders, *links) if not (ROOT / name).exists()] == []
