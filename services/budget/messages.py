"""Parses the messages of `ads-metrics` (docs/publishing.md)."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

_MINUTE_MS = 60_000
_LARGEST = 10**18  # nanos and counts of one increment; sums of 64 bits have room above it
_LATEST_MS = 253_402_300_799_999  # the end of the year 9999


class BadMessage(ValueError):
    """A message breaks a rule; the text names it."""


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
    """Return the increment of a message. Ignores fields that this service does not need. Raises BadMessage."""
    if not value:
        raise BadMessage("no value")
    try:
        fields = json.loads(value)
    except (ValueError, RecursionError):
        raise BadMessage("not JSON") from None
    if not isinstance(fields, dict):
        raise BadMessage("not a JSON object")
    name = _text(fields, "record_uuid", 36)
    try:
        identity = uuid.UUID(name)
    except ValueError:
        raise BadMessage("record_uuid is not a UUID") from None
    if key != name.encode():
        raise BadMessage("the message's key is not its record_uuid")
    minute = _number(fields, "event_minute", 0, _LATEST_MS)
    day = datetime.fromtimestamp(minute / 1000, UTC).date().isoformat()
    if minute % _MINUTE_MS:
        raise BadMessage("event_minute is not a whole minute")
    if _text(fields, "event_date", 10) != day:
        raise BadMessage("event_date is not the day of event_minute")
    return Increment(
        uuid=identity.bytes,
        version=_number(fields, "version", 0, _LARGEST),
        event_minute_ms=minute,
        event_date=day,
        campaign_id=_text(fields, "campaign_id", 128),
        store_id=_text(fields, "store_id", 128),
        currency=_text(fields, "currency", 3),
        impressions=_number(fields, "impressions", -_LARGEST, _LARGEST),
        clicks=_number(fields, "clicks", -_LARGEST, _LARGEST),
        spend_nanos=_number(fields, "spend_nanos", -_LARGEST, _LARGEST),
        committed_ms=_number(fields, "committed_at", 0, _LATEST_MS),
    )


def _text(fields: dict[str, object], name: str, longest: int) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise BadMessage(f"{name} is not a text of 1 to {longest} characters")
    return value


def _number(fields: dict[str, object], name: str, lowest: int, highest: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not lowest <= value <= highest:
        raise BadMessage(f"{name} is not a whole number from {lowest} to {highest}")
    return value
