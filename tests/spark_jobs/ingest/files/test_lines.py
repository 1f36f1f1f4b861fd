"""Lines of files by byte range: none lost, none read twice, whatever the file holds."""

from __future__ import annotations

import gzip
import io
import random
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spark_jobs.ingest.files import lines as module
from spark_jobs.ingest.files.landing import LandingFile, plan_splits, uri_path
from spark_jobs.ingest.files.lines import FileFault, Lines, LongLine, read_lines

PROPERTY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONTENT = st.lists(st.sampled_from([b"\n", b"\n", b"a", b"bc", b"\r", b"\0", b"x" * 9, b"y" * 30]), max_size=30).map(b"".join)


def split_lines(content: bytes) -> list[bytes]:
    """The oracle: a line feed ends a line, what stands behind the last one is a line too."""
    parts = content.split(b"\n")
    return parts if parts[-1] else parts[:-1]


def collect(chunks: Iterator[Lines | LongLine | FileFault]) -> tuple[list[bytes | tuple[bytes, int]], list[FileFault]]:
    """Lines in order (a long one as its head and size) and faults; checks that the numbers have no gap."""
    got: list[bytes | tuple[bytes, int]] = []
    faults: list[FileFault] = []
    for chunk in chunks:
        assert not faults, "nothing comes behind a fault"
        if isinstance(chunk, FileFault):
            assert chunk.number == len(got)
            faults.append(chunk)
        elif isinstance(chunk, LongLine):
            assert chunk.number == len(got)
            got.append((chunk.head, chunk.size))
        else:
            assert chunk.first == len(got)
            assert len(chunk.ends) and chunk.ends[-1] == len(chunk.data)
            got += [chunk.raw(index) for index in range(len(chunk.ends))]
    return got, faults


def assert_lines(got: list[bytes | tuple[bytes, int]], expected: list[bytes], longest: int) -> None:
    assert len(got) == len(expected)
    for line, raw in zip(got, expected, strict=True):
        if isinstance(line, tuple):
            head, size = line
            assert size == len(raw) > longest
            assert head == raw[:longest]
        else:
            assert line == raw


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 8)
    monkeypatch.setattr(module, "MAX_RAW_BYTES", 12)


@PROPERTY
@given(content=CONTENT, split=st.integers(1, 64), block=st.integers(1, 40), longest=st.integers(1, 40))
def test_splits_of_a_plain_file_give_each_line_once(tmp_path: Path, content: bytes, split: int, block: int, longest: int) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block)
        patch.setattr(module, "MAX_RAW_BYTES", longest)
        starts = list(range(0, max(len(content), 1), split))
        got: list[bytes | tuple[bytes, int]] = []
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            part, faults = collect(read_lines(path, start, end))
            assert not faults
            # a line belongs to the split in which it begins
            begins = [0, *(at + 1 for at, octet in enumerate(content) if octet == 10)]
            inside = [b for b in begins if start <= b < (len(content) if end is None else min(end, len(content)))]
            assert len(part) == len(inside)
            got += part
        assert_lines(got, split_lines(content), longest)


@PROPERTY
@given(content=CONTENT, members=st.integers(1, 4), block=st.integers(1, 40), longest=st.integers(1, 40), read=st.integers(1, 50))
def test_gzip_gives_each_line_once(tmp_path: Path, content: bytes, members: int, block: int, longest: int, read: int) -> None:
    path = tmp_path / "file.jsonl.gz"
    step = len(content) // members + 1
    path.write_bytes(b"".join(gzip.compress(content[at : at + step]) for at in range(0, max(len(content), 1), step)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block)
        patch.setattr(module, "MAX_RAW_BYTES", longest)
        patch.setattr(module, "_GZIP_READ_BYTES", read)
        got, faults = collect(read_lines(path))
    assert not faults
    assert_lines(got, split_lines(content), longest)


def test_a_member_may_end_within_a_read_after_the_output_was_cut(tmp_path: Path) -> None:
    """Zlib leaves stale bytes in unconsumed_tail at the end of a member that needed several calls."""
    path = tmp_path / "file.jsonl.gz"
    members = [gzip.compress(b"xxxxx", mtime=0), gzip.compress(b"xxxx\n", mtime=0)]
    path.write_bytes(b"".join(members))
    for read in range(1, sum(map(len, members)) + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "BLOCK_BYTES", 1)
            patch.setattr(module, "_GZIP_READ_BYTES", read)
            got, faults = collect(read_lines(path))
        assert not faults, read
        assert got == [b"x" * 9], read


def whole_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """The lines and the rest of what a plain decompressor makes of the start of a gzip file."""
    state = zlib.decompressobj(31)
    text = state.decompress(data) + state.flush()
    *complete, rest = text.split(b"\n")
    return complete, rest


@pytest.mark.parametrize("block", [1, 7, 8, 64, 1 << 20])
@pytest.mark.parametrize("kind", ["repeated", "random"])
def test_gzip_cut_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, kind: str) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    source = random.Random(1)
    lines = [b"same line" if kind == "repeated" else source.randbytes(6).hex().encode() for _ in range(40)]
    whole = gzip.compress(b"\n".join(lines) + b"\n")
    path = tmp_path / "cut.jsonl.gz"
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        got, faults = collect(read_lines(path))
        complete, rest = whole_lines(whole[:size])
        assert got == complete, size
        assert faults == [FileFault("truncated_gzip", rest, len(complete), nothing_read=not complete and not rest)]
    path.write_bytes(whole)
    assert collect(read_lines(path)) == (lines, [])


def test_second_member_cut_or_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl.gz"
    first, second = gzip.compress(b"1\n2"), gzip.compress(b"3\n4\n")
    path.write_bytes(first + second[:-1])
    assert collect(read_lines(path)) == ([b"1", b"23", b"4"], [FileFault("truncated_gzip", b"", 3, nothing_read=False)])
    path.write_bytes(first + second[:3])
    assert collect(read_lines(path)) == ([b"1"], [FileFault("truncated_gzip", b"2", 1, nothing_read=False)])


def test_wrong_checksum_is_a_fault_behind_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl.gz"
    whole = bytearray(gzip.compress(b"1\n2\n"))
    whole[-8] ^= 1
    path.write_bytes(whole)
    assert collect(read_lines(path)) == ([b"1", b"2"], [FileFault("corrupt_gzip", b"", 2, nothing_read=False)])


def test_gzip_wrong_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 50)
    lines = [random.Random(number).randbytes(6).hex().encode() for number in range(40)]
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb") as writer:
        writer.write(b"\n".join(lines[:20]) + b"\n")
        writer.flush()
        good = len(out.getvalue())
        writer.write(b"\n".join(lines[20:]) + b"\n")
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(out.getvalue()[:good] + b"\xff" * 200)  # no block of that kind
    assert collect(read_lines(path)) == (lines[:20], [FileFault("corrupt_gzip", b"", 20, nothing_read=False)])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(at=383, octet=108, block=32, read=3)  # zlib still had output to return when it met the wrong byte
@given(at=st.integers(0, 10_000), octet=st.integers(1, 255), block=st.integers(1, 400), read=st.integers(1, 400))
def test_gzip_with_one_wrong_byte_ends_in_lines_and_at_most_one_fault(
    tmp_path: Path, at: int, octet: int, block: int, read: int
) -> None:
    whole = bytearray(gzip.compress(b"".join(b"%d\n" % number for number in range(100)), mtime=0))
    whole[at % len(whole)] ^= octet
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(whole)
    expected = collect(read_lines(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block)
        patch.setattr(module, "_GZIP_READ_BYTES", read)
        assert collect(read_lines(path)) == expected  # whatever the sizes of the reads


def test_a_disk_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 8:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(module, "BLOCK_BYTES", 8)
    monkeypatch.setattr(module, "open_regular", lambda _: Failing(b"1\n2\n3\n45678\n"))
    assert collect(read_lines(tmp_path / "x")) == (
        [b"1", b"2", b"3"],
        [FileFault("unreadable_file", b"45", 3, nothing_read=False)],
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_gzip"),
        (b"not gzip at all\n", "corrupt_gzip"),
        (b"\x1f\x8b", "truncated_gzip"),
        (b"\x1f\x8b\x09\x00", "corrupt_gzip"),
    ],
)
def test_gzip_of_which_nothing_can_be_read(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(content)
    assert collect(read_lines(path)) == ([], [FileFault(reason, b"", 0, nothing_read=True)])


def test_gzip_of_nothing_has_no_line(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(gzip.compress(b""))
    assert collect(read_lines(path)) == ([], [])


@pytest.mark.parametrize(
    ("behind", "reasons"),
    [
        (b"\0" * 7, []),
        (b"\0" * 5000, []),
        (b"garbage", ["corrupt_gzip"]),
        (b"\0" * 5000 + b"garbage", ["corrupt_gzip"]),
        (b"\x1f", ["truncated_gzip"]),
    ],
)
@pytest.mark.parametrize("read", [16, 1000, 1 << 20])
def test_what_stands_behind_a_gzip_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: bytes, reasons: list[str], read: int
) -> None:
    monkeypatch.setattr(module, "_GZIP_READ_BYTES", read)
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(gzip.compress(b"1\n2\n") + behind)
    got, faults = collect(read_lines(path))
    assert (got, [fault.reason for fault in faults]) == ([b"1", b"2"], reasons)


def test_a_member_behind_zero_padding_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GZIP_READ_BYTES", 64)
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(gzip.compress(b"1\n") + b"\0" * 1000 + gzip.compress(b"2\n"))
    assert collect(read_lines(path)) == ([b"1", b"2"], [])


@pytest.mark.usefixtures("small")
def test_gzip_cut_within_a_long_line(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl.gz"
    for before in (b"", b"1\n"):
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb") as writer:
            writer.write(before + b"x" * 100)
        path.write_bytes(out.getvalue()[:-8])
        got, faults = collect(read_lines(path))
        assert got == ([b"1"] if before else [])
        assert faults == [FileFault("truncated_gzip", b"x" * 12, len(got), nothing_read=False)]


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.jsonl.gz"])
@pytest.mark.parametrize(("start", "end"), [(0, None), (5, 10)])
def test_a_missing_file(tmp_path: Path, name: str, start: int, end: int | None) -> None:
    assert collect(read_lines(tmp_path / name, start, end)) == ([], [FileFault("unreadable_file", b"", 0, nothing_read=True)])


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert collect(read_lines(tmp_path)) == ([], [FileFault("unreadable_file", b"", 0, nothing_read=True)])


def test_an_empty_plain_file_has_no_line(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert collect(read_lines(tmp_path / "empty.jsonl")) == ([], [])
    assert collect(read_lines(tmp_path / "empty.jsonl", 10, 20)) == ([], [])  # planned when it was longer


@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.gz"])
def test_memory_is_bounded_whatever_the_length_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64 * 1024)
    monkeypatch.setattr(module, "MAX_RAW_BYTES", 64 * 1024)
    monkeypatch.setattr(module, "_GZIP_READ_BYTES", 4096)
    size = 20_000_000
    content = b"x" * size + b"\nshort\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    del content
    tracemalloc.start()
    try:
        got, _ = collect(read_lines(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got == [(b"x" * 64 * 1024, size), b"short"]
    assert peak < 2_000_000


def test_splits_are_in_the_order_of_the_records(tmp_path: Path) -> None:
    files = [
        LandingFile(2, str(tmp_path / "events/eu/a.jsonl"), 25),
        LandingFile(1, str(tmp_path / "events/us/z.jsonl.gz"), 99),
        LandingFile(1, str(tmp_path / "events/us/b.jsonl"), 0),
        LandingFile(3, "/elsewhere/events/eu/c.jsonl", 10),
    ]
    splits = plan_splits(files, tmp_path, 10)
    assert [(s.number, s.name, s.region, s.start, s.end) for s in splits] == [
        (0, "events/us/b.jsonl", "us", 0, None),
        (1, "events/us/z.jsonl.gz", "us", 0, None),
        (2, "events/eu/a.jsonl", "eu", 0, 10),
        (3, "events/eu/a.jsonl", "eu", 10, 20),
        (4, "events/eu/a.jsonl", "eu", 20, None),
        (5, "/elsewhere/events/eu/c.jsonl", "eu", 0, None),
    ]


@pytest.mark.parametrize(
    ("uri", "path"),
    [("file:///a/b%20c.jsonl", "/a/b c.jsonl"), ("file:/a/%25.jsonl", "/a/%.jsonl"), ("/a/b%20c", "/a/b%20c")],
)
def test_paths_as_spark_prints_them(uri: str, path: str) -> None:
    assert uri_path(uri) == path
