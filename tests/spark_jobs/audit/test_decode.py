"""The auditor's contract and decoder against the contract's cases and the ingest's validator, with which they share nothing."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spark_jobs.audit import decode
from spark_jobs.audit.contract import PAYLOAD, judge_line, read_time, record_schema
from spark_jobs.audit.decode import parse_block, parse_values
from spark_jobs.ingest.contract.exact import validate_line
from spark_jobs.ingest.contract.spec import CONTRACTS, MAX_LINE_BYTES
from tests.spark_jobs.ingest.contract.cases import LIMITS, base, load
from tests.spark_jobs.ingest.contract.test_agreement import CHUNKS, REGION, STREAMS, TIMES, VALUES

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
    payload = {name: None if values is None else values[name] for name in PAYLOAD[stream]}
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

    monkeypatch.setattr(decode, "judge_line", never)
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
    assert parse_values(plain, np.arange(len(plain)), "events")["is_valid"].to_pylist() == [True] * len(plain)


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


def test_every_day() -> None:
    first = date(1895, 1, 1)
    days = [first + timedelta(days=number) for number in range(45_000)]  # both kinds of years that end a century
    micros = [read_time(f"{day}T00:00:00Z") for day in days]
    start = (first - date(1970, 1, 1)) // timedelta(microseconds=1)
    assert micros == [start + number * 86_400_000_000 for number in range(len(days))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("2025-06-02T10:00:00.1234567Z", "precision"), ("2025-06-02T10:00:00.1234560Z", 1_748_858_400_123_456)),
        *(("0000-01-01T00:00:00Z", "format"), ("1900-02-29T00:00:00Z", "format"), ("2000-02-29T00:00:00.5Z", 951_782_400_500_000)),
        *(("2025-06-0/T10:00:00Z", "format"), ("2025-06-02T10:00:0:Z", "format"), ("2025-06-02T10:00:60Z", "format")),
        *(("2025-06-02T24:00:00Z", "format"), ("2025-06-02T10:60:00Z", "format"), ("2025-06-02 10:00:00Z", "format")),
        *(("2025-06-02T10:00:00+24:00", "format"), ("2025-06-02T10:00:00+23:60", "format"), ("2025-06-02T10:00:00", "format")),
        *(("0001-01-01T00:00:00+00:01", "format"), ("9999-12-31T23:59:59.999999-00:01", "format")),
        *(("0001-01-01T00:00:00Z", -62_135_596_800_000_000), ("9999-12-31T23:59:59.999999Z", 253_402_300_799_999_999)),
    ],
)
def test_times_at_the_edges(text: str, expected: int | str) -> None:
    assert read_time(text) == expected


@SLOW
@given(st.text(alphabet="0123456789-:.TtZz+ é", max_size=30) | st.sampled_from(TIMES).map(lambda text: text.strip('"')))
def test_any_text_is_a_time_or_has_a_reason(text: str) -> None:
    assert isinstance(read_time(text), int) or read_time(text) in ("format", "precision")
