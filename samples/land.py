"""Puts the samples into a landing folder as a collector would: write under a hidden name, set the mtime, rename."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from services.simulator.landing import compress, put_file

START = datetime(2019, 11, 24, tzinfo=UTC)
DAYS = 7
"""The samples' events are of these days."""

_HERE = Path(__file__).parent
_WEEK = timedelta(weeks=1)
_LATEST = timedelta(hours=6)  # by then all but a few stragglers, which come up to 26 hours after the end, were received
_DAY = re.compile(rb"2019-1[0-2]-\d\d")


def weeks_until(now: datetime) -> int:
    """By how many whole weeks the samples can be shifted so that their days are over at ``now``."""
    return max(0, (now - START - timedelta(days=DAYS) - _LATEST) // _WEEK)


def land(dest: Path, weeks: int = 0) -> None:
    """Copy the sample files into the landing folder ``dest`` with the mtimes of files.json, in their order.

    ``weeks`` shifts every time of the records, the campaigns and the files; the hour and the day of the week stay. A file that is
    already there (same size and mtime) is left alone, so landing twice changes nothing. Raises FileNotFoundError if a sample file
    is missing.
    """
    for entry in json.loads((_HERE / "files.json").read_text(encoding="utf-8")):
        content = _shifted_file(_HERE / "landing" / entry["path"], weeks)
        mtime_ms = entry["mtime_ms"] + weeks * _WEEK // timedelta(milliseconds=1)
        target = dest / entry["path"]
        if target.exists():
            there = target.stat()
            if there.st_size == len(content) and there.st_mtime_ns == mtime_ms * 1_000_000:
                continue
        put_file(target, content, mtime_ms)


def read_truth(weeks: int = 0) -> dict[str, Any]:
    """What the samples, shifted by ``weeks``, must come to: the content of truth.json."""
    truth: dict[str, Any] = json.loads(_shifted((_HERE / "truth.json").read_bytes(), weeks))
    return truth


def events_by_hour() -> list[int]:
    """How many accepted events fall into each hour of the day, in UTC."""
    hours: Counter[int] = Counter()
    for row in read_truth()["accounting"]:
        if row["event_hour"]:
            hours[datetime.fromisoformat(row["event_hour"]).hour] += row["accepted"]
    return [hours[hour] for hour in range(24)]


def _shifted_file(path: Path, weeks: int) -> bytes:
    content = path.read_bytes()
    if not weeks:
        return content
    return compress(_shifted(gzip.decompress(content), weeks)) if path.suffix == ".gz" else _shifted(content, weeks)


def _shifted(content: bytes, weeks: int) -> bytes:
    """The text with every day of the samples so many weeks later; what a broken line has in place of a day stays."""
    days: dict[bytes, bytes] = {}

    def later(found: re.Match[bytes]) -> bytes:
        day = found[0]
        if day not in days:
            days[day] = (date.fromisoformat(day.decode()) + weeks * _WEEK).isoformat().encode()
        return days[day]

    return _DAY.sub(later, content) if weeks else content
