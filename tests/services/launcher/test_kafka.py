"""A real Kafka: up, down, killed, its port taken, its jars changed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, Producer

from services.launcher.errors import ServiceError
from services.launcher.jars import read_lock
from services.launcher.kafka import TOPICS, Kafka
from services.launcher.processes import find
from services.launcher.trial import throwaway_kafka
from spark_jobs.errors import MachineError

pytestmark = pytest.mark.services


@pytest.fixture
def kafka(tmp_path: Path, jar_cache: Path, java: Path) -> Iterator[Kafka]:
    made = Kafka(tmp_path, jar_cache=jar_cache, java=lambda: java, heap="512m")
    yield made
    for process in find(made.folder, "kafka"):
        process.kill()


def produce(kafka: Kafka, topic: str, *values: str) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "enable.idempotence": True})
    for value in values:
        producer.produce(topic, value=value)
    assert producer.flush(30) == 0


def consume(kafka: Kafka, topic: str, count: int) -> list[str]:
    """Values of a topic, sorted: ``count`` of them, and what comes within a second more."""
    settings = {"group.id": "test", "auto.offset.reset": "earliest", "enable.auto.commit": False}
    consumer = Consumer(settings | {"bootstrap.servers": kafka.bootstrap_servers, "isolation.level": "read_committed"})
    consumer.subscribe([topic])
    found: list[str] = []
    end = time.monotonic() + 30
    while time.monotonic() < end:
        message = consumer.poll(1.0)
        if message is None:
            if len(found) >= count:
                break
            continue
        assert message.error() is None
        value = message.value()
        assert isinstance(value, bytes)
        found.append(value.decode())
    consumer.close()
    return sorted(found)


def test_it_starts_answers_keeps_data_and_ends_twice(kafka: Kafka) -> None:
    values: list[str] = []
    for n in range(2):
        up = kafka.up()
        assert (up.running, up.problem, up.holds) == (True, None, dict.fromkeys(sorted(TOPICS), 2))
        (pid,) = up.processes.values()
        produce(kafka, "ad-events", f"message {n}")
        values.append(f"message {n}")
        assert consume(kafka, "ad-events", len(values)) == values
        assert kafka.up() == up  # finds it running
        assert kafka.down()
        assert not psutil.pid_exists(pid)
        assert find(kafka.folder, "kafka") == []
        assert not kafka.status().running
        with pytest.raises(ServiceError, match="Kafka does not run"):
            _ = kafka.bootstrap_servers
    kafka.up(fresh=True)
    assert consume(kafka, "ad-events", 0) == []


def test_it_listens_on_loopback_alone(kafka: Kafka) -> None:
    (pid,) = kafka.up().processes.values()
    listening = {one.laddr.ip for one in psutil.Process(pid).net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_a_kill_loses_nothing_that_was_acknowledged(kafka: Kafka) -> None:
    (pid,) = kafka.up().processes.values()
    produce(kafka, "orders", "a", "b", "c")
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    problem = kafka.status().problem
    assert problem is not None and problem.startswith("it was not stopped but ended by itself")
    said: list[str] = []
    kafka.up(said.append)
    assert said[0].startswith(f"kafka was not stopped but ended by itself (process {pid})")
    assert consume(kafka, "orders", 3) == ["a", "b", "c"]


def test_it_moves_to_other_ports_with_its_data(kafka: Kafka) -> None:
    before = kafka.up().addresses["bootstrap_servers"]
    produce(kafka, "orders", "a")
    kafka.down()
    with socket.create_server(("127.0.0.1", int(before.rsplit(":", 1)[1]))):
        after = kafka.up().addresses["bootstrap_servers"]
        assert after != before
        assert consume(kafka, "orders", 1) == ["a"]


def test_topics_that_are_there_stay_as_they_are(kafka: Kafka) -> None:
    kafka.topics, kafka.partitions = ("orders",), 1
    assert kafka.up().holds == {"orders": 1}
    kafka.topics, kafka.partitions = TOPICS, 3
    assert kafka.up().holds == {"ad-events": 3, "ads-metrics": 3, "attributed-orders": 3, "orders": 1}


def test_a_broken_data_folder_is_one_clear_line(kafka: Kafka) -> None:
    kafka.data.mkdir(parents=True)
    (kafka.data / "meta.properties").write_text("version=1\ncluster.id=x\nnode.id=99\n", "utf-8")
    with pytest.raises(ServiceError, match=r"kafka did not start: its process ended: .*node.*logs in ") as caught:
        kafka.up()
    assert "\n" not in str(caught.value)
    assert find(kafka.folder, "kafka") == []


def test_a_jar_that_was_changed_is_never_started(tmp_path: Path, jar_cache: Path, java: Path) -> None:
    with throwaway_kafka(jar_cache=jar_cache, java=lambda: java):  # so that the jars are there
        pass
    lock = read_lock("kafka")
    folder = f"kafka-{lock.digest}"
    shutil.copytree(jar_cache / folder, tmp_path / "cache" / folder)
    changed = tmp_path / "cache" / folder / lock.jars[7].name
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    kafka = Kafka(tmp_path / "home", jar_cache=tmp_path / "cache", java=lambda: java)
    with pytest.raises(MachineError, match=f"{changed.name} has SHA-256 .*no jar was used"):
        kafka.up()
    assert find(kafka.folder, "kafka") == []
    assert not kafka.logs.exists()


def test_two_brokers_to_throw_away_know_nothing_of_each_other(tmp_path: Path, jar_cache: Path, java: Path) -> None:
    with (
        throwaway_kafka(jar_cache=jar_cache, java=lambda: java, parent=tmp_path, topics=("ad-events",)) as one,
        throwaway_kafka(jar_cache=jar_cache, java=lambda: java, parent=tmp_path, topics=("ad-events",)) as two,
    ):
        produce(one, "ad-events", "from one")
        produce(two, "ad-events", "from two")
        assert consume(one, "ad-events", 1) == ["from one"]
        assert consume(two, "ad-events", 1) == ["from two"]
        folders = [one.folder, two.folder]
    assert [find(folder, "kafka") for folder in folders] == [[], []]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's end is Linux's")
def test_a_broker_of_a_test_that_is_killed_goes_with_it(tmp_path: Path, jar_cache: Path, java: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from services.launcher.trial import throwaway_kafka\n"
        "cache, java, parent = (Path(text) for text in sys.argv[1:])\n"
        "with throwaway_kafka(jar_cache=cache, java=lambda: java, parent=parent) as kafka:\n"
        "    print(*kafka.status().processes.values(), flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(jar_cache), str(java), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        broker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([broker], timeout=10)
    assert not broker.is_running()
