"""The Kafka clusters of an installation: HOME/kafka.toml, in the words of Kafka's own settings. docs/kafka.md describes each entry.

Two clients talk to a cluster, and each has settings of its own: Spark's source is Java's client, all else is librdkafka. What both
need is said once and translated; ``spark_options`` and ``client_options`` pass the rest on as it stands. A value may be
``{ env = "NAME" }`` or ``{ file = "path" }``: a secret then stands nowhere but there, and is never printed.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from spark_jobs.config import Settings
from spark_jobs.errors import KafkaConfigurationError

KAFKA_FILE = "kafka.toml"
_NAME = r"^[a-z0-9-]{1,32}$"
_TOPIC = r"^[a-zA-Z0-9._-]{1,249}$"
_OURS = {  # adtally sets these: other values would break its guarantees
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
_OURS_IN_SPARK = {"subscribe", "subscribePattern", "assign", "failOnDataLoss", "startingOffsets", "endingOffsets"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _resolved(value: Any) -> Any:
    """The text that ``{ env = … }`` or ``{ file = … }`` stands for; anything else as it is."""
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
    """One cluster. Its ``name`` is the region of records that name none, and part of the place of every record."""

    name: str = Field(pattern=_NAME)
    bootstrap_servers: str = Field(min_length=1)
    events_topic: str = Field(default="ad-events", pattern=_TOPIC)
    orders_topic: str = Field(default="orders", pattern=_TOPIC)
    consume: bool = True
    max_offsets_per_batch: int = Field(default=1_000_000, ge=1)
    security_protocol: Annotated[str, Field(pattern="^(PLAINTEXT|SSL|SASL_PLAINTEXT|SASL_SSL)$")] = "PLAINTEXT"
    sasl_mechanism: Annotated[str | None, Field(pattern="^(PLAIN|SCRAM-SHA-256|SCRAM-SHA-512)$")] = None
    username: SecretStr | None = None
    password: SecretStr | None = None
    ca_file: str | None = None
    client_extra: dict[str, SecretStr] = Field(default_factory=dict, alias="client_options")
    spark_extra: dict[str, SecretStr] = Field(default_factory=dict, alias="spark_options")

    @field_validator("username", "password", mode="before")
    @classmethod
    def _of_elsewhere(cls, value: Any) -> Any:
        return _resolved(value)

    @field_validator("client_extra", "spark_extra", mode="before")
    @classmethod
    def _each_of_elsewhere(cls, value: Any) -> Any:
        return {key: _resolved(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    @field_validator("client_extra", "spark_extra")
    @classmethod
    def _not_ours(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for key in value:
            if key.removeprefix("kafka.") in _OURS or key in _OURS_IN_SPARK:
                raise ValueError(f"{key} is set by adtally, for its guarantees stand on it")
        return value

    @model_validator(mode="after")
    def _whole(self) -> KafkaCluster:
        if self.security_protocol.startswith("SASL") and not self._has_own_login():
            missing = [name for name in ("sasl_mechanism", "username", "password") if getattr(self, name) is None]
            if missing:
                raise ValueError(f"{self.security_protocol} needs {', '.join(missing)}")
        return self

    def _has_own_login(self) -> bool:
        """Whether the options say how to log in (Kerberos, OAuth), so that no password is needed here."""
        return "sasl.mechanism" in self.client_extra or "sasl.mechanisms" in self.client_extra

    def topic(self, stream: str) -> str:
        """The topic of a stream, "events" or "orders"."""
        return {"events": self.events_topic, "orders": self.orders_topic}[stream]

    def client_options(self) -> dict[str, str]:
        """Settings by which librdkafka (Consumer, Producer, AdminClient) connects. Holds secrets: never print it."""
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
        """Options by which Spark's Kafka source connects. Holds secrets: never print it."""
        made = {"kafka.bootstrap.servers": self.bootstrap_servers, "kafka.security.protocol": self.security_protocol}
        if self.sasl_mechanism and self.username and self.password:
            made |= {
                "kafka.sasl.mechanism": self.sasl_mechanism,
                "kafka.sasl.jaas.config": _jaas(
                    self.sasl_mechanism, self.username.get_secret_value(), self.password.get_secret_value()
                ),
            }
        if self.ca_file:
            made |= {"kafka.ssl.truststore.type": "PEM", "kafka.ssl.truststore.location": self.ca_file}
        return made | {key: value.get_secret_value() for key, value in self.spark_extra.items()}


def _jaas(mechanism: str, username: str, password: str) -> str:
    module = "plain.PlainLoginModule" if mechanism == "PLAIN" else "scram.ScramLoginModule"

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    login = f"username={quoted(username)} password={quoted(password)}"
    return f"org.apache.kafka.common.security.{module} required {login};"


class _PublishFile(_Frozen):
    cluster: str
    metrics_topic: str = Field(default="ads-metrics", pattern=_TOPIC)
    credits_topic: str = Field(default="attributed-orders", pattern=_TOPIC)


class _KafkaFile(_Frozen):
    clusters: tuple[KafkaCluster, ...] = ()
    publish: _PublishFile | None = None

    @model_validator(mode="after")
    def _agrees(self) -> _KafkaFile:
        names = [cluster.name for cluster in self.clusters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two clusters are called {twice[0]}")
        if self.publish and self.publish.cluster not in names:
            raise ValueError(f"publish.cluster: there is no cluster {self.publish.cluster}")
        return self


@dataclass(frozen=True)
class Publish:
    """Where increments and credits are published."""

    cluster: KafkaCluster
    metrics_topic: str
    credits_topic: str


@dataclass(frozen=True)
class KafkaConfig:
    """All clusters of an installation. None: there is no Kafka."""

    clusters: tuple[KafkaCluster, ...] = ()
    publish: Publish | None = None

    @property
    def consumed(self) -> tuple[KafkaCluster, ...]:
        """The clusters whose topics are ingested."""
        return tuple(cluster for cluster in self.clusters if cluster.consume)

    def cluster(self, name: str) -> KafkaCluster:
        """A cluster by its name. Raises KafkaConfigurationError where there is none."""
        for cluster in self.clusters:
            if cluster.name == name:
                return cluster
        known = ", ".join(cluster.name for cluster in self.clusters) or "none"
        raise KafkaConfigurationError(f"there is no cluster {name}", hint=f"clusters of {KAFKA_FILE}: {known}")


def read_kafka(settings: Settings) -> KafkaConfig:
    """The clusters as ``settings.kafka_path`` says; none where there is no such file.

    Raises KafkaConfigurationError, which names the entry and never its value.
    """
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
        written = tomllib.loads(text)
        _refuse_open_secrets(path, written)
        held = _KafkaFile.model_validate(written)
    except tomllib.TOMLDecodeError as error:
        raise KafkaConfigurationError(f"{path}: {re.sub(r'[^ -~]', '?', str(error))}") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {_plain(item['msg'])}" for item in error.errors())
        raise KafkaConfigurationError(f"{path}: {wrong}", hint="docs/kafka.md lists the entries") from None
    publish = None
    if held.publish:
        at = next(cluster for cluster in held.clusters if cluster.name == held.publish.cluster)
        publish = Publish(at, held.publish.metrics_topic, held.publish.credits_topic)
    return KafkaConfig(held.clusters, publish)


_SECRET = re.compile(r"password|secret|jaas|token|key\.pem|ssl\.key$", re.IGNORECASE)


def _refuse_open_secrets(path: Path, written: dict[str, Any]) -> None:
    """Raise KafkaConfigurationError where a secret stands in the file itself and others than its owner may read it."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077 and (name := _secret_entry(written)):
        raise KafkaConfigurationError(
            f"{path} holds a secret ({name}) and has the mode {mode:03o}: others can read it",
            hint=f"chmod 600 {path}, or name it as {{ env = ... }} or {{ file = ... }}",
        )


def _secret_entry(value: Any, name: str = "") -> str | None:
    """The name of an entry that is a secret given as text, if there is one."""
    if isinstance(value, list):
        return next(filter(None, (_secret_entry(part, name) for part in value)), None)
    if isinstance(value, dict):
        if set(value) in ({"env"}, {"file"}):
            return None
        return next(filter(None, (_secret_entry(part, key) for key, part in value.items())), None)
    return name if isinstance(value, str) and _SECRET.search(name) else None


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ")
