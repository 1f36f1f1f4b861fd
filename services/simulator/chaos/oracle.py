"""What a landing folder comes to, by the input contract, in plain Python: one line at a time, a dictionary of ids.

Written from the contract and the decisions, with the standard library only. It imports nothing of the project: a mistake of the
pipeline must not be able to hide in code that both share.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

HOUR = timedelta(hours=1)
GRACE = timedelta(minutes=15)
SKEW = timedelta(minutes=5)
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
LINE_BYTES = 65_536
# the currencies that the tests use: the oracle keeps no list of ISO 4217
CURRENCIES = ("EUR", "USD", "JPY", "GBP")

RFC3339 = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})[Tt](?P<clock>[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.(?P<fraction>[0-9]+))?"
    r"(?P<zone>[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
REGION = re.compile(r"[a-z0-9-]{1,32}")

EVENT_IDS = ("event_id", "campaign_id", "ad_id", "store_id", "user_id")
EVENT_TEXTS = ("impression_id", "placement", "user_agent")
ORDER_IDS = ("order_id", "user_id", "store_id")
MINUTE_KEYS = ("region", "campaign_id", "ad_id", "store_id", "placement", "currency")
MINUTE_MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")
# of the agents that the tests use: the oracle keeps no list of crawlers
CRAWLERS = ("curl", "Mozilla/5.0 (compatible; Googlebot/2.1)")
REPEATED_WITHIN = {"click": timedelta(hours=1), "impression": timedelta(minutes=1)}
MOST_CLICKS = 60  # of a user in an hour


@dataclass(frozen=True)
class Landed:
    """A landing file: its name under the landing folder, its bytes as stored and its time of modification."""

    name: str
    stored: bytes
    modified_ms: int

    @property
    def region(self) -> str:
        """The region that the folder names."""
        return self.name.split("/")[1]


@dataclass
class Books:
    """All that can be said of a landing folder.

    Times are datetimes in UTC; where a record has no received_at, the word INGESTED stands for the time of its batch.
    """

    events: dict[str, dict[str, Any]] = field(default_factory=dict)  # by event_id
    orders: dict[str, dict[str, Any]] = field(default_factory=dict)  # by order_id
    refused: dict[tuple[str, int], tuple[str, bytes]] = field(default_factory=dict)  # (file, line): outcome, raw bytes
    ledger: dict[tuple[str, str, datetime | None], Counter[str]] = field(default_factory=dict)  # by stream, region, hour
    minutes: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)  # minute, MINUTE_KEYS: MINUTE_MEASURES
    unread: set[str] = field(default_factory=set)  # files in a folder whose name is that of no region
    tokens: dict[str, str] = field(default_factory=dict)  # of people who were erased, by their ids

    def erase(self, tokens: dict[str, str]) -> None:
        """Let tokens take the place of the ids of people: of one person the same everywhere, so that nothing else changes."""
        self.tokens = dict(tokens)
        for row in (*self.events.values(), *self.orders.values()):
            row["user_id"] = tokens.get(row["user_id"], row["user_id"])


INGESTED = "ingested"


def hour_of(moment: datetime) -> datetime:
    """Return the hour in which a moment lies."""
    return moment.replace(minute=0, second=0, microsecond=0)


def instant(value: object) -> datetime | None:
    """A time of RFC 3339 with a zone that has no more than microseconds, in UTC; None for all else."""
    match = RFC3339.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    fraction = match["fraction"] or ""
    if fraction[6:].strip("0"):
        return None
    zone = "+00:00" if match["zone"] in "Zz" else match["zone"]
    try:
        moment = datetime.fromisoformat(f"{match['date']}T{match['clock']}.{fraction[:6]:0<6}{zone}")
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def record_of(line: bytes) -> dict[Any, Any] | None:
    """The JSON object that a line is, None if it is none. A name that occurs twice leaves ``None`` as an extra key."""

    def pairs(found: list[tuple[str, Any]]) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        made.update(found)
        if len(made) < len(found):
            made[None] = "a name occurs twice"
        return made

    def no_number(name: str) -> Any:
        raise ValueError(name)

    try:
        found = json.loads(line.decode("utf-8"), object_pairs_hook=pairs, parse_constant=no_number)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_text(value: object) -> bool:
    """A string that UTF-8 can hold: half a surrogate pair is no text."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def is_id(value: object) -> bool:
    """Return whether a value is a text of 1 to 128 characters."""
    return isinstance(value, str) and is_text(value) and 0 < len(value) < 129


def is_amount(value: object, most: int) -> bool:
    """Return whether a value is a whole number from 0 to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_valid(stream: str, record: dict[Any, Any], folder: str, now: datetime) -> bool:
    """Whether a record keeps the contract. A null is an absent field; ``now`` stands in for an absent received_at."""
    has = {name: value for name, value in record.items() if value is not None}
    if None in record or has.get("region", folder) != folder:
        return False
    if stream == "events":
        time = instant(has.get("event_time"))
        kept = (
            all(is_id(has.get(name)) for name in EVENT_IDS)
            and all(is_text(has.get(name, "")) for name in EVENT_TEXTS)
            and has.get("event_type") in ("impression", "click")
            and is_amount(has.get("price_micros", 0), 10**12)
        )
    else:
        time = instant(has.get("order_time"))
        kept = (
            all(is_id(has.get(name)) for name in ORDER_IDS)
            and has.get("status") in ("placed", "cancelled")
            and is_amount(has.get("total_micros"), 10**15)
        )
    received = instant(has["received_at"]) if "received_at" in has else now
    if not kept or has.get("currency") not in CURRENCIES or time is None or received is None:
        return False
    return time >= EARLIEST and time - received <= SKEW


def is_late(time: datetime, received: datetime) -> bool:
    """Return whether a record was received after its hour closed."""
    return received - hour_of(time) >= HOUR + GRACE


def lines_of(file: Landed) -> Iterator[tuple[int, bytes, bool]]:
    """(number, bytes, whole) of a file. What a gzip file holds behind its last line, when it does not end well, is not whole."""
    data, broken = (file.stored, False) if not file.name.endswith(".gz") else _unpacked(file.stored)
    *whole, rest = data.split(b"\n")
    number = 0
    for number, line in enumerate(whole, start=1):
        yield number, line, True
    if broken:
        yield (number + 1 if data else 0), rest, False
    elif rest:
        yield number + 1, rest, True


def _unpacked(stored: bytes) -> tuple[bytes, bool]:
    made, left = b"", stored
    while True:
        member = zlib.decompressobj(wbits=31)
        try:
            made += member.decompress(left)
        except zlib.error:
            return made, True
        if not member.eof:
            return made, True
        left = member.unused_data
        if not left:
            return made, False


class Campaigns:
    """What a campaign bills at a time, from the text of a CSV file."""

    def __init__(self, text: str) -> None:
        self._ranges = [
            (row["campaign_id"], row["billing_model"], instant(row["valid_from"]), instant(row["valid_to"]))
            for row in csv.DictReader(io.StringIO(text))
        ]

    def model(self, campaign: str, time: datetime) -> str | None:
        """Return the billing model of a campaign at a time; None if it has no price then."""
        for name, model, start, end in self._ranges:
            if name == campaign and start is not None and start <= time and (end is None or time < end):
                return model
        return None


def nanos(event_type: str, price_micros: int, model: str | None) -> int:
    """Return what an event costs, in nanos."""
    if model == "cpc" and event_type == "click":
        return price_micros * 1_000
    if model == "cpm" and event_type == "impression":
        return price_micros * 1_000 // 1_000  # of a thousand impressions
    return 0


def account(runs: Iterable[Iterable[Landed]], campaigns_csv: str, now: datetime) -> Books:
    """The books after some runs, each with the files that landed since the run before.

    ``now`` is any time at which the runs may have been: no record's fate may hang on which.
    """
    books, campaigns = Books(), Campaigns(campaigns_csv)
    for landed in runs:
        for file in sorted(landed, key=lambda f: (f.modified_ms, f.name)):
            if not REGION.fullmatch(file.region):
                books.unread.add(file.name)
                continue
            stream = file.name.split("/")[0]
            for number, line, whole in lines_of(file):
                _offer(books, campaigns, stream, file, number, line, whole, now)
    for event in books.events.values():
        _mark(event, ["crawler_user_agent"] if event["user_agent"] in CRAWLERS else [])
    _total(books)
    return books


def review(books: Books) -> None:
    """Mark all events by all rules, by what stands around them, in whatever order it came."""
    events = sorted(books.events.values(), key=lambda event: (event["event_time"], event["event_id"]))
    clicks = Counter((event["user_id"], hour_of(event["event_time"])) for event in events if event["event_type"] == "click")
    before: dict[tuple[str, str, str], datetime] = {}
    for event in events:
        kind, time = event["event_type"], event["event_time"]
        hits = ["crawler_user_agent"] if event["user_agent"] in CRAWLERS else []
        last = before.get((event["user_id"], event["ad_id"], kind))
        if last is not None and time - last < REPEATED_WITHIN[kind]:
            hits.append(f"repeat_{kind}")
        if kind == "click" and clicks[event["user_id"], hour_of(time)] > MOST_CLICKS:
            hits.append("click_rate")
        before[event["user_id"], event["ad_id"], kind] = time
        _mark(event, hits)
    _total(books)


def _mark(event: dict[str, Any], hits: list[str]) -> None:
    cost = event["spend_nanos"] + event.get("invalid_spend_nanos", 0)
    event.update(
        invalid_traffic_rule=hits[0] if hits else None,
        invalid_traffic_rules=hits or None,
        spend_nanos=0 if hits else cost,
        invalid_spend_nanos=cost if hits else 0,
    )


def _total(books: Books) -> None:
    """Minutes and ledger from the events."""
    books.minutes.clear()
    for cell in books.ledger.values():
        cell.pop("invalid_traffic", None)
        cell.pop("spend_nanos", None)
    for event in books.events.values():
        time, invalid = event["event_time"], event["invalid_traffic_rule"] is not None
        cell = books.ledger["events", event["region"], hour_of(time)]
        cell.update(invalid_traffic=int(invalid), spend_nanos=event["spend_nanos"])
        key = (time.replace(second=0, microsecond=0), *(event[name] for name in MINUTE_KEYS))
        minute = books.minutes.setdefault(key, [0] * len(MINUTE_MEASURES))
        minute[2 * invalid + (event["event_type"] == "click")] += 1
        minute[4] += event["spend_nanos"]
        minute[5] += event["invalid_spend_nanos"]


def _offer(
    books: Books, campaigns: Campaigns, stream: str, file: Landed, number: int, line: bytes, whole: bool, now: datetime
) -> None:
    readable = whole and len(line) <= LINE_BYTES
    record = record_of(line) if readable else None
    time = None if record is None else instant(record.get("event_time" if stream == "events" else "order_time"))
    cell = books.ledger.setdefault((stream, file.region, None if time is None else hour_of(time)), Counter())
    cell["offered"] += 1
    if record is None or line.endswith(b"\r") or not is_valid(stream, record, file.region, now):
        outcome = "rejected"
    elif stream == "events":
        outcome = _event(books, campaigns, record, file, number, now, cell)
    else:
        outcome = _order(books, record, file, number, now, cell)
    cell[outcome] += 1
    if outcome in ("rejected", "conflict"):
        books.refused[file.name, number] = (outcome, line)


def _event(
    books: Books, campaigns: Campaigns, record: dict[str, Any], file: Landed, number: int, now: datetime, cell: Counter[str]
) -> str:
    time = instant(record["event_time"])
    assert time is not None
    names = (*EVENT_IDS[1:], *EVENT_TEXTS, "event_type", "currency")
    payload: dict[str, Any] = {
        "event_time": time,
        "price_micros": record.get("price_micros") or 0,
        **{name: record.get(name) for name in names},
    }
    held = books.events.get(record["event_id"])
    if held is not None:
        return "duplicate" if all(held[name] == value for name, value in payload.items()) else "conflict"
    received = instant(record.get("received_at"))
    model = campaigns.model(payload["campaign_id"], time)
    event = {
        "event_id": record["event_id"],
        **payload,
        "received_at": received or INGESTED,
        "region": file.region,
        "billing_model": model,
        "spend_nanos": nanos(payload["event_type"], payload["price_micros"], model),
        "is_late": is_late(time, received or now),
        "source": (file.name, number),
    }
    books.events[record["event_id"]] = event
    cell.update(late=int(event["is_late"]), unpriced=int(model is None))
    return "accepted"


def _order(books: Books, record: dict[str, Any], file: Landed, number: int, now: datetime, cell: Counter[str]) -> str:
    """An order takes one placing and one cancellation, in whatever order; a cancellation agrees with it in all but the time."""
    time, received = instant(record["order_time"]), instant(record.get("received_at"))
    assert time is not None
    placing = record["status"] == "placed"
    shared = {name: record[name] for name in ("user_id", "store_id", "total_micros", "currency")}
    late = is_late(time, received or now)
    told = {
        "order_time": time,
        "received_at": received or INGESTED,
        "region": file.region,
        "is_late": late,
        "source": (file.name, number),
    }
    held = books.orders.get(record["order_id"])
    if held is None:
        held = books.orders[record["order_id"]] = {
            "order_id": record["order_id"],
            **shared,
            **told,
            "status": "placed",
            "has_placed": False,
            "cancelled_at": None,
        }
    elif any(held[name] != value for name, value in shared.items()):
        return "conflict"
    elif placing and held["has_placed"]:
        return "duplicate" if held["order_time"] == time else "conflict"
    elif not placing and held["cancelled_at"] is not None:
        return "duplicate"
    elif placing:
        held.update(told)
    if placing:
        held["has_placed"] = True
    else:
        held.update(status="cancelled", cancelled_at=told["received_at"])
    cell["late"] += late
    return "accepted"


def record_uuid(query_id: str, batch_id: int, minute: datetime, key: Iterable[str | None]) -> str:
    """The name of an increment: MD5 of the query, the batch, the minute in microseconds and the key (MINUTE_KEYS).

    Parts are separated by U+001F; each text has its length in characters before it, and a null is a dash.
    """
    micros = (minute - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    parts = [query_id, str(batch_id), str(micros), *("-" if text is None else f"{len(text)}:{text}" for text in key)]
    digest = hashlib.md5("\x1f".join(parts).encode("utf-8"), usedforsecurity=False).hexdigest()
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:]))
