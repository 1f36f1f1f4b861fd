"""Topics of the run's broker, each test its own: made, filled, and pointed at by a home's kafka.toml."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable
from typing import Any

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from spark_jobs.config import Settings

_number = itertools.count()
Record = bytes | dict[str, Any] | None


class Topic:
    """A topic; its name begins with ``name`` and is nobody else's."""

    def __init__(self, servers: str, name: str, partitions: int = 2, config: dict[str, str] | None = None) -> None:
        self.name = f"{name}-{os.getpid()}-{next(_number)}"
        self.servers = servers
        self._admin = AdminClient({"bootstrap.servers": servers})
        self.make(partitions, config)

    def make(self, partitions: int = 2, config: dict[str, str] | None = None) -> None:
        new = NewTopic(self.name, num_partitions=partitions, replication_factor=1, config=config or {})
        self._admin.create_topics([new], operation_timeout=20)[self.name].result(timeout=30)
        self._await(is_there=True)

    def delete(self) -> None:
        self._admin.delete_topics([self.name], operation_timeout=20)[self.name].result(timeout=30)
        self._await(is_there=False)

    def _await(self, *, is_there: bool) -> None:
        """Wait until the broker knows what its controller has done."""
        end = time.monotonic() + 30
        while (self.name in self._admin.list_topics(timeout=20).topics) != is_there:
            assert time.monotonic() < end, f"the broker does not learn of {self.name}"
            time.sleep(0.02)

    def forget_before(self, partition: int, offset: int) -> None:
        """Take records away, as retention does."""
        from confluent_kafka import TopicPartition

        at = TopicPartition(self.name, partition, offset)
        for done in self._admin.delete_records([at]).values():
            done.result(timeout=30)

    def send(self, records: Iterable[Record], partition: int = 0, *, abort: bool = False, transaction: bool = False) -> None:
        """Send records to a partition; in a transaction of their own, which may be aborted."""
        options: dict[str, str | int] = {"bootstrap.servers": self.servers, "linger.ms": 5, "log_level": 0}
        if transaction or abort:
            options["transactional.id"] = f"test-{os.getpid()}-{next(_number)}"
        producer = Producer(options)
        failed: list[object] = []
        if transaction or abort:
            producer.init_transactions(30)
            producer.begin_transaction()
        for record in records:
            value = json.dumps(record).encode() if isinstance(record, dict) else record
            producer.produce(
                self.name,
                value,
                partition=partition,
                key=b"any",
                headers={"any": b"\xff"},
                on_delivery=lambda error, _: failed.append(error) if error and not abort else None,
            )
        assert producer.flush(30) == 0
        if abort:
            producer.abort_transaction(30)
        elif transaction:
            producer.commit_transaction(30)
        assert not failed


def point_at(settings: Settings, *clusters: tuple[str, Topic, Topic], more: str = "") -> None:
    """kafka.toml: clusters as (name, topic of events, topic of orders)."""
    settings.home_path.mkdir(parents=True, exist_ok=True)
    settings.kafka_path.write_text(
        "\n".join(
            f'[[clusters]]\nname = "{name}"\nbootstrap_servers = "{events.servers}"\n'
            f'events_topic = "{events.name}"\norders_topic = "{orders.name}"\n{more}'
            for name, events, orders in clusters
        )
    )
