"""Pinot's tables over the published topics: schema and table configuration, as Pinot 0.11 accepts them.

Both are REALTIME tables with upsert FULL: of all messages of a ``record_uuid`` the one with the highest ``version`` counts, so a
message that arrives twice, late or out of order changes nothing. For that, every message of a key must be in one partition of its
topic: any partitioner by key will do, if every producer uses the same. adtally's publisher uses that of Java (murmur2).
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
# These decide which messages are read and count. A user who names a Kafka must not set them.
_OURS = frozenset({"bootstrap.servers", "isolation.level", "auto.offset.reset", "group.id", "enable.auto.commit"})


@dataclass(frozen=True)
class Source:
    """The Kafka that Pinot reads. ``identity``: the cluster's id, because offsets mean nothing in another cluster.

    ``client_options`` (librdkafka) and ``java_options`` say how to connect (protocol, login, certificates); both may have secrets.
    """

    bootstrap_servers: str
    metrics_topic: str = METRICS_TOPIC
    credits_topic: str = CREDITS_TOPIC
    client_options: Mapping[str, str] = field(default_factory=dict, repr=False)
    java_options: Mapping[str, str] = field(default_factory=dict, repr=False)
    identity: str | None = None


@dataclass(frozen=True)
class TableSpec:
    """The wanted state of one table, as the bodies of requests to Pinot's controller."""

    name: str
    topic: str
    schema: dict[str, Any]
    config: dict[str, Any] = field(repr=False)  # may have the login to Kafka
    # settings of the stream that are only defaults: an existing table keeps its own
    defaults: tuple[str, ...] = ()


def table_specs(source: Source, *, window_days: Iterable[int] = WINDOW_DAYS, flush_rows: int | None = None) -> list[TableSpec]:
    """Return the tables over ``source``: `ads_metrics`, and `attributed_orders` with a column for each model and window.

    Pinot commits a segment after ``flush_rows`` rows (500,000) of all partitions of a server together, or after 6 hours.
    Raises ServiceUsageError if an option of the connection decides which messages count.
    """
    wrong = sorted(_OURS & set(source.java_options))
    if wrong:
        raise ServiceUsageError(f"{wrong[0]} of Kafka cannot be set for Pinot", hint="it decides which messages count")
    defaults = () if flush_rows else (_FLUSH,)
    tables = (
        (METRICS_TABLE, source.metrics_topic, metrics_schema(), ("campaign_id", "store_id", "event_date"), "event_minute"),
        (CREDITS_TABLE, source.credits_topic, credits_schema(window_days), ("campaign_id", "store_id", "order_id"), "order_time"),
    )
    return [
        TableSpec(name, topic, schema, _config(name, topic, source, indexed, time, flush_rows or FLUSH_ROWS), defaults)
        for name, topic, schema, indexed, time in tables
    ]


def metrics_schema() -> dict[str, Any]:
    """Return the schema of `ads_metrics`: a row for each increment. Times are milliseconds since 1970."""
    return _schema(
        METRICS_TABLE,
        texts="record_uuid event_date region campaign_id ad_id store_id placement currency query_id run_id",
        numbers="version batch_id",
        measures=MEASURES,
        times="event_minute committed_at",
    )


def credits_schema(window_days: Iterable[int] = WINDOW_DAYS) -> dict[str, Any]:
    """Return the schema of `attributed_orders`: a row for each order and touch, with a column for each model and window.

    A null credit (the touch is outside the window) sums as 0. The table does not have the ``user_id`` of the order.
    """
    return _schema(
        CREDITS_TABLE,
        texts="record_uuid order_id status store_id currency touch_event_id touch_type campaign_id ad_id reason rule_set",
        numbers="version is_current touches delta_version",
        measures=("total_micros", *credit_columns(window_days)),
        times="order_time touch_time attributed_at",
    )


def credit_columns(window_days: Iterable[int]) -> list[str]:
    """Return the names of the credit columns, as ``linear_7d_micros``: one model with all windows, then the next model."""
    days = list(window_days)
    return [f"{model}_{window}d_micros" for model in MODELS for window in days]


def _schema(name: str, *, texts: str, numbers: str, measures: Iterable[str], times: str) -> dict[str, Any]:
    """Return a schema. ``texts``, ``numbers`` and ``times`` are names of columns, separated by spaces."""
    moment = {"dataType": "LONG", "format": "1:MILLISECONDS:EPOCH", "granularity": "1:MILLISECONDS"}
    kinds = dict.fromkeys(texts.split(), "STRING") | dict.fromkeys(numbers.split(), "LONG")
    return {
        "schemaName": name,
        "dimensionFieldSpecs": [{"name": column, "dataType": kind} for column, kind in kinds.items()],
        "metricFieldSpecs": [{"name": measure, "dataType": "LONG"} for measure in measures],
        "dateTimeFieldSpecs": [{"name": time} | moment for time in times.split()],
        "primaryKeyColumns": ["record_uuid"],
    }


def _config(name: str, topic: str, source: Source, indexed: tuple[str, ...], time: str, flush_rows: int) -> dict[str, Any]:
    return {
        "tableName": name,
        "tableType": "REALTIME",
        "segmentsConfig": {"schemaName": name, "timeColumnName": time, "replication": "1", "replicasPerPartition": "1"},
        "tenants": {},
        # all segments of a partition on one server: on two servers a key could count twice
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
                # for Kafka's client itself: stop if unread messages were deleted; its default would skip them
                "auto.offset.reset": "none",
                _FLUSH: str(flush_rows),
                "realtime.segment.flush.threshold.time": FLUSH_TIME,
                **source.java_options,
            },
        },
        "metadata": {"customConfigs": {"kafka.cluster": source.identity or ""}},
    }
