"""The recount's parser against the contract's cases, and against the validator of the ingest, with which it shares nothing."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tracemalloc
import zlib
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spark_jobs.audit import parser
from spark_jobs.audit.parser import (
    judge_line,
    parse_block,
    parse_file,
    parse_values,
    payload_rules,
    read_time,
    read_times,
    record_schema,
)
from spark_jobs.ingest.contract.exact import validate_line
from spark_jobs.ingest.contract.parse import parse_all
from spark_jobs.ingest.contract.spec import CONTRACTS, MAX_LINE_BYTES
from spark_jobs.ingest.files.lines import read_lines
from tests.spark_jobs.ingest.contract.cases import LIMITS, base, load
from tests.spark_jobs.ingest.contract.test_agreement import CHUNKS, REGION, STREAMS, TIMES, VALUES

FILES = json.loads((Path(__file__).resolve().parents[2] / "cases" / "recount" / "files.json").read_text("utf-8"))["cases"]
OF_THE_LIMITS = ("_out_of_range", "_in_future")
SLOW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def line(stream: str = "events", **changes: Any) -> bytes:
    return json.dumps({**base(stream), **changes}, separators=(",", ":"), ensure_ascii=False).encode()


def expected(
    raw: bytes, stream: str, folder: str, number: int, *, terminated: bool = True, own_region: bool = False
) -> dict[str, Any]:
    """The record of a line by the ingest's exact validator, but for what hangs on limits."""
    verdict = validate_line(raw, CONTRACTS[stream], folder, LIMITS, terminated=terminated, own_region=own_region)
    reasons = [reason for reason in verdict.reasons if not reason.endswith(OF_THE_LIMITS)]
    values = verdict.values
    if values is None and not reasons:  # valid but for the limits: what its fields are, by limits that refuse nothing
        wide = type(LIMITS)(ingested_us=2**60, earliest_us=-(2**60), future_skew_us=2**60, hour_grace_us=0)
        values = validate_line(raw, CONTRACTS[stream], folder, wide, terminated=terminated, own_region=own_region).values
        assert values is not None
    payload = {rule.name: None if values is None else values[rule.name] for rule in payload_rules(stream)}
    return {
        "line": number,
        "is_valid": values is not None,
        "reasons": reasons or None,
        "record_id": verdict.record_id,
        "time_us": verdict.time_us,
        "received_us": None if values is None else values["received_at"],
        **payload,
    }


def found(table: pa.Table) -> list[dict[str, Any]]:
    """Records without the hash, of which nothing else knows, the region, which a value alone has, and the receipt of rejected ones,
    which the ingest does not tell (tests/spark_jobs/ingest/test_bombs.py holds it).
    """
    rows = table.drop_columns(["id_hash", "region"]).to_pylist()
    return [row if row["is_valid"] else row | {"received_us": None} for row in rows]


def assert_agreement(stream: str, raws: list[bytes], *, terminated: bool = True, first: int = 1, folder: str = REGION) -> None:
    data = b"\n".join(raws) + (b"\n" if terminated or not raws[-1] else b"")
    table = parse_block(data, first, stream, folder)
    assert table.schema == record_schema(stream)
    last = len(raws) - 1
    assert found(table) == [
        expected(raw, stream, folder, first + at, terminated=terminated or not raw or at < last) for at, raw in enumerate(raws)
    ]


def assert_values_agree(stream: str, values: list[bytes | None]) -> None:
    """Of records of a topic, at offsets with holes between them."""
    offsets = np.arange(len(values), dtype=np.int64) * 3 + 5
    table = parse_values(values, offsets, stream)
    assert table.schema == record_schema(stream)
    assert found(table) == [
        expected(value or b"", stream, "a-cluster", int(at), own_region=True) for at, value in zip(offsets, values, strict=True)
    ]
    own = [validate_line(value or b"", CONTRACTS[stream], "a-cluster", LIMITS, own_region=True).values for value in values]
    regions = [record["region"] if record["is_valid"] else None for record in table.to_pylist()]
    assert [region or "a-cluster" for region, held in zip(regions, own, strict=True) if held] == [
        held["region"] for held in own if held
    ]


def parsed(path: Path, stream: str = "events", folder: str = REGION) -> pa.Table:
    tables = list(parse_file(path, stream, folder, lambda _: None))
    return pa.concat_tables([record_schema(stream).empty_table(), *tables])


# --- lines


@pytest.mark.parametrize("stream", STREAMS)
def test_every_case_of_the_contract(stream: str) -> None:
    for case in load(stream):
        judged = judge_line(case.raw, stream, case.folder, is_terminated=case.terminated)
        assert judged.reasons == [r for r in case.reasons if not r.endswith(OF_THE_LIMITS)], case.name
        assert (judged.fields is None) == bool(judged.reasons), case.name
        if b"\n" not in case.raw:
            assert_agreement(stream, [case.raw], terminated=case.terminated, folder=case.folder)


@pytest.mark.parametrize("stream", STREAMS)
def test_every_case_in_one_block(stream: str) -> None:
    raws = [case.raw for case in load(stream) if case.folder == REGION and b"\n" not in case.raw and case.terminated]
    assert_agreement(stream, raws, first=41)


@SLOW
@given(chunk=CHUNKS, terminated=st.booleans(), first=st.sampled_from([1, 7]))
@example(chunk=("events", [line(), b'{"event_id":"e1",' + line()[1:], line()]), terminated=True, first=1)
@example(chunk=("events", [line(placement=None), line().replace(b'"top"', b'"top","x":"1","x":"1"')]), terminated=True, first=1)
@example(chunk=("events", [line(), line() + b"\r", line()]), terminated=True, first=1)
@example(chunk=("events", [line()[:-1] + b',"x":"\xff"}', line()[:-1] + b',"\xff":1}']), terminated=True, first=1)
def test_a_block_is_what_the_ingest_says_of_its_lines(chunk: tuple[str, list[bytes]], terminated: bool, first: int) -> None:
    stream, raws = chunk
    assert_agreement(stream, raws, terminated=terminated, first=first)


@pytest.mark.parametrize("stream", STREAMS)
def test_values_are_judged_as_lines_are_but_for_the_region(stream: str) -> None:
    raws: list[bytes | None] = [case.raw for case in load(stream)]
    odd = [
        *(None, b"", b"\n", b" \n\r", line(stream) + b"\n", line(stream) + b"\r", line(stream).replace(b",", b",\n"), b"\xff\n"),
        *(line(stream) + b"\n" + line(stream), line(stream, region="elsewhere"), line(stream, region="Elsewhere"), b"x" * 70_000),
        *(line(stream, region=None), line(stream, region="e\n"), line(stream, region="")),
    ]
    for value in [*raws, *odd]:
        assert_values_agree(stream, [value])
    assert_values_agree(stream, [*raws, *odd, *raws])
    assert parse_values([], np.empty(0, dtype=np.int64), stream).num_rows == 0


@pytest.mark.parametrize("stream", STREAMS)
def test_every_value_in_every_field(stream: str) -> None:
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in base(stream).items()}
    raws = []
    for value in VALUES:
        for name in (*base(stream), "unknown"):
            raws.append(("{" + ",".join(f'"{key}":{held}' for key, held in {**texts, name: value}.items()) + "}").encode())
    for raw in raws:  # alone, where no other line of the block is odd, and together
        assert_agreement(stream, [raw])
    assert_agreement(stream, raws)


@pytest.mark.parametrize("size", [MAX_LINE_BYTES, MAX_LINE_BYTES + 1])
def test_the_size_of_a_line(size: int) -> None:
    long = line(user_agent="x" * (size - len(line()) + len("browser")))
    assert len(long) == size
    assert_agreement("events", [line(), long, line()])
    table = parse_block(long, 1, "events", REGION)
    assert table["is_valid"].to_pylist() == [size <= MAX_LINE_BYTES]


def test_plain_lines_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Any:
        raise AssertionError("a line was judged one by one")

    monkeypatch.setattr(parser, "judge_line", never)
    plain = [
        line(),
        line(region=None, impression_id=None, placement=None, price_micros=None, user_agent=None, received_at=None),
        json.dumps(
            {name: value for name, value in base("events").items() if name not in ("region", "price_micros", "user_agent")}
        ).encode(),
        line(event_id="é" * 128, placement="\\"),
        line(event_time="2025-06-02T12:00:00.25+02:00"),
        line(unknown={"a": [1, "x", None]}, other="x"),
        line(placement="\u2028").replace("\u2028".encode(), b"\\u2028"),
    ]
    table = parse_block(b"".join(raw + b"\n" for raw in plain), 1, "events", REGION)
    assert table["is_valid"].to_pylist() == [True] * len(plain)
    assert parse_block(line("orders"), 1, "orders", REGION)["is_valid"].to_pylist() == [True]


def test_limits_are_not_judged() -> None:
    early = line(event_time="1970-01-01T00:00:00Z", received_at="9999-01-01T00:00:00Z")
    ahead = line(event_time="9999-01-01T00:00:00Z", received_at="1970-01-01T00:00:00Z")
    table = parse_block(early + b"\n" + ahead, 1, "events", REGION)
    assert table["is_valid"].to_pylist() == [True, True]
    assert table["time_us"].to_pylist() == [0, 253_370_764_800_000_000]
    assert table["received_us"].to_pylist() == [253_370_764_800_000_000, 0]


def test_the_hash_is_the_same_for_ever() -> None:
    """Entries of the store are compared by it: another one would have to be another format."""
    raws = [line(event_id="e1"), line(event_id="é"), line(event_id="e1", currency="none"), b"{}"]
    table = parse_block(b"\n".join(raws), 1, "events", REGION)
    assert table["id_hash"].to_pylist() == [2269290854245001967, 17839895020865391795, 2269290854245001967, None]


# --- times


def text_of(moment: datetime, digits: int, minutes: int, zone: str) -> str:
    local = moment.astimezone(timezone(timedelta(minutes=minutes))) if zone == "+" else moment
    fraction = f".{local.microsecond:06d}"[: digits + 1] if digits else ""
    return f"{local.isoformat()[:19]}{fraction}{local.isoformat()[-6:] if zone == '+' else zone}"


@SLOW
@given(
    moment=st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 12, 31), timezones=st.just(UTC)),
    digits=st.integers(0, 6),
    minutes=st.integers(-1439, 1439),
    zone=st.sampled_from(["Z", "Z", "z", "+"]),
)
def test_times_are_those_of_the_standard_library(moment: datetime, digits: int, minutes: int, zone: str) -> None:
    text = text_of(moment, digits, minutes, zone)
    micros = (datetime.fromisoformat(text.upper()) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert read_time(text) == micros
    assert read_times(pa.array(["", text, None, "2025-06-02T10:00:00Z"], pa.string())).tolist()[1] == micros


def test_every_day_of_a_column() -> None:
    first = date(1895, 1, 1)
    days = [first + timedelta(days=number) for number in range(45_000)]  # both kinds of years that end a century
    micros = read_times(pa.array([f"{day}T00:00:00Z" for day in days], pa.string()))
    start = (first - date(1970, 1, 1)) // timedelta(microseconds=1)
    assert micros.tolist() == [start + number * 86_400_000_000 for number in range(len(days))]


@SLOW
@given(st.text(alphabet="0123456789-:.TtZz+ é", max_size=30) | st.sampled_from(TIMES).map(lambda text: text.strip('"')))
@example("2025-06-02T10:00:00.1234567Z")
@example("0000-01-01T00:00:00Z")
@example("1900-02-29T00:00:00Z")
@example("2000-02-29T00:00:00.5Z")
@example("2025-06-0/T10:00:00Z")
@example("2025-06-02T10:00:0:Z")
def test_columns_of_times_read_what_one_time_reads(text: str) -> None:
    one = read_time(text)
    column = read_times(pa.array([text, None, "2025-06-02T10:00:00Z"], pa.string()).slice(0, 2)).tolist()
    assert column == [one if isinstance(one, int) else parser._NO_TIME, parser._NO_TIME]


# --- files


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
    monkeypatch.setattr(parser, "READ_BYTES", read)
    monkeypatch.setattr(parser, "_STORED_BYTES", read)
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
        patch.setattr(parser, "READ_BYTES", data.draw(st.integers(1, 600)))
        patch.setattr(parser, "_STORED_BYTES", data.draw(st.integers(1, 600)))
        rows = parsed(path).to_pylist()
    mine = [(row["line"], row["is_valid"], next((r for r in row["reasons"] or () if r.endswith("gzip")), None)) for row in rows]
    assert mine == by_the_ingest(path, REGION)


@pytest.mark.parametrize("read", [1, 7, 64, 1 << 20])
def test_gzip_cut_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int) -> None:
    """What zlib still holds back when it has taken the last byte belongs to the file."""
    whole = gzip.compress(b"one line as another\n" * 60, mtime=0)
    path = tmp_path / "cut.jsonl.gz"
    monkeypatch.setattr(parser, "READ_BYTES", read)
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
    monkeypatch.setattr(parser, "_open", lambda _: Failing(content))
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
    assert peak < 6 * parser.READ_BYTES


def test_a_block_of_line_feeds_is_judged_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "_JUDGED_AT_ONCE", 100)
    (tmp_path / "file.jsonl").write_bytes(b"\n" * 250 + line() + b"\n" * 300)
    table = parsed(tmp_path / "file.jsonl")
    assert table["line"].to_pylist() == list(range(1, 551))
    assert [n for n, valid in enumerate(table["is_valid"].to_pylist(), start=1) if valid] == [251]


def test_what_was_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl.gz").write_bytes(gzip.compress(line()))
    told: list[int] = []
    list(parse_file(tmp_path / "file.jsonl.gz", "events", REGION, told.append))
    assert sum(told) == (tmp_path / "file.jsonl.gz").stat().st_size
