"""A plain recount of a landing folder: one line at a time, a dictionary of ids. Shares no code with the truth."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")
CURRENCY = re.compile(r"[A-Z]{3}")
IDS = ("campaign_id", "ad_id", "store_id", "user_id")
EVENT_FIELDS = (*IDS, "event_id", "event_type", "impression_id", "placement", "currency", "user_agent")
SKEW = timedelta(minutes=5)
CLOSES = timedelta(hours=1, minutes=15)


def read_time(value: object) -> datetime | None:
    if not isinstance(value, str) or not TIME.fullmatch(value):
        return None
    try:
        return datetime.fromisoformat(value).astimezone(UTC)
    except ValueError:
        return None


def read_object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def is_text(value: object, low: int, high: int) -> bool:
    return isinstance(value, str) and low <= len(value) <= high


def is_whole(value: object, high: int) -> bool:
    return type(value) is int and 0 <= value <= high


def optional_text(record: dict[str, Any], name: str) -> bool:
    return name not in record or isinstance(record[name], str)


def valid_event(record: dict[str, Any], folder: str) -> bool:
    time, received = read_time(record.get("event_time")), read_time(record.get("received_at"))
    return (
        is_text(record.get("event_id"), 1, 128)
        and record.get("event_type") in ("impression", "click")
        and time is not None
        and received is not None
        and time - received <= SKEW
        and record.get("region", folder) == folder
        and all(is_text(record.get(name), 1, 128) for name in IDS)
        and all(optional_text(record, name) for name in ("impression_id", "placement", "user_agent"))
        and is_whole(record.get("price_micros", 0), 10**12)
        and isinstance(record.get("currency"), str)
        and CURRENCY.fullmatch(record["currency"]) is not None
    )


def valid_order(record: dict[str, Any], folder: str) -> bool:
    return (
        all(is_text(record.get(name), 1, 128) for name in ("order_id", "user_id", "store_id"))
        and read_time(record.get("order_time")) is not None
        and read_time(record.get("received_at")) is not None
        and record.get("region", folder) == folder
        and record.get("status") in ("placed", "cancelled")
        and is_whole(record.get("total_micros"), 10**15)
        and isinstance(record.get("currency"), str)
        and CURRENCY.fullmatch(record["currency"]) is not None
    )


def offered_lines(landing: Path, source: str) -> list[tuple[str, bytes]]:
    """(folder's region, line) in the order that counts: file mtime, path, line number."""
    files = [path for path in (landing / source).glob("*/*") if not path.name.startswith((".", "_"))]
    lines = []
    for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, str(path))):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines += [(path.parent.name, line) for line in content.removesuffix(b"\n").split(b"\n")]
    return lines


def hour_text(time: datetime | None) -> str | None:
    return None if time is None else time.strftime("%Y-%m-%dT%H:00:00Z")


def billing_models(landing: Path) -> dict[str, list[tuple[datetime, datetime, str]]]:
    models = defaultdict(list)
    for path in (landing / "campaigns").glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                end = datetime.fromisoformat(row["valid_to"]) if row["valid_to"] else datetime.max.replace(tzinfo=UTC)
                models[row["campaign_id"]].append((datetime.fromisoformat(row["valid_from"]), end, row["billing_model"]))
    return models


def recount_events(landing: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The accounting and campaign_hours of a truth file, counted from the files."""
    models = billing_models(landing)
    known: dict[str, tuple[Any, ...]] = {}
    hours: defaultdict[tuple[str, str | None], Counter[str]] = defaultdict(Counter)
    campaigns: defaultdict[tuple[str, str, str, str], Counter[str]] = defaultdict(Counter)
    for folder, line in offered_lines(landing, "events"):
        record = read_object(line)
        time = None if record is None else read_time(record.get("event_time"))
        counts = hours[folder, hour_text(time)]
        counts["offered"] += 1
        if record is None or time is None or not valid_event(record, folder):
            counts["rejected"] += 1
            continue
        price = record.get("price_micros", 0)
        payload = (time, price, *(record.get(name) for name in EVENT_FIELDS))
        if record["event_id"] in known:
            counts["duplicate" if known[record["event_id"]] == payload else "conflict"] += 1
            continue
        known[record["event_id"]] = payload
        counts["accepted"] += 1
        received = datetime.fromisoformat(record["received_at"])
        counts["late"] += received >= time.replace(minute=0, second=0, microsecond=0) + CLOSES
        model = [name for begin, end, name in models.get(record["campaign_id"], []) if begin <= time < end]
        counts["unpriced"] += not model
        is_click = record["event_type"] == "click"
        sums = campaigns[record["campaign_id"], folder, str(hour_text(time)), record["currency"]]
        sums["clicks" if is_click else "impressions"] += 1
        if model == ["cpc"] and is_click:
            sums["spend_nanos"] += price * 1000
        elif model == ["cpm"] and not is_click:
            sums["spend_nanos"] += price
    outcomes = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced")
    accounting = [
        {"region": region, "event_hour": hour, **{name: counts[name] for name in outcomes}}
        for (region, hour), counts in sorted(hours.items(), key=lambda item: (item[0][0], item[0][1] or ""))
    ]
    measures = ("impressions", "clicks", "spend_nanos")
    names = ("campaign_id", "region", "event_hour", "currency")
    campaign_hours = [
        {**dict(zip(names, key, strict=True)), **{name: sums[name] for name in measures}} for key, sums in sorted(campaigns.items())
    ]
    return accounting, campaign_hours


def recount_orders(landing: Path) -> dict[str, Any]:
    """The orders part of a truth file, counted from the files."""
    facts: dict[str, tuple[Any, ...]] = {}
    statuses: defaultdict[str, set[str]] = defaultdict(set)
    regions: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for folder, line in offered_lines(landing, "orders"):
        record = read_object(line)
        regions[folder]["offered"] += 1
        if record is None or not valid_order(record, folder):
            regions[folder]["rejected"] += 1
            continue
        names = ("user_id", "store_id", "total_micros", "currency")
        payload = (read_time(record["order_time"]), *(record[name] for name in names))
        order_id, status = record["order_id"], record["status"]
        if order_id in facts and facts[order_id] != payload:
            regions[folder]["conflict"] += 1
        elif status in statuses[order_id]:
            regions[folder]["duplicate"] += 1
        else:
            regions[folder]["accepted"] += 1
            facts[order_id] = payload
            statuses[order_id].add(status)
    finals: Counter[str] = Counter()
    money: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"placed": 0, "cancelled": 0})
    for order_id, payload in facts.items():
        status = "cancelled" if "cancelled" in statuses[order_id] else "placed"
        finals[status] += 1
        money[payload[4]][status] += payload[3]
    outcomes = ("offered", "accepted", "duplicate", "conflict", "rejected")
    return {
        "accounting": [
            {"region": region, **{name: counts[name] for name in outcomes}} for region, counts in sorted(regions.items())
        ],
        **{status: finals[status] for status in ("placed", "cancelled")},
        "total_micros_by_currency_and_status": dict(sorted(money.items())),
    }
