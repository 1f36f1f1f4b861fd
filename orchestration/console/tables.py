"""The tables of the console: what their columns mean, how a person reads them, and how they are exported."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Literal

import duckdb

from orchestration.console.filters import Filters
from orchestration.marts.parquet import parquet
from orchestration.marts.query import BUILD_COLUMN
from orchestration.marts.render import render
from spark_jobs.errors import UsageError
from spark_jobs.texts import duration, file_size, minor_digits

Row = dict[str, Any]
Kind = Literal["text", "id", "count", "change", "money", "percent", "ratio", "seconds", "bytes", "time", "date", "flag"]

ROWS_SHOWN = 50
FILTERS_COLUMN = "console_filters"
_RIGHT = ("count", "change", "money", "percent", "ratio", "seconds", "bytes")
_SYMBOLS = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥"}


@dataclass(frozen=True)
class Column:
    """A column: ``name`` in the rows and in exports, ``label`` and ``unit`` for people.

    ``kind`` says how a value reads. Money is a Decimal in whole units; its currency is the row's ``currency``. ``link`` makes the
    address behind a cell, ``why`` that of the explanation of its number; both get the row and may return None. ``below`` names a
    text of the row that stands small below the value. A column that is not ``is_shown`` can be searched and is exported.
    """

    name: str
    label: str
    kind: Kind = "text"
    unit: str = ""
    help: str = ""
    link: Callable[[Row], str | None] | None = None
    why: Callable[[Row], str | None] | None = None
    below: str = ""
    is_shown: bool = True

    @property
    def is_right(self) -> bool:
        """Whether the values align to the right, as numbers do."""
        return self.kind in _RIGHT

    def text(self, row: Mapping[str, Any]) -> str:
        """The cell as a person reads it."""
        return shown(row.get(self.name), self.kind, row.get("currency"))


@dataclass(frozen=True)
class DataTable:
    """A table of a page. ``empty`` says what to do where it has no rows; ``count`` is the number of rows before it was cut."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    empty: str = "No rows for these filters."
    note: str = ""
    count: int = field(default=-1)

    def arranged(self, filters: Filters, *, limit: int | None = ROWS_SHOWN) -> DataTable:
        """The rows that the page's search keeps, in the order that its URL asks for, cut after ``limit`` rows."""
        rows = list(self.rows)
        if filters.search:
            wanted = filters.search.casefold()
            texts = [column for column in self.columns if column.kind in ("text", "id")]
            rows = [row for row in rows if any(wanted in str(row.get(column.name) or "").casefold() for column in texts)]
        table, _, name = filters.sort.removeprefix("-").partition(".")
        if table == self.name and any(column.name == name for column in self.columns):
            known = [row for row in rows if row.get(name) is not None]
            known.sort(key=lambda row: row[name], reverse=filters.sort.startswith("-"))
            rows = known + [row for row in rows if row.get(name) is None]
        cut = rows if limit is None or filters.rows == "all" else rows[:limit]
        return replace(self, rows=cut, count=len(rows))

    @property
    def columns_shown(self) -> list[Column]:
        """The columns that a page shows."""
        return [column for column in self.columns if column.is_shown]

    def next_sort(self, column: Column, filters: Filters) -> str:
        """The order that a click on a column's head asks for: numbers first descending; a second click turns it."""
        key = f"{self.name}.{column.name}"
        first, second = (f"-{key}", key) if column.is_right else (key, f"-{key}")
        return second if filters.sort == first else first

    def is_sorted(self, column: Column, filters: Filters) -> str:
        """How the table is sorted by a column, in the words of ARIA."""
        if filters.sort.removeprefix("-") != f"{self.name}.{column.name}":
            return "none"
        return "descending" if filters.sort.startswith("-") else "ascending"

    def export(self, form: str, build_id: str, stamp: str) -> bytes:
        """The whole table as ``csv`` or ``parquet``. Two last columns are the build of the marts and the filters, ``stamp``.

        Texts that a spreadsheet would run as formulas begin with an apostrophe in CSV. Raises UsageError for another form.
        """
        names = [column.name for column in self.columns]
        if "currency" not in names and any(column.kind == "money" for column in self.columns):
            names.append("currency")
        rows = [[*(row.get(name) for name in names), build_id, stamp] for row in self.rows]
        return exported([*names, BUILD_COLUMN, FILTERS_COLUMN], rows, form)


def fetch_rows(cursor: duckdb.DuckDBPyConnection, sql: str, parameters: Mapping[str, Any] | None) -> list[Row]:
    """The rows of a statement. ``parameters`` are the values of its ``$name``; those that it does not name are left out."""
    named = set(re.findall(r"\$(\w+)", sql))  # DuckDB refuses other values
    cursor.execute(sql, {name: value for name, value in (parameters or {}).items() if name in named} or None)
    names = [str(column[0]) for column in cursor.description or []]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def exported(columns: Sequence[str], rows: Sequence[Sequence[Any]], form: str) -> bytes:
    """Rows as a file of ``form``, csv or parquet."""
    if form == "csv":
        return (render(columns, rows, "csv") + "\n").encode()
    if form == "parquet":
        return parquet(columns, rows)
    raise UsageError(f"there is no export {form!r}", hint="csv or parquet")


def shown(value: Any, kind: Kind, currency: str | None = None) -> str:
    """A value as a person reads it; a dash where there is none."""
    if value is None or value == "":
        return "–"
    match kind:
        case "count":
            return f"{value:,.0f}"
        case "change":
            return f"{value:+,.0f}".replace("-", "−")
        case "money":
            return money(value, currency)
        case "percent":
            return f"{value:.2%}"
        case "ratio":
            return f"{value:.2f}×"
        case "seconds":
            return duration(float(value))
        case "bytes":
            return file_size(value)
        case "time":
            return f"{_utc(value):%Y-%m-%d %H:%M}"
        case "flag":
            return "yes" if value else "no"
        case "date":
            return value.isoformat() if isinstance(value, date) else str(value)
    return str(value)


def money(amount: Decimal | int, currency: str | None) -> str:
    """An amount in whole units, rounded to the decimals of its currency: ``$1,234.50``, ``¥5,431``, ``12.000 KWD``."""
    rounded = rounded_units(Decimal(amount), currency)
    sign, digits = ("−" if rounded < 0 else ""), f"{abs(rounded):,f}"
    symbol = _SYMBOLS.get(currency or "")
    return f"{sign}{symbol}{digits}" if symbol else f"{sign}{digits} {currency or ''}".rstrip()


def rounded_units(amount: Decimal, currency: str | None) -> Decimal:
    """An amount in whole units, rounded half away from zero to the decimals of its currency, as the marts round."""
    return amount.quantize(Decimal(1).scaleb(-minor_digits(currency)), ROUND_HALF_UP)


def units_of_nanos(nanos: int, currency: str | None) -> Decimal:
    """Nanos as whole units of their currency, rounded as the marts round."""
    return rounded_units(Decimal(nanos).scaleb(-9), currency)


def units_of_micros(micros: int | None, currency: str | None) -> Decimal | None:
    """Micros as whole units of their currency, rounded as the marts round; None stays None."""
    return None if micros is None else rounded_units(Decimal(micros).scaleb(-6), currency)


def _utc(value: datetime) -> datetime:
    return value.astimezone(UTC) if value.tzinfo else value
