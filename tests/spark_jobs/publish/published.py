"""Increments put into Delta as batches and corrections do it, and what stands in the topics."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
from confluent_kafka import Consumer, TopicPartition

from services.launcher.kafka import Kafka
from spark_jobs.config import Settings
from spark_jobs.corrections.write_ahead import Correction, TableChange, carry_out, write_ahead
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.tables import MINUTE_METRICS
from spark_jobs.lake.writes import DeltaSink
from spark_jobs.steps import Step

NOON = datetime(2025, 6, 30, 12, tzinfo=UTC)


def publishing(settings: Settings, kafka: Kafka, name: str | None = None) -> tuple[str, str]:
    """kafka.toml of a home, with topics of names of their own; returns these: of metrics and of credits."""
    name = name or uuid.uuid4().hex[:8]
    topics = f"metrics-{name}", f"credits-{name}"
    settings.kafka_path.write_text(
        f'[[clusters]]\nname = "here"\nbootstrap_servers = "{kafka.bootstrap_servers}"\nconsume = false\n'
        f'[publish]\ncluster = "here"\nmetrics_topic = "{topics[0]}"\ncredits_topic = "{topics[1]}"\n'
    )
    return topics


def row(number: int, **changes: Any) -> dict[str, Any]:
    """Row ``number`` of `minute_metrics`."""
    minute = NOON + timedelta(minutes=number % 90)
    return {
        "record_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, str(number))),
        "event_minute": minute,
        "region": "eu-west",
        "campaign_id": f"c-{number % 5}",
        "ad_id": 'a "quoted" \\ ü 😀 \u2028' if number % 7 == 0 else "a",
        "store_id": "s",
        "placement": None if number % 2 else "top",
        "currency": "EUR",
        "impressions": number,
        "clicks": 1,
        "invalid_impressions": 2,
        "invalid_clicks": 0,
        "spend_nanos": 2**53 + number,
        "invalid_spend_nanos": 7,
        "event_date": minute.date(),
        "_query_id": "q",
        "_batch_id": number // 10,
        **changes,
    }


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, MINUTE_METRICS.schema)


def add(settings: Settings, *numbers: int, **changes: Any) -> None:
    """A version that adds these rows."""
    DeltaSink(MINUTE_METRICS, settings).append_rows(
        table([row(number, **changes) for number in numbers]), Step.MINUTE_METRICS, Transaction(uuid.uuid4().hex, 0)
    )


def correct(settings: Settings, remove: list[dict[str, Any]], put: list[dict[str, Any]]) -> None:
    """A version that takes rows out and puts others in, as a repair does."""
    token = uuid.uuid4().hex
    correction = Correction(token, token, 0, [TableChange(MINUTE_METRICS, table(remove), table(put))])
    write_ahead(settings, correction)
    carry_out(settings, correction)


def consume(kafka: Kafka, topic: str, isolation: str = "read_committed") -> list[tuple[str, bytes]]:
    """Keys and values of a topic, by partition, up to its end."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": "test",
            "isolation.level": isolation,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 20,
        }
    )
    found: list[tuple[str, bytes]] = []
    partitions = set(consumer.list_topics(topic, timeout=20).topics[topic].partitions)
    consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
    while partitions:
        for message in consumer.consume(1000, 1.0):
            if message.error() is not None:
                partitions.discard(message.partition() or 0)
            else:
                key, value = message.key(), message.value()
                assert isinstance(key, bytes)
                assert isinstance(value, bytes)
                found.append((key.decode(), value))
    consumer.close()
    return found


def told(kafka: Kafka, topic: str) -> list[dict[str, Any]]:
    """The messages as objects, by version and key."""
    made = [json.loads(value) for _, value in consume(kafka, topic)]
    return sorted(made, key=lambda each: (each["version"], each["record_uuid"]))


def state(messages: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What an upsert by key and version holds in the end."""
    held: dict[str, dict[str, Any]] = {}
    for each in messages:
        if each["version"] >= held.get(each["record_uuid"], each)["version"]:
            held[each["record_uuid"]] = each
    return held
