"""Read a statement that an advertiser got: an export of the console, or rows of `fct_billing_ledger` from `adtally query`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs.errors import UsageError
from spark_jobs.failure import one_line
from spark_jobs.texts import minor_digits

_TEXTS = ("event_date", "campaign_id", "store_id", "currency", "line_type", "reason", "run_id")
_OF_PAGE = "console_filters"  # the column of an export of the console: it has all lines of its advertiser and month
_ACCRUAL = "accrual-"  # a line that is not posted yet


@dataclass(frozen=True)
class StatementFault:
    """A line of a statement that is not the one that was posted. ``row`` is the posted line; None if there is none."""

    line_id: str
    detail: str
    row: dict[str, Any] | None = None


def compare_statement(path: Path, posted: list[dict[str, Any]]) -> tuple[int, list[StatementFault]]:
    """Compare the lines of a file with the ``posted`` lines. Returns how many lines were compared, and the faults.

    Accruals are left out. An export of a statement must have all lines that were posted for its advertiser and month before its
    last one. Raises UsageError if the file cannot be read as lines.
    """
    lines = [line for line in _read(path) if not line["line_id"].startswith(_ACCRUAL)]
    known = {row["line_id"]: row for row in posted}
    faults: list[StatementFault] = []
    seen: set[str] = set()
    for line in lines:
        row = known.get(line["line_id"])
        if line["line_id"] in seen:
            faults.append(StatementFault(line["line_id"], "the statement has the line twice", row))
        elif row is None:
            faults.append(StatementFault(line["line_id"], "the line was never posted, or was removed from the table"))
        else:
            faults += [StatementFault(line["line_id"], detail, row) for detail in _differences(line, row)]
        seen.add(line["line_id"])
    if lines and all(_OF_PAGE in line for line in lines):
        faults += _left_out(seen, posted, known)
    return len(lines), faults


def _left_out(seen: set[str], posted: list[dict[str, Any]], known: dict[str, dict[str, Any]]) -> Iterator[StatementFault]:
    own = [known[name] for name in seen & known.keys()]
    scopes = {_scope(row) for row in own}
    last = max((row["chain_position"] or 0 for row in own), default=0)
    for row in posted if len(scopes) == 1 else ():
        if _scope(row) in scopes and row["line_id"] not in seen and (row["chain_position"] or 0) <= last:
            yield StatementFault(row["line_id"], "the statement lacks the line", row)


def _scope(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["store_id"], row["event_date"].year, row["event_date"].month


def _differences(line: dict[str, str], row: dict[str, Any]) -> Iterator[str]:
    for name in _TEXTS:
        posted = str(row[name] if row[name] is not None else "")
        # The console writes reasons with spaces, and an apostrophe before what a spreadsheet would run as a formula.
        if name in line and posted.replace("_", " ") != line[name].removeprefix("'").replace("_", " ") and posted != line[name]:
            yield f"{name} is {line[name]!r}, posted was {posted!r}"
    micros = Decimal(int(row["amount_micros"]))
    units = micros.scaleb(-6).quantize(Decimal(1).scaleb(-minor_digits(row["currency"])), ROUND_HALF_UP)
    for name, posted_amount in (("amount_micros", micros), ("amount", units)):
        if name in line and _number(line, name) != posted_amount:
            yield f"{name} is {line[name]}, posted was {posted_amount}"


def _number(line: dict[str, str], name: str) -> Decimal | None:
    try:
        return Decimal(line[name].removeprefix("'"))
    except InvalidOperation:
        return None


def _read(path: Path) -> Iterator[dict[str, str]]:
    try:
        rows = _parse(path)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}", hint="a statement as CSV, JSON or Parquet") from None
    for row in rows:
        if not isinstance(row, dict) or not row.get("line_id"):
            raise UsageError(
                f"{path} has a row without line_id", hint="export the table `Lines` of the statement, or fct_billing_ledger"
            )
        yield {str(name): str(value if value is not None else "") for name, value in row.items()}


def _parse(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    text = path.read_text("utf-8-sig")
    if path.suffix == ".json":
        found = json.loads(text, parse_float=Decimal)
        return found if isinstance(found, list) else [found]
    return list(csv.DictReader(io.StringIO(text, newline="")))
