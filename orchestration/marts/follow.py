"""Builds the near-real-time marts soon after each batch, in a process that stays (docs/decisions/0028).

It looks for a new commit of the ledger, builds the days that changed, and then pauses at least twice as long as the build used the
processor. So building takes a third of a core at most, however large the days are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from orchestration.marts.build import GROUPS, MartBuild, build_marts
from orchestration.marts.pins import pin_versions
from orchestration.marts.query import query_marts
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, BusyError
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import BATCH_LEDGER

GROUP = GROUPS[0]
DISK_SECONDS, STORE_SECONDS = 3.0, 60.0  # in a store each build uploads every mart
_LIST_SECONDS = 60.0  # between two listings of the log, for commits that are not the next one: the table may be a new one
_CPU_SHARE = 1 / 3
_BUILT_AGAIN_AFTER = timedelta(minutes=30)


def nothing_to_build(settings: Settings, group: str, *, now: datetime) -> str | None:
    """Return why the marts of ``group`` need no build now; None if they do."""
    try:
        newest = pin_versions(settings)
    except AdtallyError as error:
        return str(error)
    sql = f"select table_name, delta_version, built_at from mart_build where mart_group = '{group}'"
    try:
        built = query_marts(settings, sql)[1]
    except AdtallyError:  # no marts yet, or marts of an older version
        return None
    age = now - max((at for *_, at in built), default=datetime.min).replace(tzinfo=UTC)
    if {table: version for table, version, _ in built} != newest or age > _BUILT_AGAIN_AFTER:
        return None
    return f"nothing was committed since the build of {age.total_seconds() / 60:.0f} minutes ago"


def build_after_batches(settings: Settings, stop: threading.Event, progress: Callable[[MartBuild], None]) -> None:
    """Build the near-real-time marts after each commit of the ledger, until ``stop`` is set. Call ``progress`` after each build.

    While another build runs, on this machine or another one, it waits and then builds only what that one lacks. Raises what
    `build_marts` raises otherwise.
    """
    log = DeltaLog(settings.table_uri(BATCH_LEDGER.name))
    ledger, interval, look = _Ledger(log), _interval(settings), 10 * log.poll_seconds
    while not stop.is_set():
        if not ledger.has_news():
            stop.wait(look)
            continue
        began, used = time.monotonic(), time.process_time()
        if nothing_to_build(settings, GROUP, now=datetime.now(UTC)) is None:
            try:
                progress(build_marts(settings, GROUP, patience_seconds=0, threads=1))
            except BusyError:
                stop.wait(look)
                continue
        ledger.note()
        stop.wait(began + pause_between(interval, time.process_time() - used) - time.monotonic())


def pause_between(interval_seconds: float, cpu_seconds: float) -> float:
    """Return the seconds from the begin of a build to the next one."""
    return max(interval_seconds, cpu_seconds / _CPU_SHARE)


def _interval(settings: Settings) -> float:
    """Return the shortest time between two builds, in seconds."""
    if settings.marts_interval is not None:
        return settings.marts_interval.total_seconds()
    return DISK_SECONDS if settings.state_uri == str(settings.home_path) else STORE_SECONDS


class _Ledger:
    """The newest version of the ledger, and the one before the last build. A look costs one attempt to open a file."""

    def __init__(self, log: DeltaLog) -> None:
        self._log = log
        self._newest: int | None = None
        self._noted: int | None = None
        self._listed_at = -_LIST_SECONDS

    def has_news(self) -> bool:
        """Return whether there is another version than the noted one."""
        now = time.monotonic()
        is_due = now - self._listed_at >= _LIST_SECONDS
        if self._newest is None or is_due or self._log.commit(self._newest + 1) is not None:
            self._newest, self._listed_at = self._log.latest_version(), now
        return self._newest != self._noted

    def note(self) -> None:
        """Note the version of the last look: a build has read it, or a newer one."""
        self._noted = self._newest
