"""Records that are gone before they were read: told by their offsets, gone past by decision alone, and then in the ledger."""

from __future__ import annotations

import lake
import pytest
from pyspark.sql import SparkSession
from topics import Topic, point_at

from services.launcher.kafka import Kafka
from spark_jobs.config import Settings
from spark_jobs.errors import OffsetGapError, UsageError
from spark_jobs.ingest.kafka.config import KafkaCluster, read_kafka
from spark_jobs.ingest.kafka.gaps import Gap, accept_gap, copied_records, missing_now
from spark_jobs.ingest.runner import run_ingest

pytestmark = pytest.mark.homes


@pytest.fixture
def topics(kafka: Kafka, settings: Settings) -> tuple[Topic, Topic]:
    """The topics of cluster eu-west; of events one partition."""
    made = Topic(kafka.bootstrap_servers, "events", partitions=1), Topic(kafka.bootstrap_servers, "orders", partitions=1)
    lake.campaigns(settings)
    point_at(settings, ("eu-west", *made))
    return made


def cluster(settings: Settings) -> KafkaCluster:
    return read_kafka(settings).clusters[0]


def ids(spark: SparkSession, settings: Settings) -> list[str]:
    return [row[0] for row in lake.rows(spark, settings, "events", "event_id")]


def test_what_retention_took_stops_the_ingest_until_somebody_decides(
    spark: SparkSession, settings: Settings, topics: tuple[Topic, Topic]
) -> None:
    events, _ = topics
    events.send([lake.event(f"e{n}") for n in range(3)])
    run_ingest(settings, spark=spark)
    with pytest.raises(UsageError, match="nothing is missing"):
        accept_gap(settings, "events", cluster(settings), reason="none", accepted_by="me")
    events.send([lake.event(f"e{n}") for n in range(3, 10)])
    events.forget_before(0, 7)
    for _ in range(2):
        with pytest.raises(OffsetGapError, match="partition 0 offsets 3 to 6") as said:
            run_ingest(settings, spark=spark)
        assert f"topic {events.name} of cluster eu-west" in str(said.value)
        assert "adtally accept-gap events eu-west --reason" in str(said.value)
    assert ids(spark, settings) == ["e0", "e1", "e2"]

    with pytest.raises(UsageError, match="a reason"):
        accept_gap(settings, "events", cluster(settings), reason=" ", accepted_by="me")
    gaps = accept_gap(settings, "events", cluster(settings), reason="the ingest was down", accepted_by="me")
    assert copied_records(settings, "events", gaps[0]) == 0
    assert copied_records(settings, "events", Gap(gaps[0].partition, 1, 5)) == 2  # what was copied before
    assert [(gap.partition.name, gap.first, gap.end) for gap in gaps] == [(f"kafka/eu-west/{events.name}/0", 3, 7)]
    assert run_ingest(settings, spark=spark).accepted == 3
    assert ids(spark, settings) == ["e0", "e1", "e2", "e7", "e8", "e9"]
    assert lake.rows(spark, settings, "batch_ledger", "lost_offsets; offered", "source = 'kafka'") == [(4, 3), (None, 3)]
    assert len(lake.rows(spark, settings, "raw_events", "source_offset")) == 6
    decided = "source_topic; first_offset; end_offset; reason; accepted_by"
    assert lake.rows(spark, settings, "source_gaps", decided) == [(events.name, 3, 7, "the ingest was down", "me")]

    events.send([lake.event("e10"), lake.event("e11")])
    events.forget_before(0, 11)  # more than was given up
    with pytest.raises(OffsetGapError, match="partition 0 offsets 10 to 10"):
        run_ingest(settings, spark=spark)


def test_a_topic_made_anew_is_another_one(spark: SparkSession, settings: Settings, topics: tuple[Topic, Topic]) -> None:
    events, _ = topics
    events.send([lake.event(f"old{n}") for n in range(4)])
    run_ingest(settings, spark=spark)
    events.delete()
    events.make(partitions=1)
    events.send([lake.event("old0"), *(lake.event(f"new{n}") for n in range(5))])  # more than the old one held
    for _ in range(2):
        with pytest.raises(OffsetGapError, match="was deleted and made anew"):
            run_ingest(settings, spark=spark)
    assert len(ids(spark, settings)) == 4
    accept_gap(settings, "events", cluster(settings), reason="by mistake", accepted_by="me")
    report = run_ingest(settings, spark=spark)
    assert (report.accepted, report.duplicate) == (5, 1)
    assert lake.rows(spark, settings, "events", "source_file; source_line", "event_id = 'new0'") == [
        (f"kafka/eu-west/{events.name}~2/0", 1)  # offset 1 of the old topic is another record
    ]
    assert len(lake.rows(spark, settings, "raw_events", "source_topic; source_partition; source_offset")) == 10
    assert missing_now(settings, "events", cluster(settings))[2] == []
    events.send([lake.event("new9")])
    assert run_ingest(settings, spark=spark).accepted == 1
