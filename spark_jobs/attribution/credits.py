"""The credit of each touch of an order, per model and lookback window: pure functions on arrays, in whole numbers.

A share is an exact fraction of the order's total. Each touch gets the floor of its share. The remaining micros go to the largest
remainders, one each, and to the earlier touch if remainders are equal. So the credits of a window and model sum to the total. Only
the weights of ``time_decay`` are not fractions: they are rounded to whole multiples of 2**-52 of the latest touch's weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def sort_touches(order: Ints, time: Ints, event_id: pa.ChunkedArray | pa.Array) -> Ints | None:
    """Return the indices that sort touches by (order, time, event_id), ids by their code points; None if they are sorted."""
    steps, later = np.diff(order), np.diff(time)
    if np.all((steps > 0) | ((steps == 0) & (later > 0))):
        return None
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
    decay = _Decay(age, rules.half_life_days * DAY_US)
    for number, days in reversed(list(enumerate(rules.window_days))):  # the longest first: its weights serve the others
        counts = (age > 0) & (age <= days * DAY_US) & is_click
        if rules.view_through:
            seen = (age > 0) & (age <= min(days * DAY_US, rules.view_through_hours * HOUR_US)) & ~is_click
            counts |= seen & ~np.isin(order, order[counts])
        at = np.flatnonzero(counts)
        if not len(at):
            continue
        made.inside[at, number] = True
        groups = _Groups.of(order[at], total_micros)
        window = _Window(made, number, at)
        _last_click(groups, window)
        _first_click(groups, window)
        _linear(groups, window)
        _position_based(groups, window)
        _time_decay(groups, window, decay)
    return made


@dataclass(frozen=True)
class _Groups:
    """The touches of each order in a window, as a group: the index of its first and last touch, its size, the order's total.

    ``place`` is each touch's place in its group, from 0.
    """

    first: Ints
    last: Ints
    size: Ints
    total: Ints
    place: Ints

    @classmethod
    def of(cls, order: Ints, total_micros: Ints) -> _Groups:
        first = np.flatnonzero(np.concatenate([[True], order[1:] != order[:-1]]))
        size = np.diff(np.append(first, len(order)))
        return cls(first, first + size - 1, size, total_micros[order[first]], np.arange(len(order)) - np.repeat(first, size))

    def spread(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a value per group as a value per touch."""
        return np.repeat(values, self.size)


@dataclass(frozen=True)
class _Window:
    """The column ``number`` of all credits, and the rows ``at`` of the touches in the window."""

    made: Credits
    number: int
    at: Ints

    def put(self, model: str, micros: Ints, weights: Floats, touches: Ints | slice = slice(None)) -> None:
        """Store the credits of ``touches`` (indices into the window's touches; default: all)."""
        at = self.at[touches]
        self.made.micros[model][at, self.number] = micros
        self.made.weights[model][at, self.number] = weights


def _last_click(groups: _Groups, window: _Window) -> None:
    window.put("last_click", groups.total, np.ones(len(groups.total)), groups.last)


def _first_click(groups: _Groups, window: _Window) -> None:
    window.put("first_click", groups.total, np.ones(len(groups.total)), groups.first)


def _linear(groups: _Groups, window: _Window) -> None:
    floor, rest = np.divmod(groups.total, groups.size)
    micros = groups.spread(floor) + (groups.place < groups.spread(rest))
    window.put("linear", micros, groups.spread(1.0 / groups.size))


def _position_based(groups: _Groups, window: _Window) -> None:
    """Credit all to one touch; half each to two; of more, two fifths each to the first and the last, one fifth to the others."""
    size, total = groups.size, groups.total
    between = np.maximum(size - 2, 1)
    # Remainders have the unit 1 / (5 * between), so that they can be compared.
    outer_floor, outer_rest = 2 * total // 5, 2 * total % 5 * between
    inner_floor, inner_rest = np.divmod(total, 5 * between)
    left = total - 2 * outer_floor - between * inner_floor
    # The rank of the remainder, of equal ones the earlier touch first: that of an inner touch is its place, or one next to it.
    sign = np.sign(outer_rest - inner_rest)
    first = outer_floor + (np.where(sign < 0, size - 2, 0) < left)
    last = outer_floor + (np.where(sign < 0, size - 1, np.where(sign > 0, 1, size - 1)) < left)
    two = size == 2
    first = np.where(size == 1, total, np.where(two, total // 2 + total % 2, first))
    last = np.where(size == 1, total, np.where(two, total // 2, last))
    outer = np.where(size > 2, 0.4, 1.0 / size)
    micros = groups.spread(inner_floor) + (groups.place < groups.spread(left - sign))
    weights = groups.spread(0.2 / between)
    for at, values in ((groups.first, first), (groups.last, last)):
        micros[at], weights[at] = values, outer
    window.put("position_based", micros, weights)


class _Decay:
    """The weights of `time_decay` before they are whole numbers: 2 ** (-age / half-life), relative to an order's latest touch."""

    def __init__(self, age: Ints, half_life_us: float) -> None:
        self._age, self._half_life_us = age, half_life_us
        self._known = np.zeros(len(age))
        self._latest = np.full(len(age), -1)  # the touch that the known weight is relative to

    def of(self, groups: _Groups, at: Ints) -> Floats:
        """Return the weights of the touches ``at``."""
        latest = groups.spread(at[groups.last])
        if not np.array_equal(self._latest[at], latest):
            self._latest[at] = latest
            self._known[at] = np.exp2(-((self._age[at] - self._age[latest]) / self._half_life_us))
        return self._known[at]


def _time_decay(groups: _Groups, window: _Window, decay: _Decay) -> None:
    """Weigh a touch by its age, relative to the order's latest touch, which scales all weights alike."""
    bits = np.minimum(_WEIGHT_BITS, _SUM_BITS - np.ceil(np.log2(groups.size + 1)).astype(np.int64))
    scale = groups.spread(np.ldexp(1.0, bits))  # a power of two: the product is exact
    weight = np.rint(decay.of(groups, window.at) * scale).astype(np.int64)
    sums, total = groups.spread(np.add.reduceat(weight, groups.first)), groups.spread(groups.total)
    share = weight / sums
    # The floor in floats is off by at most one. The exact remainder corrects it: it fits into 64 bits, though its terms overflow.
    floor = np.floor(total * share).astype(np.int64)
    with np.errstate(over="ignore"):
        rest = (total.view(np.uint64) * weight.view(np.uint64) - floor.view(np.uint64) * sums.view(np.uint64)).view(np.int64)
    off = (rest >= sums).astype(np.int64) - (rest < 0)
    if off.any():
        floor, rest = floor + off, rest - off * sums
    left = groups.total - np.add.reduceat(floor, groups.first)
    floor += _largest(groups, rest, left)
    window.put("time_decay", floor, share)


def _largest(groups: _Groups, rest: Ints, left: Ints) -> Bools:
    """Mark the ``left`` touches of each group with the largest remainders, of equal ones the earlier.

    Takes all groups of one size at a time. ``left`` is less than a group's size.
    """
    marked = np.zeros(len(rest), bool)
    sizes = np.where(left > 0, groups.size, 0)
    for size in (np.flatnonzero(np.bincount(sizes)[1:]) + 1).tolist():
        chosen = np.flatnonzero(sizes == size)
        at = groups.first[chosen][:, None] + np.arange(size)
        rests, wanted = rest[at], left[chosen]
        least = np.sort(rests, axis=1)[np.arange(len(chosen)), size - wanted][:, None]
        taken = rests > least
        equal = rests == least
        short = wanted - taken.sum(axis=1)
        if np.any(equal.sum(axis=1) != short):
            equal &= np.cumsum(equal, axis=1) <= short[:, None]
        marked[at] = taken | equal
    return marked


def validity(inside: Bools) -> pa.Buffer:
    """Return Arrow's bitmap of the values of `nested` that are not null."""
    return pa.py_buffer(np.packbits(inside.reshape(-1), bitorder="little"))


def nested(values: Ints | Floats, bitmap: pa.Buffer | None = None) -> pa.ListArray:
    """Return a column with a list per row of ``values``, which it refers to; null where the ``bitmap`` (`validity`) says so."""
    rows, width = values.shape
    kind = pa.float64() if values.dtype == np.float64 else pa.int64()
    flat = pa.Array.from_buffers(kind, rows * width, [bitmap, pa.py_buffer(np.ascontiguousarray(values))])
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * width), flat)
