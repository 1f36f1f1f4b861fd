"""The main job on topics of a real broker: what files guarantee, topics do."""

from __future__ import annotations

from datetime import UTC, datetime

import lake
import pytest
from pyspark.sql import SparkSession
from topics import Topic, point_at

from services.launcher.kafka import Kafka
from spark_jobs.config import Settings
from spark_jobs.errors import KafkaError
from spark_jobs.ingest.batch import BatchReport
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.operate.watermark import read_closing

pytestmark = pytest.mark.homes

COUNTS = ("offered", "accepted", "duplicate", "conflict", "rejected")


@pytest.fixture
def topics(kafka: Kafka, settings: Settings) -> tuple[Topic, Topic]:
    """The topics of events and orders of cluster eu-west, which the home reads."""
    made = Topic(kafka.bootstrap_servers, "events"), Topic(kafka.bootstrap_servers, "orders", partitions=1)
    lake.campaigns(settings)
    point_at(settings, ("eu-west", *made))
    return made


def counts(report: object) -> tuple[int, ...]:
    return tuple(getattr(report, name) for name in COUNTS)


def test_each_record_once_from_topics_files_and_a_second_run(
    spark: SparkSession, settings: Settings, topics: tuple[Topic, Topic]
) -> None:
    events, orders = topics
    lake.land(settings, "events/us-east/1.jsonl", [lake.event("of-file"), lake.event("both", region="us-east")])
    events.send([lake.event(f"e{n}") for n in range(50)], 0)
    events.send([lake.event("e7"), lake.event("e8", price_micros=9), lake.event("mirrored", region="us-east")], 1)
    events.send([lake.event("ghost")] * 3, 1, abort=True)  # never happened
    events.send([lake.event("committed")], 1, transaction=True)
    events.send([lake.event("both", region="us-east", received_at="2025-06-02T10:00:59Z")], 1)
    orders.send([lake.order("o1"), lake.order("o1"), lake.order("o1", status="cancelled")])
    report = run_ingest(settings, spark=spark)
    # files and topics run beside each other: which of the two `both` came first is open, that one did is not
    assert counts(report) == (60, 56, 3, 1, 0)
    held = lake.rows(
        spark, settings, "events", "event_id; region; source_file; source_line", "event_id in ('e7', 'mirrored', 'committed')"
    )
    name = f"kafka/eu-west/{events.name}"
    assert held == [
        ("committed", "eu-west", f"{name}/1", 7),  # behind the aborted three and the marker of their end
        ("e7", "eu-west", f"{name}/0", 7),
        ("mirrored", "us-east", f"{name}/1", 2),  # a record's own region holds
    ]
    conflict = lake.rows(
        spark, settings, "rejected_events", "outcome; source; source_topic; source_partition; source_offset; region; record_id"
    )
    assert conflict == [("conflict", "kafka", events.name, 1, 1, "eu-west", "e8")]
    assert lake.rows(spark, settings, "orders", "order_id; status") == [("o1", "cancelled")]
    offered = lake.rows(spark, settings, "batch_ledger", "stream; region; offered", "source = 'kafka'")
    assert offered == [("events", "eu-west", 55), ("orders", "eu-west", 3)]
    before = lake.everything(spark, settings)
    assert run_ingest(settings, spark=spark).batches == 0
    assert lake.everything(spark, settings) == before


def test_the_raw_copy_is_of_every_record_as_it_came(spark: SparkSession, settings: Settings, topics: tuple[Topic, Topic]) -> None:
    events, orders = topics
    sent: list[bytes | None] = [b"\xff\x00 no text", None, b"", b'{"a":1}\n', b"x" * 70_000]
    events.send(sent, 1)
    events.send([b"aborted"], 1, abort=True)
    orders.send([b"{"])
    run_ingest(settings, spark=spark)
    raw = lake.rows(
        spark,
        settings,
        "raw_events",
        "source_offset; cast(value as binary)",
        f"source_topic = '{events.name}' and cluster = 'eu-west'",
    )
    assert [(offset, None if value is None else bytes(value)) for offset, value in raw] == list(enumerate(sent))
    assert lake.rows(spark, settings, "raw_orders", "source_partition; source_offset") == [(0, 0)]
    run_ingest(settings, spark=spark)
    assert len(lake.rows(spark, settings, "raw_events", "source_offset")) == len(sent)


def test_poison_is_set_aside_with_its_place_and_nothing_stops(
    spark: SparkSession, settings: Settings, topics: tuple[Topic, Topic]
) -> None:
    events, _ = topics
    spaced = b"{\n" + lake.lines([lake.event("spread")])[1:]
    events.send(
        [lake.event("ok"), b"\xfe", None, b"", b'{"event_id":', lake.event("odd", region="No Region"), spaced, b"{}\n{}"], 0
    )
    report = run_ingest(settings, spark=spark)
    assert counts(report) == (8, 2, 0, 0, 6)
    places = "source_topic; source_partition; source_offset; source_file; reason_codes; raw_size_bytes"
    assert lake.rows(spark, settings, "rejected_events", places) == [
        (events.name, 0, offset, f"kafka/eu-west/{events.name}/0", reasons, size)
        for offset, reasons, size in (
            (1, ["invalid_utf8"], 1),
            (2, ["blank_line"], 0),
            (3, ["blank_line"], 0),
            (4, ["not_json"], 12),
            (5, ["region_format"], len(lake.lines([lake.event("odd", region="No Region")])) - 1),
            (7, ["not_json"], 5),
        )
    ]
    assert lake.rows(spark, settings, "events", "event_id; source_line") == [("ok", 0), ("spread", 6)]


def test_batches_are_bounded_by_offsets_and_a_lost_checkpoint_changes_nothing(
    spark: SparkSession, settings: Settings, kafka: Kafka
) -> None:
    events, orders = Topic(kafka.bootstrap_servers, "events", partitions=3), Topic(kafka.bootstrap_servers, "orders")
    lake.campaigns(settings)
    point_at(settings, ("eu-west", events, orders), more="max_offsets_per_batch = 40\n")
    for partition in range(3):
        events.send([lake.event(f"{partition}-{n % 45}") for n in range(50)], partition)
    reports: list[BatchReport] = []
    total = run_ingest(settings, spark=spark, progress=reports.append)
    assert counts(total) == (150, 135, 15, 0, 0)
    assert max(report.offered for report in reports) <= 42  # Spark rounds up for each partition
    before = {name: held for name, held in lake.everything(spark, settings).items() if name in ("events", "minute_metrics")}
    for checkpoint in settings.checkpoints_path.iterdir():
        checkpoint.rename(settings.home_path / f"lost-{checkpoint.name}")
    again = run_ingest(settings, spark=spark)
    assert counts(again) == (150, 0, 150, 0, 0)
    now = lake.everything(spark, settings)
    assert {name: now[name] for name in before} == before


def test_hours_wait_for_each_cluster_and_each_partition(spark: SparkSession, settings: Settings, kafka: Kafka) -> None:
    servers = kafka.bootstrap_servers
    west, east = Topic(servers, "west"), Topic(servers, "east")
    none = Topic(servers, "none")
    lake.campaigns(settings)
    point_at(settings, ("eu-west", west, none), ("us-east", east, none))

    def at(hour: int, name: str) -> dict[str, object]:
        return lake.event(name, event_time=f"2025-06-02T{hour:02}:00:00Z", received_at=f"2025-06-02T{hour:02}:20:00Z")

    def closed() -> datetime | None:
        return read_closing(settings).closed_through

    west.send([at(hour, f"w{hour}") for hour in (10, 13)], 0)
    west.send([at(11, "behind")], 1)  # the other partition has come no further
    run_ingest(settings, spark=spark)
    assert closed() is None  # of us-east nothing has come yet
    east.send([at(10, "w10"), at(13, "w13")], 0)  # a mirror: all of it duplicates, and progress all the same
    assert run_ingest(settings, spark=spark).accepted == 0
    assert closed() == datetime(2025, 6, 2, 11, tzinfo=UTC)
    west.send([at(13, "caught up")], 1)
    run_ingest(settings, spark=spark)
    assert closed() == datetime(2025, 6, 2, 13, tzinfo=UTC)


def test_a_cluster_that_is_away_is_one_line(spark: SparkSession, settings: Settings, kafka: Kafka) -> None:
    missing = Topic(kafka.bootstrap_servers, "orders")
    events = Topic(kafka.bootstrap_servers, "events")
    events.delete()
    point_at(settings, ("eu-west", events, missing))
    with pytest.raises(KafkaError, match=f"cluster eu-west at {kafka.bootstrap_servers} has no topic {events.name}"):
        run_ingest(settings, spark=spark)
    events.servers = "127.0.0.1:9"
    point_at(settings, ("eu-west", events, missing))
    with pytest.raises(KafkaError, match=r"cluster eu-west at 127\.0\.0\.1:9 does not answer") as said:
        run_ingest(settings, spark=spark)
    assert "\n" not in str(said.value)
