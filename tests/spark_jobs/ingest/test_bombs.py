"""Floods of rejects and bombs, taken by the ingest's own code without Spark: few rows, exact counts, the same by the recount."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import correct
import lake
import pytest
from local import LocalEvents, LocalOrders

from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.status import read_status

pytestmark = pytest.mark.homes

REJECTS = "source_line, outcome, reason_codes, records, raw, hour(record_time)"


@pytest.fixture
def home(tmp_path: Path) -> Callable[..., Settings]:
    def made(**changes: object) -> Settings:
        found = load_settings(home=tmp_path / "home", **changes)
        ensure_tables(found)
        lake.campaigns(found)
        return found

    return made


def _rejects(settings: Settings, columns: str = REJECTS) -> list[tuple[Any, ...]]:
    return sorted(correct.rows(settings, f"select {columns} from rejected_events"), key=lambda row: row[0])


def _ledger(settings: Settings) -> tuple[int, ...]:
    (sums,) = correct.rows(settings, "select sum(offered), sum(accepted), sum(conflict), sum(rejected) from batch_ledger")
    return tuple(int(value) for value in sums)


def _in_order(settings: Settings) -> bool:
    found = read_status(settings)
    return found.conservation_holds and not reconcile(settings, None).differences


def _flood() -> bytes:
    """Blank lines, empty objects and prices out of range in two hours, with valid records and conflicts between them."""
    made = []
    for number in range(12):
        made += [b"\n", b"{}\n"]
        made.append(lake.lines([lake.event(f"bad-{number}", price_micros=-1)]))
        made.append(lake.lines([lake.event(f"bad-{number}", price_micros=-1, event_time="2025-06-02T09:00:00Z")]))
        made.append(lake.lines([lake.event(f"ahead-{number}", price_micros=-1, event_time="2025-06-02T11:00:00Z")]))
        made.append(lake.lines([lake.event(f"good-{number}")]))
        made.append(lake.lines([lake.event(f"good-{number}", user_id="other")]))
    return b"".join(made)


@pytest.mark.parametrize("split_bytes", [4096, 16 * 1024 * 1024])
def test_a_flood_of_rejects_has_some_rows_and_a_count(home: Callable[..., Settings], split_bytes: int) -> None:
    settings = home(max_reject_rows=5, split_bytes=split_bytes)
    LocalEvents(settings).take_content(_flood())
    # of each kind lines 0 to 4 of it, then one row for the other seven
    kinds = {
        "blank_line": (1, None, ["blank_line"]),
        "price": (3, 10, ["price_micros_range"]),
        "earlier": (4, 9, ["price_micros_range"]),
        "ahead of its receipt": (5, 11, ["price_micros_range", "event_time_in_future"]),
        "conflict": (7, 10, ["conflict"]),
    }
    found = _rejects(settings)
    assert len(found) == 6 * 6
    for first, hour, reasons in kinds.values():
        own = [row for row in found if row[0] % 7 == first % 7]
        assert [row[0] for row in own] == [first + 7 * number for number in range(6)]
        assert [row[3] for row in own] == [None] * 5 + [7]
        assert {(tuple(row[2]), row[5]) for row in own} == {(tuple(reasons), hour)}
        assert [row[4] is None for row in own] == [False] * 5 + [True]
    assert _ledger(settings) == (84, 12, 12, 60)
    assert _in_order(settings)


def test_the_rows_of_a_flood_are_repaired(home: Callable[..., Settings]) -> None:
    settings = home(max_reject_rows=5)
    LocalEvents(settings).take_content(_flood())
    before = _rejects(settings)
    correct.delete(settings, "rejected_events", "true")
    assert {one.cause for one in reconcile(settings, None).differences} == {"rejected_lost"}
    assert reconcile(settings, None, repair=True).differences
    assert _rejects(settings) == before
    assert _in_order(settings)
    correct.delete(settings, "rejected_events", "records = 7 and outcome = 'conflict'")
    assert [one.cause for one in reconcile(settings, None).differences] == ["rejected_lost"]
    assert not read_status(settings).conservation_holds


def test_more_rows_than_the_limit_are_a_difference(home: Callable[..., Settings]) -> None:
    settings = home(max_reject_rows=5)
    LocalEvents(settings).take_content(_flood())
    correct.delete(settings, "rejected_events", "records is not null and reason_codes[1] = 'blank_line'")
    correct.append(
        settings,
        "rejected_events",
        "select * replace (36 as source_line, 6 as records) from rejected_events where source_line = 29",
    )
    assert {one.cause for one in reconcile(settings, None).differences} == {"rejected_lost", "rejected_unknown"}
    assert not read_status(settings).conservation_holds


def test_a_file_of_rejects_is_set_aside_and_counts_as_one(home: Callable[..., Settings]) -> None:
    settings = home(max_rejects_per_file=100, max_rejects_per_file_share=0.5)
    batches = LocalEvents(settings)
    batches.take_content(b"\n" * 90 + lake.lines([lake.event("a")]))  # a bad file, but no flood
    batches.take_content(b"\n" * 101 + lake.lines([lake.event("b")]))
    batches.take_content(b"\n" * 101 + lake.lines(lake.event(f"c{n}") for n in range(102)))  # most of it is good
    assert _ledger(settings) == (91 + 1 + 203, 103, 0, 90 + 1 + 101)
    (aside,) = [row for row in _rejects(settings) if row[0] == 0]
    assert aside == (0, "rejected", ["too_many_rejects"], None, "101 of the first 102 records are rejected", None)
    assert [one.reason_codes for one in read_status(settings).quarantined_files] == [["too_many_rejects"]]
    assert _in_order(settings)
    correct.delete(settings, "rejected_events", "source_line = 0")
    assert [one.cause for one in reconcile(settings, None, repair=True).differences] == ["rejected_lost"]
    (again,) = [row for row in _rejects(settings) if row[0] == 0]
    assert again == aside
    assert _in_order(settings)


def test_a_file_is_set_aside_for_the_rejects_of_all_its_splits(home: Callable[..., Settings]) -> None:
    settings = home(max_rejects_per_file=100, split_bytes=4096)
    line = json.dumps({"x": "y" * 90}).encode() + b"\n"
    LocalEvents(settings).take_content(lake.lines([lake.event("a")]) + line * 120)
    assert _ledger(settings) == (1, 0, 0, 1)
    assert _in_order(settings)


def test_a_gzip_file_that_unpacks_to_too_much_is_set_aside(home: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    of_settings = StreamJob._limits_of_files
    monkeypatch.setattr(StreamJob, "_limits_of_files", lambda job: replace(of_settings(job), unpacked_bytes=1024 * 1024))
    settings = home(max_gzip_ratio=100)
    batches = LocalEvents(settings)
    record = lake.lines([lake.event("a")])
    batches.take_content(gzip.compress(record * 3000), ".jsonl.gz")  # as much, but below the limit
    batches.take_content(gzip.compress(record * 6000), ".jsonl.gz")
    assert [one.reason_codes for one in read_status(settings).quarantined_files] == [["gzip_bomb"]]
    assert _ledger(settings) == (3001, 1, 0, 1)
    assert _in_order(settings)


def test_a_flood_of_rejected_orders(home: Callable[..., Settings]) -> None:
    settings = home(max_reject_rows=3, max_rejects_per_file=50, split_bytes=4096)
    flood = lake.lines(lake.order(f"o{n}", currency="none") for n in range(40))  # several splits
    good = lake.lines(lake.order(f"g{n}") for n in range(10))
    other = lake.lines(lake.order(f"g{n}", order_time="2025-06-02T11:00:01Z") for n in range(10))
    batches = LocalOrders(settings)
    first = batches.take_content(flood + good + other)
    assert (first.offered, first.accepted, first.conflict, first.rejected) == (60, 10, 10, 40)
    second = batches.take_content(lake.lines([lake.order("x")]) + flood + flood)
    assert (second.offered, second.rejected) == (1, 1)
    found = correct.rows(settings, "select source_line, outcome, reason_codes, records from rejected_orders")
    assert sorted(found) == sorted(
        [
            (0, "rejected", ["too_many_rejects"], None),
            *((n, "rejected", ["currency_unknown"], 37 if n == 4 else None) for n in range(1, 5)),
            *((n, "conflict", ["conflict"], 7 if n == 54 else None) for n in range(51, 55)),
        ]
    )
    assert correct.rows(settings, "select count(*) from orders") == [(10,)]
    assert read_status(settings).problems == []
    assert _in_order(settings)
    rows = sorted(correct.rows(settings, "select * exclude (_run_id) from rejected_orders"), key=repr)
    correct.delete(settings, "rejected_orders", "true")
    assert {one.cause for one in reconcile(settings, None, repair=True).differences} == {"rejected_lost"}
    assert sorted(correct.rows(settings, "select * exclude (_run_id) from rejected_orders"), key=repr) == rows
    assert _in_order(settings)
