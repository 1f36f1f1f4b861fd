"""The auditor's own contract: what a line of a landing file, or the value of a Kafka record, must be.

``RULES`` is the one list of fields; the columns of the records are derived from it. ``judge_line`` applies every rule to one line.
Rules that depend on the limits of a batch (too early, too far ahead of its receipt) are in the recounts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, NoReturn

import pyarrow as pa

LONGEST_LINE = 65_536  # bytes, without the line feed

# The active codes of ISO 4217, without XXX (no currency) and XTS (for tests).
ISO_4217 = (
    "AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF CHW "
    "CLF CLP CNY COP COU CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF "
    "IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP "
    "MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG "
    "SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD USN UYI UYU UYW UZS VED VES VND "
    "VUV WST XAF XAG XAU XCD XCG XOF XPD XPF XPT XSU XUA YER ZAR ZMW ZWG"
)


@dataclass(frozen=True)
class FieldRule:
    """What one field must be: an id, a text, one of ``choices``, an amount from 0 to ``most``, a time, or a region."""

    name: str
    kind: Literal["id", "text", "choice", "amount", "time", "region"]
    is_required: bool = True
    choices: tuple[str, ...] = ()
    most: int = 0


_CURRENCY = FieldRule("currency", "choice", choices=tuple(ISO_4217.split()))
_RECEIVED = FieldRule("received_at", "time", is_required=False)
_REGION = FieldRule("region", "region", is_required=False)

RULES: dict[str, tuple[FieldRule, ...]] = {
    "events": (
        FieldRule("event_id", "id"),
        FieldRule("event_type", "choice", choices=("impression", "click")),
        FieldRule("event_time", "time"),
        _RECEIVED,
        _REGION,
        FieldRule("campaign_id", "id"),
        FieldRule("ad_id", "id"),
        FieldRule("store_id", "id"),
        FieldRule("user_id", "id"),
        FieldRule("impression_id", "text", is_required=False),
        FieldRule("placement", "text", is_required=False),
        FieldRule("price_micros", "amount", is_required=False, most=10**12),
        _CURRENCY,
        FieldRule("user_agent", "text", is_required=False),
    ),
    "orders": (
        FieldRule("order_id", "id"),
        FieldRule("order_time", "time"),
        _RECEIVED,
        _REGION,
        FieldRule("user_id", "id"),
        FieldRule("store_id", "id"),
        FieldRule("total_micros", "amount", most=10**15),
        _CURRENCY,
        FieldRule("status", "choice", choices=("placed", "cancelled")),
    ),
}
ID_AND_TIME = {"events": ("event_id", "event_time"), "orders": ("order_id", "order_time")}


PAYLOAD: dict[str, tuple[str, ...]] = {
    stream: tuple(rule.name for rule in rules if rule.kind not in ("time", "region") and rule.name != ID_AND_TIME[stream][0])
    for stream, rules in RULES.items()
}
"""The fields except the id, the times and the region. Each is a column of the records, under its own name."""


def record_schema(stream: str) -> pa.Schema:
    """Return the schema of records: one row per line or value offered.

    - ``line`` counts from 1; 0 stands for a file of which nothing could be read. For a value it is the record's offset.
    - ``reasons`` is null for a valid record and never empty for another one.
    - ``record_id``, ``time_us`` (event_time or order_time, microseconds since the epoch) and ``received_us`` are set wherever they
      can be read; ``received_us`` is null where the record has none. All other fields are set for valid records only.
    - ``region`` is the one that a valid value names. It is null for lines, which belong to the region of their folder.
    - ``id_hash`` is xxh3-64 of the id in UTF-8. An absent price is 0.
    """
    kinds = {rule.name: pa.int64() if rule.kind == "amount" else pa.string() for rule in RULES[stream]}
    return pa.schema(
        {
            "line": pa.int64(),
            "is_valid": pa.bool_(),
            "reasons": pa.list_(pa.string()),
            "record_id": pa.string(),
            "time_us": pa.int64(),
            "received_us": pa.int64(),
            **{name: kinds[name] for name in PAYLOAD[stream]},
            "region": pa.string(),
            "id_hash": pa.uint64(),
        }
    )


@dataclass
class Judged:
    """A line after every rule except those of the limits: valid with its ``fields`` (PAYLOAD), or invalid with the ``reasons``."""

    reasons: list[str] = field(default_factory=list)
    record_id: str | None = None
    time_us: int | None = None
    received_us: int | None = None
    region: str | None = None  # of a value
    fields: dict[str, Any] | None = None


_SURROGATE = re.compile("[\ud800-\udfff]")  # an escape of half a surrogate pair, which UTF-8 cannot encode
REGION_NAME = re.compile(r"[a-z0-9-]{1,32}")
_RFC_3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[Tt](?:[01][0-9]|2[0-3]):[0-9]{2}:[0-9]{2})(?:\.([0-9]+))?(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))"
)
_EPOCH = datetime(1970, 1, 1)
_YEAR_1_SECONDS = (datetime.min - _EPOCH).days * 86_400
_YEAR_10000_SECONDS = ((datetime.max - _EPOCH).days + 1) * 86_400


class _DuplicateKeys(dict[str, Any]):
    """An object in which a key occurs twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _DuplicateKeys(made)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def read_time(text: str) -> int | str:
    """Return the microseconds since the epoch of an RFC 3339 time with a zone, or what is wrong with it: "format" or "precision".

    Second 60, and a time that its offset moves out of the years 1 to 9999, have a wrong format. A fraction of a microsecond has a
    wrong precision.
    """
    found = _RFC_3339.fullmatch(text)
    if found is None:
        return "format"
    local, fraction, sign, hours, minutes = found.groups()
    try:
        seconds = (datetime.fromisoformat(local) - _EPOCH) // timedelta(seconds=1)
    except ValueError:  # no such day, minute or second
        return "format"
    if sign:
        if int(hours) > 23 or int(minutes) > 59:
            return "format"
        ahead = int(hours) * 3600 + int(minutes) * 60
        seconds += -ahead if sign == "+" else ahead
        if not _YEAR_1_SECONDS <= seconds < _YEAR_10000_SECONDS:
            return "format"
    if fraction is None:
        return seconds * 1_000_000
    if len(fraction) > 6 and fraction[6:].strip("0"):
        return "precision"
    return seconds * 1_000_000 + int(f"{fraction[:6]:0<6}")


def _wrong(rule: FieldRule, value: object) -> str | None:
    """Return what is wrong with a field that is present and not a time; None if nothing is."""
    if rule.kind == "amount":
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{rule.name}_type"
        return None if 0 <= value <= rule.most else f"{rule.name}_range"
    if not isinstance(value, str):
        return f"{rule.name}_type"
    if _SURROGATE.search(value):
        return "invalid_unicode"
    if rule.kind == "id" and not 0 < len(value) <= 128:
        return f"{rule.name}_length"
    if rule.kind == "choice" and value not in rule.choices:
        return f"{rule.name}_unknown"
    if rule.kind == "region" and not REGION_NAME.fullmatch(value):
        return "region_format"
    return None


def _load(raw: bytes, judged: Judged, *, is_terminated: bool) -> dict[str, Any] | None:
    """Return the JSON object of a line; None, with the reasons added, if it is not one."""
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
        found = _JSON.decode(raw.decode().strip(" \t\r"))  # white space as JSON defines it
    except UnicodeDecodeError:
        reasons.append("invalid_utf8")
        return None
    except (ValueError, RecursionError):
        if "byte_order_mark" not in reasons and "nul_byte" not in reasons:
            reasons.append("not_json")
        if not is_terminated:
            reasons.append("unterminated_line")
        return None
    if not isinstance(found, dict):
        reasons.append("not_an_object")
        return None
    if isinstance(found, _DuplicateKeys):
        reasons.append("duplicate_key")
    return found


def judge_line(raw: bytes, stream: str, folder: str | None, *, is_terminated: bool = True) -> Judged:
    """Apply every rule to one line, without its line feed.

    ``folder`` is the region of the file's folder; None for a value, which may name any region.
    """
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
    if folder is not None and not REGION_NAME.fullmatch(folder):
        judged.reasons.append("folder_region_format")
    id_name, time_name = ID_AND_TIME[stream]
    judged.record_id, judged.time_us, judged.received_us = fields[id_name], fields[time_name], fields["received_at"]
    if not judged.reasons:
        judged.region = fields["region"] if folder is None else None
        judged.fields = {name: fields[name] for name in PAYLOAD[stream]}
    return judged
