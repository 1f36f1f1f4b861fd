"""Reads the published position of each topic from table `publications`, without asking a broker."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from spark_jobs.config import Settings
from spark_jobs.ingest.kafka.config import Publish, read_kafka
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, MINUTE_METRICS, PUBLICATIONS, Table


@dataclass(frozen=True)
class TopicStatus:
    """The published position of a table. ``version`` None: nothing is published.

    ``versions_behind``: unpublished versions with rows; ``seconds_behind``: seconds since the commit of the first of them.
    """

    table: str
    topic: str
    cluster: str
    version: int | None
    table_version: int | None
    versions_behind: int
    seconds_behind: float
    total_records: int | None


def topics_of(publish: Publish) -> list[tuple[Table, str]]:
    """Return the published tables and their topics."""
    return [(MINUTE_METRICS, publish.metrics_topic), (ATTRIBUTED_ORDERS, publish.credits_topic)]


def publications_app_id(cluster: str, key: str) -> str:
    """Return the app id of a table and topic's rows in `publications`; its transaction is the published version."""
    return f"publications:{cluster}/{key}"


def read_publications(settings: Settings, *, now: datetime | None = None) -> list[TopicStatus]:
    """Return the position of each topic, some seconds late; empty without [publish]. Raises KafkaConfigurationError."""
    publish = read_kafka(settings).publish
    if publish is None:
        return []
    lake = Lake(settings)
    found = []
    for table, topic in topics_of(publish):
        app = publications_app_id(publish.cluster.name, f"{lake.table_id(table)}/{topic}")
        version = lake.last_transaction(PUBLICATIONS, app)
        total = None
        if version is not None:
            commit = lake.log(PUBLICATIONS).find_transaction(app, version)
            total = commit.metadata.get("total_records") if commit else None
        found.append(status_of(lake, publish, table, topic, version, total, now or datetime.now(UTC)))
    return found


def status_of(
    lake: Lake, publish: Publish, table: Table, topic: str, version: int | None, total: int | None, now: datetime
) -> TopicStatus:
    """Return the position of a topic that has the table up to ``version``. Reads the commits after it."""
    log = lake.log(table)
    latest = log.latest_version()
    later = range(0 if version is None else version + 1, 0 if latest is None else latest + 1)
    waiting = [commit for commit in map(log.commit, later) if commit is None or commit.changes_rows]
    first = next((commit.committed_ms for commit in waiting if commit is not None), None)
    seconds = 0.0 if first is None else max(0.0, now.timestamp() - first / 1000)
    return TopicStatus(table.name, topic, publish.cluster.name, version, latest, len(waiting), seconds, total)
