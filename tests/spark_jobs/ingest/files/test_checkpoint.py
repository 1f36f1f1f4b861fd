"""The files of a batch from checkpoints in Spark's format: as Spark wrote one, and by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.files.checkpoint import BatchFiles, has_read_all, read_batch_files
from spark_jobs.ingest.files.landing import LandingFile

# as Spark 4.2.0 wrote it with one file a batch and the source's log compacted every third batch (the default is every tenth);
# the lists that a compacted one took in are deleted up to 3, as Spark does after a while
COMPACTED = Path(__file__).resolve().parents[3] / "cases" / "checkpoint" / "compacted"
NAMES = [
    *("a b.jsonl", "p%20q.jsonl", "h#s.jsonl", "q?.jsonl", "x;y.jsonl", "b[1].jsonl", "a+b&c=d.jsonl", "'q\"r.jsonl", "é.jsonl"),
    *("ls\u2028x.jsonl", "nel\x85x.jsonl"),
]


@pytest.mark.parametrize("batch_id", range(len(NAMES)))
def test_a_checkpoint_of_spark(batch_id: int) -> None:
    """The file names hold whatever has a meaning in a URI; 0 to 3, 5 and 8 stand in a compacted list only."""
    made = read_batch_files(COMPACTED, batch_id)
    assert made.files == [LandingFile(1_700_000_000_000 + batch_id * 1000, f"/landing/events/eu/{NAMES[batch_id]}", 0)]
    metadata = json.loads((COMPACTED / "offsets" / str(batch_id)).read_text("utf-8").split("\n")[1])
    assert made.planned_us == metadata["batchTimestampMs"] * 1000 > 1_700_000_000_000_000


class Checkpoint:
    """A checkpoint by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "offsets").mkdir(parents=True)
        (root / "commits").mkdir()
        (root / "sources" / "0").mkdir(parents=True)

    def offset(self, batch_id: int, log_offset: int, planned_ms: int = 1_000) -> None:
        metadata = json.dumps({"batchWatermarkMs": 0, "batchTimestampMs": planned_ms, "conf": {}})
        (self.root / "offsets" / str(batch_id)).write_text(f'v1\n{metadata}\n{{"logOffset":{log_offset}}}')

    def end(self, batch_id: int) -> None:
        (self.root / "commits" / str(batch_id)).write_text('v1\n{"nextBatchWatermarkMs":0}')

    def list(self, name: str, *entries: tuple[str, int, int]) -> None:
        """A list of the source: (path, modified in ms, id)."""
        lines = [json.dumps({"path": path, "timestamp": ms, "batchId": log_id}) for path, ms, log_id in entries]
        (self.root / "sources" / "0" / name).write_text("\n".join(["v1", *lines]))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "checkpoint")


def names(batch: BatchFiles) -> list[str]:
    return [Path(file.path).name for file in batch.files]


def test_files_are_in_the_order_of_their_records(checkpoint: Checkpoint) -> None:
    checkpoint.offset(0, 0, planned_ms=1_748_858_400_123)
    checkpoint.list("0", ("file:///b", 2, 0), ("file:///z", 1, 0), ("file:///a", 2, 0), ("file:///10", 2, 0), ("file:///9", 2, 0))
    batch = read_batch_files(checkpoint.root, 0)
    assert batch.planned_us == 1_748_858_400_123_000
    assert [file.path for file in batch.files] == ["/z", "/10", "/9", "/a", "/b"]


def test_a_batch_has_all_that_the_source_listed_since_the_last_one(checkpoint: Checkpoint) -> None:
    for batch_id, log_offset in enumerate((1, 1, 4)):
        checkpoint.offset(batch_id, log_offset, planned_ms=batch_id)
    for log_id in range(6):
        checkpoint.list(str(log_id), (f"file:///{log_id}", 5 - log_id, log_id))
    assert names(read_batch_files(checkpoint.root, 0)) == ["1", "0"]
    assert names(read_batch_files(checkpoint.root, 1)) == []
    assert names(read_batch_files(checkpoint.root, 2)) == ["4", "3", "2"]
    assert read_batch_files(checkpoint.root, 2).planned_us == 2000
    assert read_batch_files(checkpoint.root, 2) == read_batch_files(checkpoint.root, 2)


def test_sizes_are_those_of_the_files_and_0_where_a_file_is_gone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "full file").write_bytes(b"12345")
    (tmp_path / "empty").touch()
    os.utime(tmp_path / "full file", (9, 9))  # the time of the list counts, not the file's of today
    checkpoint.offset(0, 0)
    checkpoint.list("0", *((f"file://{tmp_path}/{name}", at, 0) for at, name in enumerate(("full%20file", "empty", "gone"))))
    assert read_batch_files(checkpoint.root, 0).files == [
        LandingFile(0, str(tmp_path / "full file"), 5),
        LandingFile(1, str(tmp_path / "empty"), 0),
        LandingFile(2, str(tmp_path / "gone"), 0),
    ]


def test_what_was_compacted_is_found_in_the_next_compacted_list(checkpoint: Checkpoint) -> None:
    for batch_id in range(25):
        checkpoint.offset(batch_id, batch_id)
    entries = [(f"file:///{log_id}", 1, log_id) for log_id in range(25)]
    checkpoint.list("9.compact", *entries[:10])
    checkpoint.list("19.compact", *entries[:20])
    for log_id in (*range(15, 19), *range(20, 25)):
        checkpoint.list(str(log_id), entries[log_id])
    for name in (".9.compact.crc", ".19.compact.crc", ".15.crc", ".29.compact.5b7c.tmp"):
        (checkpoint.root / "sources" / "0" / name).write_bytes(b"crc\0")
    assert [names(read_batch_files(checkpoint.root, batch_id)) for batch_id in range(25)] == [[str(n)] for n in range(25)]
    (checkpoint.root / "sources" / "0" / "9.compact").unlink()
    assert names(read_batch_files(checkpoint.root, 5)) == ["5"]


def _write(path: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def _remove(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def _rename(path: str, target: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / path).rename(root / target)

    return damage


def _folder(path: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / path).unlink()
        (root / path).mkdir()

    return damage


METADATA = '{"batchTimestampMs":1}'
ENTRY = '{"path":"file:///a","timestamp":1,"batchId":1}'
BROKEN: dict[str, Callable[[Path], None]] = {
    "offset gone": _remove("offsets/1"),
    "offset of the batch before gone": _remove("offsets/0"),
    "offset empty": _write("offsets/1", ""),
    "offset torn": _write("offsets/1", "v1\n" + METADATA),
    "offset of another version": _write("offsets/1", "v2\n" + METADATA + '\n{"logOffset":1}'),
    "offset without an offset": _write("offsets/1", "v1\n" + METADATA + "\n-"),
    "offset of another source": _write("offsets/1", "v1\n" + METADATA + '\n{"events":{"0":17}}'),
    "offset a number": _write("offsets/1", "v1\n" + METADATA + "\n1"),
    "offset null": _write("offsets/1", "v1\n" + METADATA + '\n{"logOffset":null}'),
    "metadata without a time": _write("offsets/1", 'v1\n{}\n{"logOffset":1}'),
    "metadata torn": _write("offsets/1", 'v1\n{"batchTi\n{"logOffset":1}'),
    "offset not text": _write("offsets/1", b"v1\n\xff\n"),
    "list gone": _remove("sources/0/1"),
    "list of an earlier id only": _rename("sources/0/1", "sources/0/0.compact"),
    "all lists gone": _rename("sources/0", "elsewhere"),
    "list a folder": _folder("sources/0/1"),
    "list empty": _write("sources/0/1", ""),
    "list without an entry": _write("sources/0/1", "v1"),
    "list of another version": _write("sources/0/1", f"v2\n{ENTRY}"),
    "list of another id": _write("sources/0/1", "v1\n" + ENTRY.replace('"batchId":1', '"batchId":2')),
    "list torn": _write("sources/0/1", f"v1\n{ENTRY}\n{ENTRY[:-5]}"),
    "list with a strange entry": _write("sources/0/1", f"v1\n{ENTRY}\n5"),
    "entry without a path": _write("sources/0/1", 'v1\n{"timestamp":1,"batchId":1}'),
    "entry with a strange path": _write("sources/0/1", 'v1\n{"path":5,"timestamp":1,"batchId":1}'),
    "entry without a time": _write("sources/0/1", 'v1\n{"path":"file:///a","batchId":1}'),
    "list not text": _write("sources/0/1", b"v1\n\xff"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_told(checkpoint: Checkpoint, damage: Callable[[Path], None]) -> None:
    """Never fewer files than there were: a batch that silently leaves one out would lose its events for good."""
    checkpoint.offset(0, 0)
    checkpoint.offset(1, 1)
    checkpoint.list("0", ("file:///0", 1, 0))
    checkpoint.list("1", ("file:///1", 1, 1))
    assert names(read_batch_files(checkpoint.root, 1)) == ["1"]
    damage(checkpoint.root)
    with pytest.raises(TableCorruptionError) as told:
        read_batch_files(checkpoint.root, 1)
    message = str(told.value)
    assert str(checkpoint.root) in message
    assert "docs/runbooks/lost-checkpoint.md" in message
    assert "\n" not in message


@pytest.fixture
def read_folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A landing folder of which `checkpoint` has read all: two batches, both ended."""
    folder = tmp_path / "landing" / "events"
    (folder / "eu").mkdir(parents=True)
    (folder / "us").mkdir()
    for batch_id, name in enumerate(("eu/a b.jsonl", "us/b.jsonl.gz")):
        (folder / name).touch()
        checkpoint.list(str(batch_id), ((folder / name).as_uri(), 1, batch_id))
        checkpoint.offset(batch_id, batch_id)
        checkpoint.end(batch_id)
    (checkpoint.root / "metadata").write_text('{"id":"q"}')
    return folder


def test_all_is_read(checkpoint: Checkpoint, read_folder: Path) -> None:
    assert has_read_all(checkpoint.root, read_folder)


def _mkdir(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _touch(*paths: Path) -> None:
    for path in paths:
        path.touch()


def _move_and_link(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(target)


# What Spark would not read again, or never reads.
IDLE: dict[str, Callable[[Path, Checkpoint], object]] = {
    "hidden": lambda folder, _: _touch(folder / "eu" / ".a.jsonl", folder / "eu" / "_b.jsonl"),
    "in a hidden folder": lambda folder, _: (_mkdir(folder / "_eu") / "c.jsonl").touch(),
    "another ending": lambda folder, _: (folder / "eu" / "c.csv").touch(),
    "deleted": lambda folder, _: (folder / "us" / "b.jsonl.gz").unlink(),
    "touched": lambda folder, _: os.utime(folder / "us" / "b.jsonl.gz", (9, 9)),
    "a link to a file that was read": lambda folder, _: _move_and_link(folder / "eu" / "a b.jsonl", folder / "moved"),
}
# What Spark would plan a batch for, or might, and batches that it would finish.
BUSY: dict[str, Callable[[Path, Checkpoint], object]] = {
    "new": lambda folder, _: (folder / "eu" / "c.jsonl").touch(),
    "of the old name elsewhere": lambda folder, _: (folder / "us" / "a b.jsonl").touch(),
    "in a new region": lambda folder, _: (_mkdir(folder / "asia") / "c.jsonl").touch(),
    "too deep": lambda folder, _: (_mkdir(folder / "eu" / "deep" / "er") / "c.jsonl").touch(),
    "in no region": lambda folder, _: (folder / "c.jsonl").touch(),
    "hidden, but not from Spark": lambda folder, _: (folder / "eu" / "_day=1.jsonl").touch(),
    "a link": lambda folder, _: (folder / "eu" / "c.jsonl").symlink_to(folder / "eu" / "a b.jsonl"),
    "a link to a folder": lambda folder, _: (folder / "asia").symlink_to(folder.parent),
    "a pipe": lambda folder, _: os.mkfifo(folder / "eu" / "c.jsonl"),
    "no landing folder": lambda folder, _: folder.rename(folder.with_name("moved")),
    "a batch that has not ended": lambda _, checkpoint: (checkpoint.root / "commits" / "1").unlink(),
    "a batch that is planned": lambda _, checkpoint: checkpoint.offset(2, 1),
    "a list without a batch": lambda _, checkpoint: checkpoint.list("2", ("file:///gone.jsonl", 1, 2)),
    "a compacted list without a batch": lambda folder, checkpoint: checkpoint.list(
        "2.compact",
        *(((folder / name).as_uri(), 1, number) for number, name in enumerate(("eu/a b.jsonl", "us/b.jsonl.gz", "gone.jsonl"))),
    ),
    "no query": lambda _, checkpoint: (checkpoint.root / "metadata").unlink(),
    "no checkpoint": lambda _, checkpoint: checkpoint.root.rename(checkpoint.root.with_name("lost")),
}


@pytest.mark.parametrize("what", IDLE)
def test_what_spark_need_not_start_for(checkpoint: Checkpoint, read_folder: Path, what: str) -> None:
    IDLE[what](read_folder, checkpoint)
    assert has_read_all(checkpoint.root, read_folder)


@pytest.mark.parametrize("what", BUSY)
def test_what_spark_must_start_for(checkpoint: Checkpoint, read_folder: Path, what: str) -> None:
    BUSY[what](read_folder, checkpoint)
    assert not has_read_all(checkpoint.root, read_folder)


def test_a_damaged_list_is_no_sign_that_all_is_read(checkpoint: Checkpoint, read_folder: Path) -> None:
    (checkpoint.root / "sources" / "0" / "1").write_text("v1\n{torn")
    with pytest.raises(TableCorruptionError, match="is not the list of a file source"):
        has_read_all(checkpoint.root, read_folder)
