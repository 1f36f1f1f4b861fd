"""The recount's own reading of the input contract: a landing file's lines, or the values of Kafka's records, as records.

Two tiers. msgspec decodes a line into a typed struct and columns are checked a block at a time; a line that is not certainly valid
is judged by ``judge_line``, rule by rule. Of the decoder's leniencies three touch the contract: it takes the last of a key that
occurs twice, a float where an integer may stand too, and white space around the object. The first shows in the number of quotation
marks (two a key and two a text: more than the record accounts for are a null, a key unknown or a key twice), the others are looked
at directly.

What hangs on the limits of a batch (too early, too far ahead of its receipt) is not judged here.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_64_intdigest

UNREADABLE = "unreadable_file"
LONGEST_LINE = 65_536  # bytes, without the line feed
READ_BYTES = 2 * 1024 * 1024  # what it makes stays in the processor's cache
_STORED_BYTES = 16 * 1024  # of a gzip file, at a time: what a member does not need is copied when it ends
_JUDGED_AT_ONCE = 10_000  # a block of line feeds has two million lines

# ISO 4217, the active codes; neither XXX (no currency) nor XTS (for tests) is money
ISO_4217 = (
    "AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF CHW "
    "CLF CLP CNY COP COU CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF "
    "IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP "
    "MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG "
    "SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD USN UYI UYU UYW UZS VED VES VND "
    "VUV WST XAF XAG XAU XCD XCG XOF XPD XPF XPT XSU XUA YER ZAR ZMW ZWG"
)


@dataclass(frozen=True)
class Rule:
    """What one field must be. ``kind``: id, text, choice (one of ``choices``), amount (0 to ``most``), time, region."""

    name: str
    kind: Literal["id", "text", "choice", "amount", "time", "region"]
    is_required: bool = True
    choices: tuple[str, ...] = ()
    most: int = 0


_CURRENCY = Rule("currency", "choice", choices=tuple(ISO_4217.split()))
_RECEIVED = Rule("received_at", "time", is_required=False)
_REGION = Rule("region", "region", is_required=False)

RULES: dict[str, tuple[Rule, ...]] = {
    "events": (
        Rule("event_id", "id"),
        Rule("event_type", "choice", choices=("impression", "click")),
        Rule("event_time", "time"),
        _RECEIVED,
        _REGION,
        *(Rule(name, "id") for name in ("campaign_id", "ad_id", "store_id", "user_id")),
        Rule("impression_id", "text", is_required=False),
        Rule("placement", "text", is_required=False),
        Rule("price_micros", "amount", is_required=False, most=10**12),
        _CURRENCY,
        Rule("user_agent", "text", is_required=False),
    ),
    "orders": (
        Rule("order_id", "id"),
        Rule("order_time", "time"),
        _RECEIVED,
        _REGION,
        *(Rule(name, "id") for name in ("user_id", "store_id")),
        Rule("total_micros", "amount", most=10**15),
        _CURRENCY,
        Rule("status", "choice", choices=("placed", "cancelled")),
    ),
}
ID_AND_TIME = {"events": ("event_id", "event_time"), "orders": ("order_id", "order_time")}


def payload_rules(stream: str) -> tuple[Rule, ...]:
    """The fields beside the id, the times and the region: a column of the records each, under its own name."""
    return tuple(rule for rule in RULES[stream] if rule.kind not in ("time", "region") and rule.name != ID_AND_TIME[stream][0])


def record_schema(stream: str) -> pa.Schema:
    """One row a line (or value) offered.

    ``line`` counts from 1; 0 stands for a file of which nothing could be read; of a value it is the record's offset. ``reasons`` is
    null of a valid record, never empty of another one. ``record_id``, ``time_us`` (event_time or order_time, microseconds since
    the epoch) and ``received_us`` are there wherever they can be read, all other fields of valid records only. ``received_us``
    is null where the record has none; an absent price is 0. ``region`` is what a valid value names; it is null of lines, which are
    of their folder's. ``id_hash`` is xxh3-64 of the id in UTF-8.
    """
    return pa.schema(
        [
            ("line", pa.int64()),
            ("is_valid", pa.bool_()),
            ("reasons", pa.list_(pa.string())),
            ("record_id", pa.string()),
            ("time_us", pa.int64()),
            ("received_us", pa.int64()),
            *((rule.name, pa.int64() if rule.kind == "amount" else pa.string()) for rule in payload_rules(stream)),
            ("region", pa.string()),
            ("id_hash", pa.uint64()),
        ]
    )


# --- one line, every rule


@dataclass
class Judged:
    """A line by all rules that hang on no limits: valid with its ``fields``, or not and why."""

    reasons: list[str] = field(default_factory=list)
    record_id: str | None = None
    time_us: int | None = None
    received_us: int | None = None
    region: str | None = None  # of a value
    fields: dict[str, Any] | None = None  # of payload_rules


_REGION_NAME = re.compile(r"[a-z0-9-]{1,32}")
_RFC_3339 = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))"
)
_YEAR_1_US = (date(1, 1, 1).toordinal() - date(1970, 1, 1).toordinal()) * 86_400_000_000
_YEAR_10000_US = (date(9999, 12, 31).toordinal() + 1 - date(1970, 1, 1).toordinal()) * 86_400_000_000


class _Twice(dict[str, Any]):
    """An object in which a key occurs twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _Twice(made)


def _no_constant(text: str) -> Any:
    raise ValueError(text)


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def read_time(text: str) -> int | str:
    """Microseconds since the epoch of an RFC 3339 time with a zone; or what is wrong with it: "format" or "precision".

    Second 60 and what an offset leads out of the years 1 to 9999 are of no format, a fraction of a microsecond is of no precision.
    """
    found = _RFC_3339.fullmatch(text)
    if found is None:
        return "format"
    year, month, day, hour, minute, second = (int(part) for part in found.groups()[:6])
    fraction, sign, ahead_hours, ahead_minutes = found.groups()[6:]
    if hour > 23 or minute > 59 or second > 59:
        return "format"
    try:
        days = date(year, month, day).toordinal() - date(1970, 1, 1).toordinal()
    except ValueError:
        return "format"
    minutes = days * 1440 + hour * 60 + minute
    if sign:
        if int(ahead_hours) > 23 or int(ahead_minutes) > 59:
            return "format"
        ahead = int(ahead_hours) * 60 + int(ahead_minutes)
        minutes += -ahead if sign == "+" else ahead
    digits = fraction or ""
    micros = (minutes * 60 + second) * 1_000_000 + int(f"{digits[:6]:0<6}")
    if not _YEAR_1_US <= micros < _YEAR_10000_US:
        return "format"
    return "precision" if digits[6:].strip("0") else micros


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from an escape
        return False
    return True


def _wrong(rule: Rule, value: Any) -> str | None:
    """What is wrong with a present field that is no time, None if nothing is."""
    if rule.kind == "amount":
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{rule.name}_type"
        return None if 0 <= value <= rule.most else f"{rule.name}_range"
    if not isinstance(value, str):
        return f"{rule.name}_type"
    if not _is_utf8(value):
        return "invalid_unicode"
    if rule.kind == "id" and not 0 < len(value) <= 128:
        return f"{rule.name}_length"
    if rule.kind == "choice" and value not in rule.choices:
        return f"{rule.name}_unknown"
    if rule.kind == "region" and not _REGION_NAME.fullmatch(value):
        return "region_format"
    return None


def _load(raw: bytes, judged: Judged, *, is_terminated: bool) -> dict[str, Any] | None:
    """The object that a line is; None with the reasons added if it is none."""
    reasons = judged.reasons
    if len(raw) > LONGEST_LINE:
        reasons.append("line_too_long")
        return None
    if raw.endswith(b"\r"):
        reasons.append("crlf")
    if raw.startswith(b"\xef\xbb\xbf"):
        reasons.append("byte_order_mark")
    if b"\0" in raw:
        reasons.append("nul_byte")
    if not raw.strip(b" \t\r"):
        reasons.append("blank_line")
        return None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        reasons.append("invalid_utf8")
        return None
    try:
        found = _JSON.decode(text.strip(" \t\r"))  # of what JSON calls white space, not of what Python does
    except (ValueError, RecursionError):
        if "byte_order_mark" not in reasons and "nul_byte" not in reasons:
            reasons.append("not_json")
        if not is_terminated:
            reasons.append("unterminated_line")
        return None
    if not isinstance(found, dict):
        reasons.append("not_an_object")
        return None
    if isinstance(found, _Twice):
        reasons.append("duplicate_key")
    return found


def judge_line(raw: bytes, stream: str, folder: str | None, *, is_terminated: bool = True) -> Judged:
    """Judge one line, without its line feed, of a file in the folder of region ``folder``; None: a value, which may name any."""
    judged = Judged()
    found = _load(raw, judged, is_terminated=is_terminated)
    if found is None:
        return judged
    fields: dict[str, Any] = {}
    for rule in RULES[stream]:
        value = found.get(rule.name)
        wrong = None
        if value is None:
            wrong = f"{rule.name}_missing" if rule.is_required else None
            value = 0 if rule.kind == "amount" and not wrong else None
        elif (wrong := _wrong(rule, value)) is None and rule.kind == "time":
            micros = read_time(value)
            value, wrong = (micros, None) if isinstance(micros, int) else (None, f"{rule.name}_{micros}")
        if wrong:
            judged.reasons.append(wrong)
        fields[rule.name] = None if wrong else value
    if folder is not None and fields["region"] not in (None, folder):
        judged.reasons.append("region_mismatch")
    if folder is not None and not _REGION_NAME.fullmatch(folder):
        judged.reasons.append("folder_region_format")
    id_name, time_name = ID_AND_TIME[stream]
    judged.record_id, judged.time_us, judged.received_us = fields[id_name], fields[time_name], fields["received_at"]
    if not judged.reasons:
        judged.region = fields["region"] if folder is None else None
        judged.fields = {rule.name: fields[rule.name] for rule in payload_rules(stream)}
    return judged


# --- a block of lines


def _struct(stream: str) -> type[msgspec.Struct]:
    required: list[tuple[str, Any]] = []
    optional: list[tuple[str, Any, Any]] = []
    for rule in RULES[stream]:
        kind: Any = str
        if rule.kind == "id":
            kind = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
        elif rule.kind == "choice":
            kind = Literal.__getitem__(rule.choices)
        elif rule.kind == "amount":  # of int alone the decoder would take 1.0 for 1
            kind = Annotated[int, msgspec.Meta(ge=0, le=rule.most)] | float
        if rule.is_required:
            required.append((rule.name, kind))
        else:
            optional.append((rule.name, kind | None, None))
    return msgspec.defstruct(f"_{stream}", [*required, *optional], gc=False)


_ANYTHING = msgspec.json.Decoder()
_DECODERS = {stream: msgspec.json.Decoder(_struct(stream)) for stream in RULES}
_NO_TIME = np.iinfo(np.int64).min
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def read_times(texts: pa.StringArray) -> Ints:
    """Microseconds since the epoch of times, _NO_TIME where ``read_time`` gives none; of a null as well.

    Times in UTC (``Z``) are read by their digits' columns, all of one length at once.
    """
    count = len(texts)
    made = np.full(count, _NO_TIME, dtype=np.int64)
    offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)[texts.offset : texts.offset + count + 1]
    if not count or offsets[-1] == offsets[0]:
        return made
    octets = np.frombuffer(texts.buffers()[2], dtype=np.uint8)
    sizes = np.diff(offsets)
    left = sizes > 0
    for size in (20, *range(22, 28)):
        chosen = np.flatnonzero(sizes == size)
        if len(chosen):
            starts = offsets[chosen]
            made[chosen] = _utc_times(octets[starts[None, :] + np.arange(size, dtype=np.int32)[:, None]])
            left[chosen] = made[chosen] == _NO_TIME
    for at in np.flatnonzero(left).tolist():
        micros = read_time(texts[at].as_py())
        made[at] = micros if isinstance(micros, int) else _NO_TIME
    return made


def _utc_times(text: npt.NDArray[np.uint8]) -> Ints:
    """Of times of one length, a row of ``text`` for each place; _NO_TIME where one is not of the form yyyy-mm-ddThh:mm:ss[.f]Z."""
    form = "0000-00-00T00:00:00" + ("." + "0" * (len(text) - 21) if len(text) > 20 else "") + "Z"
    good = np.ones(text.shape[1], dtype=bool)
    digits = text - np.uint8(48)  # what is below 0 wraps around to above 9
    for place, octet in enumerate(form.encode()):
        good &= digits[place] < 10 if octet == 48 else text[place] == octet

    def number(first: int, end: int) -> npt.NDArray[np.int32]:
        value: npt.NDArray[np.int32] = digits[first].astype(np.int32)
        for place in range(first + 1, end):
            value = value * 10 + digits[place]
        return value

    year, month, day = number(0, 4), number(5, 7), number(8, 10)
    hour, minute, second = number(11, 13), number(14, 16), number(17, 19)
    is_leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    in_year = np.clip(month, 1, 12)
    longest = np.array([31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31], dtype=np.int32)
    before = np.concatenate(([0], np.cumsum(longest)[:-1])).astype(np.int32)
    good &= (year >= 1) & (month == in_year) & (day >= 1) & (day <= longest[in_year - 1] + (is_leap & (month == 2)))
    good &= (hour < 24) & (minute < 60) & (second < 60)
    past = year - 1
    days = past * 365 + past // 4 - past // 100 + past // 400 + before[in_year - 1] + (is_leap & (month > 2)) + day
    seconds = (days - date(1970, 1, 1).toordinal()).astype(np.int64) * 86_400 + (hour * 3600 + minute * 60 + second)
    micros = seconds * 1_000_000
    if len(text) > 20:
        micros += number(20, len(text) - 1).astype(np.int64) * 10 ** (27 - len(text))
    return np.where(good, micros, _NO_TIME)


def _decoded(lines: Sequence[bytes], stream: str) -> tuple[list[msgspec.Struct], list[int]]:
    """The records of the lines that the decoder takes, and the places of the others."""
    decode = _DECODERS[stream].decode
    records: list[msgspec.Struct] = []
    odd: list[int] = []
    take = records.append
    for line in lines:
        try:
            take(decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            odd.append(len(records) + len(odd))
    return records, odd


def _quotation_marks(arrays: dict[str, pa.Array], stream: str, count: int) -> Ints:
    """How many of them the records account for: two a key, two a text."""
    made = np.zeros(count, dtype=np.int64)
    for rule in RULES[stream]:
        marks = 2 if rule.kind == "amount" else 4
        array = arrays[rule.name]
        made += marks * array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else marks
    return made


def _arrays(records: list[msgspec.Struct], stream: str) -> tuple[dict[str, pa.Array], Mask]:
    """The fields as columns, times still texts; and which records have no float where an integer must stand."""
    good = np.ones(len(records), dtype=bool)
    arrays = {}
    for rule in RULES[stream]:
        values: list[Any] = list(map(attrgetter(rule.name), records))
        if rule.kind == "amount":
            if float in set(map(type, values)):
                good &= np.fromiter((type(value) is not float for value in values), dtype=bool, count=len(values))
                values = [None if type(value) is float else value for value in values]
            arrays[rule.name] = pa.array(values, pa.int64())
        else:
            arrays[rule.name] = pa.array(values, pa.string())
    return arrays, good


def _marks(value: Any) -> int:
    """The quotation marks that a decoded value must have had at the least: two a key, two a text."""
    if type(value) is dict:
        return 2 * len(value) + sum(map(_marks, value.values()))
    if type(value) is list:
        return sum(map(_marks, value))
    return 2 if type(value) is str else 0


def _has_keys_once(line: bytes) -> bool:
    """Whether a line that may have nulls and unknown fields surely has no key twice."""
    try:
        return line.count(b'"') == _marks(_ANYTHING.decode(line))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _keys_once(data: bytes, lines: list[bytes], places: Ints, expected: Ints) -> Mask | bool:
    """Which records have no key twice: those that account for all quotation marks of their lines, or do so when read once more.

    A line never has fewer than its record accounts for, so equal sums say that all do (and that lines without a record have none).
    """
    marks = np.frombuffer(data, dtype=np.uint8) == ord('"')
    if np.count_nonzero(marks) == expected.sum():
        return True
    counted = np.diff(np.cumsum(marks, dtype=np.int64)[_line_ends(data) - 1], prepend=0)[places]
    once: Mask = counted == expected
    for at in np.flatnonzero(~once).tolist():
        once[at] = _has_keys_once(lines[places[at]])
    return once


def _line_ends(data: bytes) -> Ints:
    """The places just behind the lines."""
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 10) + 1
    return ends if data.endswith(b"\n") else np.append(ends, len(data))


def _certainly_valid(data: bytes, lines: list[bytes], stream: str, folder: str | None) -> tuple[Ints, pa.Table]:
    """The lines that are valid beyond doubt: their places (from 0) and their records (without their lines' numbers)."""
    records, odd = _decoded(lines, stream)
    places = np.delete(np.arange(len(lines)), odd)
    arrays, good = _arrays(records, stream)
    expected = _quotation_marks(arrays, stream, len(records))
    good &= _keys_once(data, lines, places, expected)
    if b"\r" in data or max(map(len, lines)) > LONGEST_LINE:
        good &= np.fromiter((len(line) <= LONGEST_LINE and not line.endswith(b"\r") for line in lines), dtype=bool)[places]
    for rule in RULES[stream]:
        array = arrays[rule.name]
        if rule.kind == "time":
            micros = read_times(array)
            absent = array.is_null().to_numpy(zero_copy_only=False)
            good &= (micros != _NO_TIME) | absent
            arrays[rule.name] = pa.array(micros, mask=absent)
        elif rule.kind == "region" and folder is None:
            named = pc.match_substring_regex(array, f"^{_REGION_NAME.pattern}$")
            good &= pc.fill_null(named, True).to_numpy(zero_copy_only=False)
        elif rule.kind == "region":
            good &= pc.fill_null(pc.equal(array, folder), True).to_numpy(zero_copy_only=False)
            good &= folder is not None and _REGION_NAME.fullmatch(folder) is not None
        elif rule.kind == "amount":
            arrays[rule.name] = pc.fill_null(array, 0)
    id_name, time_name = ID_AND_TIME[stream]
    columns = {
        "record_id": arrays[id_name],
        "time_us": arrays[time_name],
        "received_us": arrays["received_at"],
        **{rule.name: arrays[rule.name] for rule in payload_rules(stream)},
        "region": arrays["region"] if folder is None else pa.nulls(len(records), pa.string()),
        "id_hash": _hashes(map(attrgetter(id_name), records)),
    }
    made = pa.table(columns)
    return (places, made) if good.all() else (places[good], made.filter(pa.array(good)))


def _hashes(ids: Iterable[str | None]) -> pa.Array:
    return pa.array([None if value is None else xxh3_64_intdigest(value.encode()) for value in ids], pa.uint64())


def _rejected(reason: str, line: int, stream: str) -> pa.Table:
    """The record that stands for what is no readable line."""
    return _table([(line, Judged([reason]))], stream)


def _table(judged: list[tuple[int, Judged]], stream: str) -> pa.Table:
    schema = record_schema(stream)
    rows = [
        {
            "line": line,
            "is_valid": one.fields is not None,
            "reasons": one.reasons or None,
            "record_id": one.record_id,
            "time_us": one.time_us,
            "received_us": one.received_us,
            "region": one.region,
            **(one.fields or {}),
        }
        for line, one in judged
    ]
    columns = [[row.get(name) for row in rows] for name in schema.names[:-1]]
    hashes = _hashes(one.record_id for _, one in judged)
    return pa.table([*(pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=False)), hashes], schema=schema)


def parse_block(data: bytes, first: int, stream: str, folder: str) -> pa.Table:
    """The records (``record_schema``) of at least one whole line, numbered from ``first``. The last one may lack its line feed."""
    lines = data.split(b"\n")
    is_terminated = not lines[-1]
    if is_terminated:
        lines.pop()
    places, table = _certainly_valid(data, lines, stream, folder)
    parts = []
    if count := table.num_rows:
        first_columns = [pa.array(places + first), pa.repeat(True, count), pa.nulls(count, pa.list_(pa.string()))]
        parts.append(pa.table([*first_columns, *table.columns], schema=record_schema(stream)))
    if len(places) < len(lines):
        rest = np.delete(np.arange(len(lines)), places).tolist()
        last = len(lines) - 1
        for start in range(0, len(rest), _JUDGED_AT_ONCE):
            judged = [
                (first + at, judge_line(lines[at], stream, folder, is_terminated=is_terminated or at < last))
                for at in rest[start : start + _JUDGED_AT_ONCE]
            ]
            parts.append(_table(judged, stream))
    return parts[0] if len(parts) == 1 else pa.concat_tables(parts).sort_by("line")


# --- values of Kafka's records


def parse_values(values: Sequence[bytes | None], offsets: Ints, stream: str) -> pa.Table:
    """The records (``record_schema``) of values, by their ascending ``offsets``. A value is one record, whatever is in it."""
    plain = [value is not None and b"\n" not in value and 0 < len(value) <= LONGEST_LINE for value in values]
    lines = [value for value, is_plain in zip(values, plain, strict=True) if is_plain and value is not None]
    at = np.flatnonzero(plain)
    parts, sure = [], np.zeros(len(values), dtype=bool)
    if lines:
        places, table = _certainly_valid(b"\n".join(lines), lines, stream, None)
        taken = at[places]
        sure[taken] = True
        count = table.num_rows
        first_columns = [pa.array(offsets[taken]), pa.repeat(True, count), pa.nulls(count, pa.list_(pa.string()))]
        parts.append(pa.table([*first_columns, *table.columns], schema=record_schema(stream)))
    rest = np.flatnonzero(~sure).tolist()
    for start in range(0, len(rest), _JUDGED_AT_ONCE):
        judged = [(int(offsets[n]), judge_line(values[n] or b"", stream, None)) for n in rest[start : start + _JUDGED_AT_ONCE]]
        parts.append(_table(judged, stream))
    if not parts:
        return record_schema(stream).empty_table()
    return parts[0] if len(parts) == 1 else pa.concat_tables(parts).sort_by("line")


# --- a file


class _Broken(Exception):
    """A file ends in a wrong way or cannot be read; the message is the reason."""


def _stored(handle: BinaryIO, size: int, on_read: Callable[[int], None]) -> Iterator[bytes]:
    while True:
        try:
            block = handle.read(size)
        except OSError:
            raise _Broken(UNREADABLE) from None
        if not block:
            return
        on_read(len(block))
        yield block


def _last_words(state: zlib._Decompress, stored: bytes) -> bytes:
    """All that can be unpacked of ``stored``, somewhere in which an octet is wrong: what stands before it."""
    made = []
    while stored:
        half = stored[: (len(stored) + 1) // 2]
        before = state.copy()
        try:
            made.append(state.decompress(half))
            stored = stored[len(half) :]
        except zlib.error:
            if len(half) == 1:
                break
            state, stored = before, half
    return b"".join(made)


def _unpack(state: zlib._Decompress, stored: bytes) -> Iterator[bytes]:
    """What ``stored`` adds to a member, at most READ_BYTES at a time."""
    while True:
        before = state.copy()
        try:
            data = state.decompress(stored, READ_BYTES)
        except zlib.error:
            yield _last_words(before, stored)
            raise _Broken("corrupt_gzip") from None
        if data:
            yield data
        stored = state.unconsumed_tail
        if state.eof or (not stored and len(data) < READ_BYTES):
            return


def _unpacked(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a gzip file: members, with zeros between and behind them. Raises _Broken where it ends wrongly."""
    state = zlib.decompressobj(wbits=31)
    is_begun = False
    for block in blocks:
        left = block
        while left:
            if state.eof:
                left = left.lstrip(b"\0")
                if not left:
                    break
                state = zlib.decompressobj(wbits=31)
            is_begun = True
            yield from _unpack(state, left)
            left = state.unused_data
    if not is_begun:
        raise _Broken("empty_gzip")
    if not state.eof:
        raise _Broken("truncated_gzip")


def _open(path: Path) -> BinaryIO:
    """Open a landing file. A pipe in its place does not block; whatever is not a regular file raises OSError, as a link does."""
    if path.parent.is_symlink():
        raise OSError(f"{path.parent} is a symbolic link")
    handle = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError(f"{path} is not a regular file")
    return handle


def _filled(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces, small ones joined: a file may consist of a million members of a few bytes each."""
    small: list[bytes] = []
    size = 0
    try:
        for piece in pieces:
            if small and size + len(piece) > READ_BYTES // 2:
                yield b"".join(small)
                small, size = [], 0
            if len(piece) > READ_BYTES // 2:
                yield piece
            else:
                small.append(piece)
                size += len(piece)
    except (_Broken, OSError):
        if small:
            yield b"".join(small)
        raise
    if small:
        yield b"".join(small)


def parse_file(path: Path, stream: str, folder: str, on_read: Callable[[int], None]) -> Iterator[pa.Table]:
    """All records of a landing file, block by block; ``on_read`` is told of the stored bytes as they are read.

    Memory is bounded by a few times READ_BYTES, whatever the length of a line.
    """
    line = 1  # the number of the next one
    rest = b""
    is_in_long_line = False
    try:
        with _open(path) as handle:
            is_packed = path.name.endswith(".gz")
            stored = _stored(handle, _STORED_BYTES if is_packed else READ_BYTES, on_read)
            for block in _filled(_unpacked(stored)) if is_packed else stored:
                if is_in_long_line:
                    at = block.find(b"\n")
                    if at < 0:
                        continue
                    yield _rejected("line_too_long", line, stream)
                    line, block, is_in_long_line = line + 1, block[at + 1 :], False
                data = rest + block
                cut = data.rfind(b"\n") + 1
                rest = data[cut:]
                if cut:
                    table = parse_block(data[:cut], line, stream, folder)
                    line += table.num_rows
                    yield table
                if len(rest) > LONGEST_LINE:
                    rest, is_in_long_line = b"", True
    except (_Broken, OSError) as fault:
        nothing_read = line == 1 and not rest and not is_in_long_line
        yield _rejected(str(fault) if isinstance(fault, _Broken) else UNREADABLE, 0 if nothing_read else line, stream)
        return
    if is_in_long_line:
        yield _rejected("line_too_long", line, stream)
    elif rest:
        yield parse_block(rest, line, stream, folder)
