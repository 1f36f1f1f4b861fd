"""A broker that asks for a password: both clients log in by what kafka.toml says, and nobody prints it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import lake
import pytest
from pyspark.sql import SparkSession
from topics import Topic, point_at

from services.launcher.kafka import Kafka
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import KafkaError
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.java import require_java

PASSWORD = 'open "sesame"'


class _Asking(Kafka):
    """A broker with a second listener, by which one has to log in."""

    port_uses = (*Kafka.port_uses, "login")  # type: ignore[assignment]

    def _render(self, ports: dict[str, int], secrets: dict[str, str]) -> None:
        super()._render(ports, secrets)
        path = self._conf / "server.properties"
        lines = []
        for line in path.read_text().splitlines():
            if line.startswith(("listeners=", "advertised.listeners=")):
                line += f",LOGIN://127.0.0.1:{ports['login']}"
            elif line.startswith("listener.security.protocol.map="):
                line += ",LOGIN:SASL_PLAINTEXT"
            lines.append(line)
        escaped = PASSWORD.replace('"', '\\\\"')
        login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_tally="{escaped}";'
        lines += ["sasl.enabled.mechanisms=PLAIN", f"listener.name.login.plain.sasl.jaas.config={login}"]
        path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def asking() -> Iterator[tuple[Kafka, str]]:
    """The broker, and the address at which it asks."""
    with tempfile.TemporaryDirectory(prefix="adtally-kafka-") as folder:
        broker = _Asking(
            Path(folder),
            jar_cache=load_settings().jar_cache_path,
            java=lambda: require_java().executable,
            heap="256m",
            ends_with_parent=True,
        )
        broker.topics = ()
        try:
            broker.up()
            ports = (broker._conf / "server.properties").read_text().split("LOGIN://")[1]
            yield broker, ports.split(",")[0].split("\n")[0]
        finally:
            broker.down()


@pytest.mark.services
def test_both_clients_log_in(
    spark: SparkSession, settings: Settings, asking: tuple[Kafka, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broker, address = asking
    events, orders = Topic(broker.bootstrap_servers, "events"), Topic(broker.bootstrap_servers, "orders")
    events.send([lake.event("e1"), lake.event("e2")])
    lake.campaigns(settings)
    login = """security_protocol = "SASL_PLAINTEXT"
sasl_mechanism = "PLAIN"
username = "tally"
password = { env = "EVENTS_PASSWORD" }
"""
    events.servers = address
    monkeypatch.setenv("EVENTS_PASSWORD", PASSWORD)
    point_at(settings, ("eu-west", events, orders), more=login)
    assert run_ingest(settings, spark=spark).accepted == 2
    assert len(lake.rows(spark, settings, "raw_events", "source_offset")) == 2

    monkeypatch.setenv("EVENTS_PASSWORD", "wrong-word")
    with pytest.raises(KafkaError, match="Authentication failed") as said:
        run_ingest(settings, spark=spark)
    assert "wrong-word" not in str(said.value)
