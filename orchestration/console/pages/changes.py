"""What changed since my export: the figures of the build on an export against those of the newest build.

An export carries the id of its build (column mart_build), which begins with the build's time. The increments that came after it
are those of batches, and of correction runs, that the tables did not have at that time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb

from orchestration.console.recent import Recent
from orchestration.console.tables import Column, DataTable, Row, units_of_nanos
from orchestration.console.view import Page, View
from spark_jobs.errors import UsageError
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER, MINUTE_METRICS, RESTATEMENTS, Table

MEASURES = ("impressions", "clicks", "spend_nanos")
MOST_ROWS = 10_000
_BUILD_ID = re.compile(r"(\d{8}T\d{6})Z-[0-9a-f]{8}")
_MOST_COMMITS = 5_000  # of a log that is read back; a build before that is found by the times in the rows
_KEPT = 16
_SUMS = ", ".join(f"coalesce(sum({name}), 0)::hugeint as {name}" for name in MEASURES)
_AS_INGESTED = "new batches"


@dataclass(frozen=True)
class Changes:
    """What changed since a build. ``rows``: day, campaign, currency and cause; ``totals``: by currency, of all rows.

    ``how`` says what the build is known by; ``count`` is the number of rows before they were cut after MOST_ROWS.
    """

    build_id: str
    since: datetime
    how: str
    rows: list[Row]
    totals: list[Row]
    count: int


def since_of(build_id: str) -> datetime:
    """The end of the second in which a build began, UTC without a zone. Raises UsageError for what is no build id."""
    found = _BUILD_ID.fullmatch(build_id)
    try:
        if found is None:
            raise ValueError
        return datetime.strptime(found[1], "%Y%m%dT%H%M%S") + timedelta(seconds=1)
    except ValueError:
        raise UsageError(
            f"{build_id!r} is not the id of a mart build",
            hint="column mart_build of an export has it, as 20261129T145821Z-a19f527b",
        ) from None


# --- which increments came after the build


def _versions_then(view: View, lake: Lake, build_id: str, since: datetime) -> tuple[Mapping[str, int], str]:
    """The versions of the ledger and of the restatements that a build read, where they can be known, and how."""
    rows = view.rows("select table_name, delta_version from mart_build where build_id = $build", build=build_id)
    if rows:
        return {row["table_name"]: row["delta_version"] for row in rows}, "the versions that mart_build lists for it"
    found = {table.name: _version_at(view, lake, table, since) for table in (BATCH_LEDGER, RESTATEMENTS)}
    known = {name: version for name, version in found.items() if version is not None}
    return known, "the commits of the tables up to its time"


def _version_at(view: View, lake: Lake, table: Table, since: datetime) -> int | None:
    """The version of a table at a time, by the times of its commits; -1 before the first; None if the log does not say."""
    start = view.marts.versions.get(table.name)
    until = since.replace(tzinfo=UTC).timestamp() * 1000
    for count, commit in enumerate(lake.log(table).commits_backwards(start)):
        time = commit.info.get("timestamp")
        if not isinstance(time, int) or count >= _MOST_COMMITS:
            return None
        if time < until:
            return commit.version
        if commit.version == 0:
            return -1
    return None


@dataclass(frozen=True)
class _Known:
    """How to find the ids that a table had then: by its version if that is known, else by a time in its rows.

    ``pinned`` is its version in the build that is open.
    """

    table: Table
    columns: str
    time: str
    version: int | None
    pinned: int | None

    def keep(self, lake: Lake, connection: duckdb.DuckDBPyConnection, name: str, since: datetime) -> None:
        """Write the ids into a table. If the version was vacuumed, choose the rows by the time in them."""
        now = lake.scan(self.table, self.pinned)
        if self.version == -1:
            connection.execute(f"create temp table {name} as select {self.columns} from {now} limit 0")
            return
        if self.version is not None and lake.is_readable(self.table, self.version):
            then = lake.scan(self.table, self.version)
            with suppress(duckdb.Error):
                connection.execute(f"create temp table {name} as select distinct {self.columns} from {then}")
                return
        connection.execute(
            f"create temp table {name} as select {self.columns} from {now} group by all having min({self.time})::timestamp < ?",
            [since],
        )


def find_changes(view: View, build_id: str) -> Changes:
    """Compare the build that is open with an earlier one. Raises UsageError for an id that is wrong or not earlier."""
    since = since_of(build_id)
    built_at = view.marts.built_at
    if build_id != view.marts.build_id and built_at is not None and since > built_at + timedelta(seconds=1):
        raise UsageError(
            f"build {build_id} is newer than {view.marts.build_id}, the newest that is published here",
            hint="the export comes of another home, or the id has a wrong time",
        )
    lake = Lake(view.settings)
    versions, how = _versions_then(view, lake, build_id, since)
    pinned = {table.name: view.marts.versions.get(table.name) for table in (MINUTE_METRICS, BATCH_LEDGER, RESTATEMENTS)}
    ledger, runs = BATCH_LEDGER.name, RESTATEMENTS.name
    batches_then = _Known(BATCH_LEDGER, "_query_id, _batch_id", "ingested_at", versions.get(ledger), pinned[ledger])
    runs_then = _Known(RESTATEMENTS, "run_id", "restated_at", versions.get(runs), pinned[runs])
    filters = {name: getattr(view.filters, name) for name in ("campaign", "currency", "advertiser", "first", "last")}
    with lake.database() as connection:
        batches_then.keep(lake, connection, "batches_then", since)
        runs_then.keep(lake, connection, "runs_then", since)
        statement = _statement(view, lake, pinned)
        cursor = connection.execute(statement, {name: value for name, value in filters.items() if f"${name}" in statement} or None)
        names = [str(column[0]) for column in cursor.description or []]
        found = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    return Changes(build_id, since, how, _with_money(found[:MOST_ROWS]), _totals(view, found), len(found))


def _statement(view: View, lake: Lake, pinned: Mapping[str, int | None]) -> str:
    """SQL that sums the increments that came since, by day, campaign, currency and cause, the newest day first."""
    tests = view.where(advertiser="store_id", campaign="campaign_id", currency="currency")
    if view.filters.first:
        tests += " and event_date between $first and $last"
    metrics, ledger = lake.scan(MINUTE_METRICS, pinned[MINUTE_METRICS.name]), lake.scan(BATCH_LEDGER, pinned[BATCH_LEDGER.name])
    restatements = lake.scan(RESTATEMENTS, pinned[RESTATEMENTS.name])
    return f"""
        with reasons as (
            select run_id, string_agg(distinct kind || ': ' || cause, ', ' order by kind || ': ' || cause) as reason
            from {restatements} group by run_id
        ),
        since as (
            select event_date, campaign_id, currency, _run_id, {", ".join(f"coalesce({name}, 0) as {name}" for name in MEASURES)}
            from {metrics}
            semi join (select distinct _query_id, _batch_id from {ledger}) using (_query_id, _batch_id)
            where {tests} and (
                (_query_id, _batch_id) not in (select (_query_id, _batch_id) from batches_then)
                or (_run_id is not null and _run_id not in (select run_id from runs_then where run_id is not null))
            )
        )
        select event_date, campaign_id, currency,
            case when _run_id is null then '{_AS_INGESTED}' else coalesce(reason, 'correction') end as cause, {_SUMS}
        from since left join reasons on run_id = _run_id
        group by all
        having sum(impressions) <> 0 or sum(clicks) <> 0 or sum(spend_nanos) <> 0
        order by event_date desc, currency, abs(sum(spend_nanos)) desc, campaign_id, cause
    """


def _with_money(rows: list[Row]) -> list[Row]:
    for row in rows:
        row["spend"] = units_of_nanos(row["spend_nanos"], row["currency"])
    return rows


def _totals(view: View, found: list[Row]) -> list[Row]:
    """By currency the change, the figure now, and so the figure then."""
    tests = view.where(advertiser="store_id", campaign="campaign_id", currency="currency")
    if view.filters.first:
        tests += " and event_date between $first and $last"
    now = view.rows(f"select currency, {_SUMS} from fct_campaign_day where {tests} group by currency order by currency")
    for row in now:
        mine = [each for each in found if each["currency"] == row["currency"]]
        for name in MEASURES:
            row[f"{name}_change"] = sum(int(each[name]) for each in mine)
            row[f"{name}_then"] = row[name] - row[f"{name}_change"]
        for name in ("spend_nanos", "spend_nanos_change", "spend_nanos_then"):
            row[name.replace("_nanos", "")] = units_of_nanos(row[name], row["currency"])
    return now


_FOUND = Recent[Changes](_KEPT)
"""A page and its export ask for the same."""


def _found(view: View) -> Changes:
    """The changes since the build that the address names."""
    build_id = _asked(view)
    key = (view.settings.marts_path, view.marts.signature, build_id, view.filters)
    return _FOUND.get(key, lambda: find_changes(view, build_id))


def _asked(view: View) -> str:
    """The build that the address names; of several, as an export of two groups of marts has them, the last."""
    return (view.arguments.get("build", "").split() or [""])[-1]


def build(view: View) -> dict[str, Any]:
    """The page: a form where no build is named."""
    found = _found(view) if _asked(view) else None
    return {"asked": _asked(view), "changes": found, "most_rows": MOST_ROWS}


def changes(view: View) -> DataTable:
    """What changed, by day, campaign, currency and cause, the newest day first."""
    rows = _found(view).rows if _asked(view) else []
    shown = view.add_names([dict(row) for row in rows])
    return DataTable(
        "differences",
        "What changed, by day, campaign and cause",
        (
            Column("event_date", "day", "date", unit="UTC"),
            Column("campaign", "campaign", link=lambda row: view.campaign_url(row["campaign_id"]), below="campaign_id"),
            Column("campaign_id", "id", "id", is_shown=False),
            Column("currency", "currency"),
            Column("cause", "cause"),
            Column("impressions", "impressions", "change"),
            Column("clicks", "clicks", "change"),
            Column("spend", "net spend", "money", why=lambda row: _why(view, row)),
        ),
        shown,
        empty="Nothing changed: the export has the figures of the newest build.",
    )


def _why(view: View, row: Row) -> str:
    day = row["event_date"]
    return view.url("/why/day", campaign=row["campaign_id"], currency=row["currency"], first=day, last=day, sort="", rows="")


PAGE = Page("changes", "/changes", "What changed since my export", build, {"differences": changes}, shows=(), in_menu=False)
