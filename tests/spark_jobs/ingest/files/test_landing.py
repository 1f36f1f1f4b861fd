"""What the landing folder holds and which of it is read: any names, kinds, times, sizes, folders and order of arrival."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import LandingPathError
from spark_jobs.ingest.files import landing as module
from spark_jobs.ingest.files.backlog import read_landing
from spark_jobs.ingest.files.landing import (
    Reason,
    java_ms,
    name_below,
    oldest_file_at,
    open_regular,
    reason_of,
    region_folders,
    walk_landing,
)
from spark_jobs.ingest.source import FilesSource
from spark_jobs.texts import printable

CASES = Path(__file__).resolve().parents[3] / "cases" / "landing"


def reasons(landing: Path) -> dict[str, Reason | None]:
    found = [(entry.name, entry.reason) for entry in walk_landing(landing)]
    assert len(found) == len(dict(found)), "each once"
    return dict(found)


def put(landing: Path, name: str | bytes, kind: str = "file") -> Path:
    path = Path(os.fsdecode(os.path.join(os.fsencode(landing), os.fsencode(name))))
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_bytes(b"x")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            there = os.getcwd()
            os.chdir(path.parent)  # the path of a socket is short
            made.bind(path.name)
            os.chdir(there)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    return path


def test_everything_is_read_or_has_its_reason(tmp_path: Path) -> None:
    landing = tmp_path / "landing"
    wanted: dict[str, tuple[str, Reason | None]] = {
        "events/us/a.jsonl": ("file", None),
        "events/us/2025-01-01T10:00:00.jsonl.gz": ("file", None),
        "events/us/é\n%41.jsonl": ("file", None),
        "orders/eu-1/a.jsonl": ("file", None),
        "campaigns/c.csv": ("file", None),
        "names/n.csv": ("file", None),
        "events/us/x.json": ("file", Reason.WRONG_ENDING),
        "events/us/X.JSONL": ("file", Reason.WRONG_ENDING),
        "campaigns/c.txt": ("file", Reason.WRONG_ENDING),
        "events/us/2025/06/02/a.jsonl": ("file", Reason.WRONG_DEPTH),
        "events/us/dt=1/a.jsonl": ("file", Reason.WRONG_DEPTH),
        "campaigns/eu/c.csv": ("file", Reason.WRONG_DEPTH),
        "names/eu/n.csv": ("file", Reason.WRONG_DEPTH),
        "events/none.jsonl": ("file", Reason.NO_REGION),
        "events/US/a.jsonl": ("file", Reason.REGION_NAME),
        f"events/{'u' * 33}/a.jsonl": ("file", Reason.REGION_NAME),
        "event/us/a.jsonl": ("file", Reason.UNKNOWN_FOLDER),
        "readme.txt": ("file", Reason.UNKNOWN_FOLDER),
        "events/us/pipe.jsonl": ("pipe", Reason.WRONG_KIND),
        "events/us/socket.jsonl": ("socket", Reason.WRONG_KIND),
        "events/us/folder.jsonl": ("folder", Reason.WRONG_KIND),
        "campaigns/pipe.csv": ("pipe", Reason.WRONG_KIND),
        "campaigns/folder.csv": ("folder", Reason.WRONG_KIND),
        "events/us/self.jsonl": ("self.jsonl", Reason.SYMLINK),
        "events/us/passwd.jsonl": ("/etc/passwd", Reason.SYMLINK),
        "events/linked": ("us", Reason.SYMLINK),
        "events/us/again": ("..", Reason.SYMLINK),
        "campaigns/link.csv": ("c.csv", Reason.SYMLINK),
        "linked": ("events", Reason.SYMLINK),
    }
    for name, (kind, _) in wanted.items():
        put(landing, name, kind)
    latin = os.fsdecode(b"events/us/\xe9.jsonl")
    region = os.fsdecode(b"orders/\xe9/a.jsonl")
    for name in (latin, region):
        put(landing, name)
    for name in (
        "events/us/.a.jsonl",
        "events/us/_a.jsonl",
        "events/.tmp/us/a.jsonl",
        "events/us/_tmp/a.jsonl",
        ".x",
        "truth.json",
    ):
        put(landing, name)
    expected = {name: reason for name, (_, reason) in wanted.items()}
    found = reasons(landing)
    assert found == expected | {latin: Reason.NAME_NOT_UTF8, region: Reason.NAME_NOT_UTF8}
    # a single path is judged as the walk judges it; what a link leads to is not read under the link's name either
    assert {name: reason_of(landing, name) for name in found} == found
    assert reason_of(landing, "events/linked/a.jsonl") is Reason.SYMLINK
    assert reason_of(landing, "events/us/again/us/a.jsonl") is Reason.SYMLINK
    assert reason_of(landing, "events/us/_a.jsonl") is Reason.HIDDEN
    assert reason_of(landing, "events/us/gone.jsonl") is None
    assert region_folders(landing / "events") == ["us"]


def test_a_stream_that_is_a_link_or_a_file_is_named(tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere", "us/a.jsonl").parents[1]
    landing = tmp_path / "landing"
    put(landing, "events", str(elsewhere))
    put(landing, "orders")
    assert reasons(landing) == {"events": Reason.SYMLINK, "orders": Reason.WRONG_KIND}
    assert region_folders(landing / "events") == []


def test_files_beside_the_layout_are_counted_by_source_and_reason(tmp_path: Path) -> None:
    home = load_settings(home=tmp_path)
    shutil.copytree(CASES / "files-beside-the-layout" / "landing", home.landing_path)
    report = read_landing(home)
    assert [(found.source, found.reason, found.files, found.examples) for found in report.ignored] == [
        ("events", "no_region", 1, ["events/noregion.jsonl"]),
        ("events/us", "wrong_depth", 2, ["events/us/2025/06/02/10/firehose.jsonl", "events/us/dt=2025-06-02/part-0.jsonl"]),
        ("events/us", "wrong_ending", 1, ["events/us/x.json"]),
        ("landing", "unknown_folder", 1, ["event/us/a.jsonl"]),
    ]
    assert [(found.stream, found.region, found.files, found.oldest) for found in report.waiting] == [
        ("events", "us", 1, "events/us/a.jsonl")
    ]
    assert abs((datetime.now(UTC) - report.waiting[0].waiting_since).total_seconds()) < 60


def test_a_folder_full_of_strays_is_not_walked_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STRAYS", 10)
    monkeypatch.setattr("spark_jobs.ingest.files.backlog.MAX_STRAYS", 10)
    home = load_settings(home=tmp_path)
    for number in range(30):
        put(home.landing_path, f"disk/{number}/{number}/x.jsonl")
        put(home.landing_path, f"events/us/{number}.json")
        put(home.landing_path, f"events/r{number}/a.jsonl")
    report = read_landing(home)
    assert (report.ignored_files, report.is_complete) == (10, False)
    assert len(report.waiting) == 30, "what is read is found all the same"


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path) -> None:
    file = put(tmp_path, "events/us/a.jsonl")
    with open_regular(file) as handle:
        assert handle.read() == b"x"
    refused = [
        put(tmp_path, "events/us/pipe.jsonl", "pipe"),
        put(tmp_path, "events/us/link.jsonl", "a.jsonl"),
        put(tmp_path, "events/us/folder.jsonl", "folder"),
        put(tmp_path, "events/eu", "us") / "a.jsonl",
        put(tmp_path, "orders", "events") / "us" / "a.jsonl",
        tmp_path / "events" / "us" / "gone.jsonl",
    ]
    before = len(os.listdir("/proc/self/fd"))
    for path in refused:
        with pytest.raises(OSError):
            open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there only after the look at its kind."""
    pipe = put(tmp_path, "events/us/a.jsonl", "pipe")
    monkeypatch.setattr(os, "stat", lambda *_, **__: os.lstat(__file__))
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(pipe)


def test_names_are_shown_without_harm() -> None:
    assert printable(os.fsdecode(b"a\xe9\xff.jsonl")) == r"a\xe9\xff.jsonl"
    assert printable("é\n\x1b[31m\u2028") == r"é\n\x1b[31m\u2028"
    json.dumps(printable("\udce9")).encode()


def test_other_spellings_of_the_landing_folder_name_the_same_file() -> None:
    settings = load_settings(landing=Path("/data/landing"))
    for path in (
        "/data/landing/events/us/a.jsonl",
        "/old/events/home/landing/events/us/a.jsonl",
        "//x/../data/landing/events/us/a.jsonl",
    ):
        assert name_below(path, settings, "events") == "events/us/a.jsonl"
    assert name_below("/data/landing/events/us/events/a.jsonl", settings, "events") == "events/us/events/a.jsonl"
    with pytest.raises(LandingPathError, match=r"us/a\.jsonl"):
        name_below("/old/us/a.jsonl", settings, "events")
    with pytest.raises(LandingPathError):
        name_below("/old/orders/us/a.jsonl", settings, "events")


def test_the_oldest_file_of_a_region_whatever_its_time(tmp_path: Path) -> None:
    assert oldest_file_at(tmp_path, "events", "us") is None
    file = put(tmp_path, "events/us/a.jsonl")
    os.utime(file, (1_748_858_400_000, 1_748_858_400_000))  # ext4 keeps the year 2446
    ahead = oldest_file_at(tmp_path, "events", "us")
    assert ahead is not None and ahead <= datetime.now(UTC), "it cannot have come later than now"
    os.utime(file, (-5, -5))
    assert oldest_file_at(tmp_path, "events", "us") == datetime(1970, 1, 1, tzinfo=UTC)


def test_times_are_those_of_java() -> None:
    """As a file system of 64-bit times and Java 17 told them."""
    assert java_ms(1_748_858_400_000 * 10**9) == 1_748_858_400_000_000
    assert java_ms(-5 * 10**9) == -5000
    assert java_ms(-1) == -1
    assert java_ms(2**62 * 10**9) == 0
    assert java_ms(-(2**55) * 10**9) == 864_691_128_455_135_232


# --- any landing folder: read + waiting + named as unreadable + named as ignored = what is there

STREAM = st.sampled_from(["events", "orders"])
REGION = st.sampled_from([b"us", b"eu-1", b"US", b"r" * 33, b"\xe9", b"a b", "é".encode()])
STEM = st.one_of(
    st.sampled_from([b"a", b"2025-01-01T00:00:00", b"b\n", b"[1]", b"%20", b"\xff\xfe", "é😀".encode(), b"\\", b"'\""]),
    st.binary(min_size=1, max_size=6).filter(lambda name: not set(name) & {0, 47} and name not in (b".", b"..")),
)
ENDING = st.sampled_from([b".jsonl", b".jsonl", b".jsonl.gz", b".json", b".JSONL", b""])
PLACE = st.one_of(
    st.tuples(STREAM.map(str.encode), REGION),
    st.tuples(STREAM.map(str.encode), st.sampled_from([b"us", b"eu-1"])),
    st.tuples(STREAM.map(str.encode), REGION, st.sampled_from([b"2025", b"d.jsonl"])),
    st.tuples(STREAM.map(str.encode)),
    st.just((b"event", b"us")),
    st.just(()),
)
KIND = st.sampled_from(["file", "file", "file", "pipe", "folder", "/etc/passwd", "self", "..", "us"])
TIME = st.sampled_from([0, -1, -(2**40), 1_748_858_400, 1_748_858_400_000, 2**40, 1_000_000_000])
PUT = st.tuples(PLACE, STEM, ENDING, KIND, TIME, st.integers(0, 3))


class Spark:
    """A file source as Spark's: it lists, follows links, skips what Java cannot name, plans each path once, in any batches."""

    def __init__(self, settings: Settings, stream: str) -> None:
        self.root = settings.landing_path / stream
        self.checkpoint = settings.checkpoints_path / stream
        self.seen: set[str] = set()
        self.batches = 0
        for name in ("offsets", "commits", "sources/0"):
            (self.checkpoint / name).mkdir(parents=True)

    def plan(self, most: int) -> int | None:
        """Write down the next batch: its number, None where there is nothing new."""
        found = sorted((java_ms(os.stat(path).st_mtime_ns), path) for path in self._list(self.root, 0) if path not in self.seen)[
            :most
        ]
        if not found:
            return None
        number, self.batches = self.batches, self.batches + 1
        self.seen |= {path for _, path in found}
        entries = [json.dumps({"path": Path(path).as_uri(), "timestamp": ms, "batchId": number}) for ms, path in found]
        (self.checkpoint / "sources/0" / str(number)).write_text("\n".join(["v1", *entries]))
        offset = [json.dumps({"batchTimestampMs": 1}), json.dumps({"logOffset": number})]
        (self.checkpoint / "offsets" / str(number)).write_text("\n".join(["v1", *offset]))
        return number

    def finish(self, number: int) -> None:
        (self.checkpoint / "commits" / str(number)).write_text("v1\n{}")

    def _list(self, folder: Path, depth: int) -> list[str]:
        found: list[str] = []
        for path in sorted(folder.iterdir()) if depth < 6 and folder.is_dir() else ():
            try:
                path.name.encode()
                mode = path.stat().st_mode
            except (OSError, UnicodeEncodeError):
                continue
            if path.name.startswith((".", "_")):
                continue
            if stat.S_ISDIR(mode):
                found += self._list(path, depth + 1)
            elif path.name.endswith((".jsonl", ".jsonl.gz")):
                found.append(str(path))
        return found


def what_is_there(landing: Path) -> Counter[str]:
    """Everything but hidden names and folders, by plain recursion; of folders those that stand where a file is expected."""
    found: Counter[str] = Counter()
    for folder, folders, files in os.walk(landing):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        parts = Path(folder).relative_to(landing).parts
        for name in [*files, *folders]:
            path = Path(folder, name)
            is_file_like = len(parts) == 2 and parts[0] in ("events", "orders") and name.endswith((".jsonl", ".jsonl.gz"))
            if not name.startswith((".", "_")) and (not path.is_dir() or path.is_symlink() or is_file_like):
                found["/".join([*parts, name])] += 1
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rounds=st.lists(st.lists(PUT, max_size=8), min_size=1, max_size=3), most=st.integers(1, 4), crash=st.booleans())
def test_all_that_is_put_into_the_landing_folder_is_read_waits_or_is_named(
    tmp_path_factory: pytest.TempPathFactory,
    rounds: list[list[tuple[tuple[bytes, ...], bytes, bytes, str, int, int]]],
    most: int,
    crash: bool,
) -> None:
    home = load_settings(home=tmp_path_factory.mktemp("files"))
    landing = home.landing_path
    landing.mkdir()
    sparks = {stream: Spark(home, stream) for stream in ("events", "orders")}
    read: Counter[str] = Counter()
    for puts in rounds:
        for place, stem, ending, kind, time, size in puts:
            _land(landing, place, stem + ending, kind, time, size)
        for stream, spark in sparks.items():
            source = FilesSource(home, stream)
            while (number := spark.plan(most)) is not None:
                taken = source.plan(number)
                assert source.plan(number) == taken
                assert [split.name for split in source.splits(taken)] == [
                    str(Path(f.path).relative_to(landing)) for f in taken.files
                ]
                if crash and stream == "events" and puts is rounds[-1]:
                    break  # planned, and not finished: its files wait
                read.update(str(Path(file.path).relative_to(landing)) for file in taken.files)
                spark.finish(number)
    report = read_landing(home)
    waiting = sum(found.files for found in report.waiting)
    assert crash or not waiting, "what Spark cannot read does not wait: it has a reason"
    there = what_is_there(landing)
    assert sum(read.values()) + waiting + report.ignored_files == sum(there.values())
    assert set(read) <= set(there) and max(read.values(), default=1) == 1
    assert all(stat.S_ISREG(os.lstat(landing / name).st_mode) for name in read)
    json.dumps(report.ignored_text + "".join(e for found in report.ignored for e in found.examples), ensure_ascii=False).encode()


def _land(landing: Path, place: tuple[bytes, ...], name: bytes, kind: str, time: int, size: int) -> None:
    folder = Path(os.fsdecode(os.path.join(os.fsencode(landing), *place)))
    assume(len(name) < 200)
    path = folder / os.fsdecode(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            return  # a name that was read is not used again
        if kind == "file":
            hidden = folder / ".landing"
            hidden.write_bytes(b"\n" * size)
            os.utime(hidden, (time, time))
            hidden.rename(path)
        else:
            put(folder, os.fsencode(path.name), path.name if kind == "self" else kind)
    except (FileExistsError, NotADirectoryError):
        return  # something else has taken the place of the folder
