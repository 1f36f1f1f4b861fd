"""Browser code of other projects that the console serves: unchanged, licensed, and in the wheel."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
VENDORED = ROOT / "orchestration" / "console" / "static" / "vendor"
PACKAGES: list[dict[str, Any]] = tomllib.loads((VENDORED / "vendor.toml").read_text("utf-8"))["package"]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package["name"])
def test_a_vendored_package_is_unchanged_and_has_its_licence(package: dict[str, Any]) -> None:
    found = {name: hashlib.sha256((VENDORED / name).read_bytes()).hexdigest() for name in package["files"]}
    assert found == package["files"]
    assert [name for name in found if name.endswith(".LICENSE")] != []
    assert package["source"] == f"npm:{package['name']}@{package['version']}"
    assert package["license"] in {"0BSD", "MIT"}


def test_every_file_is_listed() -> None:
    listed = [name for package in PACKAGES for name in package["files"]]
    assert sorted([*listed, "vendor.toml"]) == sorted(path.name for path in VENDORED.iterdir())


def test_the_wheel_has_them_and_their_licences() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "orchestration" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    covered = {path for pattern in project["project"]["license-files"] for path in ROOT.glob(pattern)}
    assert set(VENDORED.glob("*.LICENSE")) <= covered
