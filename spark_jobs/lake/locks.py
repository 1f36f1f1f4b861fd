"""The locks of an installation: files in ADTALLY_HOME, each described once. docs/architecture.md shows this table.

A process that needs several takes them in the order of LOCKS, so two never wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum

from filelock import FileLock, Timeout

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import BusyError


class Patience(StrEnum):
    """How long others wait for a lock."""

    NONE = "are refused at once"
    SOME = "wait ten minutes"
    ENDLESS = "wait"


SECONDS = {Patience.NONE: 0.0, Patience.SOME: 600.0, Patience.ENDLESS: -1.0}
"""The timeouts of FileLock."""


@dataclass(frozen=True)
class Lock:
    """One lock. ``holder`` describes the process that holds it, ``patience`` how long others wait.

    ``busy`` and ``hint`` are the error message if the wait fails; ``{home}``, ``{path}`` and ``{seconds}`` are filled in.
    """

    file: str
    holder: str
    patience: Patience = Patience.ENDLESS
    busy: str = "{path} is held by another process"
    hint: str | None = None


UP = Lock(".up.lock", "`adtally up`", Patience.NONE, "adtally up runs on {home} already", "stop it, or name another --home")
INGEST = Lock(
    ".ingest.lock", "an ingest", Patience.NONE, "another ingest runs on {home}", "stop it, or use its ADTALLY_HOME for reading"
)
PUBLISH = Lock(
    ".publish.lock", "a publisher", Patience.NONE, "another process publishes from {home}", "`adtally ingest --continuous` does"
)
ATTRIBUTION = Lock(".attribution.lock", "an attribution", Patience.SOME, "another attribution has held {path} for {seconds:.0f} s")
BILLING = Lock(".billing.lock", "a billing run")
CORRECTIONS = Lock(".corrections.lock", "a reconciliation, backfill or review")
REWRITE = Lock(
    ".events.rewrite.lock",
    "whoever removes data files from a table: compaction, vacuum, a correction that rewrites rows",
    Patience.SOME,
    "another compaction, correction or vacuum has held {path} for {seconds:.0f} s",
    "try again when it has ended",
)
WRITE_EVENTS = Lock(".events.write.lock", "a batch of events, a new price list, or a correction while it is carried out")
WRITE_ORDERS = Lock(".orders.write.lock", "a batch of orders, or a correction while it is carried out")
TORN = Lock(".torn.lock", "whoever sets a torn commit aside")

LOCKS = (UP, INGEST, PUBLISH, ATTRIBUTION, BILLING, CORRECTIONS, REWRITE, WRITE_EVENTS, WRITE_ORDERS, TORN)
"""All locks, in the order in which they are taken."""

WRITE_LOCKS = {"events": WRITE_EVENTS, "orders": WRITE_ORDERS}
"""The lock of the writers of each stream's tables."""


def file_lock(settings: Settings, lock: Lock) -> FileLock:
    """Return the lock as a file lock that is not taken yet."""
    disk.make_folder(settings.home_path)
    return FileLock(settings.home_path / lock.file)


@contextmanager
def exclusive(settings: Settings, *locks: Lock, patience_seconds: float | None = None) -> Iterator[None]:
    """Hold ``locks``, taken in the order of LOCKS. ``patience_seconds`` replaces the patience of each.

    Raises BusyError if another process does not release one of them in time.
    """
    with ExitStack() as stack:
        for lock in sorted(locks, key=LOCKS.index):
            seconds = SECONDS[lock.patience] if patience_seconds is None else patience_seconds
            held = file_lock(settings, lock)
            try:
                held.acquire(timeout=seconds)
            except Timeout:
                place = {"home": settings.home_path, "path": settings.home_path / lock.file, "seconds": seconds}
                raise BusyError(lock.busy.format(**place), hint=lock.hint) from None
            stack.callback(held.release)
        yield


def is_held(settings: Settings, lock: Lock) -> bool:
    """Return whether a process holds ``lock`` now."""
    try:
        with exclusive(settings, lock, patience_seconds=0):
            return False
    except BusyError:
        return True
