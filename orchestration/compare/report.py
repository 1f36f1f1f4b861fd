"""Reads a third party's report: a CSV with the columns date, campaign, impressions, clicks."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from spark_jobs.errors import UsageError

MEASURES = ("impressions", "clicks")

_COLUMNS = {"date": ("date",), "campaign": ("campaign", "campaign_id"), "impressions": ("impressions",), "clicks": ("clicks",)}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_WHOLE = re.compile(r"\d{1,18}")


Key = tuple[date, str]


@dataclass(frozen=True)
class ReportLine:
    """Their counts of a campaign's day; ``line`` is its number in the file, where the header has number 1."""

    line: int
    date: date
    campaign: str
    impressions: int
    clicks: int

    @property
    def key(self) -> Key:
        """Return the day and the campaign."""
        return self.date, self.campaign


def read_report(path: Path) -> list[ReportLine]:
    """Return the lines of a report, in its order. Columns may have any order; other columns are ignored.

    Raises UsageError that names the wrong line and column.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        places = {name: _place(path, header, name, names) for name, names in _COLUMNS.items()}
        lines = [_line(path, reader.line_num, row, header, places) for row in reader if any(field.strip() for field in row)]
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}") from None
    if not lines:
        raise UsageError(f"{path} has no line below its header")
    seen: dict[Key, int] = {}
    for found in lines:
        first = seen.setdefault(found.key, found.line)
        if first != found.line:
            raise UsageError(f"{path}, line {found.line}: {found.campaign!r} on {found.date} is there twice, first in line {first}")
    return lines


def _place(path: Path, header: list[str], name: str, names: tuple[str, ...]) -> int:
    found = [at for at, column in enumerate(header) if column in names]
    if len(found) == 1:
        return found[0]
    wrong = "there is no column" if not found else "there is more than one column"
    raise UsageError(f"{path}, line 1: {wrong} {' or '.join(names)}", hint="the columns are date, campaign, impressions, clicks")


def _line(path: Path, number: int, row: list[str], header: list[str], places: dict[str, int]) -> ReportLine:
    if len(row) != len(header):
        raise UsageError(f"{path}, line {number}: {len(row)} fields where the header has {len(header)}")
    fields = {name: row[at].strip() for name, at in places.items()}

    def wrong(column: str, what: str) -> UsageError:
        return UsageError(f"{path}, line {number}, column {column}: {fields[column]!r} is not {what}")

    try:
        if not _DATE.fullmatch(fields["date"]):
            raise ValueError
        day = date.fromisoformat(fields["date"])
    except ValueError:
        raise wrong("date", "a date as 2025-06-02") from None
    if not fields["campaign"]:
        raise wrong("campaign", "a campaign")
    for name in MEASURES:
        if not _WHOLE.fullmatch(fields[name]):
            raise wrong(name, "a whole number from 0 on")
    return ReportLine(number, day, fields["campaign"], int(fields["impressions"]), int(fields["clicks"]))
