"""Kafka: one node in KRaft mode, on loopback."""

from __future__ import annotations

import base64
import subprocess
import uuid

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from services.launcher.errors import ServiceError
from services.launcher.java_service import JavaService
from services.launcher.processes import cause
from services.launcher.service import Program, Progress, Role

TOPICS = ("ad-events", "orders", "ads-metrics", "attributed-orders")
PARTITIONS = 2
_ANSWER_SECONDS = 5.0
_TOPIC_SECONDS = 30.0


class Kafka(JavaService):
    """One broker. ``up`` creates missing topics, each with ``partitions`` partitions; it never changes an existing topic."""

    name = "kafka"
    role_names = ("kafka",)
    port_uses = ("broker", "controller")
    ready_seconds = 90.0
    default_heap = "1g"
    partitions = PARTITIONS
    topics: tuple[str, ...] = TOPICS

    @property
    def bootstrap_servers(self) -> str:
        """Return the address for clients. Raises ServiceError unless the broker runs."""
        return self.running_addresses()["bootstrap_servers"]

    def roles(self, ports: dict[str, int]) -> list[Role]:
        """Return the one role: the broker is the controller too."""
        options = ("-Xms256m", f"-Xmx{self._heap}")
        return [Role("kafka", ("kafka.Kafka", str(self._conf / "server.properties")), options, stop_seconds=30.0)]

    def addresses(self, ports: dict[str, int]) -> dict[str, str]:
        """Return the bootstrap servers."""
        return {"bootstrap_servers": f"127.0.0.1:{ports['broker']}"}

    def holds(self, ports: dict[str, int]) -> dict[str, int]:
        """Return the number of partitions by topic, without Kafka's own topics."""
        found = _admin(ports).list_topics(timeout=_ANSWER_SECONDS).topics
        return {name: len(topic.partitions) for name, topic in sorted(found.items()) if not name.startswith("__")}

    def prepare(self, program: Program) -> None:
        """Format a new data folder. Raises ServiceError if Kafka's tool fails."""
        if (self.data / "meta.properties").exists():
            return
        identity = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # with a space in place of "=", the tool would read an identity that begins with a hyphen as an option
        format_it = ("format", f"--cluster-id={identity}", "-c", str(self._conf / "server.properties"))
        output = self._output("format")
        output.parent.mkdir(exist_ok=True)
        options = self._jvm(Role("format", (), ("-Xmx256m",), 0))
        command = [str(program.executable), *program.arguments, *options, "kafka.tools.StorageTool", *format_it]
        devnull, stdout = subprocess.DEVNULL, subprocess.STDOUT
        try:
            with output.open("wb") as file:
                subprocess.run(command, cwd=self.folder, stdin=devnull, stdout=file, stderr=stdout, timeout=120, check=True)
        except subprocess.SubprocessError as error:
            said = cause(output) or str(error)
            raise ServiceError(f"Kafka could not make its data folder: {said}", hint=f"logs in {self.logs}") from None

    def probe(self, role: str, ports: dict[str, int]) -> str | None:
        """Ask the broker for its topics: every partition must have a leader."""
        try:
            found = _admin(ports).list_topics(timeout=_ANSWER_SECONDS).topics
        except KafkaException as error:
            return str(error.args[0].str())
        for name, topic in found.items():
            if any(partition.leader < 0 for partition in topic.partitions.values()):
                return f"topic {name} has a partition without a leader"
        return None

    def settle(self, ports: dict[str, int], progress: Progress) -> None:
        """Create the missing topics, and wait until they have leaders."""
        admin = _admin(ports)
        there = admin.list_topics(timeout=_TOPIC_SECONDS).topics
        missing = [name for name in self.topics if name not in there]
        if not missing:
            return
        new = [NewTopic(name, num_partitions=self.partitions, replication_factor=1) for name in missing]
        for name, made in admin.create_topics(new, operation_timeout=_TOPIC_SECONDS).items():
            try:
                made.result(timeout=_TOPIC_SECONDS)
            except KafkaException as error:
                raise ServiceError(f"topic {name} could not be made: {error.args[0].str()}") from None
        progress(f"made topics {', '.join(missing)} with {self.partitions} partitions each")


def _admin(ports: dict[str, int]) -> AdminClient:
    # log_level 0: while the broker starts, refused connections are expected
    timeout_ms = int(_ANSWER_SECONDS * 1000)
    return AdminClient({"bootstrap.servers": f"127.0.0.1:{ports['broker']}", "socket.timeout.ms": timeout_ms, "log_level": 0})
