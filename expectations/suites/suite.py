"""A suite: expectations of Great Expectations, and which rows of which table they are about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from great_expectations.expectations.expectation import Expectation
from great_expectations.expectations.metadata_types import FailureSeverity

from expectations.results import Severity

SEVERITIES = {Severity.ERROR: FailureSeverity.CRITICAL, Severity.WARN: FailureSeverity.WARNING}


@dataclass(frozen=True)
class Suite:
    """The expectations of one table.

    Queries of expectations read ``{batch}``: the rows of the hour; of marts without an hour the rows of the days that changed last.
    They may also read the one row of ``this_hour`` (starts_at, ends_at), the related tables by name, and ``table_columns`` (name,
    declared, found), the types of the columns of a Delta table. Those of marts read ``checked_days`` (model, day) instead: the days
    that are validated.

    ``in_hour``: selects the hour's rows, with {date}, {hour}, {start}, {end}, {utc_start} and {utc_end} as literals. ``place``: the
    columns that identify a row. ``columns``: name -> DuckDB type of a Delta table's columns; those of a mart are in its contract.
    """

    table: str
    in_hour: str
    place: tuple[str, ...]
    expectations: tuple[Expectation, ...]
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the checks."""
        return [name_of(each) for each in self.expectations]

    @property
    def read_columns(self) -> list[str]:
        """The columns that expectations name: only these are loaded. ``place`` is among them."""
        named = " ".join((*self.place, *(str(each.dict(exclude={"meta", "description"})) for each in self.expectations)))
        return [column for column in self.columns if re.search(rf"\b{column}\b", named)]

    @property
    def related(self) -> tuple[str, ...]:
        """The other tables that expectations of this suite read."""
        return tuple(sorted({needed for each in self.expectations if (needed := needs(each)) is not None}))


def check(name: str, description: str, severity: Severity = Severity.ERROR, *, needs: str | None = None) -> dict[str, Any]:
    """Return the arguments by which an expectation becomes a check: its name (column.rule), description and severity.

    ``needs``: the related table without which it is not judged.
    """
    meta = {"check": name} if needs is None else {"check": name, "needs": needs}
    return {"meta": meta, "description": description, "severity": SEVERITIES[severity]}


def name_of(expectation: Any) -> str:
    """Return the name of the check that an expectation, or its configuration, is."""
    return str(expectation.meta["check"])


def needs(expectation: Any) -> str | None:
    """Return the related table without which an expectation is not judged."""
    needed: str | None = expectation.meta.get("needs")
    return needed
