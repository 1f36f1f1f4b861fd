"""Checks as data: what is expected of a table's hour, in SQL, and how much it matters.

A scan of the hour groups its rows (``Suite.keys``) and counts on the way the rows that offend any check; all that is judged is
computed from those groups, which are few. So a check costs an expression in the one scan, not a scan. Where a row does offend, a
second scan counts check by check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    """ERROR: the data is wrong, and what is built from it would be too. WARN: somebody should look."""

    ERROR = "error"
    WARN = "warn"


class Kind(StrEnum):
    """Where a check's SQL is evaluated."""

    SCHEMA = "schema"  # on the table's columns
    ROWS = "rows"  # a predicate over each row, true for an offender
    GROUPS = "groups"  # a predicate over the grouping keys, true for offenders
    UNIQUE = "unique"  # the sum of the suite that lists the hashes of a column's values
    MEASURE = "measure"  # a query over the groups that gives one number
    BASELINE = "baseline"  # against the trailing week


@dataclass(frozen=True)
class Check:
    """One expectation: the number that ``sql`` gives must be at most ``at_most``.

    Of rows and groups the number is that of the offending rows, of unique that of the rows too many. ``exact``: a query that says
    the number for certain, asked only where ``sql`` does not give zero. ``offenders``: a query for examples; rows and groups need
    none. ``needs``: the related table without which the check is not judged. Queries see ``data`` (the hour's rows), ``grouped``,
    and the related tables by name.
    """

    name: str
    column: str
    kind: Kind
    description: str
    sql: str = ""
    severity: Severity = Severity.ERROR
    at_most: float = 0
    exact: str | None = None
    offenders: str | None = None
    needs: str | None = None

    @property
    def expected(self) -> str:
        """In words for a person: a description and the limit where it is not zero."""
        return self.description if not self.at_most else f"{self.description}: at most {self.at_most:g}"


@dataclass(frozen=True)
class Suite:
    """What is expected of one table.

    ``columns``: name -> DuckDB type. ``in_hour``: the hour's rows, with {date}, {hour}, {start} and {end} as literals (empty: all).
    ``keys``: the grouping, name -> expression; ``sums``: further aggregates of a group, ``rows`` being there always. ``shown``: the
    columns that identify an offending row. ``shares``: what is compared with the trailing week, name -> a query of (value, weight);
    ``volume``: a query of the one number that is.
    """

    table: str
    columns: Mapping[str, str]
    in_hour: str
    keys: Mapping[str, str]
    shown: tuple[str, ...]
    checks: tuple[Check, ...]
    sums: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, str] = field(default_factory=dict)
    volume: str | None = None

    @property
    def related(self) -> tuple[str, ...]:
        """The other tables that checks of this suite read."""
        return tuple(sorted({check.needs for check in self.checks if check.needs}))


def rows(name: str, column: str, offends: str, description: str, severity: Severity = Severity.ERROR) -> Check:
    """No row may satisfy ``offends``."""
    return Check(f"{column}.{name}", column, Kind.ROWS, description, offends, severity)


def groups(name: str, column: str, offends: str, description: str, severity: Severity = Severity.ERROR) -> Check:
    """No row may satisfy ``offends``, which speaks of grouping keys only and so costs nothing."""
    return Check(f"{column}.{name}", column, Kind.GROUPS, description, offends, severity)


def not_null(*columns: str) -> tuple[Check, ...]:
    """A check a column."""
    return tuple(rows("not_null", name, f"{name} is null", f"{name} is never null") for name in columns)


def schema() -> tuple[Check, ...]:
    """The table has the declared columns with their types; other columns are only worth a look."""
    return (
        Check("table.columns", "table", Kind.SCHEMA, "every declared column is there, with its type"),
        Check("table.other_columns", "table", Kind.SCHEMA, "there is no column that is not declared", severity=Severity.WARN),
    )


def unique(column: str, ids: str = "ids") -> Check:
    """A column repeats no value within the hour; ``ids`` is the sum of the suite that lists the values' hashes."""
    repeated = f"select {column}, count(*) as rows from data where {column} is not null group by {column} having count(*) > 1"
    return Check(
        f"{column}.unique",
        column,
        Kind.UNIQUE,
        f"{column} stands once in the hour",
        ids,
        exact=f"select coalesce(sum(rows - 1), 0) from ({repeated})",  # equal hashes are a suspicion only
        offenders=f"{repeated} order by rows desc, {column}",
    )


def baseline(table: str, shares: tuple[str, ...]) -> tuple[Check, ...]:
    """The hour against the trailing week: how its shares have moved, and whether its volume is usual."""
    drift = tuple(
        Check(
            f"{name}.drift",
            name,
            Kind.BASELINE,
            f"the shares of {table} by {name} are those of the trailing week (population stability index)",
            severity=Severity.WARN,
            at_most=MAX_STABILITY_INDEX,
        )
        for name in shares
    )
    volume = Check(
        "table.volume",
        "table",
        Kind.BASELINE,
        f"{table} of this hour are as many as in the same hour of the days before (robust z-score)",
        severity=Severity.WARN,
        at_most=MAX_ROBUST_Z,
    )
    return (*drift, volume)


MAX_STABILITY_INDEX = 0.25  # by convention: below 0.1 none, above 0.25 a major shift
MAX_ROBUST_Z = 6.0
