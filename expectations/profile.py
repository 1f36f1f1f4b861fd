"""One scan of a table's hour, and everything that is measured from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import duckdb
import numpy as np

from expectations.checks import Check, Kind, Suite
from expectations.lake import hour_literals, records

EXAMPLES = 5
MOST_VALUES = 200  # a share with more values keeps the largest, and the rest as one
REST = "(rest)"


@dataclass(frozen=True)
class Profile:
    """What was measured. ``measures``: check -> number; checks that could not be judged are not in it. ``shares``: name -> value ->
    weight; ``volume``: the number of the hour."""

    rows: int
    measures: dict[str, float]
    shares: dict[str, dict[str, float]]
    volume: float


class Profiler:
    """Measures a suite on ``source`` (a table expression) through ``connection``, which sees the related tables by name."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        suite: Suite,
        source: str,
        hour: datetime | None,
        *,
        related: frozenset[str] = frozenset(),
        literals: Mapping[str, str] | None = None,
    ) -> None:
        self._connection, self._suite, self._related = connection, suite, related
        self._literals = {**hour_literals(hour), **(literals or {})}
        self._found = self._columns(source)
        self._condition = suite.in_hour.format(**self._literals) if hour is not None and suite.in_hour else "true"
        self._connection.execute(f"create or replace temp view data as {self._typed(source)}")

    def group(self) -> None:
        """The one scan: the hour's rows, grouped, with the rows that offend any row check counted."""
        keys = [f"{sql} as {name}" for name, sql in self._suite.keys.items()]
        sums = [f"{self._sql(sql)} as {name}" for name, sql in self._suite.sums.items()]
        offends = " or ".join(f"({self._sql(check.sql)})" for check in self._of(Kind.ROWS))
        selected = ", ".join([*keys, "count(*) as rows", f"count(*) filter ({offends}) as offending", *sums])
        self._connection.execute(f"create or replace temp table grouped as select {selected} from data group by all")

    def measure(self) -> Profile:
        """Everything that is judged, from the groups."""
        measured = {check.name: float(len(self._schema_offenders(check))) for check in self._of(Kind.SCHEMA)}
        sums = {"rows": "coalesce(sum(rows), 0)", "offending": "coalesce(sum(offending), 0)"}
        sums |= {check.name: f"coalesce(sum(rows) filter ({self._sql(check.sql)}), 0)" for check in self._of(Kind.GROUPS)}
        sums |= {check.name: f"({self._sql(check.sql)})" for check in self._of(Kind.MEASURE) if self.can_judge(check)}
        found = self._numbers(sums, "grouped")
        rows, offending = int(found.pop("rows")), found.pop("offending")
        measured |= found | self._offending_rows(offending > 0)
        measured |= {check.name: self._repeated(check.sql) for check in self._of(Kind.UNIQUE)}
        for check in self._suite.checks:
            if check.exact is not None and measured.get(check.name):
                measured[check.name] = self._number(self._sql(check.exact))
        shares = {name: self._shares(sql) for name, sql in self._suite.shares.items()}
        volume = self._number(self._suite.volume) if self._suite.volume else float(rows)
        return Profile(rows, measured, shares, volume)

    def can_judge(self, check: Check) -> bool:
        """Whether the related table that a check needs is there."""
        return check.needs is None or check.needs in self._related

    def offenders(self, check: Check) -> list[dict[str, Any]]:
        """A few rows that a check does not like. A query of its own: to be asked only when the check failed."""
        if check.kind is Kind.SCHEMA:
            return self._schema_offenders(check)[:EXAMPLES]
        if check.offenders is not None:
            return records(self._connection, self._sql(check.offenders), EXAMPLES)
        if check.kind not in (Kind.ROWS, Kind.GROUPS):
            return []
        shown = list(dict.fromkeys((*self._suite.shown, check.column)))
        order = ", ".join(self._suite.shown)
        sql = f"select {', '.join(shown)} from data where {self._sql(check.sql)} order by {order}"
        return records(self._connection, sql, EXAMPLES)

    def _columns(self, source: str) -> dict[str, str]:
        described = self._connection.execute(f"describe select * from {source}").fetchall()
        return {str(name): str(kind) for name, kind, *_ in described}

    def _typed(self, source: str) -> str:
        """The hour's rows with the declared columns and types: the rest can be judged where the schema is not as declared."""
        parts = []
        for name, kind in self._suite.columns.items():
            if name not in self._found:
                parts.append(f"cast(null as {kind}) as {name}")
            else:
                parts.append(name if self._found[name] == kind else f"try_cast({name} as {kind}) as {name}")
        return f"select * from (select {', '.join(parts)} from {source}) where {self._condition}"

    def _schema_offenders(self, check: Check) -> list[dict[str, Any]]:
        declared, found = self._suite.columns, self._found
        if check.name == "table.columns":
            wrong = [name for name, kind in declared.items() if found.get(name) != kind]
        else:
            wrong = [name for name in found if name not in declared]
        return [{"column": name, "declared": declared.get(name), "found": found.get(name)} for name in wrong]

    def _shares(self, sql: str) -> dict[str, float]:
        ordered = f"from ({sql}) as shares(value, weight) where weight > 0 order by weight desc, value"
        found = self._connection.execute(f"select value, weight {ordered}").fetchall()
        kept = {str(value): float(weight) for value, weight in found[:MOST_VALUES]}
        rest = sum(float(weight) for _, weight in found[MOST_VALUES:])
        return kept | {REST: rest} if rest else kept

    def _of(self, kind: Kind) -> list[Check]:
        return [check for check in self._suite.checks if check.kind is kind]

    def _offending_rows(self, any_does: bool) -> dict[str, float]:
        checks = self._of(Kind.ROWS)
        if not any_does:
            return {check.name: 0.0 for check in checks}
        return self._numbers({check.name: f"count(*) filter ({self._sql(check.sql)})" for check in checks}, "data")

    def _repeated(self, ids: str) -> float:
        """How many hashes are those of another row. Sorted numbers take half of what DuckDB's distinct does."""
        found = self._connection.execute(f"select unnest({ids}) as id from grouped").fetchnumpy()["id"]
        hashes = np.asarray(found)
        hashes.sort()
        return float(np.count_nonzero(hashes[1:] == hashes[:-1]))

    def _numbers(self, expressions: Mapping[str, str], source: str) -> dict[str, float]:
        selected = ", ".join(f'{sql} as "{name}"' for name, sql in expressions.items())
        row = self._connection.execute(f"select {selected} from {source}").fetchone()
        assert row is not None
        return {name: float(value) for name, value in zip(expressions, row, strict=True)}

    def _sql(self, text: str) -> str:
        for name, literal in self._literals.items():  # not format: SQL has braces of its own
            text = text.replace("{" + name + "}", literal)
        return text

    def _number(self, sql: str) -> float:
        row = self._connection.execute(sql).fetchone()
        return float(row[0]) if row and row[0] is not None else 0.0
