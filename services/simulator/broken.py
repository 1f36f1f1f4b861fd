"""Lines that break the input contract: each kind turns a good line into a bad one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Breakage:
    """A way to break a line. ``keeps_time``: the line is still a JSON object whose event_time is a valid time."""

    name: str
    keeps_time: bool
    apply: Callable[[bytes], bytes]


def dump(record: Record) -> bytes:
    """One compact JSON line without its newline."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()


def _edit(change: Callable[[Record], None]) -> Callable[[bytes], bytes]:
    def apply(line: bytes) -> bytes:
        record = json.loads(line)
        change(record)
        return dump(record)

    return apply


def _set(name: str, value: object) -> Callable[[bytes], bytes]:
    return _edit(lambda record: record.update({name: value}))


def _drop(name: str) -> Callable[[bytes], bytes]:
    return _edit(lambda record: record.pop(name))


def _without_zone(name: str) -> Callable[[bytes], bytes]:
    return _edit(lambda record: record.update({name: record[name][:19]}))


ANY_LINE: Sequence[Breakage] = (
    Breakage("truncated", False, lambda line: line[: len(line) * 3 // 5]),
    Breakage("not_json", False, lambda line: b"Traceback (most recent call last): connection reset by peer"),
    Breakage("not_text", False, lambda line: b"\xff\xfe\x1f\x8b" + line[:40]),
    Breakage("array", False, lambda line: b"[" + line + b"]"),
)

EVENT_BREAKAGES: Sequence[Breakage] = (
    *ANY_LINE,
    Breakage("no_event_id", True, _drop("event_id")),
    Breakage("empty_event_id", True, _set("event_id", "")),
    Breakage("long_event_id", True, _set("event_id", "e" * 129)),
    Breakage("number_event_id", True, _set("event_id", 4711)),
    Breakage("no_event_time", False, _drop("event_time")),
    Breakage("event_time_without_zone", False, _without_zone("event_time")),
    Breakage("event_time_is_number", False, _set("event_time", 1_748_822_400)),
    Breakage("event_time_no_such_day", False, _set("event_time", "2025-02-30T10:00:00Z")),
    Breakage("received_at_unreadable", True, _set("received_at", "yesterday")),
    Breakage("unknown_event_type", True, _set("event_type", "view")),
    Breakage("no_campaign_id", True, _drop("campaign_id")),
    Breakage("null_ad_id", True, _set("ad_id", None)),
    Breakage("no_store_id", True, _drop("store_id")),
    Breakage("no_user_id", True, _drop("user_id")),
    Breakage("no_currency", True, _drop("currency")),
    Breakage("currency_in_small_letters", True, _set("currency", "eur")),
    Breakage("currency_of_four_letters", True, _set("currency", "EURO")),
    Breakage("price_negative", True, _set("price_micros", -1)),
    Breakage("price_is_text", True, _set("price_micros", "250000")),
    Breakage("price_is_fraction", True, _set("price_micros", 0.25)),
    Breakage("price_over_limit", True, _set("price_micros", 10**12 + 1)),
    Breakage("region_of_another_folder", True, _set("region", "ap-south")),
    Breakage("placement_is_number", True, _set("placement", 3)),
)

ORDER_BREAKAGES: Sequence[Breakage] = (
    *ANY_LINE,
    Breakage("no_order_id", True, _drop("order_id")),
    Breakage("order_time_without_zone", False, _without_zone("order_time")),
    Breakage("unknown_status", True, _set("status", "shipped")),
    Breakage("no_user_id", True, _drop("user_id")),
    Breakage("total_negative", True, _set("total_micros", -100)),
    Breakage("total_is_text", True, _set("total_micros", "12.50")),
    Breakage("total_over_limit", True, _set("total_micros", 10**15 + 1)),
    Breakage("currency_in_small_letters", True, _set("currency", "usd")),
    Breakage("region_of_another_folder", True, _set("region", "ap-south")),
)


def from_topics(breakages: Sequence[Breakage]) -> Sequence[Breakage]:
    """Adapt breakages to topics, where no folder contradicts a region: an invalid region name replaces that breakage."""
    unreadable = Breakage("region_is_no_name", True, _set("region", "AP South"))
    return [unreadable if kind.name == "region_of_another_folder" else kind for kind in breakages]
