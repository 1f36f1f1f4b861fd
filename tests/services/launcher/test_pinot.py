"""A real Pinot that reads a real Kafka: segments are committed, counts are exact, also after everything was killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Producer

from services.launcher.errors import ServiceError
from services.launcher.kafka import Kafka
from services.launcher.pinot import Pinot
from services.launcher.processes import find
from services.launcher.trial import throwaway_kafka, throwaway_pinot

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

CASES = Path(__file__).parents[2] / "cases" / "services" / "pinot"
TOPIC = "tiny"


@pytest.fixture
def kafka(tmp_path: Path, jar_cache: Path, java: Path) -> Iterator[Kafka]:
    with throwaway_kafka(jar_cache=jar_cache, java=lambda: java, parent=tmp_path, topics=(TOPIC,)) as made:
        yield made


@pytest.fixture
def pinot(tmp_path: Path, jar_cache: Path, java: Path) -> Iterator[Pinot]:
    made = Pinot(tmp_path / "home", jar_cache=jar_cache, java=lambda: java, heap="1g")
    yield made
    for role in made.role_names:
        for process in find(made.folder, role):
            process.kill()


def produce(kafka: Kafka, keys: range, *, version: int, amount: int) -> None:
    """A row a key; the topic's partition is that of the key, as upsert needs it."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "enable.idempotence": True})
    for key in keys:
        name = f"k{key}"
        row = {"id": name, "amount": amount, "version": version, "at": 1_750_000_000_000 + key}
        producer.produce(TOPIC, key=name, value=json.dumps(row))
    assert producer.flush(30) == 0


def wait_until(reached: Callable[[], bool], *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if reached():
            return True
        time.sleep(0.5)
    return reached()


def is_refused(port: int) -> bool:
    """Whether the port ends a connection of somebody who has no key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as wrapped:
            wrapped.send(b"\0\0\0\1x")
            wrapped.recv(1)
    except ssl.SSLError as error:
        return "ALERT" in str(error).upper()
    return False


def test_rows_are_exact_through_commits_redelivery_kills_and_restarts(kafka: Kafka, pinot: Pinot) -> None:
    up = pinot.up()
    assert (up.running, up.problem, up.holds, sorted(up.processes)) == (True, None, {}, ["pinot", "zookeeper"])
    open_to_all = {
        one.laddr.port
        for pid in up.processes.values()
        for one in psutil.Process(pid).net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.ip != "127.0.0.1"
    }
    ports = json.loads((pinot.folder / "state.json").read_text("utf-8"))["ports"]
    assert open_to_all == {ports["server"]}  # as the warning says
    assert is_refused(ports["server"])
    assert (pinot.folder.stat().st_mode & 0o077, (pinot.folder / "keys.password").stat().st_mode & 0o077) == (0, 0)

    client = pinot.client
    client.put_schema(json.loads((CASES / "schema.json").read_text("utf-8")))
    table = (CASES / "table.json").read_text("utf-8").replace("KAFKA", kafka.bootstrap_servers)
    client.add_table(json.loads(table))
    totals = "select count(*), sum(amount), max(version) from tiny"

    def is_total(count: int, amount: int, version: int) -> bool:
        try:
            return client.query(totals) == [[count, float(amount), float(version)]]
        except ServiceError:
            return False

    # a flush threshold of 200 rows for two partitions: several commits
    produce(kafka, range(1000), version=1, amount=10)
    assert wait_until(lambda: is_total(1000, 10_000, 1), seconds=90), client.query(totals)
    assert wait_until(lambda: list(client.segments("tiny").values()).count("DONE") >= 4, seconds=60), client.segments("tiny")
    assert is_total(1000, 10_000, 1)
    # the same again, then one in two with a higher version, then a version that is too late
    produce(kafka, range(1000), version=1, amount=10)
    produce(kafka, range(0, 1000, 2), version=2, amount=30)
    produce(kafka, range(0, 1000, 4), version=1, amount=99)
    produce(kafka, range(1000, 1001), version=3, amount=1)  # the last row
    assert wait_until(lambda: is_total(1001, 20_001, 3), seconds=90), client.query(totals)

    assert pinot.up() == pinot.status()  # finds it running
    assert pinot.status().holds == {"tiny": 1001}
    for pid in up.processes.values():
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not pinot.status().running, seconds=10)
    problem = pinot.status().problem
    assert problem is not None and problem.startswith("it was not stopped but ended by itself")

    pinot.up()
    assert wait_until(lambda: is_total(1001, 20_001, 3), seconds=60), client.query(totals)
    produce(kafka, range(1001, 2001), version=3, amount=1)
    assert wait_until(lambda: is_total(2001, 21_001, 3), seconds=90), client.query(totals)

    processes = [psutil.Process(pid) for pid in pinot.status().processes.values()]
    assert pinot.down()
    assert not any(process.is_running() for process in processes)
    assert not any(find(pinot.folder, role) for role in pinot.role_names)
    with pytest.raises(ServiceError, match="Pinot does not run"):
        _ = pinot.client
    assert pinot.down() is False


def test_one_to_throw_away_is_gone_at_the_end(tmp_path: Path, jar_cache: Path, java: Path) -> None:
    with throwaway_pinot(jar_cache=jar_cache, java=lambda: java, parent=tmp_path) as pinot:
        assert pinot.client.query("select 1") == [[1]]
        assert pinot.client.tables() == []
        folder = pinot.folder
    assert not any(find(folder, role) for role in pinot.role_names)
    assert list(tmp_path.iterdir()) == []
