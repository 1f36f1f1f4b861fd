"""The trailing week: what the hours before an hour looked like, kept as a small file an hour when it is validated.

Derived: a file that is missing or cannot be read is an hour of which nothing is known. Without enough of them nothing is judged.
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

from expectations.profile import REST, Profile

WEEK = timedelta(days=7)
MIN_HOURS = 3  # known hours below which nothing is judged
COMPARED = 20  # values compared one by one; well below what is kept, so that each of them is kept in every hour
MIN_ROWS = 1_000  # below it, on either side, shares move by chance
_HOUR = timedelta(hours=1)
_SMALLEST_SHARE = 1e-4  # of a value that one side does not have; the index has no value for zero


class TrailingWeek:
    """Profiles of one table under ``folder``/<table>/."""

    def __init__(self, folder: Path, table: str) -> None:
        self._folder = folder / table

    def keep(self, hour: datetime, profile: Profile) -> None:
        """Write an hour's profile, in place of the one that it had."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"volume": profile.volume, "shares": profile.shares})
        path = self._path(hour)
        made = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
        made.write_text(text, "utf-8")
        made.replace(path)

    def stability_index(self, hour: datetime, name: str, profile: Profile) -> float | None:
        """How far the shares by ``name`` have moved from those of the seven days before; None: too little is known.

        Population stability index, the sum over values of (now - before) * ln(now / before).
        """
        before: Counter[str] = Counter()
        known = 0
        for past in (hour - _HOUR * n for n in range(1, WEEK // _HOUR + 1)):
            kept = self._read(past)
            if kept is not None and kept[1].get(name):
                known += 1
                before.update(kept[1][name])
        now = profile.shares[name]
        if known < MIN_HOURS or min(before.total(), sum(now.values())) < MIN_ROWS:
            return None
        return stability_index(dict(before), now)

    def robust_z(self, hour: datetime, profile: Profile) -> float | None:
        """How unusual the hour's volume is among the same hour of the seven days before; None: too little is known."""
        days = (self._read(hour - timedelta(days=day)) for day in range(1, 8))
        volumes = [kept[0] for kept in days if kept is not None]
        return robust_z(volumes, profile.volume) if len(volumes) >= MIN_HOURS else None

    def _path(self, hour: datetime) -> Path:
        return self._folder / f"{hour.astimezone(UTC):%Y-%m-%dT%H}.json"

    def _read(self, hour: datetime) -> tuple[float, dict[str, dict[str, float]]] | None:
        try:
            kept = json.loads(self._path(hour).read_text("utf-8"))
            shares = {str(k): {str(v): float(w) for v, w in share.items()} for k, share in kept["shares"].items()}
            return float(kept["volume"]), shares
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def stability_index(before: dict[str, float], now: dict[str, float]) -> float:
    """The population stability index of two sets of weights. All but the largest values count as one."""
    named = [value for value in before.keys() | now.keys() if value != REST]
    total_before, total_now = sum(before.values()), sum(now.values())
    shares = sorted(((before.get(v, 0) / total_before, now.get(v, 0) / total_now) for v in named), key=sum, reverse=True)
    kept = shares[:COMPARED]
    rest = (max(0.0, 1 - sum(b for b, _ in kept)), max(0.0, 1 - sum(n for _, n in kept)))
    pairs = [(max(b, _SMALLEST_SHARE), max(n, _SMALLEST_SHARE)) for b, n in (*kept, rest)]
    return sum((n - b) * math.log(n / b) for b, n in pairs)


def robust_z(volumes: list[float], volume: float) -> float:
    """Distance from the median in robust standard deviations.

    1.4826 times the median absolute deviation, but not less than a tenth of the median nor than counting noise.
    """
    middle = statistics.median(volumes)
    spread = 1.4826 * statistics.median(abs(each - middle) for each in volumes)
    return abs(volume - middle) / max(spread, middle / 10, math.sqrt(middle), 1.0)
