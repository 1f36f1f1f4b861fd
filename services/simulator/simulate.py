"""Writes a landing folder of ad traffic, and the result that an exact accounting of it must have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from services.simulator import encode
from services.simulator.broken import EVENT_BREAKAGES, ORDER_BREAKAGES, Breakage
from services.simulator.credit import credit_orders
from services.simulator.errors import SimulationError
from services.simulator.landing import campaigns_csv, increasing_mtimes, names_csv, write_file
from services.simulator.orders import OrderLine, draw_orders, user_name
from services.simulator.traffic import (
    AGENTS,
    EXTRAS,
    HOURLY_WEIGHTS,
    INTENTS,
    PLACEMENTS,
    Events,
    Lines,
    SimulationShares,
    draw_events,
    draw_lines,
    plan,
)
from services.simulator.truth import EventLines, Ints, Limits, OrderTruth, Truth, account_events, rfc3339, to_us, touches_by_journey
from services.simulator.world import CURRENCIES, REGIONS, World, make_world

_DAY_US = 86_400_000_000
_DEFAULT_START = datetime(2025, 6, 2, tzinfo=UTC)
_DEFAULT_SHARES = SimulationShares()
_SLICES_ORDERS = 8
_LIST = "listed_users.txt"
_RULES = f'# Written with simulated traffic: all rules as by default, and a list.\nlist_file = "{_LIST}"\n'


class TrafficOptions(TypedDict, total=False):
    """The options of `draw_traffic`.

    The traffic begins at ``start`` and lasts ``days`` (or ``events / rate`` seconds, with ``rate`` in lines a second; default: 3
    days). ``hourly_weights`` are 24 weights of the hours of the day in UTC; they replace each region's own curve. ``users`` is the
    number of people per region (default: one for 20 lines), ``click_rate`` clicks per impression, ``conversion`` orders per click.
    ``listed_users`` is the number of users on the operator's list. ``future_skew`` and ``hour_grace`` are the limits of the truth.
    """

    start: datetime
    days: float | None
    rate: float | None
    hourly_weights: Sequence[float] | None
    shares: SimulationShares
    campaigns: int
    ads: int
    users: int | None
    click_rate: float
    conversion: float
    listed_users: int
    future_skew: timedelta
    hour_grace: timedelta


@dataclass(frozen=True)
class Traffic:
    """The drawn advertisers, events, offered lines and orders, from ``start_us`` to ``end_us``.

    ``listed`` are the users on the operator's list, ``args`` the arguments for truth.json.
    """

    seed: int
    world: World
    events: Events
    lines: Lines
    order_lines: list[OrderLine]
    limits: Limits
    listed: Ints
    start_us: int
    end_us: int
    args: dict[str, Any]


@dataclass(frozen=True)
class Slice:
    """The lines of one file: positions of lines of one region in order of receipt, the last received at ``end_us``."""

    source: str
    region: int
    number: int
    positions: npt.NDArray[np.intp]
    end_us: int


def simulate(
    out: Path,
    events: int,
    seed: int,
    *,
    lines_per_file: int | None = None,
    gz_share: float = 0.25,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[TrafficOptions],
) -> Truth:
    """Write `events` event lines, their orders and campaigns and truth.json into the folder `out`; returns the truth.

    Files have ``lines_per_file`` lines (default: a 24th of all, between 500 and 40,000); the fraction ``gz_share`` of them is
    compressed. With ``listed_users`` the folder `out`/rules gets the list and the invalid_traffic.toml that names it. ``progress``
    is called with (event lines written, all) after each file.

    The same arguments give the same bytes, truth and mtimes. Raises SimulationError for wrong arguments and if `out` is not empty.
    """
    if lines_per_file is not None and lines_per_file < 1:
        raise SimulationError("lines_per_file must be at least 1")
    if not 0 <= gz_share <= 1:
        raise SimulationError("gz_share lies between 0 and 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SimulationError(f"{out} is not an empty folder", hint="choose another, or remove what is in it")
    traffic = draw_traffic(events, seed, **options)
    per_file = lines_per_file if lines_per_file is not None else min(max(events // 24, 500), 40_000)
    lines, order_lines = traffic.lines, traffic.order_lines
    order_received = np.array([line.received_us for line in order_lines], np.int64)
    order_region = np.array([line.region for line in order_lines], np.uint8)
    orders_per_file = max(20, -(-len(order_lines) // (_SLICES_ORDERS * len(REGIONS))))
    slices = [
        *_cut("events", lines.region, lines.received_us, per_file),
        *_cut("orders", order_region, order_received, orders_per_file),
    ]
    slices.sort(key=lambda item: (item.end_us, item.source, item.region, item.number))

    event_order = np.concatenate([item.positions for item in slices if item.source == "events"])
    counted_orders = OrderTruth()
    for line in (order_lines[at] for item in slices if item.source == "orders" for at in item.positions):
        counted_orders.add(REGIONS[line.region], line.record)
    columns = lines.truth_columns(event_order, traffic.events, traffic.world, traffic.listed)
    files = {source: sum(item.source == source for item in slices) for source in ("events", "orders")}
    truth = account(
        traffic, columns, counted_orders, args={"lines_per_file": per_file, "gz_share": gz_share}, totals={"files": files}
    )
    write_beside(out, traffic)
    encoder = Encoder(traffic.world)
    mtimes = increasing_mtimes([item.end_us for item in slices])
    done = 0
    for item, mtime_ms in zip(slices, mtimes, strict=True):
        if item.source == "events":
            content = encoder.encode(traffic.events, lines, item.positions)
            done += len(item.positions)
        else:
            content = b"".join(order_lines[position].text + b"\n" for position in item.positions)
        packed = item.source == "events" and int((item.number + 1) * gz_share) > int(item.number * gz_share)
        name = f"{item.source}-{item.number:05d}.jsonl{'.gz' if packed else ''}"
        write_file(out / item.source / REGIONS[item.region] / name, content, mtime_ms)
        if progress is not None and item.source == "events":
            progress(done, events)
    write_file(out / "truth.json", truth.as_json().encode())
    return truth


def draw_traffic(
    events: int,
    seed: int,
    *,
    start: datetime = _DEFAULT_START,
    days: float | None = None,
    rate: float | None = None,
    hourly_weights: Sequence[float] | None = None,
    shares: SimulationShares = _DEFAULT_SHARES,
    campaigns: int = 60,
    ads: int = 600,
    users: int | None = None,
    click_rate: float = 0.03,
    conversion: float = 0.10,
    listed_users: int = 0,
    future_skew: timedelta = Limits.future_skew,
    hour_grace: timedelta = Limits.hour_grace,
    order_breakages: Sequence[Breakage] = ORDER_BREAKAGES,
) -> Traffic:
    """Draw the traffic of `events` event lines; see `TrafficOptions`.

    ``order_breakages`` are the ways in which order lines are broken. Raises SimulationError for the first wrong argument.
    """
    problems = {
        "hourly_weights are 24 numbers of 0 or more, one of them more": hourly_weights is not None
        and (len(hourly_weights) != 24 or min(hourly_weights) < 0 or not sum(hourly_weights)),
        "events must be at least 1": events < 1,
        "start needs a zone": start.tzinfo is None,
        "only one of days and rate can be given": days is not None and rate is not None,
        "days must be more than 0": days is not None and not days > 0,
        "rate must be more than 0": rate is not None and not rate > 0,
        "there must be at least one campaign": campaigns < 1,
        "there must be at least as many ads as campaigns": ads < campaigns,
        "there must be at least two users": users is not None and users < 2,
        "click_rate lies between 0 and 1": not 0 <= click_rate <= 1,
        "conversion lies between 0 and 1": not 0 <= conversion <= 1,
        "listed_users must not be negative": listed_users < 0,
    }
    for problem, is_found in problems.items():
        if is_found:
            raise SimulationError(problem)
    limits = Limits(future_skew, hour_grace)
    span_days = days if days is not None else events / rate / 86_400 if rate is not None else 3.0
    start_us = to_us(start)
    end_us = start_us + max(1_000_000, round(span_days * _DAY_US))
    people = users if users is not None else max(50, events // 20)

    world_rng, events_rng, lines_rng, orders_rng = np.random.default_rng(seed).spawn(4)
    world = make_world(world_rng, campaigns=campaigns, ads=ads, start_us=start_us, end_us=end_us)
    counts = plan(events, shares)
    drawn = draw_events(
        events_rng,
        world,
        shares,
        limits,
        size=counts.first_time,
        offered=events,
        spare_ids=counts.broken,
        users=people,
        click_rate=click_rate,
        hourly_weights=HOURLY_WEIGHTS if hourly_weights is None else (tuple(hourly_weights),) * len(REGIONS),
        start_us=start_us,
        end_us=end_us,
    )
    lines = draw_lines(lines_rng, drawn, counts, people, end_us)
    first_day = f"{start.astimezone(UTC):%Y%m%d}"
    order_lines = draw_orders(
        orders_rng, drawn, world, conversion=conversion, first_day=first_day, end_us=end_us, breakages=order_breakages
    )
    args: dict[str, Any] = {
        "events": events,
        "start": rfc3339(start_us),
        "days": span_days,
        "campaigns": campaigns,
        "ads": ads,
        "users": people,
        "click_rate": click_rate,
        "conversion": conversion,
        "listed_users": listed_users,
        "future_skew_seconds": future_skew.total_seconds(),
        "hour_grace_seconds": hour_grace.total_seconds(),
        "shares": asdict(shares),
    }
    if hourly_weights is not None:
        args["hourly_weights"] = list(hourly_weights)
    # users at even steps of the numbers, so that frequent and rare ones are among them
    listed = np.linspace(0, people * len(REGIONS) - 1, listed_users).astype(np.int64)
    return Traffic(seed, world, drawn, lines, order_lines, limits, listed, start_us, end_us, args)


def write_beside(out: Path, traffic: Traffic) -> None:
    """Write the campaigns and names, and the rules of the truth if they are not the default ones."""
    if len(traffic.listed):
        write_file(out / "rules" / "invalid_traffic.toml", _RULES.encode())
        write_file(out / "rules" / _LIST, "".join(f"{user_name(code)}\n" for code in traffic.listed.tolist()).encode())
    write_file(out / "campaigns" / "campaigns.csv", campaigns_csv(traffic.world.rows), traffic.start_us // 1000)
    write_file(out / "names" / "names.csv", names_csv(traffic.world.names()), traffic.start_us // 1000)


def _cut(source: str, region: npt.NDArray[np.uint8], received_us: Ints, per_file: int) -> list[Slice]:
    """Cut the lines of each region, in order of receipt, into files of ``per_file`` lines."""
    slices = []
    for code in range(len(REGIONS)):
        where = np.flatnonzero(region == code)
        where = where[np.argsort(received_us[where], kind="stable")]
        for number, begin in enumerate(range(0, len(where), per_file)):
            positions = where[begin : begin + per_file]
            slices.append(Slice(source, code, number, positions, int(received_us[positions[-1]])))
    return slices


def account(
    traffic: Traffic,
    columns: EventLines,
    orders: OrderTruth,
    *,
    args: dict[str, Any],
    totals: dict[str, Any],
    sources: Sequence[str] | None = None,
) -> Truth:
    """Return the truth of event lines and orders that are read in this order, with further ``args`` and ``totals``.

    ``sources`` are the names of the columns' sources, if they have some.
    """
    world = traffic.world
    counted = account_events(
        columns,
        regions=REGIONS,
        campaigns=world.campaign_ids,
        currencies=CURRENCIES,
        agents=AGENTS,
        stores=world.stores,
        campaign_rows=world.rows,
        limits=traffic.limits,
        sources=sources,
    )
    by_intent = np.bincount(traffic.lines.intent, minlength=len(INTENTS))
    intents = {"lines_by_intent": {name: int(by_intent[code]) for code, name in enumerate(INTENTS)}}
    touches = touches_by_journey(columns, counted.touches, world.campaign_ids, world.stores, user_name)
    return Truth(
        traffic.seed,
        traffic.args | args,
        counted.accounting,
        counted.campaign_hours,
        counted.billing,
        counted.totals | intents | totals,
        orders.as_dict(),
        credit_orders(orders.final_orders(), touches),
    )


class Encoder:
    """Turns lines into JSON text, with the lookup tables of one world."""

    def __init__(self, world: World, breakages: Sequence[Breakage] = EVENT_BREAKAGES) -> None:
        self._breakages = breakages
        self._campaign_of_ad = world.campaign_of_ad
        stores = world.stores.items()
        self._campaigns = encode.table([f'","campaign_id":"{name}","store_id":"{store}","user_id":"u' for name, store in stores])
        self._ads = encode.table([f',"ad_id":"{name}' for name in world.ad_ids])
        self._currencies = encode.table([f',"currency":"{CURRENCIES[currency]}"' for currency in world.currency_of_campaign])
        self._types = encode.table(["impression", "click"])
        self._regions = encode.table(["", *(f',"region":"{name}"' for name in REGIONS)])
        self._placements = encode.table([f',"placement":"{name}"' if name else "" for name in PLACEMENTS])
        self._agents = encode.table([f',"user_agent":"{name}"' if name else "" for name in AGENTS])
        self._extras = encode.table(list(EXTRAS))

    def encode(self, events: Events, lines: Lines, at: npt.NDArray[np.intp]) -> bytes:
        """Return the JSON lines at these positions, each with its newline."""
        event = lines.event[at]
        ad = events.ad[event]
        campaign = self._campaign_of_ad[ad]
        impression = events.impression[event]
        is_click = impression >= 0
        has_price = lines.has_price[at]
        text = encode.join(
            [
                '{"event_id":"',
                encode.uuids(events.raw_ids[lines.identity[at]]),
                '","event_type":"',
                self._types[is_click.astype(np.intp)],
                '","event_time":"',
                encode.timestamps(lines.event_us[at], events.digits[event], events.offset[event]),
                '","received_at":"',
                encode.timestamps(lines.received_us[at], np.full(len(at), 3)),
                '"',
                self._regions[np.where(events.has_region[event], lines.region[at] + 1, 0)],
                self._ads[ad],
                self._campaigns[campaign],
                encode.padded(lines.user[at], width=8),
                '"',
                encode.where(is_click, encode.table([',"impression_id":"'])),
                encode.where(is_click, encode.uuids(events.raw_ids[impression])),
                encode.where(is_click, encode.table(['"'])),
                self._placements[events.placement[event]],
                encode.where(has_price, encode.table([',"price_micros":'])),
                encode.where(has_price, encode.whole(lines.price_micros[at], width=10)),
                self._currencies[campaign],
                self._agents[events.agent[event]],
                self._extras[events.extra[event]],
                "}\n",
            ],
            len(at),
        )
        breakage = lines.breakage[at]
        broken = np.flatnonzero(breakage >= 0)
        if len(broken) == 0:
            return text
        parts = text.split(b"\n")
        for position in broken:
            parts[position] = self._breakages[breakage[position]].apply(parts[position])
        return b"\n".join(parts)
