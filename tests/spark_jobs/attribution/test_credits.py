"""Credits of touches: hand-worked cases, sums, and what an independent computation says."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jobs.attribution import credit_orders
from spark_jobs.attribution.credits import Credits, credit, sort_touches
from spark_jobs.attribution.rules import MODELS, AttributionRules
from spark_jobs.units import DAY_US

CASES = sorted((Path(__file__).resolve().parents[2] / "cases" / "attribution").glob("*.json"))
TIME = pa.timestamp("us", "UTC")
HOUR_US = DAY_US // 24


def table_of(rows: list[dict[str, Any]], defaults: dict[str, Any], time: str) -> pa.Table:
    whole = [{**defaults, **row} for row in rows]
    for row in whole:
        row[time] = datetime.fromisoformat(row[time])
    names = list(defaults)
    fields = [(n, TIME if n == time else pa.int64() if n == "total_micros" else pa.string()) for n in names]
    return pa.Table.from_pylist(whole, pa.schema(fields))


ORDER = {
    "order_id": "o",
    "user_id": "u",
    "store_id": "s",
    "order_time": "",
    "total_micros": 0,
    "currency": "EUR",
    "status": "placed",
}
TOUCH = {
    "event_id": "",
    "event_type": "click",
    "user_id": "u",
    "store_id": "s",
    "event_time": "",
    "campaign_id": "c",
    "ad_id": "a",
    "invalid_traffic_rule": None,
}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_hand_worked(path: Path) -> None:
    """Each case: orders, touches, rules, and per order, model and window the micros by touch (others: none)."""
    case = json.loads(path.read_text("utf-8"))
    touches = [dict(touch) for touch in case["touches"]]
    if "repeat" in case:
        first = datetime.fromisoformat(case["repeat"]["first"])
        for number in range(case["repeat"]["count"]):
            at = first + timedelta(seconds=case["repeat"]["every_seconds"] * number)
            touches.append({"event_id": f"{case['repeat']['prefix']}{number:03d}", "event_time": at.isoformat()})
    made = credit_orders(
        table_of(case["orders"], ORDER, "order_time"),
        table_of(touches, TOUCH, "event_time"),
        AttributionRules(**case.get("rules", {})),
    )
    found: dict[str, dict[str, int]] = {}
    for row in made.to_pylist():
        found.setdefault(f"{row['order_id']} {row['model']} {row['window_days']}", {})[row["touch_event_id"]] = row["credit_micros"]
    chosen = {key: value for key, value in found.items() if key in case["credits"] or case.get("complete")}
    assert chosen == {key: value for key, value in case["credits"].items() if value}
    for key, value in case["credits"].items():
        assert sum(value.values()) in (0, {o["order_id"]: o["total_micros"] for o in case["orders"]}[key.split()[0]])


def by_hand(total: int, ages: list[int], rules: AttributionRules) -> dict[str, list[int]]:
    """Credits of touches from the earliest on, in exact fractions (time_decay: from weights of 52 bits)."""
    count = len(ages)
    position = [Fraction(1)] if count == 1 else [Fraction(1, 2)] * 2
    if count > 2:
        position = [Fraction(2, 5), *[Fraction(1, 5) / (count - 2)] * (count - 2), Fraction(2, 5)]
    weights = np.exp2(-(np.array(ages) - ages[-1]) / (rules.half_life_days * DAY_US))
    decay = [Fraction(round(weight * 2**52)) for weight in weights.tolist()]
    whole = sum(decay)
    shares = {
        "last_click": [Fraction(0)] * (count - 1) + [Fraction(1)],
        "first_click": [Fraction(1)] + [Fraction(0)] * (count - 1),
        "linear": [Fraction(1, count)] * count,
        "position_based": position,
        "time_decay": [weight / whole for weight in decay],
    }
    made = {}
    for model, parts in shares.items():
        exact = [total * part for part in parts]
        micros = [int(value) for value in exact]
        for place in sorted(range(count), key=lambda n: (micros[n] - exact[n], n))[: total - sum(micros)]:
            micros[place] += 1
        made[model] = micros
    return made


def credits_of(totals: list[int], ages: list[list[int]], rules: AttributionRules) -> Credits:
    order = np.repeat(np.arange(len(totals)), [len(part) for part in ages]).astype(np.int64)
    at = 400 * DAY_US
    times = np.array([at - age for part in ages for age in part], dtype=np.int64)
    return credit(np.full(len(totals), at), np.array(totals), order, times, np.ones(len(order), bool), rules)


ages = st.lists(st.integers(1, 30 * DAY_US), min_size=1, max_size=12).map(lambda values: sorted(values, reverse=True))
TOTALS = st.one_of(st.integers(0, 30), st.integers(0, 10**15), st.just(10**15))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TOTALS, ages), min_size=1, max_size=5), st.sampled_from([0.001, 0.5, 7.0, 30.0, 3650.0]))
def test_shares_are_the_exact_ones_and_sum_to_the_total(orders: list[tuple[int, list[int]]], half_life: float) -> None:
    rules = AttributionRules(half_life_days=half_life)
    totals, spans = [total for total, _ in orders], [span for _, span in orders]
    made = credits_of(totals, spans, rules)
    start = 0
    for total, span in orders:
        rows = slice(start, start + len(span))
        start += len(span)
        for number, days in enumerate(rules.window_days):
            inside = [age for age in span if age <= days * DAY_US]
            assert made.inside[rows, number].tolist() == [age <= days * DAY_US for age in span]
            expected = by_hand(total, inside, rules) if inside else {model: [] for model in MODELS}
            for model in MODELS:
                found = made.micros[model][rows, number]
                assert found[len(span) - len(inside) :].tolist() == expected[model], (model, days)
                assert not found[: len(span) - len(inside)].any()
                assert found.sum() == (total if inside else 0)
                assert abs(made.weights[model][rows, number].sum() - bool(inside)) < 1e-9


@pytest.mark.parametrize("count", [100, 800, 5000])
@pytest.mark.parametrize("total", [1, 10**15, 10**15 - 1])
def test_many_touches_of_one_order(count: int, total: int) -> None:
    rules = AttributionRules()
    span = sorted((number * 7_919_000_003 % (7 * DAY_US) + 1 for number in range(count)), reverse=True)
    made = credits_of([total], [span], rules)
    for model in MODELS:
        found = made.micros[model]
        assert set(found[:, 1:].sum(axis=0).tolist()) == {total} and found.min() >= 0
        if count < 1000 or model != "time_decay":  # more touches have weights of fewer bits
            assert found[:, 1].tolist() == by_hand(total, span, rules)[model]


def test_an_order_alone_or_among_others_is_credited_the_same() -> None:
    rules = AttributionRules()
    generator = np.random.default_rng(3)
    spans = [sorted(generator.integers(1, 40 * DAY_US, size).tolist(), reverse=True) for size in generator.integers(1, 40, 60)]
    totals = generator.integers(0, 10**15, 60).tolist()
    together = credits_of(totals, spans, rules)
    start = 0
    for total, span in zip(totals, spans, strict=True):
        alone = credits_of([total], [span], rules)
        for model in MODELS:
            assert np.array_equal(together.micros[model][start : start + len(span)], alone.micros[model])
            assert np.array_equal(together.weights[model][start : start + len(span)], alone.weights[model])
        start += len(span)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.text(max_size=3)), max_size=30))
def test_touches_are_sorted_by_order_time_and_id(rows: list[tuple[int, int, str]]) -> None:
    order, time = (np.array([row[n] for row in rows], dtype=np.int64) for n in (0, 1))
    ids = pa.array([row[2].encode("utf-8", "ignore").decode() for row in rows], pa.string())
    sorted_by = sort_touches(order, time, ids)
    by = list(range(len(rows))) if sorted_by is None else sorted_by.tolist()
    assert [(rows[i][0], rows[i][1], ids[i].as_py()) for i in by] == sorted(
        (r[0], r[1], i.as_py()) for r, i in zip(rows, ids, strict=True)
    )
