"""Decide when a query of the continuous ingest looks for its next batch (docs/decisions/0027).

Spark would look again at once. After a batch that took as much as a batch may take, the source has probably more, so the query
does that. After a smaller batch it waits until the interval since the begin of that batch is over: small batches are fresh, but
each has a fixed cost. A look that finds nothing is followed by a pause of the interval, however long the look took. The interval is
so long that looking takes a tenth of a core at most, however many files a landing folder has.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from spark_jobs.config import Settings
from spark_jobs.lake.landing_view import has_view

DISK_SECONDS = 1.0
STORE_SECONDS = 5.0  # each batch and each look cost requests
_LOOK_SHARE = 0.1
_COUNT_SECONDS = 60.0  # between two estimates of what a look costs, because an estimate lists the files, too


def default_interval(settings: Settings) -> float:
    """Return the seconds between two small batches if nobody has chosen them."""
    is_on_disk = settings.state_uri == str(settings.home_path) and not has_view(settings)
    return DISK_SECONDS if is_on_disk else STORE_SECONDS


class Pace:
    """The pauses between the batches of one query. ``look_seconds`` returns the CPU time of a look for new input."""

    def __init__(
        self,
        interval_seconds: float,
        look_seconds: Callable[[], float] = lambda: 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shortest, self._look_seconds, self._now = interval_seconds, look_seconds, now
        self._interval, self._estimate_at = interval_seconds, -math.inf
        self._ended = threading.Event()

    @property
    def interval_seconds(self) -> float:
        """The seconds from the begin of a small batch to the next look, and between two looks."""
        if self._now() >= self._estimate_at:
            self._interval = max(self._shortest, self._look_seconds() / _LOOK_SHARE)
            self._estimate_at = self._now() + _COUNT_SECONDS
        return self._interval

    def pause_after(self, started: float, *, is_full: bool) -> float:
        """Wait after a batch that began at ``started``. Return the seconds that were to wait: 0 after a full batch."""
        left = 0.0 if is_full else max(0.0, started + self.interval_seconds - self._now())
        self._ended.wait(left)
        return left

    def end(self) -> None:
        """End the present pause, and make no other."""
        self._ended.set()
