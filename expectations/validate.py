"""Validates an hour of a table, and the published marts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import duckdb
from great_expectations.core import ExpectationSuiteValidationResult, ExpectationValidationResult
from great_expectations.expectations.expectation import Expectation

from expectations.docs import DataDocs, Entry
from expectations.engine import DuckDBValidator, unexpected_query
from expectations.errors import UnknownTableError, UnreadableTableError
from expectations.lake import Related, connect_marts, delta_scan, hour_literals, one_line, quoted, records
from expectations.results import CheckOutcome, HourValidation, Severity
from expectations.suites import MARTS, SUITES, Suite
from expectations.suites.suite import SEVERITIES, name_of, needs
from expectations.trailing import MIN_HOURS, TrailingWeek

DEFAULT_RUN = "by hand"
EXAMPLES = 5
_CHECKED_FOR = "1 day"  # the published marts are validated every hour


def validate_hour(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    uri: str,
    version: int | None,
    hour: datetime,
    *,
    related: Related | None = None,
    docs: Path | None = None,
    run_name: str = DEFAULT_RUN,
) -> HourValidation:
    """Validate the rows of ``hour`` (its start, with a zone) in a Delta table at ``version`` (None: the newest).

    ``connection``: a new one to a DuckDB that can ``delta_scan`` the tables, with times in UTC; gets temporary tables.
    ``related``: the tables of ``related_tables(table)`` by name; expectations that need a missing one are not judged. Pin
    `batch_ledger` before the others. ``docs``: the folder of the data docs, which also keeps the trailing week; None: no page, and
    no comparison with the week. An hour without rows is valid. Raises UnknownTableError, UnreadableTableError, DocsBusyError.
    """
    began = time.perf_counter()
    suite = _suite(table, SUITES)
    week = None if docs is None else TrailingWeek(docs / "profiles", table)
    try:
        _create_hour(connection, hour)
        _load_rows(connection, suite, delta_scan(uri, version), hour)
        _load_related(connection, suite, related or {}, hour)
        before = _before(suite, week, hour)
        given = [each for each in suite.expectations if needs(each) is None or needs(each) in (related or {})]
        with closing(DuckDBValidator(connection)) as validator:
            result = validator.validate(table, given, suite.place, before)
            if week is not None:
                _keep(week, hour, result)
            return _Outcome(suite, connection, result, began).report(hour, version, docs, run_name)
    except duckdb.Error as error:
        raise UnreadableTableError(f"{table} at version {version} cannot be checked: {one_line(error)}") from error


def validate_marts(
    path: Path,
    *,
    hour: datetime | None = None,
    marts: Iterable[str] | None = None,
    docs: Path | None = None,
    run_name: str = DEFAULT_RUN,
) -> list[HourValidation]:
    """Validate the marts of a DuckDB file, or only their rows of ``hour`` (of a mart by day: its day). ``marts``: only these.

    Of a mart that is kept by days, validates the days that builds of the last day made: closed days never change, and were
    validated when they were made. After a build of all days, these are all days.

    Another process may replace the file meanwhile. Raises UnknownTableError, UnreadableTableError, DocsBusyError.
    """
    chosen = [_suite(name, MARTS) for name in (MARTS if marts is None else marts)]
    found = []
    try:
        with connect_marts(path) as connection:
            _list_days(connection, hour)
            with closing(DuckDBValidator(connection)) as validator:
                for suite in chosen:
                    began = time.perf_counter()
                    where = _of_checked_days(connection, suite) if hour is None else suite.in_hour.format(**hour_literals(hour))
                    connection.execute(f"create temp view {suite.table} as select * from marts.main.{suite.table} where {where}")
                    result = validator.validate(suite.table, suite.expectations, suite.place, {})
                    outcome = _Outcome(suite, connection, result, began)
                    found.append(outcome.report(hour, None, docs, run_name))
    except duckdb.Error as error:
        raise UnreadableTableError(f"the marts at {path} cannot be checked: {one_line(error)}") from error
    return found


def related_tables(table: str) -> tuple[str, ...]:
    """Return the other tables that a suite reads. Raises UnknownTableError."""
    return _suite(table, SUITES).related


def _suite(name: str, among: dict[str, Suite]) -> Suite:
    if name not in among:
        raise UnknownTableError(f"there is no suite for {name!r}", hint=f"there are suites for {', '.join(among)}")
    return among[name]


def _create_hour(connection: duckdb.DuckDBPyConnection, hour: datetime) -> None:
    bounds = hour_literals(hour)
    connection.execute(
        f"create temp table this_hour as select cast({bounds['start']} as timestamptz) as starts_at, "
        f"cast({bounds['end']} as timestamptz) as ends_at"
    )


def _list_days(connection: duckdb.DuckDBPyConnection, hour: datetime | None) -> None:
    """Create the table ``checked_days`` of the marts: the days of each mart that are validated."""
    if hour is None:
        since = f"(select max(changed_at) from marts.days.kept) - interval {_CHECKED_FOR}"
        days = f"select model, day from marts.days.kept where changed_at >= {since}"
    else:
        days = f"select model, {hour_literals(hour)['date']} as day from marts.days.models"
    connection.execute(f"create temp table checked_days as {days}")


def _of_checked_days(connection: duckdb.DuckDBPyConnection, suite: Suite) -> str:
    """Return the SQL condition of a mart's rows of ``checked_days``, as literals, by which whole files are skipped."""
    kept = connection.execute(f"select day from marts.days.models where model = '{quoted(suite.table)}'").fetchall()
    if not kept:
        return "true"  # a mart without days
    found = connection.execute(f"select day from checked_days where model = '{quoted(suite.table)}'").fetchall()
    days = {day for (day,) in found}
    listed = ", ".join(f"date '{day}'" for day in sorted(days)) or "null"
    # the marts have the first date for rows without a time
    return f"({kept[0][0]} in ({listed})" + (f" or {kept[0][0]} is null)" if date.min in days else ")")


def _load_rows(connection: duckdb.DuckDBPyConnection, suite: Suite, source: str, hour: datetime) -> None:
    """Load the columns that the suite reads once, with their declared types; table ``table_columns`` has the differences."""
    described = connection.execute(f"describe select * from {source}").fetchall()
    found = {str(name): str(kind) for name, kind, *_ in described}
    parts = []
    for name in suite.read_columns:
        kind = suite.columns[name]
        if name not in found:
            parts.append(f"cast(null as {kind}) as {name}")
        else:
            parts.append(name if found[name] == kind else f"try_cast({name} as {kind}) as {name}")
    where = suite.in_hour.format(**hour_literals(hour))
    connection.execute(f"create temp table {suite.table} as select {', '.join(parts)} from {source} where {where}")
    rows = [(name, suite.columns.get(name), found.get(name)) for name in dict.fromkeys((*suite.columns, *found))]
    connection.execute('create temp table table_columns ("column" varchar, declared varchar, found varchar)')
    connection.executemany("insert into table_columns values (?, ?, ?)", rows)


def _load_related(connection: duckdb.DuckDBPyConnection, suite: Suite, related: Related, hour: datetime) -> None:
    """Load the columns of other tables that the checks read."""
    for name in suite.related:
        if name in related:
            columns, where = _RELATED[name]
            sql = f"select {columns} from {delta_scan(*related[name])} where {where}".format(**hour_literals(hour))
            connection.execute(f"create temp table {name} as {sql}")


_RELATED = {
    "campaigns": ("distinct campaign_id, currency", "true"),
    "batch_ledger": (
        "_query_id, _batch_id, source, region, accepted, invalid_traffic, spend_nanos, "
        "coalesce(event_hour = {start}, false) as in_hour",
        "stream = 'events'",
    ),
}


def _drifts(suite: Suite) -> list[str]:
    return [name.removesuffix(".drift") for name in suite.names if name.endswith(".drift")]


def _before(suite: Suite, week: TrailingWeek | None, hour: datetime) -> dict[str, Any]:
    """Return the measures of the hours before, as parameters of the expectations."""
    if week is None:
        return dict.fromkeys((*_drifts(suite), "volume"))
    return {name: week.shares(hour, name) for name in _drifts(suite)} | {"volume": week.volumes(hour)}


def _keep(week: TrailingWeek, hour: datetime, result: ExpectationSuiteValidationResult) -> None:
    """Keep the measures of this hour for the next ones."""
    measured = {
        name_of(each.expectation_config): each.result["details"]["measured"]
        for each in result.results
        if "measured" in (each.result.get("details") or {})
    }
    volume = measured.pop("table.volume")
    week.keep(hour, volume, {name.removesuffix(".drift"): shares for name, shares in measured.items()})


class _Outcome:
    """Puts the result of a validation together for the caller and for the data docs."""

    def __init__(
        self, suite: Suite, connection: duckdb.DuckDBPyConnection, result: ExpectationSuiteValidationResult, began: float
    ) -> None:
        self._suite, self._connection, self._result, self._began = suite, connection, result, began
        self._by_name = {name_of(each.expectation_config): each for each in result.results}

    def report(self, hour: datetime | None, version: int | None, docs: Path | None, run_name: str) -> HourValidation:
        """Return the validation, and add its page to the data docs."""
        table = self._suite.table
        outcomes = [self._outcome(each) for each in self._suite.expectations]
        failed = sorted((each for each in outcomes if not each.success), key=lambda each: each.severity is not Severity.ERROR)
        errors = sum(outcome.severity is Severity.ERROR for outcome in failed)
        ((rows,),) = self._connection.execute(f"select count(*) from {table}").fetchall()
        page = None
        if docs is not None:
            entry = Entry(
                page="",
                table=table,
                hour="" if hour is None else f"{hour.astimezone(UTC):%Y-%m-%dT%HZ}",
                version=version,
                run_name=run_name,
                rows=rows,
                expectations=sum(each.observed is not None for each in outcomes),
                errors=errors,
                warnings=len(failed) - errors,
                validated_at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            )
            page = DataDocs(docs).add(entry, self._result, {each.name: each.failing_rows for each in failed})
        seconds = time.perf_counter() - self._began
        return HourValidation(table, hour, version, not failed, errors > 0, outcomes, rows, seconds, page)

    def _outcome(self, expectation: Expectation) -> CheckOutcome:
        name = name_of(expectation)
        found = self._by_name.get(name)
        success = found is None or bool(found.success)
        observed = None if found is None else found.result.get("unexpected_count", found.result.get("observed_value"))
        described, needed = str(expectation.description), needs(expectation)
        why = f"less than {MIN_HOURS} comparable hours are known" if needed is None else f"{needed} was not given"
        return CheckOutcome(
            name=name,
            expectation=str(expectation.expectation_type),
            column=name.partition(".")[0],
            severity=next(ours for ours, theirs in SEVERITIES.items() if theirs == expectation.severity),
            success=success,
            observed=None if observed is None else float(observed),
            expected=described if observed is not None else f"{described} (not judged: {why})",
            failing_rows=[] if found is None or success else self._failing_rows(found),
        )

    def _failing_rows(self, found: ExpectationValidationResult) -> list[dict[str, Any]]:
        query = unexpected_query(self._suite.table, found)
        if query is None:
            return []
        rows = records(self._connection, f"select * from ({query}) order by all", EXAMPLES)
        return [{name: value for name, value in row.items() if not _is_twice(name, row)} for row in rows]


def _is_twice(name: str, row: dict[str, Any]) -> bool:
    """Return whether Great Expectations selected this column twice: as the judged column and as a part of the place."""
    twice = re.fullmatch(r"(.+?)_{1,2}1", name)
    return twice is not None and twice[1] in row
