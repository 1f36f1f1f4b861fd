"""Draws orders that follow clicks: placed, some cancelled later, some sent again, some contradictory, some broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.simulator.broken import ORDER_BREAKAGES, Breakage, Record, dump
from services.simulator.traffic import Events
from services.simulator.truth import HOUR_US, rfc3339
from services.simulator.world import CURRENCIES, REGIONS, World

_SECOND_US = 1_000_000
_DAY_US = 24 * HOUR_US


@dataclass(frozen=True)
class OrderLine:
    """A line of an order file; ``record`` is None if the line breaks the contract. ``received_us`` in microseconds."""

    region: int
    received_us: int
    text: bytes
    record: Record | None


def draw_orders(
    rng: np.random.Generator,
    events: Events,
    world: World,
    *,
    conversion: float,
    first_day: str,
    end_us: int,
    breakages: Sequence[Breakage] = ORDER_BREAKAGES,
) -> list[OrderLine]:
    """Draw orders for the fraction ``conversion`` of the clicks.

    At most a third follow journeys (several touches): at random after the last click, and at the limits of the window; most others
    follow a single click, by minutes to hours, with its user, store and region. One in fifty has no touch: the user did not see ads
    of that store. 6 % of the orders are cancelled (in one of ten the cancellation arrives first), 4 % are sent again, 1 % again
    with another total; 2 % arrive hours or days late; 1 % more lines are broken.
    """
    clicks = np.flatnonzero(events.is_click)
    count = round(len(clicks) * conversion)
    chosen = clicks[np.sort(rng.permutation(len(clicks))[:count])]
    delays = rng.random(count)
    totals = rng.integers(80, 12_000, count) * 10_000
    kinds = rng.random(count)
    lags = rng.random((count, 3))
    late = rng.random(count) < 0.02
    lines: list[OrderLine] = []

    def add(region: int, received_us: int, record: Record, number: int, breakage: int | None = None) -> None:
        written = {**record, "received_at": rfc3339(received_us)}
        if number % 7:
            written["region"] = REGIONS[region]
        if breakage is None:
            lines.append(OrderLine(region, received_us, dump(written), record))
        else:
            lines.append(OrderLine(region, received_us, breakages[breakage].apply(dump(written)), None))

    after_journeys = _after_journeys(events, count // 3, end_us)
    for number in range(count):
        draw = float(delays[number])
        if number < len(after_journeys):
            click, order_us = after_journeys[number]
        else:
            click = int(chosen[number])
            clicked_us = int(events.event_us[events.impression[click]]) // 1000 * 1000
            order_us = clicked_us + (12 * 60 + int(draw * draw * 6 * 3600)) * _SECOND_US + number % 1000 * 1000
        campaign, region = world.campaign_of_ad[events.ad[click]], int(events.region[click])
        store = int(world.store_of_campaign[campaign])
        if number >= len(after_journeys) and number % 50 == 49:
            store = (store + 1) % len(world.store_ids)
        record: Record = {
            "order_id": f"o-{first_day}-{number:07d}",
            "order_time": rfc3339(order_us),
            "user_id": user_name(int(events.user[click])),
            "store_id": world.store_ids[store],
            "total_micros": 1 + number % 7 if number % 97 == 96 else int(totals[number]),
            "currency": CURRENCIES[world.currency_of_campaign[campaign]],
            "status": "placed",
        }
        first, second, third = (float(value) for value in lags[number])
        kind = float(kinds[number])
        longest_us = min(max(end_us - order_us, HOUR_US), 2 * _DAY_US)
        received_us = order_us + int(first * 3000) * 1000
        if late[number]:
            received_us += int(third * longest_us) // 1000 * 1000
        if kind < 0.06:
            cancelled_us = received_us + 600 * _SECOND_US + int(second * longest_us) // 1000 * 1000
            cancelled = {**record, "status": "cancelled"}
            if kind < 0.006:
                received_us, cancelled_us = cancelled_us, received_us
            add(region, cancelled_us, cancelled, number)
        elif kind < 0.10:
            other = region ^ int(third < 0.3)
            add(other, received_us + int(second * second * HOUR_US) // 1000 * 1000 + 1000, record, number)
        elif kind < 0.11:
            dearer = {**record, "total_micros": record["total_micros"] + 1_000_000}
            add(region, received_us + 1000 + int(second * HOUR_US) // 1000 * 1000, dearer, number)
        elif kind < 0.12:
            add(region, received_us - 2000, record, number, breakage=number % len(breakages))
        add(region, received_us, record, number)
    return lines


def _after_journeys(events: Events, most: int, end_us: int) -> list[tuple[int, int]]:
    """Return at most ``most`` orders after journeys: (click whose user and store order, time of the order in microseconds).

    Four kinds take turns: an order some time after the last click, and after every second such journey another one a day later;
    one at the microsecond of the last click (so it is no touch); one a microsecond after it; one exactly a day after it (a touch in
    the window of one day) or a microsecond more (none).
    """
    result: list[tuple[int, int]] = []
    for number, journey in enumerate(events.journeys):
        by_time = sorted((int(events.event_us[click]), int(click)) for click in journey)
        last_us, click = by_time[-1]
        middle_us = by_time[len(by_time) // 2][0]
        some_us = min(last_us + 40 * 60 * _SECOND_US + number % 1000, max(end_us, last_us + 1))
        orders = {0: [some_us], 1: [last_us], 2: [last_us + 1], 3: [middle_us + _DAY_US + number // 4 % 2]}[number % 4]
        if number % 8 == 0:
            orders.append(some_us + _DAY_US)
        result += [(click, order_us) for order_us in orders]
    return result[:most]


def user_name(code: int) -> str:
    """Return the user_id of a user by number."""
    return f"u{code:08d}"
