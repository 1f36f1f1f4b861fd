"""Read the Kafka clusters of an installation from HOME/kafka.toml. docs/kafka.md describes each entry.

Spark's source is Java's client; all other code uses librdkafka. adtally translates the settings that both need, and passes
``spark_options`` and ``client_options`` on unchanged. A value may be ``{ env = "NAME" }`` or ``{ file = "path" }``, so that no
secret needs to be in the file. adtally never prints a secret.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator

from spark_jobs.config import Settings
from spark_jobs.errors import KafkaConfigurationError
from spark_jobs.toml_text import parse_toml

KAFKA_FILE = "kafka.toml"
_NAME = r"^[a-z0-9-]{1,32}$"
_TOPIC = r"^[a-zA-Z0-9._-]{1,249}$"
_OWN_SETTINGS = {  # adtally sets these: other values would break its guarantees
    "bootstrap.servers",
    "group.id",
    "isolation.level",
    "enable.auto.commit",
    "auto.offset.reset",
    "enable.partition.eof",
    "enable.idempotence",
    "transactional.id",
    "partitioner",
    "acks",
}
_OWN_SPARK_SETTINGS = {"subscribe", "subscribePattern", "assign", "failOnDataLoss", "startingOffsets", "endingOffsets"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _resolve(value: object) -> object:
    """Return the text that ``{ env = … }`` or ``{ file = … }`` names; any other value as a text."""
    if not isinstance(value, dict):
        return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value
    if set(value) == {"env"}:
        name = str(value["env"])
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set")
        return os.environ[name]
    if set(value) == {"file"}:
        path = Path(str(value["file"])).expanduser()
        try:
            return path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    raise ValueError('is neither a text nor { env = "NAME" } nor { file = "path" }')


class KafkaCluster(_Frozen):
    """One cluster. Its ``name`` is the region of records without a region, and part of the place of every record."""

    name: str = Field(pattern=_NAME)
    bootstrap_servers: str = Field(min_length=1)
    events_topic: str = Field(default="ad-events", pattern=_TOPIC)
    orders_topic: str = Field(default="orders", pattern=_TOPIC)
    consume: bool = True
    max_offsets_per_batch: int = Field(default=1_000_000, ge=1)
    security_protocol: str = Field(default="PLAINTEXT", pattern="^(PLAINTEXT|SSL|SASL_PLAINTEXT|SASL_SSL)$")
    sasl_mechanism: str | None = Field(default=None, pattern="^(PLAIN|SCRAM-SHA-256|SCRAM-SHA-512)$")
    username: SecretStr | None = None
    password: SecretStr | None = None
    ca_file: str | None = None
    client_extra: dict[str, SecretStr] = Field(default_factory=dict, alias="client_options")
    spark_extra: dict[str, SecretStr] = Field(default_factory=dict, alias="spark_options")

    @field_validator("username", "password", mode="before")
    @classmethod
    def _resolve_secret(cls, value: object) -> object:
        return _resolve(value)

    @field_validator("client_extra", "spark_extra", mode="before")
    @classmethod
    def _resolve_options(cls, value: object) -> object:
        return {key: _resolve(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    @field_validator("client_extra", "spark_extra")
    @classmethod
    def _refuse_own_settings(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for key in value:
            if key.removeprefix("kafka.") in _OWN_SETTINGS or key in _OWN_SPARK_SETTINGS:
                raise ValueError(f"{key} is set by adtally, for its guarantees stand on it")
        return value

    @model_validator(mode="after")
    def _require_login(self) -> KafkaCluster:
        has_other_login = not {"sasl.mechanism", "sasl.mechanisms"}.isdisjoint(self.client_extra)  # Kerberos, OAuth
        missing = [name for name in ("sasl_mechanism", "username", "password") if getattr(self, name) is None]
        if self.security_protocol.startswith("SASL") and missing and not has_other_login:
            raise ValueError(f"{self.security_protocol} needs {', '.join(missing)}")
        return self

    def topic(self, stream: str) -> str:
        """Return the topic of a stream, "events" or "orders"."""
        return {"events": self.events_topic, "orders": self.orders_topic}[stream]

    def client_options(self) -> dict[str, str]:
        """Return settings for librdkafka (Consumer, Producer, AdminClient). They hold secrets: never print them."""
        made = {"bootstrap.servers": self.bootstrap_servers, "security.protocol": self.security_protocol}
        if self.sasl_mechanism and self.username and self.password:
            made |= {
                "sasl.mechanisms": self.sasl_mechanism,
                "sasl.username": self.username.get_secret_value(),
                "sasl.password": self.password.get_secret_value(),
            }
        if self.ca_file:
            made["ssl.ca.location"] = self.ca_file
        return made | {key: value.get_secret_value() for key, value in self.client_extra.items()}

    def spark_options(self) -> dict[str, str]:
        """Return options for Spark's Kafka source. They hold secrets: never print them."""
        made = {"kafka.bootstrap.servers": self.bootstrap_servers, "kafka.security.protocol": self.security_protocol}
        if self.sasl_mechanism and self.username and self.password:
            login = _jaas(self.sasl_mechanism, self.username.get_secret_value(), self.password.get_secret_value())
            made |= {"kafka.sasl.mechanism": self.sasl_mechanism, "kafka.sasl.jaas.config": login}
        if self.ca_file:
            made |= {"kafka.ssl.truststore.type": "PEM", "kafka.ssl.truststore.location": self.ca_file}
        return made | {key: value.get_secret_value() for key, value in self.spark_extra.items()}


def _jaas(mechanism: str, username: str, password: str) -> str:
    module = "plain.PlainLoginModule" if mechanism == "PLAIN" else "scram.ScramLoginModule"

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    login = f"username={quoted(username)} password={quoted(password)}"
    return f"org.apache.kafka.common.security.{module} required {login};"


class Publish(_Frozen):
    """The cluster and the topics to which increments and credits are published."""

    cluster: KafkaCluster
    metrics_topic: str = Field(default="ads-metrics", pattern=_TOPIC)
    credits_topic: str = Field(default="attributed-orders", pattern=_TOPIC)


class KafkaConfig(_Frozen):
    """All clusters of an installation. None: there is no Kafka."""

    clusters: tuple[KafkaCluster, ...] = ()
    publish: Publish | None = None

    @field_validator("clusters")
    @classmethod
    def _refuse_repeated_names(cls, clusters: tuple[KafkaCluster, ...]) -> tuple[KafkaCluster, ...]:
        names = [cluster.name for cluster in clusters]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two clusters are called {twice[0]}")
        return clusters

    @field_validator("publish", mode="before")
    @classmethod
    def _find_cluster(cls, publish: object, info: ValidationInfo) -> object:
        """Replace the name of the cluster by the cluster."""
        if not isinstance(publish, dict) or "cluster" not in publish:
            return publish
        if "clusters" not in info.data:  # they are wrong, which is reported
            return None
        found = [cluster for cluster in info.data["clusters"] if cluster.name == publish["cluster"]]
        if not found:
            raise ValueError(f"publish.cluster: there is no cluster {publish['cluster']}")
        return publish | {"cluster": found[0]}

    @property
    def consumed(self) -> tuple[KafkaCluster, ...]:
        """The clusters whose topics are ingested."""
        return tuple(cluster for cluster in self.clusters if cluster.consume)

    def cluster(self, name: str) -> KafkaCluster:
        """Return a cluster by its name. Raises KafkaConfigurationError if there is none."""
        for cluster in self.clusters:
            if cluster.name == name:
                return cluster
        known = ", ".join(cluster.name for cluster in self.clusters) or "none"
        raise KafkaConfigurationError(f"there is no cluster {name}", hint=f"clusters of {KAFKA_FILE}: {known}")


def read_kafka(settings: Settings) -> KafkaConfig:
    """Read kafka.toml; no cluster if it is missing. Raises KafkaConfigurationError, which names an entry, but never its value."""
    path = settings.kafka_path
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        if settings.kafka is not None:
            raise KafkaConfigurationError(f"ADTALLY_KAFKA: there is no file {path}") from None
        return KafkaConfig()
    except (OSError, UnicodeDecodeError) as error:
        raise KafkaConfigurationError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        written = parse_toml(text)
        _refuse_open_secrets(path, written)
        return KafkaConfig.model_validate(written)
    except tomllib.TOMLDecodeError as error:
        raise KafkaConfigurationError(f"{path}: {re.sub(r'[^ -~]', '?', str(error))}") from None
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()
        )
        raise KafkaConfigurationError(f"{path}: {wrong}", hint="docs/kafka.md lists the entries") from None


_SECRET = re.compile(r"password|secret|jaas|token|key\.pem|ssl\.key$", re.IGNORECASE)


def _refuse_open_secrets(path: Path, written: dict[str, Any]) -> None:
    """Raise KafkaConfigurationError if the file itself holds a secret and others than its owner may read it."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077 and (name := _secret_entry(written)):
        raise KafkaConfigurationError(
            f"{path} holds a secret ({name}) and has the mode {mode:03o}: others can read it",
            hint=f"chmod 600 {path}, or name it as {{ env = ... }} or {{ file = ... }}",
        )


def _secret_entry(value: object, name: str = "") -> str | None:
    """Return the name of an entry that is a secret given as text, if there is one."""
    if isinstance(value, list):
        return next(filter(None, (_secret_entry(part, name) for part in value)), None)
    if isinstance(value, dict):
        if set(value) in ({"env"}, {"file"}):
            return None
        return next(filter(None, (_secret_entry(part, key) for key, part in value.items())), None)
    return name if isinstance(value, str) and _SECRET.search(name) else None
