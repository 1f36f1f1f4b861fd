"""A real process that reads topics, killed at the steps of a batch, each in a batch of its own, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lake
import pytest
from pyspark.sql import SparkSession
from topics import Topic, point_at

from services.launcher.kafka import Kafka
from spark_jobs.config import Settings
from spark_jobs.steps import CRASH_VARIABLE, Step

ROOT = Path(__file__).resolve().parents[4]
POINTS = [
    ("after", Step.OFFSETS),
    ("after", Step.EVENTS),
    ("before", Step.MINUTE_METRICS),
    ("before", Step.EVENTS_LEDGER),
    ("after", Step.COMMITS),
]


def _run(settings: Settings, crash_at: str = "") -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ADTALLY_HOME": str(settings.home_path), CRASH_VARIABLE: crash_at}
    with (settings.home_path / "run.log").open("ab") as log:
        command = [sys.executable, "-m", "spark_jobs", "ingest"]
        return subprocess.run(command, env=environment, cwd=ROOT, stdout=log, stderr=log, timeout=300).returncode


@pytest.mark.crash
def test_a_killed_batch_of_a_topic_counts_once(spark: SparkSession, settings: Settings, kafka: Kafka) -> None:
    events, orders = Topic(kafka.bootstrap_servers, "events"), Topic(kafka.bootstrap_servers, "orders", partitions=1)
    lake.campaigns(settings)
    point_at(settings, ("eu-west", events, orders), more="max_offsets_per_batch = 60\n")
    sent = [n * 7 % 211 for n in range(60 * (len(POINTS) + 2))]  # ids come again, in other batches and in their own
    for partition in (0, 1):
        events.send([lake.event(f"e{n}") for n in sent[partition::2]], partition)
        events.send([b"poison"], partition)
    for batch, (moment, step) in enumerate(POINTS):
        assert _run(settings, f"{moment}:{step}:{batch}") == -signal.SIGKILL, f"{moment} {step} was never reached"
    assert _run(settings) == 0, (settings.home_path / "run.log").read_text()[-3000:]

    for moment in ("before", "after"):  # the copy, which has batches of its own
        events.send([b"poison"], 0)
        done = (settings.checkpoints_path / "raw_events-eu-west" / "commits").glob("[0-9]*")
        batch = max(int(path.name) for path in done) + 1
        assert _run(settings, f"{moment}:{Step.RAW_COPY}:{batch}") == -signal.SIGKILL, f"{moment} the copy was never reached"
        assert _run(settings) == 0, (settings.home_path / "run.log").read_text()[-3000:]

    assert lake.rows(spark, settings, "events", "event_id") == sorted(((f"e{n}",) for n in set(sent)), key=repr)
    totals = lake.ledger(spark, settings)
    assert [totals[name] for name in ("offered", "accepted", "duplicate", "conflict", "rejected")] == [
        len(sent) + 4,
        len(set(sent)),
        len(sent) - len(set(sent)),
        0,
        4,
    ]
    places = lake.rows(spark, settings, "rejected_events", "source_partition; source_offset")
    last = len(sent) // 2
    assert places == [(0, last), (0, last + 1), (0, last + 2), (1, last)]
    impressions = lake.rows(spark, settings, "minute_metrics", "impressions")
    assert sum(row[0] for row in impressions) == len(set(sent))
    raw = Counter(lake.rows(spark, settings, "raw_events", "source_partition; source_offset"))
    assert raw == Counter([*((0, offset) for offset in range(last + 3)), *((1, offset) for offset in range(last + 1))])
