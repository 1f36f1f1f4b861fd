"""Creates Pinot's tables and updates those that differ. It can run any number of times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
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
    """Return ``source`` with the id of its cluster. Raises ServiceError if it does not answer or lacks a topic."""
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
    """Make the missing tables and change those that differ. Returns when every table answers a query.

    Raises ServiceUsageError if a table cannot be changed in place (another topic, another Kafka cluster, another key),
    ServiceError if Pinot refuses.
    """
    for spec in specs:
        found = client.table(spec.name)
        if found is None:
            client.put_schema(spec.schema)
            client.add_table(spec.config)
            tell(f"made table {spec.name} over topic {spec.topic}")
        else:
            _check_meaning(spec, found)
            _update_schema(client, spec, tell)
            _update_config(client, spec, found, tell)
    for spec in specs:
        _await(partial(client.query, f"select count(*) from {spec.name}"), spec.name)


def _check_meaning(spec: TableSpec, found: dict[str, Any]) -> None:
    """Raise ServiceUsageError if the table's rows would mean something else after the change."""
    old, new = found["tableIndexConfig"]["streamConfigs"], spec.config["tableIndexConfig"]["streamConfigs"]
    topic = "stream.kafka.topic.name"
    if old.get(topic) != new[topic]:
        raise ServiceUsageError(f"table {spec.name} reads topic {old.get(topic)}, not {new[topic]}", hint=_FRESH)
    was, now = (config.get("metadata", {}).get("customConfigs", {}).get("kafka.cluster") for config in (found, spec.config))
    if was and now and was != now:
        raise ServiceUsageError(f"table {spec.name} was read from another Kafka cluster ({was}, not {now})", hint=_FRESH)
    for part in ("upsertConfig", "segmentsConfig"):
        if not _contains(found.get(part), spec.config[part]):
            raise ServiceUsageError(f"table {spec.name} has another {part}", hint=_FRESH)


def _update_schema(client: PinotClient, spec: TableSpec, tell: Callable[[str], None]) -> None:
    """Add the missing columns. Keep columns that are no longer wanted: Pinot cannot remove columns."""
    found = client.schema(spec.name) or {}
    merged, added = dict(found), []
    for part in ("dimensionFieldSpecs", "metricFieldSpecs", "dateTimeFieldSpecs"):
        merged[part] = list(found.get(part, []))
        kinds = {column["name"]: column.get("dataType") for column in merged[part]}
        for column in spec.schema[part]:
            name = column["name"]
            if name not in kinds:
                merged[part].append(column)
                added.append(name)
            elif kinds[name] != column["dataType"]:
                raise ServiceUsageError(f"column {name} of table {spec.name} is {kinds[name]}", hint=_FRESH)
    if added:
        client.put_schema(merged)
        client.reload(spec.name)
        tell(f"added columns to {spec.name}: {', '.join(added)}. Rows that were read before have 0 there: {_FRESH}")


def _update_config(client: PinotClient, spec: TableSpec, found: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Replace a configuration that differs. Pause and resume, because a running consumer keeps its old stream settings."""
    index = spec.config["tableIndexConfig"]
    old = found["tableIndexConfig"]["streamConfigs"]
    new = index["streamConfigs"] | {name: old[name] for name in spec.defaults if name in old}
    wanted = spec.config | {"tableIndexConfig": index | {"streamConfigs": new}}
    if old == new and _contains(found | {"tableName": spec.name}, wanted):
        return
    client.put_table(wanted)
    if old != new:
        client.pause(spec.name)
        _await(partial(_check_stopped, client, spec.name), spec.name)
        client.resume(spec.name)
    else:
        client.reload(spec.name)
    tell(f"changed the configuration of table {spec.name}")


def _check_stopped(client: PinotClient, table: str) -> None:
    consuming = client.consuming_segments(table)
    if consuming:
        raise ServiceError(f"{consuming[0]} is still being consumed")


def _contains(found: object, wanted: object) -> bool:
    """Return whether ``found`` has everything in ``wanted``. It may have more: Pinot adds defaults to a configuration."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(key in found and _contains(found[key], value) for key, value in wanted.items())
    return found == wanted


def _await(ask: Callable[[], object], table: str) -> None:
    """Call ``ask`` until it raises no ServiceError. After a minute raise the last error, with the table's name."""
    end = time.monotonic() + _TABLE_SECONDS
    while True:
        try:
            ask()
            return
        except ServiceError as error:
            if time.monotonic() > end:
                raise ServiceError(f"table {table} is not ready: {error.message}", hint=error.hint) from None
            time.sleep(0.5)
