"""Small files that machines share through a lakehouse in a store."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from spark_jobs.config import load_settings
from spark_jobs.lake.shared_folder import shared_folder

FOLDER = "quality/profiles"


def test_machines_read_what_others_wrote(prefix: str, tmp_path: Path) -> None:
    one, two = (load_settings(home=tmp_path / name, lakehouse=prefix) for name in ("one", "two"))
    file = Path(FOLDER) / "events" / "2025-06-02T10.json"
    with shared_folder(one, FOLDER):
        (one.home_path / file).parent.mkdir(parents=True)
        (one.home_path / file).write_text("first")
    with shared_folder(two, FOLDER):
        assert (two.home_path / file).read_text() == "first"
        (two.home_path / file).write_text("second")
    os.utime(one.home_path / file, (1, 1))  # it was written long ago
    with shared_folder(one, FOLDER):
        assert (one.home_path / file).read_text() == "second"
    shutil.rmtree(one.home_path)
    with shared_folder(one, FOLDER):
        assert (one.home_path / file).read_text() == "second"


def test_a_block_that_fails_copies_nothing(prefix: str, tmp_path: Path) -> None:
    one, two = (load_settings(home=tmp_path / name, lakehouse=prefix) for name in ("one", "two"))
    with pytest.raises(OSError, match="full"), shared_folder(one, FOLDER):
        (one.home_path / FOLDER).mkdir(parents=True)
        (one.home_path / FOLDER / "half.json").write_text("half")
        raise OSError("full")
    with shared_folder(two, FOLDER):
        assert not (two.home_path / FOLDER / "half.json").exists()


def test_a_local_lakehouse_shares_nothing(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "home")
    with shared_folder(settings, FOLDER):
        (tmp_path / "home" / FOLDER).mkdir(parents=True)
        (tmp_path / "home" / FOLDER / "one.json").write_text("one")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"one.json"}
