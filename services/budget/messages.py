"""A message of `ads-metrics` as this service needs it; see docs/publishing.md."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_MINUTE_MS = 60_000
_LARGEST = 10**18  # nanos and counts of one increment; sums of 64 bits have room above it
_LATEST_MS = 253_402_300_799_999  # the end of the year 9999


class BadMessage(ValueError):
    """What a message breaks, in a few words."""


@dataclass(frozen=True, slots=True)
class Increment:
    """One row of `minute_metrics`. A later ``version`` of the same uuid replaces it. ``committed_ms`` since the epoch."""

    uuid: bytes
    version: int
    event_minute_ms: int
    event_date: str
    campaign_id: str
    store_id: str
    currency: str
    impressions: int
    clicks: int
    spend_nanos: int
    committed_ms: int


def parse(key: bytes | None, value: bytes | None) -> Increment:
    """The increment of a message. Raises BadMessage; fields that are not needed here are not looked at."""
    if not value:
        raise BadMessage("no value")
    try:
        told = json.loads(value)
    except (ValueError, RecursionError):
        raise BadMessage("not JSON") from None
    if not isinstance(told, dict):
        raise BadMessage("not a JSON object")
    name = _text(told, "record_uuid", 36)
    try:
        identity = uuid.UUID(name)
    except ValueError:
        raise BadMessage("record_uuid is not a UUID") from None
    if key != name.encode():
        raise BadMessage("the message's key is not its record_uuid")
    minute = _number(told, "event_minute", 0, _LATEST_MS)
    day = datetime.fromtimestamp(minute / 1000, UTC).date().isoformat()
    if minute % _MINUTE_MS:
        raise BadMessage("event_minute is not a whole minute")
    if _text(told, "event_date", 10) != day:
        raise BadMessage("event_date is not the day of event_minute")
    return Increment(
        uuid=identity.bytes,
        version=_number(told, "version", 0, _LARGEST),
        event_minute_ms=minute,
        event_date=day,
        campaign_id=_text(told, "campaign_id", 128),
        store_id=_text(told, "store_id", 128),
        currency=_text(told, "currency", 3),
        impressions=_number(told, "impressions", -_LARGEST, _LARGEST),
        clicks=_number(told, "clicks", -_LARGEST, _LARGEST),
        spend_nanos=_number(told, "spend_nanos", -_LARGEST, _LARGEST),
        committed_ms=_number(told, "committed_at", 0, _LATEST_MS),
    )


def _text(told: dict[str, Any], name: str, longest: int) -> str:
    value = told.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise BadMessage(f"{name} is not a text of 1 to {longest} characters")
    return value


def _number(told: dict[str, Any], name: str, lowest: int, highest: int) -> int:
    value = told.get(name)
    if type(value) is not int or not lowest <= value <= highest:
        raise BadMessage(f"{name} is not a whole number from {lowest} to {highest}")
    return value
