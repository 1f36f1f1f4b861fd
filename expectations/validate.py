"""Validating: an hour of a table, and the published marts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from expectations.checks import Check, Kind, Severity, Suite
from expectations.docs import DataDocs, Entry
from expectations.errors import UnknownTableError, UnreadableTableError
from expectations.lake import Related, connect, connect_marts, delta_scan, hour_literals, one_line
from expectations.profile import Profile, Profiler
from expectations.results import CheckOutcome, HourValidation
from expectations.suites import MARTS, SUITES
from expectations.trailing import MIN_HOURS, TrailingWeek

DEFAULT_RUN = "by hand"


def validate_hour(
    table: str,
    uri: str,
    version: int | None,
    hour: datetime,
    *,
    related: Related | None = None,
    docs: Path | None = None,
    run_name: str = DEFAULT_RUN,
) -> HourValidation:
    """Judge the rows of ``hour`` (its beginning, with a zone) in a Delta table at ``version`` (None: the newest).

    ``related``: the other tables by name, as ``related_tables(table)`` lists them; what needs one that is missing is not judged.
    Pin `batch_ledger` before the others, as the marts do. ``docs``: the folder of the data docs, which also keeps what the trailing
    week is told by; None: no page, and nothing is compared with a week. An hour without rows is valid.

    Raises UnknownTableError, UnreadableTableError, and DocsBusyError.
    """
    began = time.perf_counter()
    suite = _suite(table, SUITES)
    connection = connect()
    try:
        held = _load_related(connection, suite, related or {}, hour)
        profiler = Profiler(connection, suite, delta_scan(uri, version), hour, related=held)
        profiler.group()
        profile = profiler.measure()
        if docs is not None:
            _compare(profile, suite, TrailingWeek(docs / "profiles", table), hour)
        return _judged(suite, profiler, profile, hour, version, began, docs, run_name)
    except duckdb.Error as error:
        raise UnreadableTableError(f"{table} at version {version} cannot be checked: {one_line(error)}") from error
    finally:
        connection.close()


def validate_marts(
    path: Path,
    *,
    hour: datetime | None = None,
    marts: Iterable[str] | None = None,
    docs: Path | None = None,
    run_name: str = DEFAULT_RUN,
) -> list[HourValidation]:
    """Judge the marts of a DuckDB file, or of them what belongs to ``hour`` (a mart by days: its day). ``marts``: only these.

    The file is opened anew and read-only, so it may be replaced meanwhile.

    Raises UnknownTableError, UnreadableTableError, and DocsBusyError.
    """
    chosen = [_suite(name, MARTS) for name in (MARTS if marts is None else marts)]
    try:
        with connect_marts(path) as connection:
            return [_validate_mart(connection, suite, hour, docs, run_name) for suite in chosen]
    except duckdb.Error as error:
        raise UnreadableTableError(f"the marts at {path} cannot be checked: {one_line(error)}") from error


def related_tables(table: str) -> tuple[str, ...]:
    """The tables that a suite compares its own with. Raises UnknownTableError."""
    return _suite(table, SUITES).related


def _validate_mart(
    connection: duckdb.DuckDBPyConnection, suite: Suite, hour: datetime | None, docs: Path | None, run_name: str
) -> HourValidation:
    began = time.perf_counter()
    for name in suite.related:
        connection.execute(f"create or replace temp view {name} as select * from marts.main.{name}")
    minutes = "true" if hour is None else "event_date = " + hour_literals(hour)["date"]
    source = f"marts.main.{suite.table}"
    related = frozenset(suite.related)
    profiler = Profiler(connection, suite, source, hour, related=related, literals={"minutes": minutes})
    profiler.group()
    return _judged(suite, profiler, profiler.measure(), hour, None, began, docs, run_name)


def _suite(name: str, among: dict[str, Suite]) -> Suite:
    if name not in among:
        raise UnknownTableError(f"there is no suite for {name!r}", hint=f"there are suites for {', '.join(among)}")
    return among[name]


def _load_related(connection: duckdb.DuckDBPyConnection, suite: Suite, related: Related, hour: datetime) -> frozenset[str]:
    """What the checks need of other tables, as temporary tables of a few columns."""
    for name in suite.related:
        if name in related:
            columns, where = _RELATED[name]
            scan = delta_scan(*related[name])
            condition = where.format(**hour_literals(hour))
            connection.execute(
                f"create temp table {name} as select {columns.format(**hour_literals(hour))} from {scan} where {condition}"
            )
    return frozenset(suite.related) & related.keys()


_RELATED = {
    "campaigns": ("distinct campaign_id, currency", "true"),
    "batch_ledger": (
        "_query_id, _batch_id, source, region, accepted, invalid_traffic, spend_nanos, "
        "coalesce(event_hour = {start}, false) as in_hour",
        "stream = 'events'",
    ),
}


def _compare(profile: Profile, suite: Suite, week: TrailingWeek, hour: datetime) -> None:
    """Add the measures against the trailing week, where enough is known of it; then keep this hour for the next ones."""
    found = {f"{name}.drift": week.stability_index(hour, name, profile) for name in suite.shares}
    found["table.volume"] = week.robust_z(hour, profile)
    profile.measures.update({name: value for name, value in found.items() if value is not None})
    week.keep(hour, profile)


def _judged(
    suite: Suite,
    profiler: Profiler,
    profile: Profile,
    hour: datetime | None,
    version: int | None,
    began: float,
    docs: Path | None,
    run_name: str,
) -> HourValidation:
    from expectations.judge import Judge, expectation_type, successes  # it takes seconds to import

    judged = [check for check in suite.checks if check.name in profile.measures]
    result = Judge.shared().judge(suite.table, judged, profile.measures)
    success = successes(result)
    failing = {check.name: profiler.offenders(check) for check in judged if not success[check.name]}
    outcomes = [
        CheckOutcome(
            name=check.name,
            expectation=expectation_type(check),
            column=check.column,
            severity=check.severity,
            success=success.get(check.name, True),
            observed=profile.measures.get(check.name),
            expected=check.expected if check.name in success else f"{check.expected} (not judged: {_why(check)})",
            failing_rows=failing.get(check.name, []),
        )
        for check in suite.checks
    ]
    failed = sorted((each for each in outcomes if not each.success), key=lambda each: each.severity is not Severity.ERROR)
    errors = sum(outcome.severity is Severity.ERROR for outcome in failed)
    page = None
    if docs is not None:
        entry = Entry(
            page="",
            table=suite.table,
            hour="" if hour is None else f"{hour.astimezone(UTC):%Y-%m-%dT%HZ}",
            version=version,
            run_name=run_name,
            rows=profile.rows,
            expectations=len(judged),
            errors=errors,
            warnings=len(failed) - errors,
            validated_at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        )
        page = DataDocs(docs).add(entry, result, {each.name: each.failing_rows for each in failed})
    seconds = time.perf_counter() - began
    return HourValidation(suite.table, hour, version, not failed, errors > 0, outcomes, profile.rows, seconds, page)


def _why(check: Check) -> str:
    if check.kind is Kind.BASELINE:
        return f"less than {MIN_HOURS} comparable hours are known"
    return f"{check.needs} was not given"
