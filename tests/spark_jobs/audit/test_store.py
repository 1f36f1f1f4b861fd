"""The store of parsed files: the second run, the changed file, the damaged entry, the killed run, two runs at once."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lake import event, land, lines, order

from spark_jobs.audit import files as landing_files
from spark_jobs.audit import store, worker
from spark_jobs.audit.contract import record_schema
from spark_jobs.audit.store import ParsedFile, RawFile, ensure_parsed, prune
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home without tables: the store needs none."""
    return load_settings(home=tmp_path / "home")


def raw(path: Path) -> RawFile:
    found = path.stat()
    return RawFile(str(path), found.st_mtime_ns // 1_000_000, found.st_size)


def some_files(settings: Settings) -> list[RawFile]:
    first = land(settings, "events/eu/a.jsonl", [event("1"), event("2", event_time="2025-06-02T11:59:59.999999Z")])
    second = land(settings, "events/us/b.jsonl.gz", [event("3", event_time="2025-06-02T09:00:00Z", currency="none")])
    third = land(settings, "events/eu/c.jsonl", lines([event("4")]) + b"nonsense\n")
    return [raw(path) for path in (first, second, third)]


def states(settings: Settings) -> dict[str, tuple[int, int]]:
    """The store's files and what would tell that one was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in settings.recount_path.rglob("*") if path.is_file()}


def content(parsed: list[ParsedFile]) -> list[pa.Table]:
    return [pq.read_table(one.parquet) for one in parsed]


def test_entries_say_what_is_in_them(settings: Settings) -> None:
    files = some_files(settings)
    told: list[tuple[int, int]] = []
    made = ensure_parsed(settings, "events", [*reversed(files), files[0]], lambda done, total: told.append((done, total)))
    assert [(one.raw, one.name, one.region, one.records, one.has_unknown_time) for one in made] == [
        (files[2], "events/eu/c.jsonl", "eu", 2, True),
        (files[1], "events/us/b.jsonl.gz", "us", 1, False),
        (files[0], "events/eu/a.jsonl", "eu", 2, False),
        (files[0], "events/eu/a.jsonl", "eu", 2, False),
    ]
    assert [(one.min_us, one.max_us) for one in made[:3]] == [
        (1_748_858_400_000_000, 1_748_858_400_000_000),
        (1_748_854_800_000_000, 1_748_854_800_000_000),  # rejected, and its time can be read
        (1_748_858_400_000_000, 1_748_865_599_999_999),
    ]
    tables = content(made)
    assert all(table.schema.remove_metadata() == record_schema("events") for table in tables)
    assert [table["record_id"].to_pylist() for table in tables] == [["4", None], ["3"], ["1", "2"], ["1", "2"]]
    total = sum(file.size for file in files)
    assert told[-1] == (total, total)


def test_orders_have_entries_too(settings: Settings) -> None:
    path = land(settings, "orders/eu/a.jsonl", [order("o1"), order("o2", total_micros=-1)])
    [made] = ensure_parsed(settings, "orders", [raw(path)])
    assert content([made])[0].select(["record_id", "is_valid", "total_micros"]).to_pylist() == [
        {"record_id": "o1", "is_valid": True, "total_micros": 12_340_000},
        {"record_id": "o2", "is_valid": False, "total_micros": None},
    ]


def test_a_second_run_parses_nothing(settings: Settings) -> None:
    files = some_files(settings)
    first = ensure_parsed(settings, "events", files)
    before = states(settings)
    told: list[int] = []
    assert ensure_parsed(settings, "events", files, lambda done, _: told.append(done)) == first
    assert (states(settings), told) == (before, [])


def test_a_home_may_be_moved(settings: Settings, tmp_path: Path) -> None:
    files = some_files(settings)
    ensure_parsed(settings, "events", files)
    settings.home_path.rename(tmp_path / "moved")
    moved = load_settings(home=tmp_path / "moved")
    there = [RawFile(file.path.replace(str(settings.home_path), str(moved.home_path)), file.mtime_ms, file.size) for file in files]
    before = states(moved)
    assert [one.records for one in ensure_parsed(moved, "events", there)] == [2, 1, 2]
    assert states(moved) == before


def test_a_changed_file_is_another_file(settings: Settings) -> None:
    path = land(settings, "events/eu/a.jsonl", [event("1")])
    old = raw(path)
    ensure_parsed(settings, "events", [old])
    path.write_bytes(lines([event("1"), event("2")]))
    new = raw(path)
    assert [one.records for one in ensure_parsed(settings, "events", [new, old])] == [2, 1]  # what was parsed stays
    path.write_bytes(lines([event("1"), event("2"), event("3")]))
    assert ensure_parsed(settings, "events", [RawFile(new.path, new.mtime_ms + 1, new.size)]) == []  # there is no such file


def test_a_file_that_is_gone(settings: Settings) -> None:
    files = some_files(settings)
    ensure_parsed(settings, "events", files[:1])
    for file in files[:2]:
        Path(file.path).unlink()
    assert [one.raw for one in ensure_parsed(settings, "events", files)] == [files[0], files[2]]


def test_a_file_that_changes_while_it_is_read(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = land(settings, "events/eu/a.jsonl", [event("1")])
    file = raw(path)
    parse = landing_files.parse_file

    def changing(*arguments: object) -> object:
        yield from parse(*arguments)  # type: ignore[arg-type]
        with path.open("ab") as end:
            end.write(lines([event("2")]))

    monkeypatch.setattr(worker, "parse_file", changing)
    assert ensure_parsed(settings, "events", [file]) == []
    assert states(settings) == {}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def make_foreign(path: Path) -> None:
    pq.write_table(pa.table({"line": [1, 2]}), path)


def make_older(path: Path) -> None:
    table = pq.read_table(path)
    said = pq.read_metadata(path).metadata[worker.METADATA_KEY].replace(b'"format": ', b'"format": -')
    pq.write_table(table.replace_schema_metadata({worker.METADATA_KEY: said}), path)


def mix_up(path: Path) -> None:
    """The entry of another file under this one's name."""
    other = next(one for one in path.parent.glob("*.parquet") if one != path)
    path.write_bytes(other.read_bytes())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_bytes(b"nonsense"),
    "foreign": make_foreign,
    "older": make_older,
    "mixed up": mix_up,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(settings: Settings, damage: str) -> None:
    files = some_files(settings)
    first = ensure_parsed(settings, "events", files)
    expected = content(first)
    DAMAGES[damage](first[0].parquet)
    damaged = states(settings)
    again = ensure_parsed(settings, "events", files)
    assert again == first
    assert content(again) == expected
    made_again = {name for name, state in states(settings).items() if damaged.get(name) != state}
    assert made_again == {first[0].parquet.name}


def test_an_unreadable_file_is_tried_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = land(settings, "events/eu/a.jsonl", [event("1")])
    with monkeypatch.context() as broken:
        broken.setattr("spark_jobs.audit.files._open", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        [first] = ensure_parsed(settings, "events", [raw(path)])
        assert content([first])[0]["reasons"].to_pylist() == [["unreadable_file"]]
    [second] = ensure_parsed(settings, "events", [raw(path)])
    assert content([second])[0]["is_valid"].to_pylist() == [True]


def test_a_file_of_several_row_groups(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "ROW_GROUP_ROWS", 100)
    monkeypatch.setattr("spark_jobs.audit.files.READ_BYTES", 1000)
    path = land(settings, "events/eu/a.jsonl", [event(str(number)) for number in range(1000)])
    [made] = ensure_parsed(settings, "events", [raw(path)])
    assert pq.read_metadata(made.parquet).num_row_groups > 5
    assert content([made])[0]["record_id"].to_pylist() == [str(number) for number in range(1000)]


@pytest.fixture
def workers() -> Callable[[], list[psutil.Process]]:
    """The child processes that have come since the test began: a session of Spark may run beside it."""
    before = set(psutil.Process().children())
    return lambda: [child for child in psutil.Process().children() if child not in before]


def test_processes_make_what_one_makes(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Callable[[], list[psutil.Process]]
) -> None:
    files = [
        raw(land(settings, f"events/eu/{number}.jsonl", [event(f"{number}-{k}") for k in range(100 * number)]))
        for number in range(7)
    ]
    alone = content(ensure_parsed(settings, "events", files))
    other = load_settings(home=tmp_path / "other", landing=settings.landing_path)
    monkeypatch.setattr(store, "_WORTH_PROCESSES", 0)
    told: list[tuple[int, int]] = []
    made = ensure_parsed(other, "events", files, lambda done, total: told.append((done, total)))
    assert content(made) == alone
    assert told[-1] == (sum(file.size for file in files),) * 2
    assert not workers()


def test_what_cannot_be_written_is_said(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, workers: Callable[[], list[psutil.Process]]
) -> None:
    files = some_files(settings)
    settings.recount_path.parent.mkdir(exist_ok=True)
    settings.recount_path.write_text("in the way")
    for worth in (2**60, 0):
        monkeypatch.setattr(store, "_WORTH_PROCESSES", worth)
        with pytest.raises(AdtallyError, match="cannot be parsed"):
            ensure_parsed(settings, "events", files)
    assert not workers()


def test_a_process_that_is_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, workers: Callable[[], list[psutil.Process]]
) -> None:
    """It reads for minutes a file with a hole; what it had begun is nothing, what was done is kept."""
    monkeypatch.setattr(store, "_WORTH_PROCESSES", 0)
    endless = settings.landing_path / "events/eu/z.jsonl"
    files = some_files(settings)
    with endless.open("wb") as hole:
        hole.truncate(2**40)
    files.append(raw(endless))

    def kill_the_last() -> None:
        deadline = time.monotonic() + 60
        while len(list(settings.recount_path.rglob("*.parquet"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        for child in workers():
            child.kill()

    killer = threading.Thread(target=kill_the_last)
    killer.start()
    with pytest.raises(AdtallyError, match="ended too early"):
        ensure_parsed(settings, "events", files)
    killer.join()
    kept = states(settings)
    assert len(ensure_parsed(settings, "events", files[:3])) == 3
    assert states(settings) == kept


ENSURE = """
import sys
from pathlib import Path
from spark_jobs.config import load_settings
from spark_jobs.audit.store import RawFile, ensure_parsed
settings = load_settings(home=Path(sys.argv[1]))
paths = sorted((settings.landing_path / "events").glob("*/*"))
files = [RawFile(str(path), path.stat().st_mtime_ns // 1_000_000, path.stat().st_size) for path in paths]
print(sum(one.records for one in ensure_parsed(settings, "events", files)))
"""


def test_two_runs_at_once_and_one_that_is_killed(settings: Settings) -> None:
    for number in range(4):
        records = [event(f"{number}-{k}") for k in range(4000)]
        land(settings, f"events/eu/{number}.jsonl.gz", records)
    command = [sys.executable, "-c", ENSURE, str(settings.home_path)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(settings.recount_path.rglob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [int(run.communicate(timeout=120)[0]) for run in runs] == [16_000, 16_000]
    assert len(list(settings.recount_path.rglob("*.parquet"))) == 4
    assert [run.returncode for run in runs] == [0, 0]


def test_prune(settings: Settings) -> None:
    files = some_files(settings)
    made = ensure_parsed(settings, "events", files)
    fresh, old = (made[0].parquet.with_name(f".x.parquet.{age}.tmp") for age in ("fresh", "old"))
    for path in (fresh, old):
        path.touch()
    os.utime(old, (0, 0))
    assert prune(settings, "events", files[:1]) == 3
    assert {path.name for path in settings.recount_path.rglob("*") if path.is_file()} == {made[0].parquet.name, fresh.name}
    assert prune(settings, "events", files[:1]) == 0
    assert prune(settings, "orders", []) == 0


def test_a_gzip_file_counts_for_more(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides on processes is what there is to parse, not what is stored."""
    asked: list[int] = []
    monkeypatch.setattr(store, "_parse_in_processes", lambda tasks, workers, _: asked.append(workers))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    paths = [land(settings, f"events/eu/{number}.jsonl.gz", gzip.compress(b"x" * 9000)) for number in range(3)]
    monkeypatch.setattr(store, "_WORTH_PROCESSES", sum(path.stat().st_size for path in paths) * 2)
    ensure_parsed(settings, "events", [raw(path) for path in paths])
    assert asked == [2]
