"""Query results as a table, CSV or JSON."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal

from spark_jobs.errors import UsageError
from spark_jobs.texts import printable, printable_json

FORMATS = ("table", "csv", "json")
# the wide signs too: spreadsheets of some languages take them. A number is none: exact sums of Pinot come as text
_FORMULA = re.compile(r"(?![+-]?[0-9]+(\.[0-9]+)?$)(\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r])")


def render(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    format: str = "table",
    width: int | None = None,
    *,
    is_raw: bool = False,
) -> str:
    """Return ``rows`` as text, without a line end after the last line.

    table: aligned, numbers to the right, six digits of a fraction, nulls as ``NULL``, and a last line that counts the rows. If the
    columns do not fit into ``width`` (None: they always do), each row is a block. csv: a header, nulls as nothing, RFC 4180
    quoting, texts guarded as `_guarded` says unless ``is_raw``. json: an array of objects in column order; integers of any size
    stay integers, decimals are strings so that no digit is lost. Timestamps are ISO 8601 with a ``T``.

    Raises UsageError for another format, and for json with two columns of one name.
    """
    if format == "table":
        return _table(columns, rows, width)
    if format == "csv":
        return _csv(columns, rows, is_raw=is_raw)
    if format == "json":
        return _json(columns, rows)
    raise UsageError(f"no format {format!r}", hint=f"one of {', '.join(FORMATS)}")


def _plain(value: object) -> object:
    """Return a value as JSON can hold it, without loss."""
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
    return str(value)


def _text(value: object) -> str:
    plain = _plain(value)
    if isinstance(plain, bool):
        return "true" if plain else "false"
    if isinstance(plain, dict | list):
        return json.dumps(plain, ensure_ascii=False)
    return str(plain)


def _is_number(value: object) -> bool:
    """Return whether a column with this value may be aligned to the right."""
    return value is None or (isinstance(value, int | float | Decimal) and not isinstance(value, bool))


def _shown(value: object) -> str:
    """Return a cell as a person reads it: nobody needs the sixteenth digit of a rate."""
    if isinstance(value, float) and value == value and abs(value) < 1e15:
        return f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) >= 1e-4 or not value else f"{value:.6g}"
    return "NULL" if value is None else printable(_text(value))


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], room: int | None) -> str:
    cells = [[_shown(value) for value in row] for row in rows]
    header = [printable(column) for column in columns]
    widths = [max([len(name), *(len(row[index]) for row in cells)]) for index, name in enumerate(header)]
    numeric = [all(_is_number(row[index]) for row in rows) for index in range(len(header))]

    def line(values: Sequence[str]) -> str:
        padded = [
            value.rjust(width) if right else value.ljust(width) for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    count = f"({len(rows)} row{'' if len(rows) == 1 else 's'})"
    if room is not None and sum(widths) + 2 * (len(widths) - 1) > room:
        return "\n".join([*_blocks(header, cells, room), count])
    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in cells), count])


def _blocks(header: Sequence[str], cells: Sequence[Sequence[str]], room: int) -> Iterator[str]:
    """Yield the lines of each row: as many names and values on a line as fit, and none of them cut."""
    for number, row in enumerate(cells, 1):
        yield f"row {number}"
        line = ""
        for name, value in zip(header, row, strict=True):
            pair = f"{name} {value}"
            if line and 2 + len(line) + 3 + len(pair) > room:
                yield f"  {line}"
                line = ""
            line = f"{line}   {pair}" if line else pair
        yield f"  {line}"


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]], *, is_raw: bool) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    as_text = str if is_raw else _guarded
    writer.writerow(map(as_text, columns))
    writer.writerows(
        ["" if value is None else _text(value) if _is_number(value) else as_text(_text(value)) for value in row] for row in rows
    )
    return buffer.getvalue().removesuffix("\n")


def _guarded(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula (an apostrophe is before it), and no terminal for a command."""
    return ("'" if _FORMULA.match(text) else "") + printable(text, keep="\n")


def _json(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if len(set(columns)) != len(columns):
        raise UsageError("two columns have one name", hint="name them apart with `as`, or use csv")
    if not rows:
        return "[]"
    objects = (
        json.dumps({name: _plain(value) for name, value in zip(columns, row, strict=True)}, ensure_ascii=False) for row in rows
    )
    return printable_json("[\n  " + ",\n  ".join(objects) + "\n]")
