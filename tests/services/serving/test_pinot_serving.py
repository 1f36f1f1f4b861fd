"""What a real Pinot serves from a real Kafka equals a recount: after redelivery, commits, and kills of everything."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from services.launcher.errors import ServiceError, ServiceUsageError
from services.launcher.kafka import PARTITIONS, Kafka
from services.launcher.pinot import Pinot, PinotClient
from services.serving.named import named_query
from services.serving.setup import ensure_tables, examine
from services.serving.tables import CREDITS_TABLE, CREDITS_TOPIC, METRICS_TABLE, METRICS_TOPIC, Source, table_specs
from tests.services.serving import traffic
from tests.services.serving.traffic import CAMPAIGNS, DAYS, Message

pytestmark = [pytest.mark.services, pytest.mark.trial, pytest.mark.timeout(900)]

NOW = datetime(2025, 6, 4, tzinfo=UTC)
BUDGET = 1440 * 10**8
BOTH_DAYS = {"from_day": DAYS[0], "to_day": DAYS[1]}
FLUSH_ROWS = 400


class Served:
    """All that was sent, and whether Pinot answers by it."""

    def __init__(self, kafka: Kafka, pinot: Pinot) -> None:
        self.kafka, self.pinot = kafka, pinot
        self.sent: dict[str, list[Message]] = {METRICS_TOPIC: [], CREDITS_TOPIC: []}

    @property
    def client(self) -> PinotClient:
        return self.pinot.client

    def send(self, topic: str, messages: Iterable[Message]) -> None:
        options = {"bootstrap.servers": self.kafka.bootstrap_servers, "enable.idempotence": True, "partitioner": "murmur2"}
        producer = Producer(options)
        for message in messages:
            producer.produce(topic, key=message["record_uuid"], value=traffic.as_value(message))
            self.sent[topic].append(message)
        assert producer.flush(60) == 0

    def expected(self) -> dict[str, Any]:
        rows, credits = traffic.standing(self.sent[METRICS_TOPIC]), traffic.standing(self.sent[CREDITS_TOPIC])
        return {
            "rows": [len(rows), len(credits)],
            "totals": traffic.totals(rows),
            "campaign_day": traffic.campaign_day(rows),
            "spend_by_hour": traffic.spend_by_hour(rows, CAMPAIGNS[2]),
            "budget_pacing": traffic.budget_pacing(rows, DAYS[1], BUDGET),
            "attributed_revenue": traffic.attributed_revenue(credits, "time_decay", 1, DAYS[0]),
        }

    def found(self) -> dict[str, Any]:
        client = self.client

        def ask(name: str, **given: str) -> Any:
            return named_query(name).ask_pinot(client, given, now=NOW)[1]

        counts = [client.query(f"select count(*) from {table}")[0][0] for table in (METRICS_TABLE, CREDITS_TABLE)]
        return {
            "rows": counts,
            "totals": ask("totals"),
            "campaign_day": ask("campaign_day", **BOTH_DAYS),
            "spend_by_hour": ask("spend_by_hour", **BOTH_DAYS, campaign_id=CAMPAIGNS[2]),
            "budget_pacing": ask("budget_pacing", day=DAYS[1], daily_budget_micros=str(BUDGET)),
            "attributed_revenue": ask("attributed_revenue", from_day=DAYS[0], to_day=DAYS[0], model="time_decay", window_days="1"),
        }

    def equals_the_recount(self) -> None:
        """Wait until it does, and fail with both where it does not."""
        expected = self.expected()
        assert wait_until(lambda: all(self.has_read(topic) for topic in self.sent), seconds=90)
        wait_until(lambda: self.found() == expected, seconds=20)
        assert self.found() == expected

    def ends(self, topic: str) -> dict[int, int]:
        consumer = Consumer({"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": "tests"})
        try:
            return {at: consumer.get_watermark_offsets(TopicPartition(topic, at), timeout=20)[1] for at in range(PARTITIONS)}
        finally:
            consumer.close()

    def has_read(self, topic: str) -> bool:
        """Whether Pinot has read all that is in a topic."""
        table = {METRICS_TOPIC: METRICS_TABLE, CREDITS_TOPIC: CREDITS_TABLE}[topic]
        return self.client.consumed(table) == self.ends(topic)

    def committed(self, table: str) -> int:
        return list(self.client.segments(table).values()).count("DONE")


def wait_until(reached: Callable[[], bool], *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if reached():
                return True
        except ServiceError:  # starting, or a segment is being handed over
            pass
        time.sleep(0.5)
    return False


@pytest.fixture(scope="module")
def served(served_kafka: Kafka, served_pinot: Pinot) -> Served:
    source = examine(Source(served_kafka.bootstrap_servers))
    ensure_tables(served_pinot.client, table_specs(source, window_days=traffic.WINDOWS, flush_rows=FLUSH_ROWS), lambda _line: None)
    return Served(served_kafka, served_pinot)


def test_served_totals_equal_a_recount_whatever_is_redelivered_committed_and_killed(served: Served) -> None:
    draw = random.Random(7)
    first = [traffic.increment(at, version=1, draw=draw) for at in range(900)]
    credits = [traffic.credited(at, version=1, is_current=1, draw=draw) for at in range(600)]
    served.send(METRICS_TOPIC, first)
    served.send(CREDITS_TOPIC, credits)
    served.equals_the_recount()
    assert max(row[5] for row in served.expected()["totals"]) > 2**53  # what sum() would lose
    assert wait_until(lambda: min(served.committed(METRICS_TABLE), served.committed(CREDITS_TABLE)) >= 2, seconds=60)
    served.equals_the_recount()

    # newer versions of some; then everything again in another order, so that old versions come late, some of them twice
    newer = [traffic.increment(at, version=2, draw=draw) for at in range(0, 900, 3)]
    revised = [traffic.credited(at, version=2, is_current=at % 2, draw=draw) for at in range(0, 600, 5)]
    served.send(METRICS_TOPIC, newer)
    served.send(CREDITS_TOPIC, revised)
    again, credits_again = [*first, *newer, *first[:100]], [*credits, *revised]
    draw.shuffle(again)
    draw.shuffle(credits_again)
    served.send(METRICS_TOPIC, again)
    served.send(CREDITS_TOPIC, credits_again)
    served.equals_the_recount()
    for table in (METRICS_TABLE, CREDITS_TABLE):
        served.client.force_commit(table)
    served.equals_the_recount()

    before = served.committed(METRICS_TABLE)
    for pid in [*served.pinot.status().processes.values(), *served.kafka.status().processes.values()]:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not served.pinot.status().running and not served.kafka.status().running, seconds=10)
    problem = served.pinot.status().problem
    assert problem is not None and problem.startswith("it was not stopped but ended by itself")
    served.kafka.up()
    served.pinot.up()
    served.equals_the_recount()
    assert served.committed(METRICS_TABLE) >= before >= 4
    served.send(METRICS_TOPIC, [traffic.increment(at, version=3, draw=draw) for at in range(600, 1200)])
    served.send(METRICS_TOPIC, first)
    served.equals_the_recount()


def test_what_is_right_is_left_alone_and_what_cannot_be_changed_is_refused(served: Served) -> None:
    told: list[str] = []
    servers = served.kafka.bootstrap_servers
    source = examine(Source(servers))
    specs = table_specs(source, window_days=traffic.WINDOWS)
    ensure_tables(served.client, specs, told.append)
    assert told == []

    ensure_tables(served.client, table_specs(source, window_days=(1, 7, 60)), told.append)
    assert len(told) == 1 and "added columns to attributed_orders: last_click_60d_micros, " in told[0]
    # the same broker by another name: what is consumed goes on where it was
    moved = examine(Source(servers.replace("127.0.0.1", "localhost")))
    ensure_tables(served.client, table_specs(moved, window_days=traffic.WINDOWS, flush_rows=FLUSH_ROWS), told.append)
    assert told[1:] == [f"changed the configuration of table {name}" for name in (METRICS_TABLE, CREDITS_TABLE)]
    served.send(METRICS_TOPIC, [traffic.increment(7000, version=1, draw=random.Random(1))])
    served.equals_the_recount()

    for changed, says in (
        (Source(servers, "elsewhere", identity=source.identity), "reads topic ads-metrics, not elsewhere"),
        (Source(servers, identity="another"), "was read from another Kafka cluster"),
    ):
        with pytest.raises(ServiceUsageError, match=says):
            ensure_tables(served.client, table_specs(changed), told.append)
    with pytest.raises(ServiceError, match="has no topic missing"):
        examine(Source(servers, "missing"))


def test_a_partition_that_nothing_reads_is_told_and_read_again(served: Served) -> None:
    client = served.client
    client.force_commit(METRICS_TABLE)
    done = f"{METRICS_TABLE}__1__"
    assert wait_until(
        lambda: any(n.startswith(done) and s == "DONE" for n, s in client.segments(METRICS_TABLE).items()), seconds=60
    )
    assert wait_until(lambda: any(name.startswith(done) for name in client.consuming_segments(METRICS_TABLE)), seconds=60)
    segment = next(name for name in client.consuming_segments(METRICS_TABLE) if name.startswith(done))
    # what a kill between two segments leaves
    client._call(f"{client.controller}/segments/{METRICS_TABLE}_REALTIME/{segment}", method="DELETE")
    assert wait_until(lambda: "does not read partition 1 of its topic" in str(served.pinot.status().problem), seconds=60)
    served.send(METRICS_TOPIC, [traffic.increment(at, version=1, draw=random.Random(3)) for at in range(7100, 7200)])
    assert served.pinot.up().problem is None
    served.equals_the_recount()


def test_messages_that_went_before_they_were_read_are_told(served: Served) -> None:
    assert served.pinot.status().problem is None
    client = served.client
    client.pause(METRICS_TABLE)
    assert wait_until(lambda: not client.consuming_segments(METRICS_TABLE), seconds=60)
    served.send(METRICS_TOPIC, [traffic.increment(at, version=1, draw=random.Random(2)) for at in range(8000, 8100)])
    admin = AdminClient({"bootstrap.servers": served.kafka.bootstrap_servers})
    ends = served.ends(METRICS_TOPIC)
    admin.delete_records([TopicPartition(METRICS_TOPIC, 1, ends[1] - 5)])[TopicPartition(METRICS_TOPIC, 1)].result(30)
    client.resume(METRICS_TABLE)
    assert wait_until(lambda: served.has_read(METRICS_TOPIC), seconds=120)
    [(partition, first, end)] = client.lost(METRICS_TABLE)
    assert (partition, end) == (1, ends[1] - 5) and first < end
    problem = served.pinot.status().problem
    assert (
        problem is not None and f"table ads_metrics lacks messages {first} to {end - 1} of partition 1, which were gone" in problem
    )
