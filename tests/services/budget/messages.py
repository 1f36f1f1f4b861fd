"""Messages of `ads-metrics` with a known sum, and a producer that can be made to repeat itself."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable
from typing import Any

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

MINUTE_MS = 1_751_284_800_000  # 2025-06-30T12:00:00Z
DAY = "2025-06-30"


def increment(number: int, *, version: int = 1, **changes: Any) -> dict[str, Any]:
    """Increment ``number``: its uuid, campaign and measures follow from the number."""
    return {
        "record_uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, str(number))),
        "version": version,
        "event_minute": MINUTE_MS + number % 60 * 60_000,
        "event_date": DAY,
        "campaign_id": f"c-{number % 7}",
        "store_id": f"s-{number % 3}",
        "currency": "EUR",
        "impressions": number % 11,
        "clicks": number % 5,
        "spend_nanos": number * 1_001 + 1,
        "committed_at": MINUTE_MS + 3_600_000 + number,
        **changes,
    }


def sums(increments: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str, str], list[int]]:
    """Per day, campaign, store and currency: impressions, clicks and nanos of increments, each taken once."""
    made: dict[tuple[str, str, str, str], Counter[int]] = {}
    for told in {each["record_uuid"]: each for each in increments}.values():
        key = (told["event_date"], told["campaign_id"], told["store_id"], told["currency"])
        for at, name in enumerate(("impressions", "clicks", "spend_nanos")):
            made.setdefault(key, Counter())[at] += told[name]
    return {key: [found[at] for at in range(3)] for key, found in made.items()}


def make_topic(servers: str, partitions: int = 2) -> str:
    """A new topic of a name of its own."""
    name = f"metrics-{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": servers})
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result(30)
    return name


def send(
    servers: str, topic: str, increments: Iterable[dict[str, Any]], *, transaction: str | None = None, ends: str = "commit"
) -> None:
    """Produce increments under their keys; in a transaction where it has a name, which then ``ends`` in "commit" or "abort"."""
    producer = Producer({"bootstrap.servers": servers, **({"transactional.id": transaction} if transaction else {})})
    if transaction:
        producer.init_transactions(30)
        producer.begin_transaction()
    for told in increments:
        producer.produce(topic, key=told["record_uuid"], value=json.dumps(told))
        producer.poll(0)
    producer.flush(30)
    if transaction:
        (producer.commit_transaction if ends == "commit" else producer.abort_transaction)(30)
