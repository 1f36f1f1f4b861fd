"""Messages as the publisher writes them, made up from a seed, and what they must come to, counted here in whole numbers."""

from __future__ import annotations

import json
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

from services.serving.tables import credit_columns

Message = dict[str, Any]
Rows = list[list[Any]]

START_MS = 1_748_822_400_000  # 2025-06-02
DAYS = ("2025-06-02", "2025-06-03")
CAMPAIGNS = ("c-1", "c 2", "o'c; option(skipUpsert=true)", "ça\\va%")
WINDOWS = (1, 7)
MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")


def increment(at: int, *, version: int, draw: random.Random) -> Message:
    """A row of minute_metrics. Spend is such that few rows are beyond 2^53, and a double would lose its last digits."""
    minute = START_MS + draw.randrange(2 * 1440) * 60_000
    campaign = draw.randrange(len(CAMPAIGNS))
    counts = {name: draw.randrange(9) for name in MEASURES[:4]}
    spend = draw.randrange(10**15) * draw.choice((1, 1, 1, -1)) if draw.random() < 0.9 else 0
    return {
        "record_uuid": str(uuid.UUID(int=at)),
        "version": version,
        "event_minute": minute,
        "event_date": datetime.fromtimestamp(minute / 1000, UTC).date().isoformat(),
        "region": draw.choice(("eu-west", "us-east")),
        "campaign_id": CAMPAIGNS[campaign],
        "ad_id": f"a-{campaign}-{draw.randrange(3)}",
        "store_id": f"s-{campaign % 2}",
        "placement": draw.choice(("feed", None)),
        "currency": draw.choice(("EUR", "USD")),
        **counts,
        "spend_nanos": spend,
        "invalid_spend_nanos": draw.randrange(10**15),
        "query_id": "q",
        "batch_id": version,
        "run_id": None,
        "committed_at": START_MS + version * 1000,
    }


def credited(at: int, *, version: int, is_current: int, draw: random.Random) -> Message:
    """An order's credit to a touch, or an order without one."""
    has_touch = draw.random() < 0.8
    touch_ms = START_MS + draw.randrange(2 * 86_400_000) if has_touch else None
    campaign = draw.randrange(len(CAMPAIGNS))
    micros = {
        name: (draw.randrange(10**15) if is_current else 0) if has_touch and draw.random() < 0.8 else None
        for name in credit_columns(WINDOWS)
    }
    return {
        "record_uuid": str(uuid.UUID(int=at)),
        "version": version,
        "is_current": is_current,
        "order_id": f"o-{at // 2}",
        "status": "placed",
        "order_time": START_MS + 2 * 86_400_000,
        "user_id": "somebody",
        "store_id": f"s-{campaign % 2}",
        "currency": "EUR",
        "total_micros": 10**15,
        "touch_event_id": f"e-{at}" if has_touch else None,
        "touch_type": "click" if has_touch else None,
        "touch_time": touch_ms,
        "campaign_id": CAMPAIGNS[campaign] if has_touch else None,
        "ad_id": f"a-{campaign}" if has_touch else None,
        "touches": 1,
        **micros,
        "reason": "order",
        "rule_set": "r",
        "attributed_at": START_MS,
        "delta_version": version,
    }


def as_value(message: Message) -> str:
    return json.dumps(message, sort_keys=True, ensure_ascii=False)


def standing(messages: Iterable[Message]) -> list[Message]:
    """Of each key the message with the highest version."""
    held: dict[str, Message] = {}
    for message in messages:
        if message["record_uuid"] not in held or message["version"] >= held[message["record_uuid"]]["version"]:
            held[message["record_uuid"]] = message
    return list(held.values())


def rounded(nanos: int) -> int:
    whole, rest = divmod(abs(nanos), 1000)
    return (whole + (rest >= 500)) * (1 if nanos >= 0 else -1)


def _sums(rows: Iterable[Message], key: Any, names: Iterable[str]) -> list[tuple[tuple[Any, ...], Counter[str]]]:
    sums: defaultdict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        for name in names:
            sums[key(row)][name] += row[name] or 0
    return sorted(sums.items())


def _time(ms: int) -> datetime:
    return datetime(1970, 1, 1) + timedelta(milliseconds=ms)


def totals(increments: Iterable[Message]) -> Rows:
    return [[*key, *(sums[name] for name in MEASURES)] for key, sums in _sums(increments, lambda row: (row["currency"],), MEASURES)]


def campaign_day(increments: Iterable[Message]) -> Rows:
    made = []
    keys = ("event_date", "campaign_id", "store_id", "currency")
    for key, sums in _sums(increments, lambda row: tuple(row[name] for name in keys), MEASURES):
        shown, clicked, bad_shown, bad_clicked, net, invalid = (sums[name] for name in MEASURES)
        ctr = clicked / shown if shown else None
        counts = [shown, clicked, bad_shown, bad_clicked, shown + bad_shown, clicked + bad_clicked, ctr]
        made.append([date.fromisoformat(key[0]), *key[1:], *counts, rounded(net), rounded(invalid), rounded(net + invalid)])
    return made


def spend_by_hour(increments: Iterable[Message], campaign: str) -> Rows:
    chosen = (row for row in increments if row["campaign_id"] == campaign)
    sums = _sums(
        chosen,
        lambda row: (row["event_minute"] // 3_600_000, row["campaign_id"], row["currency"]),
        ("impressions", "clicks", "spend_nanos"),
    )
    return [
        [_time(key[0] * 3_600_000), *key[1:], one["impressions"], one["clicks"], rounded(one["spend_nanos"])] for key, one in sums
    ]


def budget_pacing(increments: Iterable[Message], day: str, budget: int) -> Rows:
    chosen = (row for row in increments if row["event_date"] == day)
    spent: Counter[tuple[Any, ...]] = Counter()
    made: Rows = []
    for (campaign, currency, minute), one in _sums(
        chosen, lambda row: (row["campaign_id"], row["currency"], row["event_minute"]), ("spend_nanos",)
    ):
        if not one["spend_nanos"]:
            continue
        spent[campaign, currency] += one["spend_nanos"]
        so_far, at = rounded(spent[campaign, currency]), _time(minute)
        by_clock = budget // 1440 * (at.hour * 60 + at.minute + 1)  # a budget that the minutes of a day divide
        made.append([at, campaign, currency, so_far, budget, by_clock, max(0, so_far - budget)])
    return made


def attributed_revenue(credits: Iterable[Message], model: str, window: int, day: str) -> Rows:
    name = f"{model}_{window}d_micros"
    chosen = [row for row in credits if row["is_current"] and row["touch_time"] is not None and row[name]]
    keyed = _sums(
        chosen,
        lambda row: (_time(row["touch_time"]).date(), row["store_id"], row["campaign_id"], row["currency"]),
        (name,),
    )
    return [[*key, sums[name]] for key, sums in keyed if key[0] == date.fromisoformat(day)]
