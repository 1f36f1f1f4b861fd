"""Orders that follow clicks: placed, some cancelled later, some sent again, some contradictory, some broken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.simulator.broken import ORDER_BREAKAGES, Record, dump
from services.simulator.traffic import Events
from services.simulator.truth import HOUR_US, OrderTruth, rfc3339
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
    rng: np.random.Generator, events: Events, world: World, *, conversion: float, first_day: str, end_us: int
) -> list[OrderLine]:
    """One order for this fraction of the clicks, same user, store and region, minutes to hours after the click.

    Of the orders 6 % are cancelled (one in ten of those is told so before it is told of the order), 4 % are sent again,
    1 % again with another total; 1 % more lines are broken.
    """
    clicks = np.flatnonzero(events.is_click)
    count = round(len(clicks) * conversion)
    chosen = np.sort(rng.permutation(len(clicks))[:count])
    delays = rng.random(count)
    totals = rng.integers(80, 12_000, count) * 10_000
    kinds = rng.random(count)
    lags = rng.random((count, 3))
    lines: list[OrderLine] = []

    def add(region: int, received_us: int, record: Record, number: int, breakage: int | None = None) -> None:
        written = {**record, "received_at": rfc3339(received_us)}
        if number % 7:
            written["region"] = REGIONS[region]
        if breakage is None:
            lines.append(OrderLine(region, received_us, dump(written), record))
        else:
            lines.append(OrderLine(region, received_us, ORDER_BREAKAGES[breakage].apply(dump(written)), None))

    for number, click in enumerate(clicks[chosen]):
        impression = int(events.impression[click])
        campaign = world.campaign_of_ad[events.ad[click]]
        clicked_us = int(events.event_us[impression]) // 1000 * 1000
        draw = float(delays[number])
        order_us = clicked_us + (12 * 60 + int(draw * draw * 6 * 3600)) * _SECOND_US + number % 1000 * 1000
        region = int(events.region[click])
        record: Record = {
            "order_id": f"o-{first_day}-{number:07d}",
            "order_time": rfc3339(order_us),
            "user_id": f"u{int(events.user[click]):08d}",
            "store_id": world.store_ids[world.store_of_campaign[campaign]],
            "total_micros": int(totals[number]),
            "currency": CURRENCIES[world.currency_of_campaign[campaign]],
            "status": "placed",
        }
        first, second, third = (float(value) for value in lags[number])
        received_us = order_us + int(first * 3000) * 1000
        kind = float(kinds[number])
        longest_us = min(max(end_us - order_us, HOUR_US), 2 * _DAY_US)
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
            add(region, received_us - 2000, record, number, breakage=number % len(ORDER_BREAKAGES))
        add(region, received_us, record, number)
    return lines


def count_orders(lines: list[OrderLine]) -> OrderTruth:
    """The truth of order lines in the order in which they count."""
    truth = OrderTruth()
    for line in lines:
        truth.add(REGIONS[line.region], line.record)
    return truth
