"""Files that must survive a power cut: what is synced, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spark_jobs import disk


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the system was asked for, in order: ("fsync", name) and ("rename", new name)."""
    made: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        made.append(("fsync", "temporary" if name.endswith(disk.TEMPORARY_ENDING) else name))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        made.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return made


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_after(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    disk.write_file(tmp_path / "manifest.json", b"one")
    disk.write_file(tmp_path / "manifest.json", b"two")
    assert (tmp_path / "manifest.json").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert calls == [("fsync", "temporary"), ("rename", "manifest.json"), ("fsync", tmp_path.name)] * 2


def test_new_folders_are_synced_in_their_parents(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    disk.make_folder(tmp_path / "a" / "b")
    assert sorted(calls) == [("fsync", "a"), ("fsync", tmp_path.name)]
    calls.clear()
    disk.make_folder(tmp_path / "a" / "b")
    assert calls == []


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    disk.write_file(tmp_path / "a", b"old")
    with pytest.raises(OSError, match="disk full"), disk.replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_many_files_and_the_folders_above_them(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    folder = tmp_path / "table" / "hour=1"
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / name).write_bytes(b"x")
    disk.sync_files(folder / name for name in "abc")
    assert sorted(calls) == [("fsync", name) for name in "abc"]
    calls.clear()
    disk.sync_new_folders([folder], tmp_path)
    assert calls == [("fsync", "hour=1"), ("fsync", "table"), ("fsync", tmp_path.name)]
    with pytest.raises(FileNotFoundError):
        disk.sync_files([folder / "gone", folder / "a"])


def test_a_rename_between_folders_is_synced_in_both(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "file").write_bytes(b"x")
    disk.replace(tmp_path / "here" / "file", tmp_path / "there" / "file")
    assert calls == [("rename", "file"), ("fsync", "there"), ("fsync", "here")]
