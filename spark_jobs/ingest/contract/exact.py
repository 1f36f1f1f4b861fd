"""The exact validator: judge one line at a time and name every reason. Slow and complete; the fast one must agree with it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from spark_jobs.ingest.contract.spec import (
    CURRENCIES,
    EARLIEST_US,
    LATEST_US,
    MAX_LINE_BYTES,
    REGION_FORM,
    BatchLimits,
    Contract,
    Field,
    FieldKind,
)
from spark_jobs.units import EPOCH

_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d+))?([Zz]|([+-])(\d\d):(\d\d))", flags=re.ASCII)
_BOM = b"\xef\xbb\xbf"


@dataclass
class LineVerdict:
    """The outcome of one line: ``values`` if it is valid, else ``reasons``. ``time_us`` and ``record_id`` are set if readable."""

    reasons: list[str] = field(default_factory=list)
    values: dict[str, Any] | None = None
    time_us: int | None = None
    record_id: str | None = None


class _Object(dict[str, Any]):
    duplicate = False


def _pairs(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    made.duplicate = len(made) != len(pairs)
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_refuse_constant)


def parse_time(text: str) -> tuple[int | None, str | None]:
    """Return the microseconds since the epoch of an RFC 3339 time with a zone, or None and what is wrong: format or precision."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None, "format"
    year, month, day, hour, minute, second, fraction, _zone, sign, off_hour, off_minute = match.groups()
    digits = (fraction or "").ljust(6, "0")
    try:
        moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second), int(digits[:6]), UTC)
    except ValueError:
        return None, "format"
    micros = (moment - EPOCH) // timedelta(microseconds=1)
    if sign is not None:
        if int(off_hour) > 23 or int(off_minute) > 59:
            return None, "format"
        offset = (int(off_hour) * 60 + int(off_minute)) * 60_000_000
        micros += -offset if sign == "+" else offset
    if not EARLIEST_US <= micros <= LATEST_US:  # the zone can move a time out of the years that a timestamp has
        return None, "format"
    if digits[6:].strip("0"):
        return None, "precision"
    return micros, None


def _check(spec: Field, value: object) -> tuple[str | int | None, str | None]:
    """Return the value of a present field, or None and the reason why it is wrong."""
    if spec.kind is FieldKind.INTEGER:
        if type(value) is not int:
            return None, f"{spec.name}_type"
        return (value, None) if 0 <= value <= spec.high else (None, f"{spec.name}_range")
    if type(value) is not str:
        return None, f"{spec.name}_type"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return None, "invalid_unicode"
    if spec.kind is FieldKind.TIME:
        micros, problem = parse_time(value)
        return micros, f"{spec.name}_{problem}" if problem else None
    if spec.kind is FieldKind.ID and not 1 <= len(value) <= 128:
        return None, f"{spec.name}_length"
    if spec.kind in (FieldKind.ENUM, FieldKind.CURRENCY) and value not in (spec.values or CURRENCIES):
        return None, f"{spec.name}_unknown"
    if spec.kind is FieldKind.REGION and REGION_FORM.fullmatch(value) is None:
        return None, "region_format"
    return value, None


def validate_line(
    raw: bytes, contract: Contract, folder_region: str, limits: BatchLimits, *, terminated: bool = True, own_region: bool = False
) -> LineVerdict:
    """Judge one line (without its line feed).

    The ``values`` of a valid line have every field of the contract, times in microseconds, the folder's region and the defaults; an
    absent received_at stays None. Otherwise ``reasons`` has every reason, in the contract's order. With ``own_region`` a record's
    own region applies, as in a topic into which other regions are mirrored.
    """
    verdict = LineVerdict()
    reasons = verdict.reasons
    if len(raw) > MAX_LINE_BYTES:
        reasons.append("line_too_long")
        return verdict
    if raw.endswith(b"\r"):
        reasons.append("crlf")
    if raw.startswith(_BOM):
        reasons.append("byte_order_mark")
    if b"\0" in raw:
        reasons.append("nul_byte")
    if not raw.strip(b" \t\r"):
        reasons.append("blank_line")
        return verdict
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        reasons.append("invalid_utf8")
        return verdict
    try:
        # strip only JSON's own white space: str.strip() would remove more than the decoder accepts
        record = _DECODER.decode(text.strip(" \t\r"))
    except (ValueError, RecursionError):
        if not {"byte_order_mark", "nul_byte"} & set(reasons):
            reasons.append("not_json")
        if not terminated:
            reasons.append("unterminated_line")
        return verdict
    if not isinstance(record, _Object):
        reasons.append("not_an_object")
        return verdict
    if record.duplicate:
        reasons.append("duplicate_key")

    values: dict[str, Any] = {}
    for spec in contract.fields:
        if record.get(spec.name) is not None:
            values[spec.name], reason = _check(spec, record[spec.name])
        else:
            values[spec.name], reason = spec.default, f"{spec.name}_missing" if spec.required else None
        if reason is not None:
            reasons.append(reason)
    record_id = values[contract.id_field]
    verdict.record_id = record_id if isinstance(record_id, str) else None
    time_us = values[contract.time_field]
    verdict.time_us = time_us

    own = values["region"]
    if own is not None and own != folder_region and not own_region:
        reasons.append("region_mismatch")
    if REGION_FORM.fullmatch(folder_region) is None:
        reasons.append("folder_region_format")
    values["region"] = own if own_region and own is not None else folder_region
    if time_us is not None:
        if time_us < limits.earliest_us:
            reasons.append(f"{contract.time_field}_out_of_range")
        received_us = values["received_at"] if values["received_at"] is not None else limits.ingested_us
        if time_us > received_us + limits.future_skew_us:
            reasons.append(f"{contract.time_field}_in_future")
    if not reasons:
        verdict.values = values
    return verdict
