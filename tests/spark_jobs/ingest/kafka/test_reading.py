"""A task that reads a partition whose broker goes."""

from __future__ import annotations

import os
import signal
import time

import lake
import pytest
from topics import Topic

from services.launcher.trial import throwaway_kafka
from spark_jobs.config import load_settings
from spark_jobs.errors import KafkaError
from spark_jobs.ingest.kafka.ranges import OffsetSplit
from spark_jobs.ingest.kafka.reading import QUIET_SECONDS, read_records
from spark_jobs.java import require_java

pytestmark = pytest.mark.services


def test_a_broker_that_is_gone_is_given_up_soon_though_its_going_was_not_told() -> None:
    cache = load_settings().jar_cache_path
    with throwaway_kafka(jar_cache=cache, java=lambda: require_java().executable, topics=(), heap="256m") as kafka:
        servers = kafka.bootstrap_servers
        topic = Topic(servers, "events", partitions=1)
        topic.send([lake.event(f"e{n}") for n in range(20)])
        name = f"kafka/eu/{topic.name}/0"

        def split(start: int, end: int) -> OffsetSplit:
            return OffsetSplit(0, name, "eu", topic.name, 0, start, end, {"bootstrap.servers": servers})

        (lines,) = read_records(split(0, 10))
        assert lines.numbers is not None and lines.numbers.tolist() == list(range(10))
        (pid,) = kafka.status().processes.values()
        os.kill(pid, signal.SIGKILL)
        time.sleep(2)  # the consumer is between two batches
        started = time.monotonic()
        with pytest.raises(KafkaError, match=rf"{name}: nothing came for .* s, with offsets up to 29 to come \(.+\)"):
            list(read_records(split(20, 30)))
        assert time.monotonic() - started < QUIET_SECONDS / 2  # whoever reads holds a lock that others wait for
