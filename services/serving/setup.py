"""Brings Pinot's tables to what they should be, as often as it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from services.launcher.errors import ServiceError, ServiceUsageError
from services.launcher.pinot import PinotClient
from services.serving.tables import Source, TableSpec

_KAFKA_SECONDS = 15.0
_TABLE_SECONDS = 60.0
_FRESH = "`adtally services pinot up --fresh` deletes Pinot's data and reads the topics from their start"


def examine(source: Source) -> Source:
    """``source`` with the id of its cluster. Raises ServiceError where it does not answer or lacks a topic that is to be read."""
    options: dict[str, str | int | float | bool] = {"log_level": 0, **source.client_options}
    options["bootstrap.servers"] = source.bootstrap_servers
    try:
        found = AdminClient(options).list_topics(timeout=_KAFKA_SECONDS)
    except KafkaException as error:
        raise ServiceError(
            f"Kafka at {source.bootstrap_servers} does not answer: {error.args[0].str()}", hint="Pinot reads its topics"
        ) from None
    for topic in (source.metrics_topic, source.credits_topic):
        if topic not in found.topics or found.topics[topic].error is not None:
            raise ServiceError(f"Kafka at {source.bootstrap_servers} has no topic {topic}", hint="`adtally publish` makes it")
    return replace(source, identity=str(found.cluster_id))


def ensure_tables(client: PinotClient, specs: Iterable[TableSpec], tell: Callable[[str], None]) -> None:
    """Make the tables that are missing and change those that differ; what is as it should be is left alone.

    Returns when every table answers a query. Raises ServiceUsageError where a difference cannot be made up in place (another
    topic, another Kafka cluster, another key), ServiceError where Pinot refuses.
    """
    for spec in specs:
        found = client.table(spec.name)
        if found is None:
            client.put_schema(spec.schema)
            client.add_table(spec.config)
            tell(f"made table {spec.name} over topic {spec.topic}")
        else:
            _refuse(spec, found)
            _update_schema(client, spec, tell)
            _update_config(client, spec, found, tell)
    for spec in specs:
        _await(lambda name=spec.name: client.query(f"select count(*) from {name}"), spec.name)  # type: ignore[misc]


def _refuse(spec: TableSpec, found: dict[str, Any]) -> None:
    """Raise where the table's rows would mean something else after the change."""
    old, new = found["tableIndexConfig"]["streamConfigs"], spec.config["tableIndexConfig"]["streamConfigs"]
    topic = "stream.kafka.topic.name"
    if old.get(topic) != new[topic]:
        raise ServiceUsageError(f"table {spec.name} reads topic {old.get(topic)}, not {new[topic]}", hint=_FRESH)
    was, now = (config.get("metadata", {}).get("customConfigs", {}).get("kafka.cluster") for config in (found, spec.config))
    if was and now and was != now:
        raise ServiceUsageError(f"table {spec.name} was read from another Kafka cluster ({was}, not {now})", hint=_FRESH)
    for part in ("upsertConfig", "segmentsConfig"):
        if not _holds(found.get(part), spec.config[part]):
            raise ServiceUsageError(f"table {spec.name} has another {part}", hint=_FRESH)


def _update_schema(client: PinotClient, spec: TableSpec, tell: Callable[[str], None]) -> None:
    """Add the columns that are missing. One that is there and no longer wanted is kept: Pinot does not take columns away."""
    found = client.schema(spec.name) or {}
    merged, added = dict(found), []
    for part in ("dimensionFieldSpecs", "metricFieldSpecs", "dateTimeFieldSpecs"):
        there = {column["name"]: column for column in found.get(part, [])}
        for column in spec.schema[part]:
            known = there.get(column["name"])
            if known is not None and known.get("dataType") != column["dataType"]:
                raise ServiceUsageError(f"column {column['name']} of table {spec.name} is {known.get('dataType')}", hint=_FRESH)
        fresh = [column for column in spec.schema[part] if column["name"] not in there]
        merged[part] = [*found.get(part, []), *fresh]
        added += [column["name"] for column in fresh]
    if added:
        client.put_schema(merged)
        client.reload(spec.name)
        tell(f"added columns to {spec.name}: {', '.join(added)}. Rows that were read before have 0 there: {_FRESH}")


def _update_config(client: PinotClient, spec: TableSpec, found: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Replace a configuration that differs. What is being consumed is committed, for a consumer keeps the settings of its start."""
    index = spec.config["tableIndexConfig"]
    old = found["tableIndexConfig"]["streamConfigs"]
    new = index["streamConfigs"] | {name: old[name] for name in spec.defaults if name in old}
    wanted = spec.config | {"tableIndexConfig": index | {"streamConfigs": new}}
    if old == new and _holds(found | {"tableName": spec.name}, wanted):
        return
    client.put_table(wanted)
    if old != new:
        client.pause(spec.name)
        _await(lambda: _stopped(client, spec.name), spec.name)
        client.resume(spec.name)
    else:
        client.reload(spec.name)
    tell(f"changed the configuration of table {spec.name}")


def _stopped(client: PinotClient, table: str) -> None:
    consuming = client.consuming_segments(table)
    if consuming:
        raise ServiceError(f"{consuming[0]} is still being consumed")


def _holds(found: Any, wanted: Any) -> bool:
    """Whether all that is wanted stands in what was found; Pinot adds its defaults to a configuration."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(key in found and _holds(found[key], value) for key, value in wanted.items())
    return bool(found == wanted)


def _await(ask: Callable[[], object], table: str) -> None:
    """Ask until there is no ServiceError. Raises the last one, with the table's name, after a minute."""
    end = time.monotonic() + _TABLE_SECONDS
    while True:
        try:
            ask()
        except ServiceError as error:
            if time.monotonic() > end:
                raise ServiceError(f"table {table} is not ready: {error.message}", hint=error.hint) from None
            time.sleep(0.5)
        else:
            return
