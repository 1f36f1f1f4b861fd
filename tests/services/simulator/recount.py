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
REGION = re.compile(r"[a-z0-9-]{1,32}")
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


def region_holds(record: dict[str, Any], folder: str, from_topics: bool) -> bool:
    """The region is the folder's; in a record of a topic any name will do."""
    region = record.get("region", folder)
    return isinstance(region, str) and REGION.fullmatch(region) is not None if from_topics else region == folder


def valid_event(record: dict[str, Any], folder: str, from_topics: bool = False) -> bool:
    time, received = read_time(record.get("event_time")), read_time(record.get("received_at"))
    return (
        is_text(record.get("event_id"), 1, 128)
        and record.get("event_type") in ("impression", "click")
        and time is not None
        and received is not None
        and time - received <= SKEW
        and region_holds(record, folder, from_topics)
        and all(is_text(record.get(name), 1, 128) for name in IDS)
        and all(optional_text(record, name) for name in ("impression_id", "placement", "user_agent"))
        and is_whole(record.get("price_micros", 0), 10**12)
        and isinstance(record.get("currency"), str)
        and CURRENCY.fullmatch(record["currency"]) is not None
    )


def valid_order(record: dict[str, Any], folder: str, from_topics: bool = False) -> bool:
    return (
        all(is_text(record.get(name), 1, 128) for name in ("order_id", "user_id", "store_id"))
        and read_time(record.get("order_time")) is not None
        and read_time(record.get("received_at")) is not None
        and region_holds(record, folder, from_topics)
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


def accepted_events(landing: Path, from_topics: bool = False) -> dict[str, dict[str, Any]]:
    """The first valid record of each event_id, with its time and folder, in the order of acceptance."""
    known: dict[str, dict[str, Any]] = {}
    for folder, line in offered_lines(landing, "events"):
        record = read_object(line)
        if record is not None and valid_event(record, folder, from_topics):
            known.setdefault(record["event_id"], {**record, "time": read_time(record["event_time"]), "folder": folder})
    return known


def invalid_rules(landing: Path, listed: frozenset[str] = frozenset(), from_topics: bool = False) -> dict[str, list[str]]:
    """The rules that hit each invalid event, in their order: every pair of events of a user and ad is looked at."""
    events = accepted_events(landing, from_topics)
    alike: defaultdict[tuple[str, ...], list[tuple[datetime, str]]] = defaultdict(list)
    clicks: Counter[tuple[str, str]] = Counter()
    for event in events.values():
        alike[event["user_id"], event["ad_id"], event["event_type"]].append((event["time"], event["event_id"]))
        clicks[event["user_id"], str(hour_text(event["time"]))] += event["event_type"] == "click"
    found: dict[str, list[str]] = {}
    for event_id, event in events.items():
        kind, mine = event["event_type"], (event["time"], event_id)
        window = timedelta(hours=1) if kind == "click" else timedelta(minutes=1)
        same = alike[event["user_id"], event["ad_id"], kind]
        hits = {
            "crawler_user_agent": re.search("Googlebot|bingbot|AhrefsBot|python-requests", event.get("user_agent", "")) is not None,
            "listed_user": event["user_id"] in listed,
            f"repeat_{kind}": any(other < mine and mine[0] - other[0] < window for other in same),
            "click_rate": kind == "click" and clicks[event["user_id"], str(hour_text(event["time"]))] > 60,
        }
        if any(hits.values()):
            found[event_id] = [name for name, hit in hits.items() if hit]
    return found


def recount_credit(
    landing: Path, invalid: dict[str, list[str]], from_topics: bool = False
) -> dict[tuple[str, int, str], list[tuple[str, int]]]:
    """(model, window, order_id) -> [(event_id, micros)] of last_click, first_click and linear, in plain integers."""
    facts, statuses = settled_orders(landing, from_topics=from_topics)
    touches: defaultdict[tuple[str, str], list[tuple[datetime, str]]] = defaultdict(list)
    for event_id, event in accepted_events(landing, from_topics).items():
        if event["event_type"] == "click" and event_id not in invalid:
            touches[event["user_id"], event["store_id"]].append((event["time"], event_id))
    found: dict[tuple[str, int, str], list[tuple[str, int]]] = {}
    for order_id, (time, user, store, total, _currency) in facts.items():
        if "cancelled" in statuses[order_id]:
            continue
        for window in (1, 7, 14, 28, 30):
            inside = sorted(touch for touch in touches[user, store] if timedelta() < time - touch[0] <= timedelta(days=window))
            ids = [event_id for _, event_id in inside]
            share, rest = divmod(total, len(ids)) if ids else (0, 0)
            found["last_click", window, order_id] = [(event_id, total) for event_id in ids[-1:]]
            found["first_click", window, order_id] = [(event_id, total) for event_id in ids[:1]]
            found["linear", window, order_id] = [(event_id, share + (at < rest)) for at, event_id in enumerate(ids)]
    return found


def recount_billing(campaign_hours: list[dict[str, Any]], landing: Path, from_topics: bool = False) -> list[dict[str, Any]]:
    """The billing part of a truth file from its campaign_hours: a day's nanos, rounded half up."""
    store_of = {event["campaign_id"]: event["store_id"] for event in accepted_events(landing, from_topics).values()}
    nanos: Counter[tuple[str, str, str, str]] = Counter()
    for row in campaign_hours:
        nanos[row["event_hour"][:10], row["campaign_id"], store_of[row["campaign_id"]], row["currency"]] += row["spend_nanos"]
    names = ("event_date", "campaign_id", "store_id", "currency")
    return [
        {**dict(zip(names, key, strict=True)), "spend_micros": value // 1000 + (value % 1000 >= 500)}
        for key, value in sorted(nanos.items())
    ]


def recount_events(
    landing: Path, listed: frozenset[str] = frozenset(), from_topics: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The accounting and campaign_hours of a truth file, counted from the files."""
    invalid = invalid_rules(landing, listed, from_topics)
    models = billing_models(landing)
    known: dict[str, tuple[Any, ...]] = {}
    hours: defaultdict[tuple[str, str | None], Counter[str]] = defaultdict(Counter)
    campaigns: defaultdict[tuple[str, str, str, str], Counter[str]] = defaultdict(Counter)
    for folder, line in offered_lines(landing, "events"):
        record = read_object(line)
        time = None if record is None else read_time(record.get("event_time"))
        counts = hours[folder, hour_text(time)]
        counts["offered"] += 1
        if record is None or time is None or not valid_event(record, folder, from_topics):
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
        region = record.get("region", folder)
        sums = campaigns[record["campaign_id"], region, str(hour_text(time)), record["currency"]]
        part = "invalid_" if record["event_id"] in invalid else ""
        counts["invalid_traffic"] += part != ""
        sums[f"{part}{'clicks' if is_click else 'impressions'}"] += 1
        if model == ["cpc"] and is_click:
            sums[f"{part}spend_nanos"] += price * 1000
        elif model == ["cpm"] and not is_click:
            sums[f"{part}spend_nanos"] += price
    outcomes = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced", "invalid_traffic")
    accounting = [
        {"region": region, "event_hour": hour, **{name: counts[name] for name in outcomes}}
        for (region, hour), counts in sorted(hours.items(), key=lambda item: (item[0][0], item[0][1] or ""))
    ]
    measures = ("impressions", "clicks", "spend_nanos", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos")
    names = ("campaign_id", "region", "event_hour", "currency")
    campaign_hours = [
        {**dict(zip(names, key, strict=True)), **{name: sums[name] for name in measures}} for key, sums in sorted(campaigns.items())
    ]
    return accounting, campaign_hours


Facts = dict[str, tuple[Any, ...]]


def settled_orders(
    landing: Path, regions: defaultdict[str, Counter[str]] | None = None, from_topics: bool = False
) -> tuple[Facts, dict[str, set[str]]]:
    """(order_time, user_id, store_id, total_micros, currency) and the statuses of each accepted order; counts by region."""
    facts: Facts = {}
    statuses: defaultdict[str, set[str]] = defaultdict(set)
    regions = defaultdict(Counter) if regions is None else regions
    for folder, line in offered_lines(landing, "orders"):
        record = read_object(line)
        regions[folder]["offered"] += 1
        if record is None or not valid_order(record, folder, from_topics):
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
    return facts, statuses


def recount_orders(landing: Path, from_topics: bool = False) -> dict[str, Any]:
    """The orders part of a truth file, counted from the files."""
    regions: defaultdict[str, Counter[str]] = defaultdict(Counter)
    facts, statuses = settled_orders(landing, regions, from_topics)
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
