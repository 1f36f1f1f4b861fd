"""Finds which days of the marts have changed since a build, in the Delta logs: no table is scanned.

A batch, a correction, a review, an erasure or a bill adds files to a table or removes some. Their partitions or their rows say
which days they hold. Compaction moves rows between files, which Delta marks; it changes no day.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta

import duckdb

from spark_jobs.lake.duck import literal
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import Commit
from spark_jobs.lake.mart_days import NO_DAY, date_list
from spark_jobs.lake.tables import (
    ATTRIBUTED_ORDERS,
    BATCH_LEDGER,
    BILLING_LINES,
    CAMPAIGNS,
    EVENTS,
    MINUTE_METRICS,
    RECONCILIATIONS,
    RESTATEMENTS,
    Table,
)

DAY_OF = {
    MINUTE_METRICS: "event_date",
    EVENTS: "event_date",
    BILLING_LINES: "event_date",
    BATCH_LEDGER: "cast(event_hour as date)",
    RESTATEMENTS: "cast(event_hour as date)",
    RECONCILIATIONS: "cast(event_hour as date)",
    ATTRIBUTED_ORDERS: "cast(order_time as date)",
}
"""The day of a row in each table that has days, as SQL."""

_PACING_DAYS = timedelta(days=28)  # the days after a day whose curves of spend it is in: see int_spend__curves


class UnknownChanges(Exception):
    """Nobody can say any more what has changed: all days must be built. The message says why."""


@dataclass
class Changes:
    """``days`` of events and of what corrects or bills them; ``orders``: days of orders; ``budgets_from``: the first day of which a
    campaign's budget has changed, None if none has."""

    days: set[date] = field(default_factory=set)
    orders: set[date] = field(default_factory=set)
    budgets_from: date | None = None

    def scope(self, name: str, known: Iterable[date]) -> frozenset[date]:
        """Return the days that a model of a scope builds again; `revenue` adds others. ``known``: the days that it has."""
        if name == "orders":
            return frozenset(self.orders)
        if name == "weeks":
            mondays = {monday_of(day) for day in self.days}
            return frozenset(monday + timedelta(days=number) for monday in mondays for number in range(7))
        if name == "pacing":
            later = {each for each in known if any(day < each <= day + _PACING_DAYS for day in self.days)}
            budgets = set() if self.budgets_from is None else {each for each in known if each >= self.budgets_from}
            return frozenset(self.days | later | budgets)
        return frozenset(self.days)


def monday_of(day: date) -> date:
    """Return the first day of a day's week."""
    return day - timedelta(days=day.weekday())


def find_changes(
    lake: Lake, database: duckdb.DuckDBPyConnection, tables: Iterable[Table], before: Mapping[str, int], now: Mapping[str, int]
) -> Changes:
    """Return what has changed in ``tables`` between two sets of versions, by table name.

    Raises UnknownChanges if a log or a file is gone that would say it.
    """
    found = Changes()
    for table in tables:
        if table.name not in before or before[table.name] > now[table.name]:
            raise UnknownChanges(f"the last build read another table {table.name}")
        if before[table.name] == now[table.name]:
            continue
        commits = lake.log(table).commits(before[table.name], now[table.name])
        if commits is None:
            raise UnknownChanges(f"the log of {table.name} no longer has the commits since the last build")
        changing = [commit for commit in commits if commit.changes_rows]
        try:
            if table is CAMPAIGNS:
                found.budgets_from = _budgets_from(lake, database, before[table.name], now[table.name]) if changing else None
            elif table in DAY_OF:
                days = found.orders if table is ATTRIBUTED_ORDERS else found.days
                days |= _days_of(lake, database, table, changing)
        except duckdb.Error as error:
            raise UnknownChanges(f"files of {table.name} that changed cannot be read: {str(error).splitlines()[0]}") from error
    return found


def _days_of(lake: Lake, database: duckdb.DuckDBPyConnection, table: Table, commits: Iterable[Commit]) -> set[date]:
    files = [action for commit in commits for action in (*commit.data_added, *commit.data_removed)]
    if "event_date" in table.partition_by:
        values = [(action.get("partitionValues") or {}).get("event_date") for action in files]
        if None in values:  # a removal may leave them out, and its file holds no partition column
            raise UnknownChanges(f"a commit to {table.name} does not say its partitions")
        return {date.fromisoformat(str(value)) for value in values}
    paths = sorted({action["path"] for action in files})
    if not paths:
        return set()
    sql = f"select distinct coalesce({DAY_OF[table]}, date '{NO_DAY}') from {lake.scan_files(table, paths)}"
    return {day for (day,) in database.execute(sql).fetchall()}


def _budgets_from(lake: Lake, database: duckdb.DuckDBPyConnection, before: int, now: int) -> date | None:
    """Return the first day on which a campaign's budget differs between two versions. A range that only ends elsewhere differs from
    the earlier of its two ends on."""
    columns = "campaign_id, currency, valid_from, daily_budget_micros, valid_to"
    old, new = (f"(select {columns} from {lake.scan(CAMPAIGNS, version)})" for version in (before, now))
    day: date | None
    [(day,)] = database.execute(
        f"""
        with different as (
            select * from (from {old} except all from {new}) union all select * from (from {new} except all from {old})
        ), grouped as (
            select case
                when count(*) = 2 and count(distinct coalesce(daily_budget_micros, -1)) = 1 then min(valid_to) else min(valid_from)
            end as start
            from different group by campaign_id, currency, valid_from
        )
        select cast(min(start) as date) from grouped
        """
    ).fetchall()
    return day


def restriction(table: Table, days: frozenset[date] | None) -> str:
    """Return the SQL condition that chooses the rows of some days (None: all) of a table."""
    if days is None or table not in DAY_OF:
        return "true"
    if not days:
        return "false"
    day, dated = DAY_OF[table], days - {NO_DAY}
    listed = date_list(dated) or "null"
    if day == "event_date":
        return f"event_date in ({listed})"
    time = day.removeprefix("cast(").removesuffix(" as date)")
    within = "false"
    if dated:  # a range, by which whole files and row groups can be skipped
        within = (
            f"{time} >= timestamptz {literal(f'{min(dated)} 00:00:00+00')} "
            f"and {time} < timestamptz {literal(f'{max(dated) + timedelta(days=1)} 00:00:00+00')} and {day} in ({listed})"
        )
    return f"({within} or {time} is null)" if NO_DAY in days else within
