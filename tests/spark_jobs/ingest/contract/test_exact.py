"""Every reason a line can be rejected for, at its boundary."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jobs.ingest.contract.exact import parse_time, validate_line
from spark_jobs.ingest.contract.spec import CONTRACTS, CURRENCIES, EARLIEST_US, LATEST_US, MAX_LINE_BYTES, FieldKind
from spark_jobs.units import to_micros
from tests.spark_jobs.ingest.contract.cases import LIMITS, Case, base, load

CASES = [*load("events"), *load("orders")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.stream}: {case.name}")
def test_case(case: Case) -> None:
    contract = CONTRACTS[case.stream]
    verdict = validate_line(case.raw, contract, case.folder, LIMITS, terminated=case.terminated)
    assert verdict.reasons == case.reasons
    if case.reasons:
        assert verdict.values is None
    else:
        assert verdict.values is not None
        assert list(verdict.values) == [field.name for field in contract.fields]
        assert {name: verdict.values[name] for name in case.gives} == case.gives


def test_every_reason_has_a_case() -> None:
    reasons = {"line_too_long"}  # below
    reasons |= {"crlf", "byte_order_mark", "nul_byte", "blank_line", "invalid_utf8", "not_json", "unterminated_line"}
    reasons |= {"not_an_object", "duplicate_key", "invalid_unicode", "region_mismatch", "region_format", "folder_region_format"}
    kinds = {
        FieldKind.ID: ["type", "length"],
        FieldKind.TEXT: ["type"],
        FieldKind.ENUM: ["type", "unknown"],
        FieldKind.CURRENCY: ["type", "unknown"],
        FieldKind.INTEGER: ["type", "range"],
        FieldKind.TIME: ["type", "format", "precision"],
        FieldKind.REGION: ["type"],
    }
    for contract in CONTRACTS.values():
        own = {"missing": [f.name for f in contract.fields if f.required]}
        own |= {"in_future": [contract.time_field], "out_of_range": [contract.time_field]}
        reasons |= {f"{name}_{problem}" for problem, names in own.items() for name in names}
        reasons |= {f"{f.name}_{problem}" for f in contract.fields for problem in kinds[f.kind]}
    covered = {reason for case in CASES for reason in case.reasons} | {"line_too_long"}
    # the two contracts share the code of a field of the same name and kind
    assert reasons == covered


@pytest.mark.parametrize(("size", "reasons"), [(MAX_LINE_BYTES, []), (MAX_LINE_BYTES + 1, ["line_too_long"])])
@pytest.mark.parametrize("filler", ["x", "é"])
def test_the_size_of_a_line_is_in_bytes(size: int, reasons: list[str], filler: str) -> None:
    record = {**base("events"), "user_agent": "", "placement": ""}
    line = json.dumps(record, ensure_ascii=False).encode()
    fill = filler.encode() * ((size - len(line)) // len(filler.encode()))
    line = line.replace(b'"user_agent": ""', b'"user_agent": "' + fill + b'"')
    line = line.replace(b'"placement": ""', b'"placement": "' + b"y" * (size - len(line)) + b'"')
    assert len(line) == size
    assert validate_line(line, CONTRACTS["events"], "eu", LIMITS).reasons == reasons


def test_a_line_that_is_too_long_is_not_read() -> None:
    verdict = validate_line(b"\0" * (MAX_LINE_BYTES + 1) + b"\r", CONTRACTS["events"], "eu", LIMITS)
    assert verdict.reasons == ["line_too_long"]


def test_a_rejected_line_keeps_its_id_and_time_where_they_can_be_read() -> None:
    record = {**base("events"), "currency": "eur"}
    verdict = validate_line(json.dumps(record).encode(), CONTRACTS["events"], "eu", LIMITS)
    assert (verdict.record_id, verdict.time_us) == ("e1", 1_748_858_400_000_000)
    record = {**record, "event_id": "", "event_time": "noon"}
    verdict = validate_line(json.dumps(record).encode(), CONTRACTS["events"], "eu", LIMITS)
    assert (verdict.record_id, verdict.time_us) == (None, None)


@pytest.mark.parametrize("currency", sorted(CURRENCIES))
def test_currencies_are_three_capitals(currency: str) -> None:
    assert len(currency) == 3 and currency.isascii() and currency.isupper()


@given(
    moment=st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29)),
    hours=st.integers(-23, 23),
    minutes=st.integers(0, 59),
)
def test_times_against_the_standard_library(moment: datetime, hours: int, minutes: int) -> None:
    zone = f"{'-' if hours < 0 else '+'}{abs(hours):02d}:{minutes:02d}"
    text = f"{moment.isoformat()}{zone}"
    assert parse_time(text) == (to_micros(datetime.fromisoformat(text).astimezone(UTC)), None)


@given(st.text(alphabet="0123456789-:.+TtZz ", max_size=32) | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?[+-]\d\d:\d\d"))
def test_a_time_that_is_read_can_be_held(text: str) -> None:
    micros, problem = parse_time(text)
    assert (micros is None) == (problem is not None)
    assert micros is None or EARLIEST_US <= micros <= LATEST_US
