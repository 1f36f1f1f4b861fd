"""Orders: one row an order, whatever the order and the batches in which its records arrive."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jobs.ingest.dedupe.classify import Outcome
from spark_jobs.ingest.orders import SettledOrders, micros, settle_orders, signed
from spark_jobs.lake.tables import ORDERS

Row = dict[str, Any]

PROPERTY = settings(max_examples=200, deadline=None)
CONTENT = json.loads((Path(__file__).resolve().parents[2] / "cases" / "orders" / "settle.json").read_text("utf-8"))
BASE: Row = CONTENT["base"]
CASES: list[dict[str, Any]] = CONTENT["cases"]
TIMES = ("order_time", "received_at", "cancelled_at")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAY_US = 86_400_000_000


def records_of(changes: list[Row]) -> list[Row]:
    """Staged rows; fingerprints lie around 2^63, where the table's numbers turn negative."""
    return [
        {
            "n": at,
            **BASE,
            "received_at": 1000 + at,
            "is_late": at % 2 == 0,
            "hour_us": 0,
            "fingerprint": 2**63 - 2 + at,
            "source_file": "orders/eu/1.jsonl",
            "source_line": at,
            **change,
        }
        for at, change in enumerate(changes)
    ]


def as_stored(row: Row) -> Row:
    """A row as table `orders` gives it back: times as datetimes, the batch's own columns added."""
    times = {name: None if row[name] is None else EPOCH + timedelta(microseconds=micros(row[name])) for name in TIMES}
    return {**row, **times, "ingested_at": EPOCH, "_query_id": "q", "_batch_id": 1}


class Table:
    """Table `orders` in a dict: a merge replaces the whole row."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def settle(self, batch: list[Row]) -> list[tuple[Outcome, int]]:
        given = copy.deepcopy((batch, self.rows))
        settled = settle_orders(batch, self.rows)
        assert (batch, self.rows) == given, "what was given is not changed"
        ids = [row["order_id"] for row in settled.changed]
        accepted = {r["order_id"] for r, (outcome, _) in zip(batch, pairs(settled), strict=True) if outcome is Outcome.ACCEPTED}
        assert ids == sorted(accepted), "a merge takes one row an order"
        self.rows |= {row["order_id"]: as_stored(row) for row in settled.changed}
        return pairs(settled)


def pairs(settled: SettledOrders) -> list[tuple[Outcome, int]]:
    return [(Outcome(one), int(holder)) for one, holder in zip(settled.outcome, settled.accepted_fingerprint, strict=True)]


def settle_in(batches: list[list[Row]]) -> tuple[list[tuple[Outcome, int]], dict[str, Row]]:
    table = Table()
    made = [pair for batch in batches for pair in table.settle(batch)]
    return made, table.rows


def expected_row(records: list[Row], wanted: dict[str, Any]) -> Row:
    source = records[wanted["from"]]
    by = wanted.get("cancelled_by")
    row = {name: source[name] for name in ORDERS.schema.names if name in source}
    row |= {"status": wanted["status"], "cancelled_at": None if by is None else records[by]["received_at"]}
    row |= {"has_placed": wanted.get("has_placed", True), "fingerprint": signed(source["fingerprint"])}
    return as_stored(row)


@pytest.mark.parametrize("split", ["one batch", "a batch each"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_case(case: dict[str, Any], split: str) -> None:
    records = records_of([record[0] for record in case["records"]])
    made, rows = settle_in([records] if split == "one batch" else [[record] for record in records])
    held_by = [record[2] if len(record) > 2 else at for at, record in enumerate(case["records"])]
    assert [outcome.name.lower() for outcome, _ in made] == [record[1] for record in case["records"]]
    assert [fingerprint for _, fingerprint in made] == [records[at]["fingerprint"] for at in held_by]
    assert rows == {order_id: expected_row(records, wanted) for order_id, wanted in case["rows"].items()}


CHANGE = st.fixed_dictionaries(
    {
        "order_id": st.sampled_from(["a", "a", "b"]),
        "status": st.sampled_from(["placed", "cancelled"]),
        "order_time": st.sampled_from([10, 10, 20 * DAY_US + 1]),
        "region": st.sampled_from(["eu", "us"]),
        "total_micros": st.sampled_from([1500, 1500, 0]),
        "user_id": st.sampled_from(["u", "u", "u", "v"]),
    }
)


def oracle(records: list[Row]) -> tuple[list[tuple[Outcome, int]], dict[str, Row]]:
    """All at once: an order's first record says whose it is; the first of each status that agrees with it counts."""
    made: list[tuple[Outcome, int]] = []
    rows: dict[str, Row] = {}
    for at, record in enumerate(records):
        so_far = [r for r in records[: at + 1] if r["order_id"] == record["order_id"]]
        shared = ("user_id", "store_id", "total_micros", "currency")
        agreeing = [r for r in so_far if all(r[name] == so_far[0][name] for name in shared)]
        placed = next((r for r in agreeing if r["status"] == "placed"), None)
        cancelled = next((r for r in agreeing if r["status"] == "cancelled"), None)
        if record is placed or record is cancelled:
            outcome = Outcome.ACCEPTED
        elif record not in agreeing or (placed and record["status"] == "placed" and record["order_time"] != placed["order_time"]):
            outcome = Outcome.CONFLICT
        else:
            outcome = Outcome.DUPLICATE
        holder = placed or cancelled
        assert holder is not None
        made.append((outcome, holder["fingerprint"]))
        row = {name: holder[name] for name in ORDERS.schema.names if name in holder}
        row |= {"status": "cancelled" if cancelled else "placed", "cancelled_at": cancelled["received_at"] if cancelled else None}
        row |= {"has_placed": placed is not None, "fingerprint": signed(holder["fingerprint"])}
        rows[record["order_id"]] = as_stored(row)
    return made, rows


@PROPERTY
@given(changes=st.lists(CHANGE, max_size=10), cuts=st.lists(st.integers(0, 10), max_size=4))
def test_any_batches_give_what_one_batch_gives(changes: list[Row], cuts: list[int]) -> None:
    records = records_of(changes)
    edges = [0, *sorted(cuts), len(records)]
    batches = [records[start:end] for start, end in pairwise(edges)]
    assert settle_in(batches) == settle_in([records]) == oracle(records)


@PROPERTY
@given(st.lists(CHANGE, max_size=8))
def test_a_replay_changes_nothing(changes: list[Row]) -> None:
    table = Table()
    first = table.settle(records_of(changes))
    before = copy.deepcopy(table.rows)
    again = table.settle(records_of(changes))
    assert table.rows == before
    turned = {Outcome.ACCEPTED: {Outcome.DUPLICATE}, Outcome.DUPLICATE: {Outcome.DUPLICATE}, Outcome.CONFLICT: {Outcome.CONFLICT}}
    assert all(after in turned[outcome] for (outcome, _), (after, _) in zip(first, again, strict=True))


@PROPERTY
@given(st.permutations([{}, {"region": "us"}, {"status": "cancelled"}, {"status": "cancelled", "order_time": 99}]))
def test_records_that_agree_may_come_in_any_order(changes: list[Row]) -> None:
    made, rows = settle_in([records_of(changes)])
    assert sorted(outcome.name for outcome, _ in made) == ["ACCEPTED", "ACCEPTED", "DUPLICATE", "DUPLICATE"]
    held = rows["o"]
    assert (held["status"], held["has_placed"], micros(held["order_time"])) == ("cancelled", True, 10)
    assert micros(held["cancelled_at"]) == 1000 + next(at for at, change in enumerate(changes) if "status" in change)


def test_a_changed_row_has_every_column_but_the_batch_s_own() -> None:
    (placed,) = settle_orders(records_of([{}]), {}).changed
    (cancelled,) = settle_orders(records_of([{"status": "cancelled"}]), {}).changed
    own = {"ingested_at", "_query_id", "_batch_id", "_run_id"}
    assert set(placed) == set(cancelled) == set(ORDERS.schema.names) - own


def test_no_records() -> None:
    settled = settle_orders([], {"o": {}})
    assert (pairs(settled), settled.changed) == ([], [])


@pytest.mark.parametrize(("fingerprint", "stored"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)])
def test_a_fingerprint_as_it_is_stored(fingerprint: int, stored: int) -> None:
    assert signed(fingerprint) == stored
    assert stored % 2**64 == fingerprint


def test_times_as_numbers_and_as_datetimes() -> None:
    assert micros(1_748_858_400_000_001) == micros(datetime(2025, 6, 2, 10, 0, 0, 1, tzinfo=UTC)) == 1_748_858_400_000_001
