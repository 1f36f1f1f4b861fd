"""Pinot's tables over the published topics: schema and table configuration, as Pinot 0.11 takes them.

Both are REALTIME tables with upsert FULL: of all messages of a ``record_uuid`` the one with the highest ``version`` counts, so
that a message that comes twice, late or out of order changes nothing. For that every message of a key must be in one partition of
its topic: with any partitioner by key, as long as every producer uses the same. adtally's publisher uses that of Java (murmur2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.launcher.errors import ServiceUsageError

METRICS_TABLE = "ads_metrics"
CREDITS_TABLE = "attributed_orders"
METRICS_TOPIC = "ads-metrics"
CREDITS_TOPIC = "attributed-orders"
MODELS = ("last_click", "first_click", "linear", "position_based", "time_decay")
WINDOW_DAYS = (1, 7, 14, 28, 30)
FLUSH_ROWS = 500_000
FLUSH_TIME = "6h"
MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")

_FLUSH = "realtime.segment.flush.threshold.rows"
# what decides which messages are read and which of them count: these are not for who names a Kafka to set
_OURS = frozenset({"bootstrap.servers", "isolation.level", "auto.offset.reset", "group.id", "enable.auto.commit"})


@dataclass(frozen=True)
class Source:
    """The Kafka that is read. ``client_options`` are librdkafka's and ``java_options`` the Java client's way to say how to connect
    (protocol, login, certificates); both may hold secrets. ``identity`` is the cluster's id: offsets mean nothing in another one.
    """

    bootstrap_servers: str
    metrics_topic: str = METRICS_TOPIC
    credits_topic: str = CREDITS_TOPIC
    client_options: Mapping[str, str] = field(default_factory=dict, repr=False)
    java_options: Mapping[str, str] = field(default_factory=dict, repr=False)
    identity: str | None = None


@dataclass(frozen=True)
class TableSpec:
    """One table as it should be: the bodies that Pinot's controller takes."""

    name: str
    topic: str
    schema: dict[str, Any]
    config: dict[str, Any] = field(repr=False)  # may hold the login to Kafka
    # settings of the stream that were not asked for: a table that is there keeps its own
    defaults: tuple[str, ...] = ()


def table_specs(source: Source, *, window_days: Iterable[int] = WINDOW_DAYS, flush_rows: int | None = None) -> list[TableSpec]:
    """The tables over ``source``: `ads_metrics`, and `attributed_orders` with a column for each model and window.

    A segment is committed after ``flush_rows`` rows (500,000) of all partitions of a server together, or after 6 hours.
    Raises ServiceUsageError where an option of the connection is one that decides what counts.
    """
    wrong = sorted(_OURS & set(source.java_options))
    if wrong:
        raise ServiceUsageError(f"{wrong[0]} of Kafka cannot be set for Pinot", hint="it decides which messages count")
    tables = (
        (METRICS_TABLE, source.metrics_topic, metrics_schema(), ("campaign_id", "store_id", "event_date"), "event_minute"),
        (CREDITS_TABLE, source.credits_topic, credits_schema(window_days), ("campaign_id", "store_id", "order_id"), "order_time"),
    )
    return [
        TableSpec(
            name,
            topic,
            schema,
            _config(name, topic, source, indexed=indexed, time=time, flush_rows=flush_rows or FLUSH_ROWS),
            () if flush_rows else (_FLUSH,),
        )
        for name, topic, schema, indexed, time in tables
    ]


def metrics_schema() -> dict[str, Any]:
    """A row an increment, as published to ``ads-metrics``. Times are milliseconds since 1970."""
    texts = (
        "record_uuid",
        "event_date",
        "region",
        "campaign_id",
        "ad_id",
        "store_id",
        "placement",
        "currency",
        "query_id",
        "run_id",
    )
    return _schema(
        METRICS_TABLE,
        texts=texts,
        numbers=("version", "batch_id"),
        measures=MEASURES,
        times=("event_minute", "committed_at"),
    )


def credits_schema(window_days: Iterable[int] = WINDOW_DAYS) -> dict[str, Any]:
    """A row an order and touch, as published to ``attributed-orders``, with ``<model>_<days>d_micros`` for every model and window.

    A credit that is null (the touch lies outside the window) sums as 0. Who ordered (``user_id``) is not served.
    """
    texts = ("record_uuid", "order_id", "status", "store_id", "currency", "touch_event_id", "touch_type", "campaign_id", "ad_id")
    return _schema(
        CREDITS_TABLE,
        texts=(*texts, "reason", "rule_set"),
        numbers=("version", "is_current", "touches", "delta_version"),
        measures=("total_micros", *credit_columns(window_days)),
        times=("order_time", "touch_time", "attributed_at"),
    )


def credit_columns(window_days: Iterable[int]) -> list[str]:
    """Names of the columns of credits: a model's over all windows, then the next model's."""
    days = list(window_days)
    return [f"{model}_{window}d_micros" for model in MODELS for window in days]


def _schema(
    name: str, *, texts: Iterable[str], numbers: Iterable[str], measures: Iterable[str], times: Iterable[str]
) -> dict[str, Any]:
    moment = {"dataType": "LONG", "format": "1:MILLISECONDS:EPOCH", "granularity": "1:MILLISECONDS"}
    return {
        "schemaName": name,
        "dimensionFieldSpecs": [
            *({"name": text, "dataType": "STRING"} for text in texts),
            *({"name": number, "dataType": "LONG"} for number in numbers),
        ],
        "metricFieldSpecs": [{"name": measure, "dataType": "LONG"} for measure in measures],
        "dateTimeFieldSpecs": [{"name": time} | moment for time in times],
        "primaryKeyColumns": ["record_uuid"],
    }


def _config(name: str, topic: str, source: Source, *, indexed: tuple[str, ...], time: str, flush_rows: int) -> dict[str, Any]:
    return {
        "tableName": name,
        "tableType": "REALTIME",
        "segmentsConfig": {"schemaName": name, "timeColumnName": time, "replication": "1", "replicasPerPartition": "1"},
        "tenants": {},
        # all segments of a partition on one server, or a key could count once on each of two
        "routing": {"instanceSelectorType": "strictReplicaGroup"},
        "upsertConfig": {"mode": "FULL", "comparisonColumn": "version", "hashFunction": "NONE"},
        "tableIndexConfig": {
            "loadMode": "MMAP",
            "nullHandlingEnabled": True,
            "invertedIndexColumns": list(indexed),
            "rangeIndexColumns": [time],
            "streamConfigs": {
                "streamType": "kafka",
                "stream.kafka.topic.name": topic,
                "stream.kafka.broker.list": source.bootstrap_servers,
                "stream.kafka.consumer.type": "lowlevel",
                "stream.kafka.consumer.factory.class.name": "org.apache.pinot.plugin.stream.kafka20.KafkaConsumerFactory",
                "stream.kafka.decoder.class.name": "org.apache.pinot.plugin.stream.kafka.KafkaJSONMessageDecoder",
                "stream.kafka.isolation.level": "read_committed",
                "stream.kafka.consumer.prop.auto.offset.reset": "smallest",
                # for Kafka's client itself: where messages that were not read are gone, stop; its own default goes on behind them
                "auto.offset.reset": "none",
                _FLUSH: str(flush_rows),
                "realtime.segment.flush.threshold.time": FLUSH_TIME,
                **source.java_options,
            },
        },
        "metadata": {"customConfigs": {"kafka.cluster": source.identity or ""}},
    }
