"""Credits each placed order to the clicks before it, one order at a time and in exact numbers.

A touch is a billable click of the order's user and store, strictly before the order and at most the window before it. Touches are
in the order of (time, event id). `last_click` and `first_click` give all to one touch, `linear` the same to each, `position_based`
40 % to the first and the last and 20 % to those between (two: half each), `time_decay` by 2^(-age / 7 days). A credit is the floor
of its exact share; the remaining micros go to the largest remainders, ties to the earlier touch.
"""

from __future__ import annotations

import decimal
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

DAY_US = 86_400_000_000
MODELS = ("last_click", "first_click", "linear", "position_based", "time_decay")
WINDOWS = (1, 7, 14, 28, 30)
DEFAULT_WINDOW = 7
LISTED_MODELS = ("last_click", "first_click", "linear")
HALF_LIFE_DAYS = 7

_PRECISE = decimal.Context(prec=40)
_CAMPAIGN_COLUMNS = ("model", "window_days", "campaign_id", "currency", "credit_micros", "orders")


@dataclass(frozen=True, order=True)
class Touch:
    """A billable click; touches sort by time and then by event id."""

    event_us: int
    event_id: str
    campaign_id: str


@dataclass(frozen=True)
class FinalOrder:
    """An accepted order with its final status."""

    order_id: str
    order_us: int
    user_id: str
    store_id: str
    total_micros: int
    currency: str
    is_placed: bool


def weights(model: str, touches: Sequence[Touch], order_us: int) -> list[Fraction]:
    """Return the relative parts of the touches in an order; they need not sum to one."""
    count = len(touches)
    if model == "last_click":
        return [Fraction(0)] * (count - 1) + [Fraction(1)]
    if model == "first_click":
        return [Fraction(1)] + [Fraction(0)] * (count - 1)
    if model == "linear" or (model == "position_based" and count < 3):
        return [Fraction(1)] * count
    if model == "position_based":
        return [Fraction(2, 5), *[Fraction(1, 5 * (count - 2))] * (count - 2), Fraction(2, 5)]
    ages = [decimal.Decimal(order_us - touch.event_us) / (HALF_LIFE_DAYS * DAY_US) for touch in touches]
    return [Fraction(_PRECISE.power(2, -age)) for age in ages]  # to 28 digits and more


def split(total: int, parts: Sequence[Fraction]) -> list[int]:
    """Split ``total`` into whole micros in proportion to ``parts``, by largest remainder."""
    whole = sum(parts, Fraction(0))
    exact = [total * part / whole for part in parts]
    floors = [share.numerator // share.denominator for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda at: (floors[at] - exact[at], at))
    for at in by_remainder[: total - sum(floors)]:
        floors[at] += 1
    return floors


def credit_orders(orders: Iterable[FinalOrder], touches: Mapping[tuple[str, str], Sequence[Touch]]) -> dict[str, Any]:
    """Attribute orders, given the touches of each (user_id, store_id) in any order.

    ``totals``: placed, cancelled, per window the placed orders with a touch, and ``several_touches`` in the default window.
    ``campaigns``: model, window_days, campaign_id, currency, credit_micros and the number of orders in which a touch of the
    campaign has a share. ``orders``: order_id and per listed model, in the default window, [event_id, credit_micros] of each touch
    with a share.
    """
    placed = cancelled = several = 0
    credited: Counter[int] = Counter()
    sums: dict[tuple[str, int, str, str], list[int]] = {}
    listed: list[dict[str, Any]] = []
    sorted_touches = {journey: sorted(found) for journey, found in touches.items()}
    for order in sorted(orders, key=lambda order: order.order_id):
        if not order.is_placed:
            cancelled += 1
            continue
        placed += 1
        mine = sorted_touches.get((order.user_id, order.store_id), [])
        end = bisect_left(mine, order.order_us, key=lambda touch: touch.event_us)
        row: dict[str, Any] = {"order_id": order.order_id, **{model: [] for model in LISTED_MODELS}}
        listed.append(row)
        for window in WINDOWS:
            begin = bisect_left(mine, order.order_us - window * DAY_US, key=lambda touch: touch.event_us)
            inside = mine[begin:end]
            if not inside:
                continue
            credited[window] += 1
            several += window == DEFAULT_WINDOW and len(inside) > 1
            for model in MODELS:
                parts = weights(model, inside, order.order_us)
                micros = split(order.total_micros, parts)
                shared = [(touch, amount) for touch, part, amount in zip(inside, parts, micros, strict=True) if part]
                for campaign in {touch.campaign_id for touch, _ in shared}:
                    cell = sums.setdefault((model, window, campaign, order.currency), [0, 0])
                    cell[0] += sum(amount for touch, amount in shared if touch.campaign_id == campaign)
                    cell[1] += 1
                if window == DEFAULT_WINDOW and model in LISTED_MODELS:
                    row[model] = [[touch.event_id, amount] for touch, amount in shared]
    return {
        "totals": {
            "placed": placed,
            "cancelled": cancelled,
            "credited_by_window": {str(window): credited[window] for window in WINDOWS},
            "several_touches": several,
        },
        "campaigns": [dict(zip(_CAMPAIGN_COLUMNS, (*key, *sums[key]), strict=True)) for key in sorted(sums)],
        "orders": listed,
    }
