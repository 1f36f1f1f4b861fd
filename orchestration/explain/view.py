"""Reads the published marts, and with DuckDB the Delta tables at the versions that their build names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import duckdb

from orchestration.explain.node import Node
from orchestration.marts import query_marts
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.failure import one_line
from spark_jobs.lake.duck import literal
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import (
    ATTRIBUTED_ORDERS,
    BATCH_LEDGER,
    MINUTE_METRICS,
    RAW_EVENTS,
    RAW_RETIREMENTS,
    RESTATEMENTS,
    RULE_SETS,
    Table,
)

MEASURES = ("impressions", "clicks", "spend_nanos", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos")
GROUP_OF_MART = {"fct_campaign_day": "near_real_time", "fct_billing_ledger": "near_real_time", "fct_attribution_credits": "hourly"}

KAFKA = "kafka/"
"""The prefix of the source_file of a record from a topic; its source_line is the offset."""

Row = dict[str, Any]
Group = TypeVar("Group")

_HASH_SHOWN = 12
_LONG_LISTS = ("crawler_patterns", "users", "networks")


class DayKey(NamedTuple):
    """Names a campaign's day in one store and currency: a row of `fct_campaign_day`, and several lines of the ledger."""

    event_date: date
    campaign_id: str
    store_id: str
    currency: str

    def condition(self) -> str:
        """Return the SQL condition that selects its rows in a mart."""
        names = " and ".join(f"{name} = {literal(value)}" for name, value in zip(self._fields[1:], self[1:], strict=True))
        return f"event_date = date '{self.event_date}' and {names}"


@dataclass(frozen=True)
class Build:
    """The published build of a group of marts. ``versions``: Delta table -> version."""

    build_id: str
    built_at: datetime
    git_revision: str | None
    versions: dict[str, int]

    def node(self) -> Node:
        """Return the build as a node."""
        facts = {"id": self.build_id, "at": self.built_at, "git_revision": self.git_revision, "delta_versions": self.versions}
        return Node("mart build", facts)


@dataclass
class BuildView:
    """Reads the marts, and the Delta tables at the versions of a build. Times are UTC without a zone."""

    lake: Lake
    build: Build
    connection: duckdb.DuckDBPyConnection

    def marts(self, sql: str) -> list[Row]:
        """Return the rows of a statement over the published marts."""
        return mart_rows(self.lake.settings, sql)

    def version(self, table: Table) -> int | None:
        """Return the version that the build read, the newest if it did not read the table, or None without a table."""
        pinned = self.build.versions.get(table.name)
        return self.lake.version(table) if pinned is None else pinned

    def scan(self, table: Table, version: int | None = None) -> str:
        """Return SQL that reads the table at ``version``, by default the one that the build read."""
        wanted = self.version(table) if version is None else version
        if wanted is None:
            raise AdtallyError(f"there is no table {table.name}", hint="run `adtally ingest` first")
        return self.lake.scan(table, wanted)

    def retired(self, name: str, place: int) -> str | None:
        """Say where the raw input of a landing file, or of an offset of a partition, is now; None if it was not retired."""
        for row in self._retirements.get(name, ()):
            if row["first_offset"] is None or row["first_offset"] <= place < row["end_offset"]:
                return f"archived to {row['archived_to']}" if row["archived_to"] else "dropped after its retention"
        return None

    @cached_property
    def _retirements(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        names = ("source_file", "first_offset", "end_offset", "archived_to")
        for row in self.lake.rows(RAW_RETIREMENTS, *names).to_pylist():
            found.setdefault(row["source_file"], []).append(row)
        return found

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[Row]:
        """Return the rows of a statement over the Delta tables. Raises AdtallyError if a version no longer exists."""
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
        """Return the values of Kafka's records as text or hex, by place (kafka/<cluster>/<topic>/<partition>, offset).

        They come from table raw_events; records that it lacks are left out.
        """
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
        """Return a rule set as a node: its hash and a summary of its content."""
        found = self.rows(f"select kind, content from {self.scan(RULE_SETS)} where rule_set = ? limit 1", [name])
        if not found:
            return Node(f"rule set {name[:_HASH_SHOWN]}", {"rule_set": name}, problems=["table rule_sets does not have it"])
        facts = {"rule_set": name, "kind": found[0]["kind"], "says": _summary(json.loads(found[0]["content"]))}
        return Node(f"rule set {name[:_HASH_SHOWN]}", facts)


@contextmanager
def open_build(settings: Settings, mart: str) -> Iterator[BuildView]:
    """Open the tables at the versions of the published build of ``mart``.

    Raises AdtallyError if there is no build, UsageError if the lakehouse is not in a local path.
    """
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


def mart_rows(settings: Settings, sql: str) -> list[Row]:
    """Return rows of the published marts. Raises AdtallyError if there are no marts, or they lack the mart."""
    try:
        names, rows = query_marts(settings, sql)
    except UsageError as error:  # the statement is right, so the file is wrong
        raise AdtallyError(f"the published marts are of an older adtally: {error}", hint="run `adtally marts build`") from None
    return [dict(zip(names, row, strict=True)) for row in rows]


def sums(rows: Sequence[Row], names: Sequence[str] = MEASURES) -> dict[str, int]:
    """Return the totals of these measures."""
    return {name: sum(int(row[name] or 0) for row in rows) for name in names}


def grouped(rows: Iterable[Row], group_of: Callable[[Row], Group]) -> dict[Group, list[Row]]:
    """Return the rows by group, in the order in which the groups first appear."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return groups


def increments(view: BuildView, key: DayKey, *, metrics: int | None = None, ledger: int | None = None) -> list[Row]:
    """Sum the increments of completed batches by batch and correction run, as the marts count them.

    ``metrics`` and ``ledger``: versions of minute_metrics and batch_ledger, by default those of the build.
    """
    totals = ", ".join(f"sum(coalesce({name}, 0))::hugeint as {name}" for name in MEASURES)
    return view.rows(
        f"""
        select _query_id, _batch_id, _run_id, count(*)::bigint as increments, min(event_minute) as first_minute,
            max(event_minute) as last_minute, {totals}
        from {view.scan(MINUTE_METRICS, metrics)}
        semi join (select distinct _query_id, _batch_id from {view.scan(BATCH_LEDGER, ledger)}) using (_query_id, _batch_id)
        where event_minute::date = ? and event_date = ? and campaign_id = ? and store_id = ? and currency = ?
        group by all order by _query_id, _batch_id, _run_id nulls first
        """,
        [key.event_date, *key],
    )


def corrections(view: BuildView, runs: Iterable[str | None]) -> dict[str, Row]:
    """Return run id -> kinds, reasons and causes of those runs that are corrections.

    They come from the newest version of `restatements`, because a correction writes this table last.
    """
    wanted = sorted({run for run in runs if run})
    if not wanted:
        return {}
    newest = view.lake.version(RESTATEMENTS)
    found = view.rows(
        f"""
        select run_id, list(distinct kind order by kind) as kinds, list(distinct reason order by reason) as reasons,
            list(distinct cause order by cause) as causes, max(restated_at) as restated_at
        from {view.scan(RESTATEMENTS, newest)} where run_id in (select unnest(?)) group by run_id
        """,
        [wanted],
    )
    return {row["run_id"]: row for row in found}


def revisions_of(view: BuildView, order: str) -> list[Row]:
    """Return an order's revisions at the version of the build, one row each, the oldest first."""
    names = ("status", "reason", "rule_set", "attributed_at", "order_time", "user_id", "store_id", "currency", "total_micros")
    facts = ", ".join(["any_value(_run_id) as run_id", *(f"any_value({name}) as {name}" for name in names)])
    return view.rows(
        f"""
        select revision, count(touch_event_id)::bigint as touches, {facts}
        from {view.scan(ATTRIBUTED_ORDERS)} where order_id = ? group by revision order by revision
        """,
        [order],
    )


def _text_of(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def _naive(value: object) -> object:
    return value.replace(tzinfo=None) if isinstance(value, datetime) else value


def _summary(content: dict[str, object]) -> dict[str, object]:
    """Return a rule set's entries on one line each; of long lists only the length."""
    found: dict[str, object] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value.get("mode") == "off":
            found[name] = "off"
        elif isinstance(value, dict):
            found[name] = " ".join(str(item) if key == "mode" else f"{key}={item}" for key, item in value.items())
        elif isinstance(value, list) and name in _LONG_LISTS:
            found[name] = f"{len(value):,} entries"
        else:
            found[name] = value
    return found
