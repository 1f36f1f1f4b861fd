"""The credit of each touch of an order, per model and lookback window: pure functions on arrays, in whole numbers.

A share is an exact fraction of the order's total. Each touch gets the floor of its share. The remaining micros go to the largest
remainders, one each, and to the earlier touch if remainders are equal. So the credits of a window and model sum to the total. Only
the weights of ``time_decay`` are not fractions: they are rounded to whole multiples of 2**-52 of the latest touch's weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs.attribution.rules import MODELS, AttributionRules
from spark_jobs.units import DAY_US, HOUR_US

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_WEIGHT_BITS = 52
_SUM_BITS = 61  # weights of an order sum to less than 2**61, so every difference below fits into 64 bits


@dataclass(frozen=True)
class Credits:
    """Arrays of shape (touches, windows); ``micros`` and ``weights`` by model. Both are 0 outside of a window."""

    inside: Bools
    micros: dict[str, Ints]
    weights: dict[str, Floats]


def sort_touches(order: Ints, time: Ints, event_id: pa.ChunkedArray | pa.Array) -> Ints:
    """Return the indices that sort touches by (order, time, event_id), ids by their code points."""
    by = np.lexsort((time, order))
    tied = np.flatnonzero((order[by][1:] == order[by][:-1]) & (time[by][1:] == time[by][:-1]))
    start = 0
    while start < len(tied):  # one round a run of equal times
        end = start
        while end + 1 < len(tied) and tied[end + 1] == tied[end] + 1:
            end += 1
        low, high = tied[start], tied[end] + 2
        ids = event_id.take(pa.array(by[low:high])).to_pylist()
        by[low:high] = by[low:high][sorted(range(len(ids)), key=ids.__getitem__)]
        start = end + 1
    return by


def credit(
    order_time: Ints, total_micros: Ints, order: Ints, touch_time: Ints, is_click: Bools, rules: AttributionRules
) -> Credits:
    """Return the credits of touches, which are sorted by (order, time, event_id).

    ``order`` is each touch's index into ``order_time`` (microseconds) and ``total_micros`` (0 to 10**15). A touch counts in a
    window where 0 < order_time - touch_time <= window. Impressions count in a window without a click, if view-through is on.
    """
    shape = (len(order), len(rules.window_days))
    made = Credits(
        np.zeros(shape, bool), {model: np.zeros(shape, np.int64) for model in MODELS}, {model: np.zeros(shape) for model in MODELS}
    )
    age = order_time[order] - touch_time
    for number, days in enumerate(rules.window_days):
        counts = (age > 0) & (age <= days * DAY_US) & is_click
        if rules.view_through:
            seen = (age > 0) & (age <= min(days * DAY_US, rules.view_through_hours * HOUR_US)) & ~is_click
            counts |= seen & ~np.isin(order, order[counts])
        at = np.flatnonzero(counts)
        if not len(at):
            continue
        group = _Groups.of(order[at])
        total = total_micros[order[at]]
        made.inside[at, number] = True
        for model, (micros, weights) in _shares(group, total, age[at], rules).items():
            made.micros[model][at, number] = micros
            made.weights[model][at, number] = weights
    return made


@dataclass(frozen=True)
class _Groups:
    """The touches of each order in a window, as a group. ``starts`` has the index of each group's first touch.

    Per touch: the ``number`` of its group, the group's ``size``, and the touch's ``place`` in it, from 0.
    """

    size: Ints
    place: Ints
    starts: Ints
    number: Ints

    @classmethod
    def of(cls, order: Ints) -> _Groups:
        first = np.ones(len(order), dtype=bool)
        first[1:] = order[1:] != order[:-1]
        starts = np.flatnonzero(first)
        number = np.cumsum(first) - 1
        size = np.diff(np.append(starts, len(order)))[number]
        return cls(size, np.arange(len(order)) - starts[number], starts, number)


def _shares(group: _Groups, total: Ints, age: Ints, rules: AttributionRules) -> dict[str, tuple[Ints, Floats]]:
    last, first = group.place == group.size - 1, group.place == 0
    return {
        "last_click": (np.where(last, total, 0), last.astype(np.float64)),
        "first_click": (np.where(first, total, 0), first.astype(np.float64)),
        "linear": (total // group.size + (group.place < total % group.size), 1.0 / group.size),
        "position_based": _position_based(group, total, first | last, last),
        "time_decay": _time_decay(group, total, age, rules),
    }


def _position_based(group: _Groups, total: Ints, outer: Bools, last: Bools) -> tuple[Ints, Floats]:
    """Credit all to one touch; half each to two; of more, two fifths each to the first and the last, one fifth to the others."""
    size, place = group.size, group.place
    between = np.maximum(size - 2, 1)
    # Remainders have the unit 1 / (5 * between), so that they can be compared.
    outer_floor, outer_rest = 2 * total // 5, 2 * total % 5 * between
    inner_floor, inner_rest = total // (5 * between), total % (5 * between)
    left = total - 2 * outer_floor - between * inner_floor
    # The rank of the remainder; of equal ones the earlier touch is first.
    if_outer = np.where(last, 1, np.where(outer, 0, place + 1))
    if_inner = np.where(last, size - 1, np.where(outer, size - 2, place - 1))
    rank = np.where(outer_rest > inner_rest, if_outer, np.where(outer_rest < inner_rest, if_inner, place))
    many = np.where(outer, outer_floor, inner_floor) + (rank < left)
    few = np.where(size == 1, total, total // 2 + (place < total % 2))
    weights = np.where(outer, 0.4, 0.2 / between)
    return np.where(size > 2, many, few), np.where(size > 2, weights, 1.0 / size)


def _time_decay(group: _Groups, total: Ints, age: Ints, rules: AttributionRules) -> tuple[Ints, Floats]:
    """Weigh a touch by 2 ** (-age / half-life), relative to the order's latest touch, which scales all weights alike."""
    ends = group.starts + group.size[group.starts] - 1
    older = (age - age[ends][group.number]) / (rules.half_life_days * DAY_US)
    bits = np.minimum(_WEIGHT_BITS, _SUM_BITS - np.ceil(np.log2(group.size + 1)).astype(np.int64))
    weight = np.rint(np.ldexp(np.exp2(-older), bits)).astype(np.int64)
    sums = np.add.reduceat(weight, group.starts)[group.number]
    # The floor in floats is off by at most one. The exact remainder corrects it: it fits into 64 bits, though its terms overflow.
    floor = np.floor(total * (weight / sums)).astype(np.int64)
    with np.errstate(over="ignore"):
        rest = (total.view(np.uint64) * weight.view(np.uint64) - floor.view(np.uint64) * sums.view(np.uint64)).view(np.int64)
    off = np.where(rest < 0, -1, np.where(rest >= sums, 1, 0))
    floor, rest = floor + off, rest - off * sums
    left = total[group.starts] - np.add.reduceat(floor, group.starts)
    floor += _rank(group, rest, left) < left[group.number]
    return floor, weight / sums


def _rank(group: _Groups, rest: Ints, left: Ints) -> Ints:
    """Return each touch's rank in its group by remainder, largest first, of equal ones the earlier first.

    Ranks all groups of one size at a time. Where nothing is left over, the rank does not matter and is the touch's place.
    """
    rank = group.place.copy()
    sizes = np.where(left > 0, group.size[group.starts], 1)
    for size in np.unique(sizes[sizes > 1]).tolist():
        at = group.starts[sizes == size][:, None] + np.arange(size)
        by = np.argsort(-rest[at], axis=1, kind="stable")
        places = np.empty_like(by)
        np.put_along_axis(places, by, np.broadcast_to(np.arange(size), by.shape), axis=1)
        rank[at] = places
    return rank


def nested(values: Ints | Floats, inside: Bools) -> pa.ListArray:
    """Return a column with a list per row of ``values``; null where not ``inside``."""
    rows, width = values.shape
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), mask=~inside.reshape(-1))
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * width), flat)
