"""The recount of what was read from Kafka, by the table of raw records: as of files, whatever that table has and lacks."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import correct
import lake
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession
from topics import Record, Topic, point_at

from orchestration.assets.hours import recount_verdicts
from orchestration.explain import as_json, explain_campaign_day
from orchestration.marts import build_marts
from services.launcher.kafka import Kafka
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.backfill import backfill
from spark_jobs.corrections.reconcile import ReconcileReport, reconcile
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.operate.status import read_status
from spark_jobs.units import HourRange
from tests.expectations.small_lake import validated
from tests.spark_jobs.homes.faults import FAULTS

pytestmark = pytest.mark.homes

ELSE = {"event_time": "2025-06-02T07:30:00Z", "received_at": "2025-06-02T07:30:01Z"}
EU: list[Record] = [
    *(b"nonsense", lake.event("t1"), lake.event("t1"), lake.event("t2", campaign_id="nobody"), None, b""),
    *(lake.event(f"e{n}", ad_id=f"a-{n % 3}", event_type="click" if n % 4 else "impression") for n in range(40)),
    b"{\n" + lake.lines([lake.event("spread")])[1:],
]
US: list[Record] = [
    *(lake.event("t1", **ELSE), lake.event("t1", user_id="u-9"), lake.event("t3", received_at=None), b"\xff", b"x" * 70_000),
    *(lake.event(f"e{n}", ad_id=f"a-{n % 3}", event_type="click" if n % 4 else "impression") for n in range(30, 60)),
    *(lake.event(f"m{n}", region="eu-west", **ELSE) for n in range(10)),
]

CANCELLED = {"status": "cancelled", "received_at": "2025-06-03T00:00:00Z"}
ORDERS: list[Record] = [
    *(lake.order(f"o{n}", order_time=f"2025-06-02T10:{n:02d}:00Z") for n in range(30)),
    *(lake.order("o1", order_time="2025-06-02T10:01:00Z"), lake.order("o2", total_micros=1), None, b"nonsense"),
    *(lake.order("o3", **CANCELLED), lake.order("o99", **CANCELLED), lake.order("o99"), lake.order("o4", region="us-west")),
    *(lake.order("o5", order_time="2025-06-02T10:05:01Z"), lake.order("o100", received_at=None)),
]


@pytest.fixture(scope="module")
def base(spark: SparkSession, kafka: Kafka, tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> Settings:
    """A home that has read a file and two clusters, in several batches; nobody changes it."""
    made = load_settings(home=tmp_path_factory.mktemp("raw") / "home")
    shutil.copytree(empty_lakehouse, made.lakehouse_uri)
    lake.campaigns(made)
    eu, us, orders = (Topic(kafka.bootstrap_servers, name) for name in ("eu", "us", "orders"))
    point_at(made, ("eu-west", eu, orders), ("us-east", us, orders), more="max_offsets_per_batch = 20\n")
    lake.land(made, "events/eu-west/of-file.jsonl", [lake.event("of-file"), lake.event("e3", ad_id="a-0", event_type="click")])
    eu.send(EU[:20], 0)
    eu.send([lake.event("never")] * 3, 0, abort=True)  # offsets without a record, as the marker behind them
    eu.send(EU[20:], 1, transaction=True)
    orders.send(ORDERS[:20], 0)  # both clusters read the same topic, as if one were a mirror of the other
    orders.send(ORDERS[20:], 1)
    run_ingest(made, spark=spark)
    us.send(US, 0)  # behind the other, so that it is known which is first
    run_ingest(made, spark=spark)
    return made


@pytest.fixture
def home(base: Settings, tmp_path: Path) -> Settings:
    """A copy of the base home to tamper with."""
    return correct.copied(base, tmp_path / "home")


@pytest.fixture(scope="module")
def truth(base: Settings) -> dict[str, Any]:
    """What the base home holds."""
    return correct.contents(base)


def causes(report: ReconcileReport) -> tuple[str, ...]:
    return tuple(sorted({found.cause for found in report.differences}))


def test_clean_data_has_no_difference(base: Settings) -> None:
    report = reconcile(base, None)
    assert report.differences == []
    held = correct.rows(base, "select count(*), sum(spend_nanos)::bigint from events")
    assert [(sum(h.events_expected for h in report.hours), sum(h.nanos_expected for h in report.hours))] == held
    assert correct.rows(base, "select distinct source, region from batch_ledger where stream = 'events' and offered > 0") == [
        *(("files", "eu-west"), ("kafka", "eu-west"), ("kafka", "us-east")),
    ]


TOGETHER = [  # none of them takes away what another wants
    ("a row of events is deleted", "an increment is changed", "the ledger of a batch is deleted", "a rejected record is made up"),
    ("a whole hour of events stands twice", "increments stand twice", "rows of the ledger stand twice", "an event is made up"),
    ("the price of an event is changed", "an increment is deleted", "an id is accepted again in an hour long closed"),
    ("a batch is lost from all tables but its plan",),
]


@pytest.mark.parametrize("names", TOGETHER, ids=range(len(TOGETHER)))
def test_faults_are_found_and_put_right_once(home: Settings, truth: dict[str, Any], names: tuple[str, ...]) -> None:
    """The strongest of those of files, several at a time."""
    planted = [fault for fault in FAULTS if fault.name in names]
    assert len(planted) == len(names)
    for fault in planted:
        fault.plant(home)
    repaired = reconcile(home, None, repair=True)
    assert set(causes(repaired)) >= {fault.causes[0] for fault in planted}
    assert repaired.remaining == []
    assert correct.contents(home) == truth
    assert read_status(home).conservation_holds
    assert reconcile(home, None).differences == []


def test_orders_are_found_and_put_right_once(home: Settings, truth: dict[str, Any]) -> None:
    assert sum(hour.orders_found for hour in reconcile(home, None).hours) == 32
    correct.delete(home, "orders", "order_id in ('o3', 'o7')")
    correct.update(home, "orders", "order_id = 'o99'", status="'placed'")
    correct.append(home, "orders", "select * replace ('made-up' as order_id) from orders where order_id = 'o5'")
    correct.delete(home, "rejected_orders", "outcome = 'conflict'")
    correct.append(home, "rejected_orders", "from rejected_orders where outcome = 'rejected'")
    correct.delete(home, "batch_ledger", "stream = 'orders' and _batch_id = 0")
    repaired = reconcile(home, None, repair=True)
    assert set(causes(repaired)) == {
        *("order_lost", "order_altered", "order_unknown", "rejected_lost", "rejected_twice", "ledger_missing"),
    }
    assert repaired.remaining == []
    assert correct.contents(home) == truth
    assert read_status(home).conservation_holds
    assert reconcile(home, None).differences == []


def test_orders_whose_raw_records_are_yet_to_come_are_left_out(home: Settings, truth: dict[str, Any]) -> None:
    """Cancellations and placings are behind what the raw copy has come to: their rows stand for themselves."""
    ends = {path: path.read_text() for path in (last_batch(home, f"raw_orders-{cluster}") for cluster in ("eu-west", "us-east"))}
    for path, text in ends.items():
        *head, offsets = text.splitlines()
        earlier = {topic: dict.fromkeys(partitions, 10) for topic, partitions in json.loads(offsets).items()}
        path.write_text("\n".join([*head, json.dumps(earlier)]))
    found = reconcile(home, None, repair=True)
    assert found.differences == []
    assert {left.raw_table for left in found.waiting} == {"raw_orders"}
    for path, text in ends.items():
        path.write_text(text)
    correct.delete(home, "orders", "order_id = 'o3'")
    assert causes(reconcile(home, None, repair=True)) == ("order_lost",)
    assert correct.contents(home) == truth


def test_raw_records_of_orders_that_a_hand_took_away_take_nothing_back(home: Settings, truth: dict[str, Any]) -> None:
    shutil.rmtree(home.recount_path, ignore_errors=True)
    correct.delete(home, "raw_orders", "source_offset in (0, 3, 14)")
    found = reconcile(home, None, repair=True)
    assert causes(found) == ("raw_missing",)
    assert {difference.layer for difference in found.remaining} == {"orders"}
    assert correct.contents(home) == truth


def test_records_of_orders_that_no_batch_took_become_a_batch_once(home: Settings) -> None:
    row = correct.select(home, "from raw_orders where cluster = 'us-east' and source_partition = 0 limit 1").to_pylist()[0]
    schema = correct.select(home, "from raw_orders limit 1").schema
    values = [lake.lines([lake.order("m1")]), lake.lines([lake.order("o7", **CANCELLED)]), b"{}"]
    more = [{**row, "source_offset": 20 + at, "value": value} for at, value in enumerate(values)]
    write_deltalake(home.table_uri("raw_orders"), pa.Table.from_pylist(more, schema), mode="append")
    for query in ("raw_orders-us-east", "orders-us-east"):
        go_past(home, query, 0, 23)
    found = reconcile(home, None, repair=True)
    assert causes(found) == ("record_missed",)
    assert found.remaining == []
    assert correct.rows(home, "select order_id, status, source_line from orders where _run_id is not null") == [
        ("m1", "placed", 20),
        ("o7", "cancelled", 7),
    ]
    assert read_status(home).conservation_holds
    assert reconcile(home, None).differences == []


def last_batch(settings: Settings, query: str) -> Path:
    """The offsets of the newest batch of a query."""
    return max((settings.checkpoints_path / query / "offsets").glob("[0-9]*"), key=lambda path: int(path.name))


def go_past(settings: Settings, query: str, partition: int, end: int) -> None:
    """A further batch of a query, up to an offset, of which nothing but its checkpoint tells."""
    last = last_batch(settings, query)
    *head, offsets = last.read_text().splitlines()
    topics = {topic: {**ends, str(partition): end} for topic, ends in json.loads(offsets).items()}
    number = str(int(last.name) + 1)
    last.with_name(number).write_text("\n".join([*head, json.dumps(topics)]))
    shutil.copy(settings.checkpoints_path / query / "commits" / last.name, settings.checkpoints_path / query / "commits" / number)


def test_what_the_raw_table_lacks_yet_is_waited_for_and_left_out(home: Settings, truth: dict[str, Any]) -> None:
    commits = home.checkpoints_path / "raw_events-us-east" / "commits"
    number = last_batch(home, "raw_events-us-east").name
    (commits / number).rename(home.home_path / "later")  # its rows are in the table, but nobody can know that they are all
    correct.delete(home, "events", "event_id in ('m3', 't2')")
    hour = HourRange.of(datetime(2025, 6, 2, 7, tzinfo=UTC))
    found = reconcile(home, None, repair=True)
    assert causes(found) == ("event_lost", "increment_altered") or causes(found) == ("event_lost",)
    assert {found.campaign_id for found in found.differences if found.layer == "events"} == {"nobody"}  # t2 is of eu-west
    assert {left.source.split("/")[1] for left in found.waiting} == {"us-east"}
    assert sum(left.end_offset - left.first_offset for left in found.waiting) == len(US)
    assert correct.rows(home, "select count(*) from events where event_id = 'm3'") == [(0,)]
    asked = reconcile(home, hour, patience_seconds=0.0)
    assert asked.waiting and asked.differences == []
    assert not next(iter(recount_verdicts(hour, asked.remaining, asked.waiting))).passed
    (home.home_path / "later").rename(commits / number)
    assert causes(reconcile(home, None, repair=True)) == ("event_lost",)
    assert correct.contents(home) == truth


def test_what_the_raw_table_never_had_is_said_and_nothing_is_taken_back(home: Settings, truth: dict[str, Any]) -> None:
    raw = home.table_uri("raw_events")
    DeltaTable(raw).delete("cluster = 'us-east' and source_offset < 25")
    began = home.checkpoints_path / "raw_events-us-east" / "sources" / "0" / "0"
    began.write_bytes(began.read_bytes().replace(b'"0":0', b'"0":25'))
    found = reconcile(home, None, repair=True)
    assert causes(found) == ("raw_missing",)
    assert [difference.is_repaired for difference in found.differences] == [False] * len(found.differences)
    assert correct.contents(home) == truth
    correct.delete(home, "events", "event_id = 'm9'")  # of what is there, all is recounted as before
    assert causes(reconcile(home, None, repair=True)) == ("event_lost", "raw_missing")
    assert correct.contents(home) == truth


def test_raw_records_that_stand_there_twice_count_once(home: Settings) -> None:
    """After a lost checkpoint the copy begins anew; while it has none, its rows tell how far it was."""
    copies = correct.select(home, "from raw_events")
    for checkpoint in home.checkpoints_path.glob("raw_events-*"):
        shutil.rmtree(checkpoint)
    write_deltalake(home.table_uri("raw_events"), copies, mode="append")
    assert reconcile(home, None).differences == []


def test_records_that_no_batch_took_become_a_batch_once(home: Settings) -> None:
    topic = correct.rows(home, "select any_value(source_topic) from raw_events where cluster = 'us-east'")[0][0]
    values = [lake.lines([lake.event("late-1")]), lake.lines([lake.event("t1", **ELSE)]), b"{}", lake.lines([lake.event("late-2")])]
    row = correct.select(home, "from raw_events where cluster = 'us-east' limit 1")
    more = []
    for at, value in enumerate(values):
        record = {**row.to_pylist()[0], "source_partition": 0, "source_offset": len(US) + at, "value": value}
        more.append(pa.Table.from_pylist([record], row.schema))
    write_deltalake(home.table_uri("raw_events"), pa.concat_tables(more), mode="append")
    for query in ("raw_events-us-east", "events-us-east"):
        go_past(home, query, 0, len(US) + len(values))
    found = reconcile(home, None, repair=True)
    assert causes(found) == ("record_missed",)
    assert found.remaining == []
    where = "where _run_id is not null"
    place = f"kafka/us-east/{topic}/0"
    held = correct.rows(home, f"select event_id, region, source_file, source_line from events {where}")
    assert held == [("late-1", "us-east", place, 45), ("late-2", "us-east", place, 48)]
    assert correct.rows(home, f"select source, region, offered, accepted, conflict, rejected from batch_ledger {where}") == [
        ("kafka", "us-east", 1, 0, 0, 1),
        ("kafka", "us-east", 1, 0, 1, 0),
        ("kafka", "us-east", 2, 2, 0, 0),
    ]
    rejects = f"select outcome, source, source_topic, source_partition, source_offset from rejected_events {where}"
    assert correct.rows(home, rejects) == [("conflict", "kafka", topic, 0, 46), ("rejected", "kafka", topic, 0, 47)]
    assert read_status(home).conservation_holds
    assert reconcile(home, None).differences == []


def test_raw_records_that_a_hand_took_away_take_nothing_back(home: Settings, truth: dict[str, Any]) -> None:
    shutil.rmtree(home.recount_path, ignore_errors=True)  # else what was parsed before would still be known
    correct.delete(home, "raw_events", "cluster = 'us-east' and source_offset in (0, 3, 36, 37)")
    found = reconcile(home, None, repair=True)
    assert causes(found) == ("raw_missing",)
    assert correct.contents(home) == truth


def test_batches_are_planned_anew_where_their_plans_are_gone(home: Settings, truth: dict[str, Any]) -> None:
    table = DeltaTable(home.table_uri("events"))
    table.create_checkpoint()
    for number in range(table.version()):
        (Path(home.table_uri("events")) / "_delta_log" / f"{number:020d}.json").unlink()
    shutil.rmtree(home.recount_path, ignore_errors=True)
    correct.delete(home, "events", "event_id in ('m3', 't2')")
    assert causes(reconcile(home, None, repair=True)) == ("event_lost",)
    assert correct.contents(home) == truth
    assert reconcile(home, None).differences == []


def test_hours_are_judged_anew_by_other_prices(home: Settings) -> None:
    lake.campaigns(home, "c-cpm,s-1,cpc,1000000,EUR,2000-01-01T00:00:00Z,")
    hour = HourRange.of(datetime(2025, 6, 2, 7, tzinfo=UTC))
    report = backfill(home, hour)
    assert report.hours_changed == 1
    assert [(change.rows, change.spend_nanos_before, change.spend_nanos_after) for change in report.changes] == [(10, 15_000, 0)]
    assert correct.rows(home, "select sum(spend_nanos)::bigint from events where event_hour = 7") == [(0,)]
    assert reconcile(home, None).differences == []
    assert backfill(home, hour).changes == []


def test_the_marts_of_topics_hold_and_are_explained_down_to_the_message(home: Settings) -> None:
    """Records that name another region than their cluster are in the books of the cluster: what compares the two must know."""
    build_marts(home)
    assert reconcile(home, None).differences == []
    related = {name: (home.table_uri(name), None) for name in ("batch_ledger", "campaigns")}
    for name in ("events", "minute_metrics", "batch_ledger"):
        judged = validated(name, home.table_uri(name), None, datetime(2025, 6, 2, 7, tzinfo=UTC), related=related)
        assert (judged.rows > 0, judged.error_failed) == (True, False), judged.failed
    top = explain_campaign_day(home, "c-cpm", date(2025, 6, 2), sample=50)
    assert list(top.all_problems()) == []
    message = json.dumps(lake.event("m0", region="eu-west", **ELSE))
    assert json.dumps({"message": message})[1:-1] in json.dumps(as_json(top), default=str)
