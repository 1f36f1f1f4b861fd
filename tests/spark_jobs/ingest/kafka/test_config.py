"""HOME/kafka.toml: what it says, what it refuses, and that no secret of it is ever shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import KafkaConfigurationError
from spark_jobs.ingest.kafka.config import KafkaConfig, read_kafka

CASES = Path(__file__).resolve().parents[3] / "cases" / "kafka"


def written(tmp_path: Path, text: str) -> Settings:
    settings = load_settings(home=tmp_path)
    settings.kafka_path.write_text(text)
    settings.kafka_path.chmod(0o600)
    return settings


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ('password = "word"', "password"),
        ('client_options = { "sasl.oauthbearer.client.secret" = "word" }', "sasl.oauthbearer.client.secret"),
        ('spark_options = { "kafka.sasl.jaas.config" = "word" }', "kafka.sasl.jaas.config"),
        ('client_options = { "ssl.key.password" = { env = "HOME" } }', None),
        ('username = "word"', None),
    ],
)
def test_a_file_with_a_secret_is_its_owners_alone(tmp_path: Path, entry: str, name: str | None) -> None:
    settings = written(tmp_path, f'[[clusters]]\nname = "eu"\nbootstrap_servers = "a:1"\n{entry}\n')
    assert read_kafka(settings).clusters
    for mode in (0o640, 0o604):
        settings.kafka_path.chmod(mode)
        if name is None:
            assert read_kafka(settings).clusters
            continue
        with pytest.raises(KafkaConfigurationError, match=rf"{name}\) and has the mode {mode:03o}") as caught:
            read_kafka(settings)
        assert "word" not in str(caught.value).replace("password", "")


def test_no_file_is_no_kafka(tmp_path: Path) -> None:
    assert read_kafka(load_settings(home=tmp_path)) == KafkaConfig()


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(KafkaConfigurationError, match="ADTALLY_KAFKA: there is no file"):
        read_kafka(load_settings(home=tmp_path, kafka=tmp_path / "none.toml"))


def test_clusters_topics_and_where_to_publish(tmp_path: Path) -> None:
    config = read_kafka(
        written(
            tmp_path,
            """
            [[clusters]]
            name = "eu-west"
            bootstrap_servers = "a:1,b:2"
            [[clusters]]
            name = "us-east"
            bootstrap_servers = "c:3"
            events_topic = "clicks"
            consume = false
            [publish]
            cluster = "us-east"
            """,
        )
    )
    assert [(c.name, c.topic("events"), c.topic("orders")) for c in config.clusters] == [
        ("eu-west", "ad-events", "orders"),
        ("us-east", "clicks", "orders"),
    ]
    assert [c.name for c in config.consumed] == ["eu-west"]
    assert config.publish is not None
    assert (config.publish.cluster.name, config.publish.metrics_topic, config.publish.credits_topic) == (
        "us-east",
        "ads-metrics",
        "attributed-orders",
    )
    assert config.cluster("eu-west").client_options() == {"bootstrap.servers": "a:1,b:2", "security.protocol": "PLAINTEXT"}
    with pytest.raises(KafkaConfigurationError, match="there is no cluster mars"):
        config.cluster("mars")


def test_logins_reach_both_clients_and_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'p"a\\ss word'
    monkeypatch.setenv("EVENTS_USER", "adtally-user")
    (tmp_path / "word").write_text(secret + "\n")
    config = read_kafka(
        written(
            tmp_path,
            f"""
            [[clusters]]
            name = "eu-west"
            bootstrap_servers = "a:1"
            security_protocol = "SASL_SSL"
            sasl_mechanism = "SCRAM-SHA-512"
            username = {{ env = "EVENTS_USER" }}
            password = {{ file = "{tmp_path / "word"}" }}
            ca_file = "/etc/ca.pem"
            client_options = {{ "client.id" = "adtally", "ssl.key.password" = {{ env = "EVENTS_USER" }} }}
            spark_options = {{ "kafka.request.timeout.ms" = 5000 }}
            """,
        )
    )
    cluster = config.clusters[0]
    assert cluster.client_options() == {
        "bootstrap.servers": "a:1",
        "security.protocol": "SASL_SSL",
        "sasl.mechanisms": "SCRAM-SHA-512",
        "sasl.username": "adtally-user",
        "sasl.password": secret,
        "ssl.ca.location": "/etc/ca.pem",
        "client.id": "adtally",
        "ssl.key.password": "adtally-user",
    }
    assert cluster.spark_options() == {
        "kafka.bootstrap.servers": "a:1",
        "kafka.security.protocol": "SASL_SSL",
        "kafka.sasl.mechanism": "SCRAM-SHA-512",
        "kafka.sasl.jaas.config": "org.apache.kafka.common.security.scram.ScramLoginModule required "
        'username="adtally-user" password="p\\"a\\\\ss word";',
        "kafka.ssl.truststore.type": "PEM",
        "kafka.ssl.truststore.location": "/etc/ca.pem",
        "kafka.request.timeout.ms": "5000",
    }
    for shown in (repr(config), str(cluster), repr(cluster.model_dump()), cluster.model_dump_json()):
        assert "adtally-user" not in shown
        assert "ss word" not in shown


@pytest.mark.parametrize("case", json.loads((CASES / "refused.json").read_text()), ids=lambda case: case["says"])
def test_what_cannot_be_right_is_refused_by_name(tmp_path: Path, case: dict[str, str]) -> None:
    with pytest.raises(KafkaConfigurationError) as refused:
        read_kafka(written(tmp_path, case["file"]))
    said = str(refused.value)
    assert case["says"] in said
    assert "\n" not in said
    assert "hunter2" not in said
