"""Makes the committed samples from the real impressions: ``python -m samples.make_samples IMPRESSIONS_CSV``.

The README next to this file says what is real and what is added. The same CSV gives the same files, to the byte.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.simulator.broken import EVENT_BREAKAGES, ORDER_BREAKAGES, Record, dump
from services.simulator.credit import credit_orders
from services.simulator.landing import campaigns_csv, compress, increasing_mtimes, names_csv, put_file
from services.simulator.traffic import AGENTS, CRAWLER_AGENTS, PEOPLE_AGENTS
from services.simulator.truth import (
    HOUR_US,
    NO_TIME,
    CampaignRow,
    EventLines,
    Limits,
    OrderTruth,
    Row,
    Truth,
    account_events,
    rfc3339,
    to_us,
    touches_by_journey,
)

SEED = 20191124
REGIONS = ("eu-west", "us-east")
CURRENCIES = ("EUR", "JPY", "USD")
CURRENCY_OF_SHOP = {"all": "JPY", "men": "EUR", "women": "USD"}
CENT_MICROS = {"EUR": 10_000, "JPY": 1_000_000, "USD": 10_000}
"""Prices are drawn in cents, and in whole yen."""
BUDGET_CENTS = {("women", "bts"): 400}
"""Daily budgets that are not 1,000 cents or yen: women-bts spends more than it has on its last two days."""
FILES_PER_REGION = {"events": 4, "orders": 2}
LATE, RESENT, CONFLICTS, BROKEN, FUTURE = 0.010, 0.010, 0.001, 0.001, 0.0005
"""Parts of the real impressions that are made to arrive late, sent again, contradicted, broken or before their time."""

_SECOND_US = 1_000_000
_DAY_US = 24 * HOUR_US
_IDS = uuid.uuid5(uuid.NAMESPACE_DNS, "samples.adtally")
_SWITCH = "2019-11-27T00:00:00Z"
_END = "2019-11-30T12:00:00Z"


@dataclass(frozen=True)
class Line:
    """A line to be written, and what the truth must know of it.

    ``record`` is None if the line breaks the contract; then ``time_us`` is the time that can still be read, or NO_TIME.
    Times are microseconds since the epoch.
    """

    region: int
    received_us: int
    text: bytes
    time_us: int
    record: Record | None


def campaign_rows() -> list[CampaignRow]:
    """Six campaigns, one for each shop and policy; women-random changes its billing, men-random ends half a day early."""
    opening, switch, end = (to_us(datetime.fromisoformat(text)) for text in ("2019-11-01T00:00:00Z", _SWITCH, _END))
    ranges: dict[tuple[str, str], list[tuple[str, int, int | None]]] = {
        ("all", "bts"): [("cpc", opening, None)],
        ("all", "random"): [("cpm", opening, None)],
        ("men", "bts"): [("cpc", opening, None)],
        ("men", "random"): [("cpm", opening, end)],
        ("women", "bts"): [("cpc", opening, None)],
        ("women", "random"): [("cpm", opening, switch), ("cpc", switch, None)],
    }
    return [
        CampaignRow(
            f"{shop}-{policy}",
            f"store-{shop}",
            model,
            BUDGET_CENTS.get((shop, policy), 1_000) * CENT_MICROS[CURRENCY_OF_SHOP[shop]],
            CURRENCY_OF_SHOP[shop],
            begin,
            stop,
        )
        for (shop, policy), found in ranges.items()
        for model, begin, stop in found
    ]


def names(ads: Iterable[str]) -> list[tuple[str, str, str]]:
    """(kind, id, name) of the stores, the campaigns and these ads, whose ids make_events makes."""
    shops = {"all": "Everyone", "men": "Men", "women": "Women"}
    policies = {"bts": "learned choice", "random": "random choice"}
    stores = [("store", f"store-{shop}", f"Fashion for {name.lower()}") for shop, name in shops.items()]
    campaigns = {f"{shop}-{policy}": f"{name}, {chosen}" for shop, name in shops.items() for policy, chosen in policies.items()}
    split = sorted((ad.rpartition("-item-") for ad in set(ads)), key=lambda parts: (parts[0], int(parts[2])))
    return [
        *stores,
        *(("campaign", campaign, name) for campaign, name in campaigns.items()),
        *(("ad", f"{campaign}-item-{item}", f"{campaigns[campaign]}: item {item}") for campaign, _, item in split),
    ]


def _read(path: Path) -> list[dict[str, str]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return list(csv.DictReader(io.StringIO(text)))


def _event_line(region: int, received_us: int, record: Record, time_us: int, breakage: int | None = None) -> Line:
    written = {
        "event_id": record["event_id"],
        "event_type": record["event_type"],
        "event_time": record["event_time"],
        "received_at": rfc3339(received_us),
        "region": REGIONS[region],
        **record,
    }
    if breakage is None:
        return Line(region, received_us, dump(written), time_us, record)
    kind = EVENT_BREAKAGES[breakage]
    return Line(region, received_us, kind.apply(dump(written)), time_us if kind.keeps_time else NO_TIME, None)


def _ms(us: float) -> int:
    return int(us) // 1000 * 1000


def make_events(rows: Sequence[dict[str, str]], rng: np.random.Generator) -> list[Line]:
    """Event lines of the real impressions and clicks, and the added ones. Every real event is well formed once at least."""
    size = len(rows)
    people = {segment: -(-count // 8) for segment, count in Counter(row["user_segment"] for row in rows).items()}
    person, lag, agent, crawler = rng.random(size), rng.random(size), rng.random(size), rng.random(size)
    shown_price, click_price = rng.integers(200, 900, size), rng.integers(10, 90, size)
    chosen = rng.permutation(size)
    marks = np.cumsum([round(part * size) for part in (LATE, RESENT, CONFLICTS, BROKEN, FUTURE)])
    late, resent, clashing, broken, future = np.split(chosen[: marks[-1]], marks[:-1])
    draw = rng.random((size, 2))
    last_us = max(to_us(datetime.fromisoformat(row["timestamp"])) for row in rows)

    lines: list[Line] = []
    firsts: list[Line] = []
    late_set = {int(index) for index in late}
    for index, row in enumerate(rows):
        time_us = to_us(datetime.fromisoformat(row["timestamp"]))
        campaign = f"{row['campaign']}-{row['policy']}"
        currency = CURRENCY_OF_SHOP[row["campaign"]]
        segment = row["user_segment"]
        user = f"{segment}-{int(person[index] * people[segment])}"
        region = int(zlib.crc32(user.encode()) % 5 >= 3)
        received_us = _ms(time_us + (0.2 + 0.6 * lag[index] / (1.05 - lag[index])) * _SECOND_US) + 1000
        if index in late_set:
            closes_us = (time_us // HOUR_US + 1) * HOUR_US + 15 * 60 * _SECOND_US
            longest_us = min(max(last_us - closes_us, HOUR_US), 2 * _DAY_US)
            received_us = _ms(closes_us + float(draw[index, 0]) ** 2 * longest_us)
        record: Record = {
            "event_id": str(uuid.uuid5(_IDS, f"impression/{index}")),
            "event_type": "impression",
            "event_time": rfc3339(time_us),
            "campaign_id": campaign,
            "ad_id": f"{campaign}-item-{row['item_id']}",
            "store_id": f"store-{row['campaign']}",
            "user_id": user,
            "placement": f"position-{row['position']}",
            "price_micros": int(shown_price[index]) * CENT_MICROS[currency],
            "currency": currency,
        }
        agents = CRAWLER_AGENTS if crawler[index] < 0.01 else PEOPLE_AGENTS
        if name := agents[int(agent[index] * len(agents))]:
            record["user_agent"] = name
        firsts.append(_event_line(region, received_us, record, time_us))
        if row["click"] == "1":
            click_us = time_us + int((2 + 30 * draw[index, 1]) * _SECOND_US)
            click = {
                **record,
                "event_id": str(uuid.uuid5(_IDS, f"click/{index}")),
                "event_type": "click",
                "event_time": rfc3339(click_us),
                "impression_id": record["event_id"],
                "price_micros": int(click_price[index]) * CENT_MICROS[currency],
            }
            lines.append(_event_line(region, _ms(click_us + _SECOND_US), click, click_us))

    def again(index: int) -> tuple[Line, Record]:
        first = firsts[index]
        assert first.record is not None
        return first, first.record

    for number, index in enumerate(resent):
        first, record = again(int(index))
        longest_us = [10 * _SECOND_US, 3 * HOUR_US, 3 * _DAY_US, 10 * 60 * _SECOND_US][number % 4]
        received_us = first.received_us + 1000 + _ms(min(longest_us, max(last_us - first.received_us, HOUR_US)) * draw[index, 1])
        lines.append(_event_line(first.region ^ int(number % 4 == 3), received_us, record, first.time_us))
    for number, index in enumerate(clashing):
        first, record = again(int(index))
        received_us = first.received_us + 1000 + _ms([HOUR_US, 2 * _DAY_US][number % 2] * draw[index, 1])
        time_us = first.time_us - (HOUR_US if number % 3 == 2 else 0)
        changes: tuple[Record, ...] = (
            {"price_micros": record["price_micros"] + 50_000},
            {"placement": "position-4"},
            {"event_time": rfc3339(time_us)},
        )
        lines.append(_event_line(first.region, received_us, {**record, **changes[number % 3]}, time_us))
    for number, index in enumerate(broken):
        first, record = again(int(index))
        breakage = number % len(EVENT_BREAKAGES)
        lines.append(_event_line(first.region, first.received_us - 2_000_000, record, first.time_us, breakage))
    for index in future:
        first, record = again(int(index))
        received_us = _ms(first.time_us - (600 + 3000 * draw[index, 1]) * _SECOND_US)
        lines.append(_event_line(first.region, received_us, record, first.time_us))
    return firsts + lines


def make_orders(events: Sequence[Line], rng: np.random.Generator) -> list[Line]:
    """Order lines after two of five clicks: some cancelled, sent again, contradicted or broken."""
    lines: list[Line] = []

    def add(region: int, received_us: int, record: Record, breakage: int | None = None) -> None:
        text = dump({**record, "received_at": rfc3339(received_us), "region": REGIONS[region]})
        if breakage is None:
            lines.append(Line(region, received_us, text, NO_TIME, record))
        else:
            lines.append(Line(region, received_us, ORDER_BREAKAGES[breakage].apply(text), NO_TIME, None))

    clicks = [line for line in events if line.record is not None and line.record["event_type"] == "click"]
    draw = rng.random((len(clicks), 4))
    number = 0
    for click, (bought, wait, total, later) in zip(clicks, draw.tolist(), strict=True):
        if bought >= 0.4 or click.record is None:
            continue
        order_us = _ms(click.time_us + (120 + 3 * 3600 * wait * wait) * _SECOND_US)
        record: Record = {
            "order_id": f"order-{number:04d}",
            "order_time": rfc3339(order_us),
            "user_id": click.record["user_id"],
            "store_id": click.record["store_id"],
            "total_micros": (1_500 + int(total * 20_000)) * CENT_MICROS[click.record["currency"]],
            "currency": click.record["currency"],
            "status": "placed",
        }
        received_us = order_us + 1_500_000
        later_us = received_us + 60 * _SECOND_US + _ms(later * 20 * HOUR_US)
        add(click.region, received_us, record)
        match number % 16:
            case 3 | 11:
                add(click.region, later_us, {**record, "status": "cancelled"})
            case 5:
                add(click.region, later_us, record)
            case 7:
                add(click.region ^ 1, later_us, record)
            case 9:
                add(click.region, later_us, {**record, "total_micros": record["total_micros"] + 1_000_000})
            case 13:
                add(click.region, later_us, {**record, "order_id": f"order-x{number}"}, number // 16 % len(ORDER_BREAKAGES))
        number += 1
    return lines


def _cut(lines: Sequence[Line], source: str) -> list[tuple[int, str, list[Line]]]:
    """(slice end in microseconds, path, lines) of each file: one region's lines in order of receipt."""
    result = []
    for code, region in enumerate(REGIONS):
        mine = sorted((line for line in lines if line.region == code), key=lambda line: line.received_us)
        per_file = max(1, -(-len(mine) // FILES_PER_REGION[source]))
        for number, begin in enumerate(range(0, len(mine), per_file)):
            part = mine[begin : begin + per_file]
            name = f"{source}/{region}/{source}-{number:05d}.jsonl" + (".gz" if source == "events" else "")
            result.append((part[-1].received_us, name, part))
    return result


def _event_columns(lines: Sequence[Line], campaigns: Sequence[str]) -> EventLines:
    """Columns for the truth; what a resend must repeat is the record without received_at and region."""
    identities: dict[str, int] = {}
    payloads: dict[bytes, int] = {}
    nothing: Record = {"event_type": "", "campaign_id": campaigns[0], "currency": CURRENCIES[0], "price_micros": 0}
    records = [line.record or nothing for line in lines]
    ids = [uuid.UUID(record["event_id"]).int if "event_id" in record else 0 for record in records]
    return EventLines(
        region=np.array([line.region for line in lines], np.int64),
        event_us=np.array([line.time_us for line in lines], np.int64),
        received_us=np.array([line.received_us for line in lines], np.int64),
        well_formed=np.array([line.record is not None for line in lines], np.bool_),
        identity=np.array([identities.setdefault(record.get("event_id", ""), len(identities)) for record in records], np.int64),
        payload=np.array([payloads.setdefault(dump(record), len(payloads)) for record in records], np.int64),
        campaign=np.array([campaigns.index(record["campaign_id"]) for record in records], np.int64),
        currency=np.array([CURRENCIES.index(record["currency"]) for record in records], np.int64),
        is_click=np.array([record["event_type"] == "click" for record in records], np.bool_),
        user=_codes(map(_user, lines)),
        ad=_codes(record.get("ad_id", "") for record in records),
        agent=np.array([AGENTS.index(record.get("user_agent", "")) for record in records], np.int64),
        is_listed=np.zeros(len(lines), np.bool_),
        id_high=np.array([number >> 64 for number in ids], np.uint64),
        id_low=np.array([number & (1 << 64) - 1 for number in ids], np.uint64),
        price_micros=np.array([record["price_micros"] for record in records], np.int64),
    )


def _user(line: Line) -> str:
    return "" if line.record is None else str(line.record["user_id"])


def _codes(names: Iterable[str]) -> npt.NDArray[np.int64]:
    """Numbers for names, the same for the same."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], np.int64)


def make(impressions: Path, out: Path) -> Truth:
    """Write landing/, files.json and truth.json into the folder ``out`` from the impressions CSV; returns the truth.

    The CSV (plain or .gz) has the columns timestamp, policy, campaign, item_id, position, click, user_segment.
    """
    rows = _read(impressions)
    events_rng, orders_rng = np.random.default_rng(SEED).spawn(2)
    events = make_events(rows, events_rng)
    orders = make_orders(events, orders_rng)
    slices = sorted([*_cut(events, "events"), *_cut(orders, "orders")], key=lambda item: item[:2])
    campaigns = campaign_rows()
    campaign_ids = sorted({row.campaign_id for row in campaigns})

    event_lines = [line for _, name, part in slices if name.startswith("events/") for line in part]
    columns = _event_columns(event_lines, campaign_ids)
    stores = {row.campaign_id: row.store_id for row in campaigns}
    counted = account_events(
        columns,
        regions=REGIONS,
        campaigns=campaign_ids,
        currencies=CURRENCIES,
        agents=AGENTS,
        stores=stores,
        campaign_rows=campaigns,
        limits=Limits(),
    )
    order_truth = OrderTruth()
    for _, name, part in slices:
        if name.startswith("orders/"):
            for line in part:
                order_truth.add(REGIONS[line.region], line.record)
    args: Row = {"impressions": len(rows), "sha256": hashlib.sha256(impressions.read_bytes()).hexdigest()}
    touches = touches_by_journey(
        columns, counted.touches, campaign_ids, stores, [*dict.fromkeys(_user(line) for line in event_lines)].__getitem__
    )
    credit = credit_orders(order_truth.final_orders(), touches)
    truth = Truth(
        SEED, args, counted.accounting, counted.campaign_hours, counted.billing, counted.totals, order_truth.as_dict(), credit
    )

    first_ms = min(line.received_us for line in events) // 1000 // 3_600_000 * 3_600_000
    named = names(line.record["ad_id"] for line in events if line.record is not None)
    contents = [
        ("campaigns/campaigns.csv", campaigns_csv(campaigns), first_ms, len(campaigns)),
        ("names/names.csv", names_csv(named), first_ms + 1, len(named)),
    ]
    mtimes = increasing_mtimes([end_us for end_us, _, _ in slices])
    for (_, name, part), mtime_ms in zip(slices, mtimes, strict=True):
        contents.append((name, b"".join(line.text + b"\n" for line in part), mtime_ms, len(part)))
    listed: list[dict[str, Any]] = []
    for name, content, mtime_ms, count in contents:
        stored = compress(content, level=9) if name.endswith(".gz") else content
        put_file(out / "landing" / name, stored, mtime_ms)
        listed.append({"path": name, "mtime_ms": mtime_ms, "lines": count, "sha256": hashlib.sha256(stored).hexdigest()})
    listing = ",\n".join(" " + json.dumps(entry) for entry in listed)
    put_file(out / "files.json", f"[\n{listing}\n]\n".encode())
    put_file(out / "truth.json", truth.as_json().encode())
    return truth


def main() -> None:
    """Read the arguments and make the samples."""
    parser = argparse.ArgumentParser(description="Make the samples from the real impressions.")
    parser.add_argument("impressions", type=Path, help="impressions.csv or impressions.csv.gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into (default: here)")
    arguments = parser.parse_args()
    print(json.dumps(make(arguments.impressions, arguments.out).totals, indent=1))


if __name__ == "__main__":
    main()
