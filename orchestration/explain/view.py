"""The marts' build and the Delta tables at the versions that it names, read with DuckDB."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import duckdb

from orchestration.explain.node import Node
from orchestration.marts import query_marts
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.failure import one_line
from spark_jobs.lake.duck import literal
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.roots import require_local
from spark_jobs.lake.tables import (
    ATTRIBUTED_ORDERS,
    BATCH_LEDGER,
    MINUTE_METRICS,
    RAW_EVENTS,
    RESTATEMENTS,
    RULE_SETS,
    TRAFFIC_REVIEWS,
    Table,
)

MEASURES = ("impressions", "clicks", "spend_nanos", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos")
GROUP_OF_MART = {"fct_campaign_day": "near_real_time", "fct_billing_ledger": "near_real_time", "fct_attribution_credits": "hourly"}

KAFKA = "kafka/"
"""What the source_file of a record of a topic begins with; its source_line is the offset."""

_HASH_SHOWN = 12
_LONG_LISTS = ("crawler_patterns", "users", "networks")


@dataclass(frozen=True)
class Build:
    """A build of the group of marts that a mart belongs to. ``versions``: Delta table -> version."""

    build_id: str
    built_at: datetime
    git_revision: str | None
    versions: dict[str, int]

    def node(self) -> Node:
        """What there is to say of it."""
        facts = {"id": self.build_id, "at": self.built_at, "git_revision": self.git_revision, "delta_versions": self.versions}
        return Node("mart build", facts)


@dataclass
class BuildView:
    """Reads the marts, and Delta tables as a build saw them. Times are UTC without a zone."""

    lake: Lake
    build: Build
    connection: duckdb.DuckDBPyConnection

    def marts(self, sql: str) -> list[dict[str, Any]]:
        """Rows of the published marts."""
        return mart_rows(self.lake.settings, sql)

    def version(self, table: Table) -> int | None:
        """The version that the build read; the newest of a table that it did not read; None: there is no table."""
        pinned = self.build.versions.get(table.name)
        return self.lake.version(table) if pinned is None else pinned

    def scan(self, table: Table, version: int | None = None) -> str:
        """SQL of the table at the version that the build read, or at another."""
        wanted = self.version(table) if version is None else version
        if wanted is None:
            raise AdtallyError(f"there is no table {table.name}", hint="run `adtally ingest` first")
        return self.lake.scan(table, wanted)

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[dict[str, Any]]:
        """Rows of a statement over the Delta tables. Raises AdtallyError if a version is no longer there."""
        try:
            cursor = self.connection.execute(sql, list(parameters))
            names = [str(column[0]) for column in cursor.description or []]
            return [dict(zip(names, map(_naive, row), strict=True)) for row in cursor.fetchall()]
        except duckdb.Error as error:
            raise AdtallyError(
                f"the versions that build {self.build.build_id} names cannot be read: {one_line(error)}",
                hint="build the marts again with `adtally marts build`",
            ) from error

    def messages(self, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str]:
        """What Kafka's records at (kafka/<cluster>/<topic>/<partition>, offset) hold, as table raw_events has it; text, or hex."""
        wanted = [(name.split("/")[1:], offset) for name, offset in places if name.startswith(KAFKA)]
        if not wanted or self.version(RAW_EVENTS) is None:
            return {}
        tests = " or ".join(
            f"(cluster = {literal(cluster)} and source_topic = {literal(topic)} and source_partition = {int(partition)} "
            f"and source_offset = {offset})"
            for (cluster, topic, partition), offset in wanted
        )
        rows = self.rows(
            f"""
            select '{KAFKA}' || cluster || '/' || source_topic || '/' || source_partition as name, source_offset, value
            from {self.scan(RAW_EVENTS)} where {tests}
            """
        )
        return {(row["name"], row["source_offset"]): _text_of(row["value"]) for row in rows if row["value"] is not None}

    def rule_set(self, name: str) -> Node:
        """A rule set: its hash and what it says, in short."""
        found = self.rows(f"select kind, content from {self.scan(RULE_SETS)} where rule_set = ? limit 1", [name])
        if not found:
            return Node(f"rule set {name[:_HASH_SHOWN]}", {"rule_set": name}, problems=["table rule_sets does not have it"])
        facts = {"rule_set": name, "kind": found[0]["kind"], "says": _summary(json.loads(found[0]["content"]))}
        return Node(f"rule set {name[:_HASH_SHOWN]}", facts)


@contextmanager
def open_build(settings: Settings, mart: str) -> Iterator[BuildView]:
    """Open the tables as the published build of ``mart`` saw them.

    Raises AdtallyError if there is no build, UsageError for a lakehouse that is not a local path.
    """
    require_local(settings, "explain")
    group = GROUP_OF_MART[mart]
    names = "build_id, built_at, git_revision, table_name, delta_version"
    rows = mart_rows(settings, f"select {names} from mart_build where mart_group = '{group}' order by table_name")
    if not rows:
        raise AdtallyError(f"the published marts do not say what {mart} was built from", hint="run `adtally marts build`")
    versions = {str(row["table_name"]): int(row["delta_version"]) for row in rows}
    build = Build(rows[0]["build_id"], rows[0]["built_at"], rows[0]["git_revision"], versions)
    lake = Lake(settings)
    with lake.database() as connection:
        yield BuildView(lake, build, connection)


def mart_rows(settings: Settings, sql: str) -> list[dict[str, Any]]:
    """Rows of the published marts, by column. Raises AdtallyError where there are none, or they lack the mart."""
    try:
        names, rows = query_marts(settings, sql)
    except UsageError as error:  # the statements are ours: what is wrong is the file
        raise AdtallyError(f"the published marts are of an older adtally: {error}", hint="run `adtally marts build`") from None
    return [dict(zip(names, row, strict=True)) for row in rows]


def sums(rows: Sequence[dict[str, Any]], names: Sequence[str] = MEASURES) -> dict[str, int]:
    """The totals of these measures."""
    return {name: sum(int(row[name] or 0) for row in rows) for name in names}


def increments(
    view: BuildView, day: date, campaign: str, store: str, currency: str, *, metrics: int | None = None, ledger: int | None = None
) -> list[dict[str, Any]]:
    """Per batch and correction run what the increments of completed batches come to, as the marts count them."""
    totals = ", ".join(f"sum(coalesce({name}, 0))::hugeint as {name}" for name in MEASURES)
    return view.rows(
        f"""
        select _query_id, _batch_id, _run_id, count(*)::bigint as increments, min(event_minute) as first_minute,
            max(event_minute) as last_minute, {totals}
        from {view.scan(MINUTE_METRICS, metrics)}
        semi join (select distinct _query_id, _batch_id from {view.scan(BATCH_LEDGER, ledger)}) using (_query_id, _batch_id)
        where event_date = ? and event_minute::date = ? and campaign_id = ? and store_id = ? and currency = ?
        group by all order by _query_id, _batch_id, _run_id nulls first
        """,
        [day, day, campaign, store, currency],
    )


def corrections(view: BuildView, runs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run id -> kind, reason and causes as `restatements` has them, at its newest: it is written last of a correction."""
    if not runs:
        return {}
    newest = view.lake.version(RESTATEMENTS)
    found = view.rows(
        f"""
        select run_id, list(distinct kind order by kind) as kinds, list(distinct reason order by reason) as reasons,
            list(distinct cause order by cause) as causes, max(restated_at) as restated_at
        from {view.scan(RESTATEMENTS, newest)} where run_id in (select unnest(?)) group by run_id
        """,
        [list(runs)],
    )
    return {row["run_id"]: row for row in found}


def reviews_of(view: BuildView, day: date) -> list[dict[str, Any]]:
    """The reviews of a day's hours that the build can have seen: per run how many hours, events, invalid and changed marks."""
    if view.version(TRAFFIC_REVIEWS) is None:
        return []
    return view.rows(
        f"""
        select run_id, rule_set, count(*)::bigint as hours, sum(events)::bigint as events, sum(invalid)::bigint as invalid,
            sum(changed)::bigint as changed, max(reviewed_at) as reviewed_at
        from {view.scan(TRAFFIC_REVIEWS)}
        where event_hour::date = ? and reviewed_at <= ?::timestamptz group by all order by reviewed_at, run_id
        """,
        [day, view.build.built_at],
    )


def revisions_of(view: BuildView, order: str) -> list[dict[str, Any]]:
    """An order's revisions as the build saw them, one row a revision, the oldest first."""
    return view.rows(
        f"""
        select revision, any_value(status) as status, any_value(reason) as reason, any_value(rule_set) as rule_set,
            any_value(_run_id) as run_id, any_value(attributed_at) as attributed_at, any_value(order_time) as order_time,
            any_value(user_id) as user_id, any_value(store_id) as store_id, any_value(currency) as currency,
            any_value(total_micros) as total_micros, count(touch_event_id)::bigint as touches
        from {view.scan(ATTRIBUTED_ORDERS)} where order_id = ? group by revision order by revision
        """,
        [order],
    )


def _text_of(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def _naive(value: Any) -> Any:
    return value.replace(tzinfo=None) if isinstance(value, datetime) else value


def _summary(content: dict[str, Any]) -> dict[str, Any]:
    """A rule set's entries with lists given by their length."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value.get("mode") == "off":
            found[name] = "off"
        elif isinstance(value, dict):
            found[name] = " ".join(_entry(key, item) for key, item in value.items())
        elif isinstance(value, list) and name in _LONG_LISTS:
            found[name] = f"{len(value):,} entries"
        else:
            found[name] = value
    return found


def _entry(key: str, value: Any) -> str:
    return str(value) if key == "mode" else f"{key}={value}"
