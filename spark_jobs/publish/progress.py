"""How far publishing has come, as table `publications` tells it: for people, without asking a broker."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from deltalake import DeltaTable

from spark_jobs.config import Settings
from spark_jobs.ingest.kafka.config import Publish, read_kafka
from spark_jobs.lake.log import Commit, DeltaLog
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, MINUTE_METRICS, PUBLICATIONS


@dataclass(frozen=True)
class TopicStatus:
    """How far a table is published. ``versions_behind``: those with rows that are not; ``seconds_behind``: since the first of them.

    ``version`` None: nothing is published.
    """

    table: str
    topic: str
    cluster: str
    version: int | None
    table_version: int | None
    versions_behind: int
    seconds_behind: float
    total_records: int | None


def topics_of(publish: Publish) -> list[tuple[str, str]]:
    """The tables that are published, and their topics."""
    return [(MINUTE_METRICS.name, publish.metrics_topic), (ATTRIBUTED_ORDERS.name, publish.credits_topic)]


def table_id(uri: str) -> str | None:
    """A table's own id, None where there is no table: one that was deleted and made anew has another."""
    log = DeltaLog(uri)
    first = log.commit(0)
    if first is not None and first.table_id:
        return first.table_id
    return None if log.latest_version() is None else str(DeltaTable(uri).metadata().id)


def committed_ms(commit: Commit) -> int:
    """When a commit was made, in milliseconds since the epoch; 0 where it does not say."""
    return int(commit.info.get("timestamp", 0))


def told_by(cluster: str, key: str) -> str:
    """The app id of rows of `publications`: a cluster, table and topic; its transaction is the version that was published."""
    return f"publications:{cluster}/{key}"


def read_publications(settings: Settings, *, now: datetime | None = None) -> list[TopicStatus]:
    """How far behind each topic is, some seconds late; empty where nothing is to be published.

    Raises KafkaConfigurationError where kafka.toml cannot be right.
    """
    publish = read_kafka(settings).publish
    if publish is None:
        return []
    uri = settings.table_uri(PUBLICATIONS.name)
    told = DeltaTable(uri) if DeltaLog(uri).exists() else None
    found = []
    for table, topic in topics_of(publish):
        app = told_by(publish.cluster.name, f"{table_id(settings.table_uri(table))}/{topic}")
        version = None if told is None else told.transaction_version(app)
        total = None
        if version is not None:
            commit = DeltaLog(uri).find_transaction(app, version)
            total = commit.metadata.get("total_records") if commit else None
        found.append(status_of(settings, publish, table, topic, version, total, now or datetime.now(UTC)))
    return found


def status_of(
    settings: Settings, publish: Publish, table: str, topic: str, version: int | None, total: int | None, now: datetime
) -> TopicStatus:
    """What is behind ``version`` of a table. Reads the commits behind it."""
    log = DeltaLog(settings.table_uri(table))
    latest = log.latest_version()
    waiting = []
    for behind in range(0 if version is None else version + 1, 0 if latest is None else latest + 1):
        commit = log.commit(behind)
        if commit is None or commit.changes_rows:
            waiting.append(commit)
    first = next((committed_ms(commit) for commit in waiting if commit is not None), None)
    seconds = 0.0 if first is None else max(0.0, now.timestamp() - first / 1000)
    return TopicStatus(table, topic, publish.cluster.name, version, latest, len(waiting), seconds, total)
