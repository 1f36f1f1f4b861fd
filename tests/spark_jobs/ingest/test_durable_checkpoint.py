"""Spark's checkpoint across a power cut: what is synced before a commit, what is set aside, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.durable_checkpoint import CheckpointState, CheckpointSync, read_state, set_aside_torn


def write(path: Path, *lines: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["v1", *map(json.dumps, lines)]))
    path.with_name(f".{path.name}.crc").write_bytes(b"crc")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Batches 0 and 1 have ended, batch 2 is planned."""
    folder = tmp_path / "checkpoints" / "events"
    folder.mkdir(parents=True)
    (folder / "metadata").write_text('{"id":"query"}')
    for batch in range(3):
        write(folder / "sources" / "0" / str(batch), {"path": "file:///a", "timestamp": 1, "batchId": batch})
        write(folder / "offsets" / str(batch), {"batchTimestampMs": 1}, {"logOffset": batch})
        if batch < 2:
            write(folder / "commits" / str(batch), {"nextBatchWatermarkMs": 0})
    return folder


def visible(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


def test_a_whole_checkpoint_is_left_alone(checkpoint: Path) -> None:
    before = visible(checkpoint)
    assert set_aside_torn(checkpoint) == []
    assert visible(checkpoint) == before
    assert read_state(checkpoint) == CheckpointState("query", planned=2, ended=1)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert (set_aside_torn(tmp_path / "none"), read_state(tmp_path / "none")) == ([], None)


@pytest.mark.parametrize(
    ("torn", "gone"),
    [
        pytest.param(["commits/1"], {"commits/1"}, id="the end of a batch: it runs again"),
        pytest.param(["offsets/2"], {"offsets/2"}, id="the plan of a batch"),
        pytest.param(["sources/0/2"], {"sources/0/2", "offsets/2"}, id="the files of a plan"),
        pytest.param(["sources/0/2", "offsets/2", "commits/1"], {"sources/0/2", "offsets/2", "commits/1"}, id="all of it"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"v1\n{", b"\0" * 40], ids=["empty", "cut off", "zeros"])
def test_torn_files_of_the_last_batch_are_set_aside(checkpoint: Path, torn: list[str], gone: set[str], content: bytes) -> None:
    before = visible(checkpoint)
    for name in torn:
        (checkpoint / name).write_bytes(content)
    assert len(set_aside_torn(checkpoint)) == len(gone)
    assert visible(checkpoint) == before - gone
    assert all(not (checkpoint / name).with_name(f".{Path(name).name}.crc").exists() for name in gone)
    assert set_aside_torn(checkpoint) == []


def test_a_checkpoint_torn_in_its_first_batch_is_started_again(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    write(folder / "sources" / "0" / "0", {"path": "file:///a", "timestamp": 1, "batchId": 0})
    write(folder / "offsets" / "0", {"batchTimestampMs": 1}, {"logOffset": 0})
    (folder / "metadata").touch()
    set_aside_torn(folder)
    assert visible(folder) == {"sources/0/0"}
    assert read_state(folder) is None


def test_a_missing_metadata_is_refused_if_a_batch_has_ended(checkpoint: Path) -> None:
    (checkpoint / "metadata").unlink()
    before = visible(checkpoint)
    with pytest.raises(TableCorruptionError, match=r"metadata cannot be read, and batch 1 that needs it has ended.*power-cut"):
        set_aside_torn(checkpoint)
    assert visible(checkpoint) == before


@pytest.mark.parametrize("name", ["metadata", "sources/0/1"])
def test_what_an_ended_batch_needs_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(b"")
    for later in ("offsets/2", "sources/0/2"):
        (checkpoint / later).unlink()
    before = visible(checkpoint)
    with pytest.raises(TableCorruptionError, match=f"{name} cannot be read, and batch 1 that needs it has ended.*power-cut"):
        set_aside_torn(checkpoint)
    assert visible(checkpoint) == before


def test_an_empty_checksum_would_stop_spark_no_more(checkpoint: Path) -> None:
    (checkpoint / "offsets" / ".2.crc").write_bytes(b"")
    assert set_aside_torn(checkpoint) == []
    assert not (checkpoint / "offsets" / ".2.crc").exists()


def test_each_file_is_synced_once_before_the_first_commit_of_a_batch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    sync = CheckpointSync(checkpoint)
    sync.before_commit()
    expected = {str(path) for path in (*checkpoint.rglob("*"), *list(checkpoint.parents)[:2], checkpoint)}
    assert set(synced) == expected
    synced.clear()
    write(checkpoint / "commits" / "2", {"nextBatchWatermarkMs": 0})
    write(checkpoint / "offsets" / "3", {"batchTimestampMs": 1}, {"logOffset": 3})
    (checkpoint / "offsets" / ".4.tmp").touch()
    sync.before_commit()
    assert {str(Path(path).relative_to(checkpoint)) for path in synced} == {
        *("commits", "commits/2", "commits/.2.crc", "offsets", "offsets/3", "offsets/.3.crc")
    }
