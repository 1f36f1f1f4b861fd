"""How far topics are read and copied, asked of a real broker; what is said of one that is away; and what never is."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import lake
import pytest
from topics import Topic, point_at

from orchestration.cli import app
from orchestration.cli.doctor import examine
from services.launcher.kafka import Kafka
from spark_jobs.config import Settings
from spark_jobs.ingest.kafka.topics import read_topic_sources
from spark_jobs.operate.health import read_signal

SECRET = "never-to-be-seen"


def checkpoint(settings: Settings, query: str, topic: str, ends: dict[str, int]) -> None:
    """One finished batch of a query, up to these offsets."""
    folder = settings.checkpoints_path / query
    for part in ("offsets", "commits"):
        (folder / part).mkdir(parents=True)
    (folder / "offsets" / "0").write_text("\n".join(["v1", json.dumps({"batchTimestampMs": 1}), json.dumps({topic: ends})]))
    (folder / "commits" / "0").write_text("v1\n{}")


def test_what_is_read_copied_and_waits(settings: Settings, kafka: Kafka, capsys: pytest.CaptureFixture[str]) -> None:
    events, orders = Topic(kafka.bootstrap_servers, "events"), Topic(kafka.bootstrap_servers, "orders")
    point_at(settings, ("eu-west", events, orders))
    events.send([lake.event(f"e{n}") for n in range(7)], 1)
    checkpoint(settings, "events-eu-west", events.name, {"0": 0, "1": 5})
    checkpoint(settings, "raw_events-eu-west", events.name, {"0": 0, "1": 2})
    found, none = read_topic_sources(settings)
    assert (found.topic, found.read_to, found.lag, found.copy_lag, found.problem) == (events.name, {0: 0, 1: 5}, 2, 5, None)
    assert (none.lag, none.copy_lag) == (0, 0)
    now = datetime.now(UTC)
    assert read_signal(settings, "stream_lag", now=now).ok
    late = read_signal(settings, "stream_lag", now=now + timedelta(minutes=5))
    assert not late.ok and 290 < (late.value or 0) < 400
    assert f"2 offsets of topic {events.name} of cluster eu-west wait" in late.detail
    assert read_signal(settings, "kafka_clusters").detail == "2 topics answer"
    assert app.run(["--home", str(settings.home_path), "status", "--json"]) == 0
    assert [topic["read_to"] for topic in json.loads(capsys.readouterr().out)["topics"]] == [{"0": 0, "1": 5}, {"0": 0, "1": 0}]
    checks = {check.name: check for check in examine(settings.home_path)}
    assert checks["kafka eu-west"].ok and f"{events.name} (2 partitions)" in checks["kafka eu-west"].detail
    orders.delete()
    away = {check.name: check for check in examine(settings.home_path)}["kafka eu-west"]
    assert not away.ok and f"has no topic {orders.name}" in away.detail
    assert read_signal(settings, "kafka_clusters").value == 1


def test_a_cluster_that_is_away_fails_nothing_and_no_secret_is_seen(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spark_jobs.ingest.kafka.topics.ASK_SECONDS", 0.5)
    monkeypatch.setenv("ANY_PASSWORD", SECRET)
    settings.kafka_path.write_text(
        '[[clusters]]\nname = "eu-west"\nbootstrap_servers = "127.0.0.1:9"\nsecurity_protocol = "SASL_PLAINTEXT"\n'
        f'sasl_mechanism = "PLAIN"\nusername = "{SECRET}"\npassword = {{ env = "ANY_PASSWORD" }}\n'
        f'[clusters.client_options]\n"ssl.key.password" = "{SECRET}"\n'
    )
    checkpoint(settings, "events-eu-west", "ad-events", {"0": 9})
    home = ("--home", str(settings.home_path))
    for command in (("status",), ("status", "--json"), ("doctor",), ("doctor", "--json"), ("reconcile",)):
        app.run([*home, *command])
    seen = "".join(capsys.readouterr())
    assert SECRET not in seen
    assert "does not answer" in seen
    found = read_topic_sources(settings)
    assert [(source.lag, source.ends) for source in found] == [(None, None)] * 2
    assert found[0].read_to == {0: 9}
    assert read_signal(settings, "stream_lag").ok
    away = read_signal(settings, "kafka_clusters")
    assert (away.ok, away.value) == (False, 2) and "eu-west" in away.detail
    settings.kafka_path.write_text(f'[[clusters]]\nname = "eu-west"\npasswort = "{SECRET}"\n')
    wrong = {check.name: check for check in examine(settings.home_path)}["kafka"]
    assert not wrong.ok and "passwort" in wrong.detail and SECRET not in wrong.detail
