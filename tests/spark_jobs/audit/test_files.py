"""Landing files as the auditor reads them: broken, cut and huge ones, against the ingest's reader."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spark_jobs.audit import decode, files
from spark_jobs.audit.contract import record_schema
from spark_jobs.audit.files import parse_file
from spark_jobs.ingest.contract.parse import parse_all
from spark_jobs.ingest.contract.spec import CONTRACTS
from spark_jobs.ingest.files.lines import read_lines
from tests.spark_jobs.ingest.contract.cases import LIMITS, base
from tests.spark_jobs.ingest.contract.test_agreement import REGION

FILES = json.loads((Path(__file__).resolve().parents[2] / "cases" / "recount" / "files.json").read_text("utf-8"))["cases"]
SLOW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def line(**changes: Any) -> bytes:
    return json.dumps({**base("events"), **changes}, separators=(",", ":"), ensure_ascii=False).encode()


def parsed(path: Path, stream: str = "events", folder: str = REGION) -> pa.Table:
    tables = list(parse_file(path, stream, folder, lambda _: None))
    return pa.concat_tables([record_schema(stream).empty_table(), *tables])


def stored(case: dict[str, Any]) -> tuple[str, bytes]:
    def full(text: str) -> bytes:
        event = line().decode()
        return "".join({"E": event, "P": event[:40]}.get(character, character) for character in text).encode()

    if "text" in case:
        return "file.jsonl", full(case["text"])
    if "stored" in case:
        return "file.jsonl.gz", base64.b64decode(case["stored"])
    packed = b"".join(gzip.compress(full(text), mtime=0) for text in case["gzip"])
    return "file.jsonl.gz", packed[: len(packed) - case.get("cut", 0)] + base64.b64decode(case.get("behind", ""))


@pytest.mark.parametrize("read", [1, 7, 1 << 20])
@pytest.mark.parametrize("case", FILES, ids=[case["name"] for case in FILES])
def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any], read: int) -> None:
    name, content = stored(case)
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(files, "READ_BYTES", read)
    monkeypatch.setattr(files, "_STORED_BYTES", read)
    rows = [[row["line"], row["reasons"] or []] for row in parsed(tmp_path / name).to_pylist()]
    assert rows == case["gives"]


def by_the_ingest(path: Path, region: str) -> list[tuple[int, bool, str | None]]:
    """(line, valid, a reason that stands for the file as a whole) as the ingest reads a file."""
    rows: list[tuple[int, bool, str | None]] = []
    for chunk in parse_all(read_lines(path), CONTRACTS["events"], region, LIMITS):
        rows += [(n + 1, True, None) for n in chunk.valid["n"].to_pylist()]
        rows += [(one.number + 1, False, one.reasons[0] if one.reasons[0].endswith("gzip") else None) for one in chunk.rejects]
    return sorted(rows)


@SLOW
@given(data=st.data())
def test_broken_files_have_the_lines_that_the_ingest_finds(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the bytes, cut, changed or added to, and whatever the sizes of the reads."""
    pieces = st.sampled_from([line(), line(event_id="e2"), b"", b"x", line()[:50], b"y" * 70, line() + b"\r"])
    content = b"\n".join(data.draw(st.lists(pieces, max_size=6)))
    path = tmp_path / data.draw(st.sampled_from(["a.jsonl", "a.jsonl.gz"]))
    if path.suffix == ".gz":
        middle = data.draw(st.integers(0, len(content)))
        content = b"".join(gzip.compress(part, mtime=0) for part in (content[:middle], content[middle:]))
        match data.draw(st.integers(0, 3)):
            case 0:
                content = content[: data.draw(st.integers(0, len(content)))]
            case 1:
                changed = bytearray(content)
                changed[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
                content = bytes(changed)
            case 2:
                content += data.draw(st.sampled_from([b"\0" * 9, b"\0x", b"x", b"\x1f\x8b"]))
            case _:
                pass
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "READ_BYTES", data.draw(st.integers(1, 600)))
        patch.setattr(files, "_STORED_BYTES", data.draw(st.integers(1, 600)))
        rows = parsed(path).to_pylist()
    mine = [(row["line"], row["is_valid"], next((r for r in row["reasons"] or () if r.endswith("gzip")), None)) for row in rows]
    assert mine == by_the_ingest(path, REGION)


@pytest.mark.parametrize("read", [1, 7, 64, 1 << 20])
def test_gzip_cut_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int) -> None:
    """What zlib still holds back when it has taken the last byte belongs to the file."""
    whole = gzip.compress(b"one line as another\n" * 60, mtime=0)
    path = tmp_path / "cut.jsonl.gz"
    monkeypatch.setattr(files, "READ_BYTES", read)
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        lines, half = divmod(len(zlib.decompressobj(31).decompress(whole[:size])), 20)
        rows = parsed(path).to_pylist()
        assert [row["reasons"] for row in rows] == [["not_json"]] * lines + [["truncated_gzip"]], size
        assert rows[-1]["line"] == (lines + 1 if lines or half else 0)


def test_gzip_wrong_in_the_middle_of_much(tmp_path: Path) -> None:
    """More comes before the wrong byte than one step unpacks."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as writer:
        writer.write((line() + b"\n") * 50_000)
        writer.flush(zlib.Z_FULL_FLUSH)
        good = len(out.getvalue())
        writer.write(line() + b"\n")
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(out.getvalue()[:good] + b"\xff" * 50)
    table = parsed(path)
    assert (table.num_rows, table["is_valid"].to_pylist().count(True)) == (50_001, 50_000)
    assert table.slice(50_000)["reasons"].to_pylist() == [["corrupt_gzip"]]


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.jsonl.gz", "."])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    rows = parsed(tmp_path / name).to_pylist()
    assert [(row["line"], row["reasons"]) for row in rows] == [(0, ["unreadable_file"])]


def test_a_disk_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 400:
                raise OSError(5, "Input/output error")
            return super().read(200)

    content = (line() + b"\n") * 3
    monkeypatch.setattr(files, "_open", lambda _: Failing(content))
    assert [(row["line"], row["reasons"]) for row in parsed(tmp_path / "x.jsonl").to_pylist()] == [
        (1, None),
        (2, ["unreadable_file"]),
    ]


@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.gz"])
@pytest.mark.parametrize("end", [b"\n" + line(), b"", b"\n"])
def test_a_line_longer_than_memory_should_hold(tmp_path: Path, name: str, end: bytes) -> None:
    content = line() + b"\n" + b"x" * 30_000_000 + end
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, compresslevel=1) if name.endswith(".gz") else content)
    del content
    tracemalloc.start()
    try:
        rows = parsed(path).to_pylist()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [row["reasons"] for row in rows] == [None, ["line_too_long"], *([None] if len(end) > 1 else [])]
    assert peak < 6 * files.READ_BYTES


def test_a_block_of_line_feeds_is_judged_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_ROWS_AT_ONCE", 100)
    (tmp_path / "file.jsonl").write_bytes(b"\n" * 250 + line() + b"\n" * 300)
    table = parsed(tmp_path / "file.jsonl")
    assert table["line"].to_pylist() == list(range(1, 551))
    assert [n for n, valid in enumerate(table["is_valid"].to_pylist(), start=1) if valid] == [251]


def test_what_was_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl.gz").write_bytes(gzip.compress(line()))
    told: list[int] = []
    list(parse_file(tmp_path / "file.jsonl.gz", "events", REGION, told.append))
    assert sum(told) == (tmp_path / "file.jsonl.gz").stat().st_size
