"""Keeps the volume and shares of each validated hour in a small file, and compares an hour with its trailing week.

The files are derived data: if one is missing or unreadable, its hour is unknown. Nothing is judged with too few known hours.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

Shares = dict[str, float]
"""Value -> weight."""

WEEK = timedelta(days=7)
MIN_HOURS = 3  # with fewer known hours nothing is judged
MIN_ROWS = 1_000  # with fewer rows on either side shares change by chance
MAX_STABILITY_INDEX = 0.25  # by convention: below 0.1 none, above 0.25 a major shift
MAX_ROBUST_Z = 6.0
MOST_VALUES = 200  # shares with more values keep the largest, and the rest as one
REST = "(rest)"
COMPARED = 20  # values compared one by one; well below MOST_VALUES, so that each of them is kept in every hour
_HOUR = timedelta(hours=1)
_SMALLEST_SHARE = 1e-4  # of a value that one side does not have; the index has no value for zero


class TrailingWeek:
    """Reads and writes the volume and the shares of each hour of one table, under ``folder``/<table>/."""

    def __init__(self, folder: Path, table: str) -> None:
        self._folder = folder / table

    def keep(self, hour: datetime, volume: float, shares: dict[str, Shares]) -> None:
        """Write the measures of an hour; replaces earlier ones."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(hour), json.dumps({"volume": volume, "shares": shares}))

    def shares(self, hour: datetime, name: str) -> Shares | None:
        """Return the sum of the shares by ``name`` over the seven days before; None if fewer than MIN_HOURS hours are known."""
        before: Counter[str] = Counter()
        known = 0
        for past in (hour - _HOUR * n for n in range(1, WEEK // _HOUR + 1)):
            kept = self._read(past)
            if kept is not None and kept[1].get(name):
                known += 1
                before.update(kept[1][name])
        return dict(before) if known >= MIN_HOURS else None

    def volumes(self, hour: datetime) -> list[float] | None:
        """Return the volumes of the same hour of the seven days before; None if fewer than MIN_HOURS hours are known."""
        days = (self._read(hour - timedelta(days=day)) for day in range(1, 8))
        volumes = [kept[0] for kept in days if kept is not None]
        return volumes if len(volumes) >= MIN_HOURS else None

    def _path(self, hour: datetime) -> Path:
        return self._folder / f"{hour.astimezone(UTC):%Y-%m-%dT%H}.json"

    def _read(self, hour: datetime) -> tuple[float, dict[str, Shares]] | None:
        try:
            kept = json.loads(self._path(hour).read_text("utf-8"))
            shares = {str(k): {str(v): float(w) for v, w in share.items()} for k, share in kept["shares"].items()}
            return float(kept["volume"]), shares
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old text or the new one."""
    made = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    made.write_text(text, "utf-8")
    made.replace(path)


def keep_largest(shares: Shares) -> Shares:
    """Keep the MOST_VALUES largest positive weights, and the sum of the others as REST."""
    ordered = sorted(((value, weight) for value, weight in shares.items() if weight > 0), key=lambda each: (-each[1], each[0]))
    rest = sum(weight for _, weight in ordered[MOST_VALUES:])
    return dict(ordered[:MOST_VALUES]) | ({REST: rest} if rest else {})


def stability_index(before: Shares, now: Shares) -> float:
    """Return the population stability index of two sets of weights; all but the largest values count as one.

    It is the sum over values of (now - before) * ln(now / before), of shares.
    """
    named = [value for value in before.keys() | now.keys() if value != REST]
    total_before, total_now = sum(before.values()), sum(now.values())
    shares = sorted(((before.get(v, 0) / total_before, now.get(v, 0) / total_now) for v in named), key=sum, reverse=True)
    kept = shares[:COMPARED]
    rest = (max(0.0, 1 - sum(b for b, _ in kept)), max(0.0, 1 - sum(n for _, n in kept)))
    pairs = [(max(b, _SMALLEST_SHARE), max(n, _SMALLEST_SHARE)) for b, n in (*kept, rest)]
    return sum((n - b) * math.log(n / b) for b, n in pairs)


def robust_z(volumes: list[float], volume: float) -> float:
    """Return the distance from the median in robust standard deviations.

    One is 1.4826 times the median absolute deviation, but not less than a tenth of the median nor than counting noise.
    """
    middle = statistics.median(volumes)
    spread = 1.4826 * statistics.median(abs(each - middle) for each in volumes)
    return abs(volume - middle) / max(spread, middle / 10, math.sqrt(middle), 1.0)
