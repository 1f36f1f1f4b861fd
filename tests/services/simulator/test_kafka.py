"""What the simulator puts into topics, read back from a real Kafka and recounted by other code: one cluster and two.

Two clusters are two pairs of topics of one broker here: to a producer they are as far apart as two brokers.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from services.launcher.kafka import Kafka
from services.simulator import kafka as sending_to_kafka
from services.simulator.errors import DeliveryError, SimulationError
from services.simulator.kafka import Cluster, Sending, simulate_to_kafka
from services.simulator.traffic import SimulationShares
from services.simulator.truth import Truth
from tests.services.simulator.recount import recount_billing, recount_events, recount_orders
from tests.services.simulator.test_simulate import assert_credit_equals_a_recount

EVENTS = 1_500
SHARES = SimulationShares(0.03, 0.03, 0.03, 0.06, 0.05, 0.05, 0.04, 0.03, 0.05, 0.04, 0.02, 0.03, 0.02)
OPTIONS: dict[str, Any] = {
    "shares": SHARES,
    "days": 1.5,
    "campaigns": 9,
    "ads": 30,
    "users": 40,
    "click_rate": 0.3,
    "conversion": 0.5,
}
COUNTED = ("offered", "accepted", "duplicate", "conflict", "rejected")
Record = tuple[bytes | None, bytes | None]


def clusters(kafka: Kafka, *names: str, **config: str) -> list[Cluster]:
    """Clusters with new topics of two partitions each. ``config`` is that of the topics."""
    options: dict[str, Any] = {"bootstrap.servers": kafka.bootstrap_servers}
    made = [Cluster(name, options, *(f"{uuid.uuid4().hex}-{name}-{kind}" for kind in ("events", "orders"))) for name in names]
    topics = [topic for cluster in made for topic in (cluster.events_topic, cluster.orders_topic)]
    admin = AdminClient(options)
    for future in admin.create_topics([NewTopic(topic, 2, 1, config=config) for topic in topics]).values():
        future.result(20)
    return made


def consumed(cluster: Cluster, topic: str) -> list[list[Record]]:
    """(key, value) of a topic's committed records by partition."""
    consumer = Consumer(
        {
            **cluster.options,
            "group.id": "read-back",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(2)])
    found: list[list[Record]] = [[], []]
    ended = 0
    while ended < 2:
        message = consumer.poll(20)
        assert message is not None, "the broker fell silent"
        error = message.error()
        if error is not None:
            assert error.code() == KafkaError._PARTITION_EOF
            ended += 1
            continue
        partition, key, value = message.partition(), message.key(), message.value()
        assert partition is not None and not isinstance(key, str) and not isinstance(value, str)
        found[partition].append((key, value))
    consumer.close()
    return found


def landed(made: list[Cluster], folder: Path, out: Path) -> Path:
    """The topics as files for the recount: cluster by cluster, partition by partition."""
    number = 0
    for cluster in made:
        for stream, topic in (("events", cluster.events_topic), ("orders", cluster.orders_topic)):
            for partition, records in enumerate(consumed(cluster, topic)):
                if not records:
                    continue
                number += 1
                path = folder / stream / cluster.name / f"{partition}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"".join(value + b"\n" for _, value in records if value is not None))
                os.utime(path, (number, number))
    (folder / "campaigns").mkdir()
    (folder / "campaigns" / "campaigns.csv").write_bytes((out / "campaigns" / "campaigns.csv").read_bytes())
    return folder


def summed(rows: list[dict[str, Any]], key: str, names: tuple[str, ...]) -> dict[Any, Counter[str]]:
    found: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    for row in rows:
        found[row[key]].update({name: row[name] for name in names})
    return found


def test_truth_of_one_cluster_equals_a_recount_of_its_topics(kafka: Kafka, tmp_path: Path) -> None:
    """Every row of it, by the cluster's name; of transactions only what was committed counts."""
    made = clusters(kafka, "eu-west")
    sending = Sending(transactional=True, abort_some=0.5, chunk=400)
    truth = simulate_to_kafka(tmp_path / "out", EVENTS, 5, made, sending, **OPTIONS)
    landing = landed(made, tmp_path / "landing", tmp_path / "out")
    accounting, campaign_hours = recount_events(landing, from_topics=True)
    assert truth.totals["offered"] == EVENTS and truth.totals["duplicate"] > 0 < truth.totals["conflict"]
    assert truth.accounting == accounting
    assert truth.campaign_hours == campaign_hours
    assert {row["region"] for row in truth.campaign_hours} == {"eu-west", "us-east"}
    assert truth.orders == recount_orders(landing, from_topics=True)
    assert truth.billing == recount_billing(campaign_hours, landing, from_topics=True)
    assert_credit_equals_a_recount(landing, truth, from_topics=True)
    assert Truth.load(tmp_path / "out" / "truth.json") == truth


def test_truth_of_two_clusters_holds_whichever_is_read_first(kafka: Kafka, tmp_path: Path) -> None:
    made = clusters(kafka, "us-east", "eu-west")
    sending = Sending(mirror=0.7, mirror_again=0.3, clocks_ahead={"us-east": 60.0})
    truth = simulate_to_kafka(tmp_path / "out", EVENTS, 6, made, sending, **OPTIONS)
    late = set()
    for number, order in enumerate((made, made[::-1])):
        landing = landed(order, tmp_path / f"landing-{number}", tmp_path / "out")
        accounting, campaign_hours = recount_events(landing, from_topics=True)
        assert truth.campaign_hours == campaign_hours
        assert summed(truth.accounting, "event_hour", COUNTED) == summed(accounting, "event_hour", COUNTED)
        names = ("offered", "conflict", "rejected")
        assert summed(truth.accounting, "region", names) == summed(accounting, "region", names)
        assert truth.billing == recount_billing(campaign_hours, landing, from_topics=True)
        orders = recount_orders(landing, from_topics=True)
        assert {**truth.orders, "accounting": []} == {**orders, "accounting": []}
        late.add(sum(row["late"] for row in accounting))
    assert_credit_equals_a_recount(tmp_path / "landing-1", truth, from_topics=True)
    low, high = truth.totals["late_range"]
    assert low <= min(late) and max(late) <= high
    sent = truth.totals["messages"]
    assert sum(held["mirrored"] for held in sent.values()) > 0.8 * EVENTS
    assert sum(held["events"] for held in sent.values()) == truth.totals["offered"] > 1.8 * EVENTS


def test_sent_again_after_a_kill_it_is_the_same_records_under_the_same_keys(kafka: Kafka, tmp_path: Path) -> None:
    (cluster,) = clusters(kafka, "eu-west")
    sending = Sending(transactional=True, chunk=100)

    class _Killed(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done >= 300:
            raise _Killed

    with pytest.raises(_Killed):
        simulate_to_kafka(tmp_path / "out", 800, 3, [cluster], sending, progress=stop)
    simulate_to_kafka(tmp_path / "out", 800, 3, [cluster], sending)
    by_partition = consumed(cluster, cluster.events_topic)
    counts = Counter(record for records in by_partition for record in records)
    assert sum(counts.values()) == 800 + 300 or sum(counts.values()) == 800 + 200  # the last chunk may have been cut by orders
    keys = [{key for key, _ in records} for records in by_partition]
    assert not keys[0] & keys[1] and all(keys)  # an id stays in its partition, so in its order
    with pytest.raises(SimulationError, match="has the truth of another traffic"):
        simulate_to_kafka(tmp_path / "out", 800, 4, [cluster])


def test_live_traffic_bears_the_time_of_sending_and_its_truth(kafka: Kafka, tmp_path: Path) -> None:
    made = clusters(kafka, "eu-west")
    truth = simulate_to_kafka(tmp_path / "out", 300, 8, made, Sending(live=True, rate=200.0), shares=SHARES, click_rate=0.3)
    landing = landed(made, tmp_path / "landing", tmp_path / "out")
    assert recount_events(landing, from_topics=True) == (truth.accounting, truth.campaign_hours)
    assert truth.totals["offered"] == 300 and Truth.load(tmp_path / "out" / "truth.json") == truth


def test_a_cluster_that_takes_nothing_is_an_error(kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending_to_kafka, "_ANSWER_SECONDS", 1.0)
    gone = Cluster("eu-west", {"bootstrap.servers": "127.0.0.1:1", "socket.timeout.ms": "500"})
    with pytest.raises(DeliveryError, match=r"Kafka of eu-west does not answer: .*for a trial"):
        simulate_to_kafka(tmp_path / "a", 10, 1, [gone])
    missing = Cluster("eu-west", {"bootstrap.servers": kafka.bootstrap_servers}, "no-such-topic", "nor-this")
    with pytest.raises(DeliveryError, match="Kafka of eu-west has no topic no-such-topic"):
        simulate_to_kafka(tmp_path / "b", 10, 1, [missing])
    (narrow,) = clusters(kafka, "eu-west", **{"max.message.bytes": "100"})
    with pytest.raises(DeliveryError, match=r"did not take \d+ records: .*too large"):
        simulate_to_kafka(tmp_path / "c", 2_000, 1, [narrow])


@pytest.mark.parametrize(
    ("names", "sending", "said"),
    [
        (["a", "b", "c"], Sending(), "one cluster is needed, or two"),
        (["a", "a"], Sending(), "two clusters need two names"),
        (["a"], Sending(mirror=0.5), "a mirror needs two clusters"),
        (["a", "b"], Sending(mirror_again=0.5), "mirror_again needs a mirror"),
        (["a", "b"], Sending(mirror=1.5), "mirror lies between 0 and 1"),
        (["a"], Sending(abort_some=0.5), "only transactions can be aborted"),
        (["a"], Sending(live=True), "live needs a rate"),
        (["a"], Sending(rate=0.0), "rate must be more than 0"),
        (["a"], Sending(clocks_ahead={"b": 1.0}), "there is no cluster b"),
        (["a"], Sending(clocks_ahead={"a": float("nan")}), "a clock is ahead by a day at most"),
    ],
)
def test_refuses_wrong_arguments(tmp_path: Path, names: list[str], sending: Sending, said: str) -> None:
    with pytest.raises(SimulationError, match=said):
        simulate_to_kafka(tmp_path, 10, 1, [Cluster(name, {}) for name in names], sending)
