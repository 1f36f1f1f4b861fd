"""`adtally status` checks the batches since the last time that all was right, and all of them where it cannot know which."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

import pyarrow.compute as pc
import pytest
from lake import campaigns, event, land, order
from local import LocalEvents, LocalOrders

from benchmarks.flat import Ingest
from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import commit_identity
from spark_jobs.lake.tables import EVENTS, MINUTE_METRICS, ORDERS, TABLES
from spark_jobs.operate.checked_batches import read_unchecked
from spark_jobs.operate.fsck import fsck
from spark_jobs.operate.status import read_status
from spark_jobs.steps import Step


@pytest.fixture
def events(settings: Settings) -> LocalEvents:
    """Three batches, of which all is right."""
    campaigns(settings)
    stream = LocalEvents(settings)
    for number in range(3):
        stream.take([event(f"e-{number}-{at}", event_time=f"2025-06-02T0{number}:00:00Z") for at in range(4)])
    assert read_status(settings).problems == []
    return stream


def first(settings: Settings) -> int:
    return read_unchecked(Lake(settings).pin(*TABLES.values())).first_batch["events"]


def test_new_batches_are_checked(events: LocalEvents) -> None:
    settings = events.settings
    assert first(settings) > 2
    events.take([event("new")])
    assert first(settings) == 3
    assert read_status(settings).problems == []
    assert first(settings) > 3


def test_rows_that_are_added_to_an_old_batch_are_found(events: LocalEvents) -> None:
    lake = Lake(events.settings)
    held = lake.at({EVENTS.name: lake.version(EVENTS) or 0})
    rows = next(lake.read_file_rows(EVENTS, held.files(EVENTS)[0]))
    one = rows.slice(0, 1)
    lake.append(EVENTS, one, Step.EVENTS)
    assert first(events.settings) == pc.min(one["_batch_id"]).as_py()
    for _ in range(2):  # what is wrong is not remembered as right
        problems = read_status(events.settings).problems
        assert any("accepted is 4 in batch_ledger, 5 in events" in problem for problem in problems)
        assert any("stand more than once" in problem for problem in problems)


def test_all_batches_are_checked_where_rows_went_or_nothing_is_known(events: LocalEvents) -> None:
    settings, lake = events.settings, Lake(events.settings)
    known = settings.home_path / "checked_versions.json"
    text = known.read_text()
    for damaged in ("", "{", text.replace('"events": [', '"events": [9')):
        known.write_text(damaged)
        assert first(settings) == 0
    known.write_text(text)
    held = lake.at({EVENTS.name: lake.version(EVENTS) or 0})
    lake.commit(EVENTS, Step.EVENTS, remove=held.files(EVENTS)[:1])
    assert first(settings) == 0
    assert any("accepted is 4 in batch_ledger, 0 in events" in problem for problem in read_status(settings).problems)


def test_orders_are_compared_by_what_changed_since(events: LocalEvents) -> None:
    settings, lake = events.settings, Lake(events.settings)
    orders = LocalOrders(settings, "orders")
    orders.take([order("o-1"), order("o-2")])
    assert read_status(settings).problems == []
    orders.take([order("o-1", status="cancelled"), order("o-3")])
    unchecked = read_unchecked(lake.pin(*TABLES.values()))
    assert (unchecked.records, len(unchecked.orders_removed)) == (2, 1)
    assert read_status(settings).problems == []
    assert read_unchecked(lake.pin(*TABLES.values())).records == 4
    orders.take([order("o-2", status="cancelled")])
    for commit in lake.log(ORDERS).commits_backwards():
        for name in commit.removed_paths:  # as a vacuum does
            (Path(settings.table_uri("orders")) / name).unlink(missing_ok=True)
    assert read_status(settings).problems == []
    held = lake.at({ORDERS.name: lake.version(ORDERS) or 0})
    lake.commit(ORDERS, Step.ORDERS, remove=held.files(ORDERS)[:1])
    for _ in range(2):
        assert any("accepted is 5 in batch_ledger" in problem for problem in read_status(settings).problems)


def test_a_check_of_all_does_not_believe_what_was_noted(events: LocalEvents) -> None:
    settings, lake = events.settings, Lake(events.settings)
    held = lake.at({EVENTS.name: lake.version(EVENTS) or 0})
    lake.append(EVENTS, next(lake.read_file_rows(EVENTS, held.files(EVENTS)[0])).slice(0, 1), Step.EVENTS)
    known = json.loads((settings.home_path / "checked_versions.json").read_text())
    log = lake.log(EVENTS)
    version = log.latest_version() or 0
    known["events"] = [version, commit_identity(log.commit(version))]
    (settings.home_path / "checked_versions.json").write_text(json.dumps(known))
    assert read_status(settings).problems == []
    assert any("5 in events" in problem for problem in read_status(settings, check_all=True).problems)
    assert any("5 in events" in found.detail for found in fsck(settings).findings)


def test_no_file_of_a_checked_batch_is_read(events: LocalEvents) -> None:
    settings, lake = events.settings, Lake(events.settings)
    orders = LocalOrders(settings, "orders")
    orders.take([order("o-1")])
    assert read_status(settings).problems == []
    for table in (EVENTS, MINUTE_METRICS):  # the ingest of orders reads orders
        for path in lake.pin(table).paths(table):
            (Path(settings.table_uri(table.name)) / unquote(path)).unlink()
    orders.take([order("o-2")])  # batch 1, which the events had long ago
    assert events.take([event("later", event_time="2025-06-02T09:00:00Z")]).accepted == 1
    assert read_status(settings).problems == []
    with pytest.raises(TableCorruptionError):
        read_status(settings, check_all=True)


def test_files_of_later_plans_are_looked_for(settings: Settings) -> None:
    campaigns(settings)
    ingest, at = Ingest(settings), datetime(2025, 6, 2, 12, tzinfo=UTC)
    files = [land(settings, f"events/eu/{number}.jsonl", [event(f"e-{number}")]) for number in range(4)]
    ingest.batch("events", files[:1], at)
    assert read_status(settings).problems == []
    checkpoint = ingest.checkpoints["events"]
    checkpoint.end(checkpoint.plan(files[1:2], int(at.timestamp() * 1000) + 1000))  # no batch ran
    for number in range(2, 4):
        ingest.batch("events", files[number : number + 1], at + timedelta(seconds=number))
    for _ in range(2):  # what is wrong is not remembered as right
        assert any("no batch has taken 1 file" in problem for problem in read_status(settings).problems)
    for number in range(2):  # as Spark does with the plans of old batches
        for part in ("offsets", "commits"):
            (settings.checkpoints_path / "events" / part / str(number)).unlink()
    assert any("no batch has taken 1 file" in problem for problem in read_status(settings).problems)
