"""The budget service on a real Kafka: redelivered, killed, replayed, fed with rubbish."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from services.budget.errors import BudgetBusyError, BudgetUsageError, GapError
from services.budget.service import BudgetService
from services.budget.store import Loaded, Store
from services.launcher.kafka import Kafka
from tests.services.budget.messages import DAY, MINUTE_MS, increment, make_topic, send, sums

ROOT = Path(__file__).resolve().parents[3]
NOON = datetime(2025, 7, 1, 12, tzinfo=UTC)


def service(path: Path, kafka: Kafka, topic: str, keep_days: int | None = None) -> BudgetService:
    return BudgetService(path, {"bootstrap.servers": kafka.bootstrap_servers}, topic, keep_days=keep_days, now=lambda: NOON)


def once(path: Path, kafka: Kafka, topic: str, **options: bool) -> Loaded:
    return service(path, kafka, topic).run(threading.Event(), once=True, **options)


def held(path: Path) -> dict[tuple[str, str, str, str], list[int]]:
    with Store(path, read_only=True) as store:
        return {row[:4]: list(row[4:]) for row in store.sums()}


def test_redelivery_a_second_run_and_a_replay_change_nothing(tmp_path: Path, kafka: Kafka) -> None:
    servers, path = kafka.bootstrap_servers, tmp_path / "budget.sqlite"
    topic = make_topic(servers)
    first, second = [increment(n) for n in range(500)], [increment(n) for n in range(500, 800)]
    send(servers, topic, first, transaction=f"{topic}-a")
    send(servers, topic, [increment(9_000_000)], transaction=f"{topic}-a", ends="abort")
    assert once(path, kafka, topic) == Loaded(added=500)
    assert held(path) == sums(first)
    assert service(path, kafka, topic).lags() == {0: 0, 1: 0}, "markers of transactions are no messages that wait"
    assert once(path, kafka, topic) == Loaded()
    # the same ids again at other offsets, as after a crash of a publisher without transactions
    send(servers, topic, [*first[300:], *second])
    assert service(path, kafka, topic).lags() != {0: 0, 1: 0}
    assert once(path, kafka, topic) == Loaded(added=300, again=200)
    assert once(path, kafka, topic, from_start=True) == Loaded(again=1000)
    assert held(path) == sums([*first, *second])


def test_a_later_version_replaces_and_an_earlier_one_does_not(tmp_path: Path, kafka: Kafka) -> None:
    servers, path = kafka.bootstrap_servers, tmp_path / "budget.sqlite"
    topic = make_topic(servers)
    wrong, right = increment(1), increment(1, version=3, impressions=0, clicks=0, spend_nanos=0)
    send(servers, topic, [wrong, increment(2), right, increment(1, version=2)])
    assert once(path, kafka, topic) == Loaded(added=2, replaced=1, again=1)
    assert held(path) == sums([right, increment(2)])
    send(servers, topic, [increment(2, clicks=77)])
    assert once(path, kafka, topic) == Loaded(aside=1), "two truths of one version are for a person to judge"
    assert held(path) == sums([right, increment(2)])


def test_a_sum_beyond_64_bits_stops_nothing(tmp_path: Path, kafka: Kafka) -> None:
    servers, path = kafka.bootstrap_servers, tmp_path / "budget.sqlite"
    topic = make_topic(servers, partitions=1)
    send(servers, topic, [increment(7 * n, store_id="s", event_minute=MINUTE_MS, spend_nanos=10**18) for n in range(12)])
    assert once(path, kafka, topic) == Loaded(added=9, aside=3)
    assert [row[2] for row in held(path).values()] == [9 * 10**18]


def test_bad_messages_are_put_aside_with_their_place(tmp_path: Path, kafka: Kafka) -> None:
    servers, path = kafka.bootstrap_servers, tmp_path / "budget.sqlite"
    topic = make_topic(servers, partitions=1)
    good = increment(1)
    bad: list[tuple[str | None, bytes | None, str]] = [
        ("k", None, "no value"),
        ("k", b"\xff\xfe", "not JSON"),
        ("k", b"[" * 100_000, "not JSON"),
        ("k", b"[]", "not a JSON object"),
        *(
            (str(told.get("record_uuid")), json.dumps(told).encode(), reason)
            for told, reason in (
                (increment(3, record_uuid="x"), "record_uuid is not a UUID"),
                (increment(3, spend_nanos=1.5), "spend_nanos is not a whole number"),
                (increment(3, clicks=True), "clicks is not a whole number"),
                (increment(3, impressions=10**19), "impressions is not a whole number"),
                (increment(3, event_date="2025-07-01"), "event_date is not the day of event_minute"),
                (increment(3, campaign_id=None), "campaign_id is not a text"),
                (increment(3, event_minute=10**18), "event_minute is not a whole number"),
            )
        ),
        (None, json.dumps(good).encode(), "the message's key is not its record_uuid"),
    ]
    producer = Producer({"bootstrap.servers": servers})
    for key, value, _ in bad:
        producer.produce(topic, key=key, value=value)
    producer.flush(30)
    send(servers, topic, [good])
    assert once(path, kafka, topic) == Loaded(added=1, aside=len(bad))
    assert held(path) == sums([good])
    with Store(path, read_only=True) as store:
        kept = store.db.execute("select partition, offset, reason, value from aside order by offset").fetchall()
    assert [row[:2] for row in kept] == [(0, offset) for offset in range(len(bad))]
    assert [row[3] for row in kept] == [value for _, value, _ in bad]
    for row, (_, _, reason) in zip(kept, bad, strict=True):
        assert row[2].startswith(reason)
    assert once(path, kafka, topic, from_start=True) == Loaded(again=1), "not put aside twice"


def test_killed_in_mid_load_and_started_again_it_is_exact(tmp_path: Path, kafka: Kafka) -> None:
    servers, path = kafka.bootstrap_servers, tmp_path / "budget.sqlite"
    topic = make_topic(servers)
    told = [increment(n) for n in range(60_000)]
    send(servers, topic, told)
    send(servers, topic, told[:20_000])
    command = [sys.executable, "-m", "services.budget", "--bootstrap-servers", servers, "--topic", topic, "--store", str(path)]
    chance = random.Random(11)
    counts = []
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        want = _consumed(path) + chance.randrange(1, 12_000)
        end = time.monotonic() + 60
        while _consumed(path) < want and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(_consumed(path))
    assert 0 < counts[0] < counts[-1] < 80_000, f"killed while it worked: {counts}"
    once(path, kafka, topic)
    assert held(path) == sums(told)


def _consumed(path: Path) -> int:
    if not path.exists():
        return 0
    db = sqlite3.connect(path)
    try:
        return int(db.execute("select coalesce(sum(next_offset), 0) from offsets").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        db.close()


def test_a_sealed_day_is_final_and_nothing_of_it_is_lost(tmp_path: Path, kafka: Kafka) -> None:
    servers, path = kafka.bootstrap_servers, tmp_path / "budget.sqlite"
    topic = make_topic(servers)
    old, new = [increment(n) for n in range(50)], increment(100, event_minute=1_751_371_200_000, event_date="2025-07-01")
    send(servers, topic, [*old, new])
    service(path, kafka, topic, keep_days=1).run(threading.Event(), once=True)  # the day before NOON's is kept
    with Store(path, read_only=True) as store:
        assert store.db.execute("select count(*) from increments").fetchone() == (51,)
    BudgetService(path, {"bootstrap.servers": servers}, topic, keep_days=1, now=lambda: datetime(2025, 7, 2, tzinfo=UTC)).run(
        threading.Event(), once=True
    )
    with Store(path, read_only=True) as store:
        assert store.db.execute("select count(*) from increments").fetchone() == (1,)
    # read again these are known by their offsets; sent again, or late, they are kept aside
    assert once(path, kafka, topic, from_start=True) == Loaded(again=51)
    send(servers, topic, [old[0], increment(51)])
    assert once(path, kafka, topic) == Loaded(aside=2)
    assert held(path) == sums([*old, new])


def test_what_is_gone_or_made_anew_is_said(tmp_path: Path, kafka: Kafka) -> None:
    servers, path = kafka.bootstrap_servers, tmp_path / "budget.sqlite"
    topic = make_topic(servers, partitions=1)
    admin = AdminClient({"bootstrap.servers": servers})
    send(servers, topic, [increment(n) for n in range(10)])
    assert once(path, kafka, topic) == Loaded(added=10)
    send(servers, topic, [increment(n) for n in range(10, 20)])
    next(iter(admin.delete_records([TopicPartition(topic, 0, 15)]).values())).result(30)
    with pytest.raises(GapError, match="partition 0 lacks offsets 10 to 14"):
        once(path, kafka, topic)
    assert once(path, kafka, topic, accept_gap=True) == Loaded(added=5)
    # a topic of the same name, made anew: from its start, and what was counted is known by its uuid
    admin.delete_topics([topic])[topic].result(30)
    time.sleep(1)
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)
    send(servers, topic, [increment(n) for n in range(25)])
    assert once(path, kafka, topic) == Loaded(added=10, again=15)
    assert held(path) == sums(increment(n) for n in range(25))
    with pytest.raises(BudgetUsageError, match="there is no topic"):
        once(tmp_path / "other.sqlite", kafka, "no-such-topic")


def test_one_process_a_file_and_no_other_file(tmp_path: Path, kafka: Kafka) -> None:
    topic = make_topic(kafka.bootstrap_servers)
    path, stop = tmp_path / "budget.sqlite", threading.Event()
    running = threading.Thread(target=service(path, kafka, topic).run, args=(stop,))
    running.start()
    try:
        while not path.exists():
            time.sleep(0.01)
        with pytest.raises(BudgetBusyError):
            once(path, kafka, topic)
    finally:
        stop.set()
        running.join(30)
    (tmp_path / "text").write_text("no database at all, but long enough to be looked at" * 10)
    with pytest.raises(BudgetUsageError, match="not a budget file"):
        once(tmp_path / "text", kafka, topic)
    assert DAY  # the day of the messages
