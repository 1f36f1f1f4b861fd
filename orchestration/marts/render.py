"""Query results as a table, CSV or JSON."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from spark_jobs.errors import UsageError

FORMATS = ("table", "csv", "json")


def render(columns: Sequence[str], rows: Sequence[Sequence[Any]], format: str = "table") -> str:
    """``rows`` as text, without a line end after the last line.

    table: aligned, numbers to the right, nulls as ``NULL``, with a last line that counts the rows. csv: a header, nulls
    as nothing, RFC 4180 quoting. json: an array of objects in column order; integers whatever their size stay integers,
    decimals are strings so that no digit is lost. Timestamps are ISO 8601 with a ``T``.

    Raises UsageError for another format, and for json with two columns of one name.
    """
    if format == "table":
        return _table(columns, rows)
    if format == "csv":
        return _csv(columns, rows)
    if format == "json":
        return _json(columns, rows)
    raise UsageError(f"no format {format!r}", hint=f"one of {', '.join(FORMATS)}")


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it, without loss."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, Decimal | UUID | timedelta):
        return str(value)
    return str(value)


def _text(value: Any) -> str:
    plain = _plain(value)
    if isinstance(plain, bool):
        return "true" if plain else "false"
    if isinstance(plain, dict | list):
        return json.dumps(plain, ensure_ascii=False)
    return str(plain)


def _printable(text: str) -> str:
    """``text`` on one line, without characters that steer a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _is_number(value: Any) -> bool:
    """Whether a column may keep to the right with ``value`` in it."""
    return value is None or (isinstance(value, int | float | Decimal) and not isinstance(value, bool))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [["NULL" if value is None else _printable(_text(value)) for value in row] for row in rows]
    header = [_printable(column) for column in columns]
    widths = [max([len(name), *(len(row[index]) for row in cells)]) for index, name in enumerate(header)]
    numeric = [all(_is_number(row[index]) for row in rows) for index in range(len(header))]

    def line(values: Sequence[str]) -> str:
        padded = [
            value.rjust(width) if right else value.ljust(width) for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    count = f"({len(rows)} row{'' if len(rows) == 1 else 's'})"
    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in cells), count])


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else _text(value) for value in row] for row in rows)
    return buffer.getvalue().removesuffix("\n")


def _json(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if len(set(columns)) != len(columns):
        raise UsageError("two columns have one name", hint="name them apart with `as`, or use csv")
    if not rows:
        return "[]"
    objects = (
        json.dumps({name: _plain(value) for name, value in zip(columns, row, strict=True)}, ensure_ascii=False) for row in rows
    )
    return "[\n  " + ",\n  ".join(objects) + "\n]"
