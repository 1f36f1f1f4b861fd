"""The fast validator against the exact one: what a chunk gives is what its lines give one by one."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spark_jobs.ingest.contract import alike, vectorised
from spark_jobs.ingest.contract.alike import read_alike
from spark_jobs.ingest.contract.exact import LineVerdict, validate_line
from spark_jobs.ingest.contract.parse import Reject, decode_raw, encode_raw, parse_chunk
from spark_jobs.ingest.contract.spec import CONTRACTS, MAX_LINE_BYTES, MAX_RAW_BYTES, Contract
from spark_jobs.ingest.contract.vectorised import accept_plain, flat_lines, parsed_schema
from spark_jobs.ingest.files.lines import FileFault, Lines, LongLine
from tests.spark_jobs.ingest.contract.cases import LIMITS, base, load

REGION = "eu"
STREAMS = ("events", "orders")

# values of fields as they stand in a line: good ones, and all that a lax reader could take for good
TIMES = [
    '"2025-06-02T10:00:00Z"',
    '"2025-06-02T10:00:00.123456Z"',
    '"2025-06-02T12:00:00.5+02:00"',
    '"2025-06-02T09:59:59.999999-00:01"',
    '"2025-06-02T10:05:02Z"',
    '"2025-06-02T10:05:02.000001Z"',
    '"2025-06-03T00:05:00Z"',
    '"2025-06-02 10:00:00Z"',
    '"2025-06-02T10:00:00"',
    '"2025-06-02t10:00:00z"',
    '"2025-06-02T10:00:00.0000000Z"',
    '"2025-06-02T10:00:00.0000001Z"',
    '"2024-02-29T00:00:00Z"',
    '"2025-02-29T00:00:00Z"',
    '"2016-12-31T23:59:60Z"',
    '"2025-06-01T24:00:00Z"',
    '"2025-06-03T09:59:00+23:59"',
    '"2025-06-02T10:00:00-23:59"',
    '"0000-01-01T00:00:00Z"',
    '"0001-01-01T00:00:00+23:59"',
    '"9999-12-31T23:59:59.999999Z"',
    '"9999-12-31T23:59:59-23:59"',
    '"2000-01-01T00:00:00Z"',
    '"1999-12-31T23:59:59.999999Z"',
    '"2025-06-02T10:00:00 UTC"',
    '"2025-06-02T10:00:00Z\\n"',
    '"infinity"',
    '"epoch"',
    "1748858400",
]
INTEGERS = ["0", "5", "1500", "1000000000000", "1000000000001", "1000000000000000", "1000000000000001", "18446744073709551617"]
INTEGERS += ["9" * 400, "-0", "-1", "01", "+1", "1.0", "1e3", "1E3", "0x5", "1.", ".5", "1_000", "5 ", " 5", "true", "false"]
INTEGERS += ["NaN", "nan", "Infinity", "-Infinity", "inf", '"5"', '""', '" 5"']
STRINGS = ['"x"', '""', '" "', '"top"', '"é"', '"😀"', '"e\u0301"', '"\u007f"', '"\u00a0"', '"\ufeff"', '"\u2028"']
STRINGS += ['"[]"', '"{}"', '"}"', '":"', '","', '"null"', '"5"', '"//"', '"/*"', '"\'"', '"\x1f"', '"\t"', "'x'", "x", ""]
STRINGS += ['"\\u0041"', '"\\""', '"\\\\"', '"\\/"', '"\\ud83d"', '"\\u0000"']
STRINGS += ["5", "NaN", "null", "true", "{}", '{"a":1}', '{"a":"b"}', "[]", '["x"]']
STRINGS += ['"' + "x" * 128 + '"', '"' + "é" * 128 + '"', '"' + "x" * 129 + '"']
ENUMS = ['"impression"', '"click"', '"Click"', '"placed"', '"cancelled"']
ENUMS += ['"EUR"', '"JPY"', '"eur"', '"XXX"', '"XTS"', '"ABC"', '"EUR "']
REGIONS = ['"eu"', '"us"', '"EU"', '""', '"eu "']
ODD_LINES = [b"", b" ", b"\r", b"5", b"null", b"[]", b"{}", b"}", b'"}', b"1}", b'{"a":{}}', b"[{}]", b"\xff"]
VALUES = [*TIMES, *INTEGERS, *STRINGS, *ENUMS, *REGIONS]

SPACES = ["", "", "", " ", "\t", "\r", "  ", "\x0b", "\x0c", "\u00a0", "/**/"]
ENDS = ["", "", "", "", " ", "\r", "\t", ",", "}", " 1}", '"}', ',"x":1}', "//", "\x00", "{}"]


@st.composite
def records(draw: st.DrawFn, stream: str) -> str:
    """A line near a valid one: a few fields changed, dropped, doubled or made up."""
    pairs = [(f'"{name}"', json.dumps(value, ensure_ascii=False)) for name, value in base(stream).items()]
    kinds = {
        "event_time": TIMES,
        "order_time": TIMES,
        "received_at": TIMES,
        "price_micros": INTEGERS,
        "total_micros": INTEGERS,
        "region": REGIONS,
    }
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(pairs) - 1))
        key, value = pairs[at]
        match draw(st.integers(0, 7)):
            case 0 | 1:
                pairs[at] = (key, draw(st.sampled_from(kinds.get(key.strip('"'), STRINGS + ENUMS))))
            case 2:
                pairs[at] = (key, draw(st.sampled_from(VALUES)))
            case 3:
                del pairs[at]
            case 4:
                pairs.insert(draw(st.integers(0, len(pairs))), (key, draw(st.sampled_from([value, "null", "5", '"x"', '""']))))
            case 5:
                made_up = draw(st.sampled_from(['"x"', '""', "5", key.upper(), key.replace("_", "\\u005f"), f'"{key}"', "x"]))
                pairs.insert(at, (made_up, draw(st.sampled_from(VALUES))))
            case 6:
                pairs[at] = (draw(st.sampled_from([key.upper(), key.title(), '"x"', key[:-1], '" ' + key[1:]])), value)
            case 7:
                other = draw(st.integers(0, len(pairs) - 1))
                pairs[at], pairs[other] = (key, pairs[other][1]), (pairs[other][0], value)
        if not pairs:
            break
    space = st.sampled_from(SPACES) if draw(st.integers(0, 3)) == 0 else st.just("")
    comma = draw(st.sampled_from([",", ",", ",", ",", ",,", ";", ""])) if draw(st.integers(0, 7)) == 0 else ","
    body = comma.join(f"{draw(space)}{key}{draw(space)}:{draw(space)}{value}{draw(space)}" for key, value in pairs)
    return f"{draw(space)}{{{body}{draw(st.sampled_from(['', '', '', ',', ' ']))}}}{draw(st.sampled_from(ENDS))}"


@st.composite
def lines(draw: st.DrawFn, stream: str) -> bytes:
    """A line near a valid one, sometimes with wrong bytes; sometimes nothing like one."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(
            st.sampled_from([b"", b" ", b"5", b"null", b"[]", b"{}", b'"}', b"1}", b'{"a":{}}', b"[{}]", b"}", b"\xff", b"\r"])
        )
    raw = draw(records(stream)).encode("utf-8", "surrogatepass")
    if kind >= 8 and raw:
        changed = bytearray(raw)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(changed) - 1))
            octet = draw(st.sampled_from(b'{}[]":,\\ \t\r\x00019.eE-+ntf\xc3\xff\x7f\x1f') | st.integers(0, 255))
            match draw(st.integers(0, 2)):
                case 0:
                    changed[at] = octet
                case 1:
                    changed.insert(at, octet)
                case 2 if len(changed) > 1:
                    del changed[at]
        raw = bytes(changed)
    return raw.replace(b"\n", b"")


CHUNKS = st.sampled_from(STREAMS).flatmap(lambda name: st.tuples(st.just(name), st.lists(lines(name), min_size=1, max_size=12)))


def chunk_of(raws: list[bytes], *, terminated: bool = True, first: int = 0) -> Lines:
    data = b"".join(raw + b"\n" for raw in raws)
    ends = np.cumsum([len(raw) + 1 for raw in raws]).astype(np.int64)
    if not terminated and raws[-1]:
        data, ends[-1] = data[:-1], ends[-1] - 1
    return Lines(data, ends, first)


def one_by_one(chunk: Lines, contract: Contract) -> tuple[list[dict[str, Any]], list[Reject]]:
    valid, rejects = [], []
    for index in range(len(chunk.ends)):
        raw = chunk.raw(index)
        terminated = chunk.terminated or index < len(chunk.ends) - 1
        verdict: LineVerdict = validate_line(raw, contract, REGION, LIMITS, terminated=terminated)
        if verdict.values is not None:
            valid.append({"n": chunk.first + index, **verdict.values})
        else:
            text, encoding = encode_raw(raw)
            number = chunk.first + index
            rejects.append(Reject(number, verdict.reasons, text, encoding, len(raw), verdict.record_id, verdict.time_us))
    return valid, rejects


def assert_agreement(stream: str, chunk: Lines) -> None:
    contract = CONTRACTS[stream]
    parsed = parse_chunk(chunk, contract, REGION, LIMITS)
    valid, rejects = one_by_one(chunk, contract)
    assert parsed.valid.schema == parsed_schema(contract)
    assert parsed.valid.to_pylist() == valid
    assert parsed.rejects == rejects
    assert parsed.offered == len(chunk.ends) == len(valid) + len(rejects)


def fast_alone(stream: str, raws: list[bytes], smallest: int = 1) -> dict[int, dict[str, Any]]:
    """What the fast validator alone takes, by line number, from lines that meet its preconditions."""
    chunk = chunk_of(raws)
    flat = flat_lines(chunk.data, chunk.ends)
    texts: list[str | None] = []
    for index, raw in enumerate(raws):
        try:
            texts.append(raw.decode() + "\n" if len(raw) <= MAX_LINE_BYTES and flat[index] else None)
        except UnicodeDecodeError:
            texts.append(None)
    table = pa.table({"n": pa.array(range(len(raws)), pa.int64()), "line": pa.array(texts, pa.string())})
    contract = CONTRACTS[stream]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectorised, "SMALLEST_BLOCK", smallest)
        accepted = accept_plain(table.filter(table["line"].is_valid()), contract, REGION, LIMITS)
    assert accepted.schema == parsed_schema(contract)
    rows = accepted.to_pylist()
    return {row.pop("n"): row for row in rows}


def line(stream: str, old: str = "", new: str = "", **changes: Any) -> bytes:
    text = json.dumps({**base(stream), **changes}, separators=(",", ":"), ensure_ascii=False)
    assert old in text
    return text.replace(old, new, 1).encode()


NESTED = line("events", '"top"', '{"a":1}')
SWAPPED = line("events", '"placement":"top","price_micros":1500', '"placement":5,"price_micros":"5"')


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chunk=CHUNKS, terminated=st.booleans(), first=st.sampled_from([0, 7]))
@example(chunk=("events", [NESTED, b"5"]), terminated=True, first=0)
@example(chunk=("events", [b" ", NESTED]), terminated=True, first=0)
@example(chunk=("events", [SWAPPED]), terminated=True, first=0)
@example(chunk=("events", [line("events"), b""]), terminated=True, first=3)
def test_a_chunk_gives_what_its_lines_give_one_by_one(chunk: tuple[str, list[bytes]], terminated: bool, first: int) -> None:
    stream, raws = chunk
    assert_agreement(stream, chunk_of(raws, terminated=terminated, first=first))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CHUNKS)
@example(("events", [NESTED, b"5"]))
@example(("events", [SWAPPED]))
def test_the_fast_validator_takes_nothing_that_the_exact_one_refuses(chunk: tuple[str, list[bytes]]) -> None:
    stream, raws = chunk
    for number, values in fast_alone(stream, raws).items():
        verdict = validate_line(raws[number], CONTRACTS[stream], REGION, LIMITS)
        assert (verdict.reasons, verdict.values) == ([], values)


def among_others(raws: list[bytes], usual: bytes) -> list[bytes]:
    """Lines among more lines of one form, so that the fastest reader looks at them."""
    return [one for raw in raws for one in (usual, usual, usual, usual, usual, raw)] + [usual] * 80


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chunk=CHUNKS, is_last=st.booleans(), data=st.data())
@example(chunk=("events", [line("events", '"top","price_micros":1500,', '"top";"price_micros":1500,')]), is_last=True, data=None)
@example(chunk=("events", [line("events", ":1500,", ":15e2,"), line("events", ":1500,", ":0150,")]), is_last=False, data=None)
@example(chunk=("events", [line("events", '"placement":"top"', '"placement":null')]), is_last=False, data=None)
@example(chunk=("events", [line("events", "top", "t\tp"), line("events", "top", "t}p")]), is_last=True, data=None)
def test_lines_among_others_of_one_form(chunk: tuple[str, list[bytes]], is_last: bool, data: st.DataObject | None) -> None:
    stream, raws = chunk
    usual = line(stream)
    if data is not None and data.draw(st.booleans()):
        usual = data.draw(records(stream)).encode("utf-8", "surrogatepass").replace(b"\n", b"")
    mixed = among_others(raws, usual)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alike, "FEWEST_LINES", 1)
        assert_agreement(stream, chunk_of([*mixed, raws[-1]] if is_last else mixed))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("value", VALUES)
def test_every_value_in_every_field_among_others(stream: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "FEWEST_LINES", 1)
    raws = []
    for name in base(stream):
        pairs = {**{n: json.dumps(v, ensure_ascii=False) for n, v in base(stream).items()}, name: value}
        raws.append(("{" + ",".join(f'"{key}":{held}' for key, held in pairs.items()) + "}").encode())
    assert_agreement(stream, chunk_of(among_others(raws, line(stream))))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("again", ["null", '"other"', "5"])
def test_a_field_that_all_lines_repeat(stream: str, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a field that a line has twice the second value counts, also if it is null."""
    monkeypatch.setattr(alike, "FEWEST_LINES", 1)
    for name in base(stream):
        repeated = line(stream)[:-1] + f',"{name}":{again}}}'.encode()
        assert_agreement(stream, chunk_of([repeated] * 90))


OTHERS = [
    line("events", ',"region":"eu"', ""),  # fewer quotes
    line("events", '"placement":"top"', '"placemend":"top"'),  # as many quotes, as many bytes
    line("events", '"top",', '"top";'),
    line("events", ":1500,", ":1.50,"),
    line("events", ":1500,", ":0150,"),
    line("events", ":1500,", ":+150,"),
    line("events", ":1500,", ": 150,"),
]


@pytest.mark.parametrize("others", [*([one] for one in OTHERS), OTHERS])
@pytest.mark.parametrize("first", [40, 300])
def test_the_fastest_reader_takes_lines_of_its_form_only(others: list[bytes], first: int) -> None:
    raws = [line("events", event_id=f"e{'x' * (at % 90)}{at}", price_micros=10 ** (at % 13)) for at in range(300)]
    wanted = [json.loads(raw) for raw in raws]
    raws[first:first] = others
    found = read_alike(pa.array([raw.decode() + "\n" for raw in raws]), CONTRACTS["events"])
    assert found is not None
    is_read, fields = found
    assert np.flatnonzero(~is_read).tolist() == list(range(first, first + len(others)))
    assert [{key: value for key, value in row.items() if value is not None} for row in fields.to_pylist()] == wanted


def test_a_sample_that_misleads_costs_little() -> None:
    """Most lines have fewer quotes than those of the sample, so the block is left to the JSON reader early."""
    sampled = set(np.linspace(0, 999, 16, dtype=int).tolist())
    raws = [line("events") if at in sampled else line("events", ',"region":"eu"', "") for at in range(1000)]
    assert read_alike(pa.array([raw.decode() + "\n" for raw in raws]), CONTRACTS["events"]) is None
    assert_agreement("events", chunk_of(raws))


def test_lines_of_a_second_form_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "FEWEST_LINES", 32)
    other = line("events", impression_id=None)
    raws = [other if at % 10 == 8 else line("events", event_id=f"e{at}") for at in range(400)]
    taken = []

    def watched(lines: pa.StringArray, contract: Contract) -> Any:
        found = read_alike(lines, contract)
        taken.append(0 if found is None else int(found[0].sum()))
        return found

    monkeypatch.setattr(vectorised, "read_alike", watched)
    assert_agreement("events", chunk_of(raws))
    assert taken[:2] == [360, 40]


@pytest.mark.parametrize("number", ["-0", "1" + "0" * 30])
def test_a_form_whose_lines_are_all_refused_is_tried_once(number: str) -> None:
    """Their sample looks alike, but no line has a number that the fastest reader takes."""
    assert_agreement("events", chunk_of([line("events", ":1500,", f":{number},")] * 300))


@pytest.mark.parametrize(
    "usual",
    [
        line("events").replace(b":", b" : ").replace(b",", b", "),  # blanks, also in the times
        line("events", impression_id=None),
        line("orders"),
        b'{"price_micros":5,"event_id":"x"}',
    ],
)
def test_the_form_may_be_any(usual: bytes) -> None:
    stream = "orders" if b"order_id" in usual else "events"
    found = read_alike(pa.array([usual.decode() + "\n"] * 300), CONTRACTS[stream])
    assert found is not None
    assert found[0].all()
    assert found[1].to_pylist()[0] == {one.name: json.loads(usual).get(one.name) for one in CONTRACTS[stream].fields}


@pytest.mark.parametrize("usual", [line("events", unknown=1), line("events", placement=5), line("events", '"top"', "1.5"), b"{}"])
def test_a_form_that_is_not_plain_is_left_to_the_other_readers(usual: bytes) -> None:
    assert read_alike(pa.array([usual.decode() + "\n"] * 300), CONTRACTS["events"]) is None


@pytest.mark.parametrize("stream", STREAMS)
def test_every_case_of_the_contract_in_one_chunk(stream: str) -> None:
    raws = [case.raw for case in load(stream) if case.folder == REGION and b"\n" not in case.raw]
    assert_agreement(stream, chunk_of(raws))
    for number, values in fast_alone(stream, raws).items():
        assert validate_line(raws[number], CONTRACTS[stream], REGION, LIMITS).values == values


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("value", VALUES)
def test_every_value_in_every_field(stream: str, value: str) -> None:
    raws = []
    for name in base(stream):
        pairs = {**{n: json.dumps(v, ensure_ascii=False) for n, v in base(stream).items()}, name: value}
        text = ",".join(f'"{key}":{held}' for key, held in pairs.items())
        raws.append(f"{{{text}}}".encode())
    assert_agreement(stream, chunk_of(raws))
    for number, values in fast_alone(stream, raws).items():
        assert validate_line(raws[number], CONTRACTS[stream], REGION, LIMITS).values == values


@pytest.mark.parametrize("text", [value.strip('"') for value in TIMES])
def test_plain_times_are_those_of_the_pattern(text: str) -> None:
    times = pa.chunked_array([["2025-06-02T10:00:00.123456Z"[: len(text) - 1] + "Z", text]], pa.string())
    is_plain = vectorised._are_plain_times(times)
    assert not is_plain or re.fullmatch(vectorised._TIME_PATTERN, text)
    assert is_plain or not text.startswith("2025-06-02T10") or not text.endswith("Z") or len(text) > 27


def test_the_fast_validator_takes_plain_lines() -> None:
    plain = [
        line("events"),
        line("events", ',"region":"eu"', ""),
        line("events", ',"price_micros":1500', ""),
        line("events", ',"user_agent":"browser"', ""),
        line("events", placement=":"),
        line("events", event_time="2025-06-02T12:00:00.25+02:00"),
        line("events", event_id="é" * 128),
    ]
    assert set(fast_alone("events", plain)) == set(range(len(plain)))
    assert set(fast_alone("orders", [line("orders")])) == {0}


@pytest.mark.parametrize("size", [MAX_LINE_BYTES, MAX_LINE_BYTES + 1])
def test_the_size_of_a_line_within_a_chunk(size: int) -> None:
    long = line("events", "browser", "x" * (size - len(line("events")) + len("browser")))
    assert len(long) == size
    chunk = chunk_of([line("events"), long, line("events")])
    assert_agreement("events", chunk)
    assert len(parse_chunk(chunk, CONTRACTS["events"], REGION, LIMITS).rejects) == (size > MAX_LINE_BYTES)


def test_faults_of_a_file_are_one_reject() -> None:
    contract = CONTRACTS["events"]
    long = parse_chunk(LongLine(b"x" * 10, 12_345, 4), contract, REGION, LIMITS)
    assert (long.offered, long.valid.num_rows) == (1, 0)
    assert long.rejects == [Reject(4, ["line_too_long"], "x" * 10, "utf-8", 12_345)]
    fault = parse_chunk(FileFault("truncated_gzip", b"{", 4, nothing_read=False), contract, REGION, LIMITS)
    assert fault.rejects == [Reject(4, ["truncated_gzip"], "{", "utf-8", 1)]
    whole = parse_chunk(FileFault("corrupt_gzip", b"", 0, nothing_read=True), contract, REGION, LIMITS)
    assert whole.rejects == [Reject(-1, ["corrupt_gzip"], "", "utf-8", 0)]


@given(st.binary(max_size=64))
def test_raw_bytes_come_back(raw: bytes) -> None:
    text, encoding = encode_raw(raw)
    assert "\0" not in text
    assert decode_raw(text, encoding) == raw


def test_raw_bytes_are_kept_up_to_a_size() -> None:
    raw = b"x" + "é".encode() * MAX_RAW_BYTES  # the cut goes through a character
    text, encoding = encode_raw(raw)
    assert decode_raw(text, encoding) == raw[:MAX_RAW_BYTES]


@pytest.mark.parametrize("folder", ["EU", "", "x" * 33, "e u", "eu.bak"])
def test_a_folder_that_is_no_region_accepts_nothing(folder: str) -> None:
    contract = CONTRACTS["events"]
    parsed = parse_chunk(chunk_of([line("events", ',"region":"eu"', "")]), contract, folder, LIMITS)
    assert (parsed.offered, parsed.valid.num_rows) == (1, 0)
    assert parsed.rejects[0].reasons == ["folder_region_format"]
