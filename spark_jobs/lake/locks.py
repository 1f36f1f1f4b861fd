"""The locks of an installation, each described once. docs/architecture.md shows this table.

They are files in ADTALLY_HOME, or leases of a lakehouse in an object store (`leases.py`). A process that needs several takes them
in the order of LOCKS, so two never wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from filelock import FileLock, Timeout

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import BusyError
from spark_jobs.lake.commit import commit_fence
from spark_jobs.lake.leases import Lease, lease_of
from spark_jobs.lake.locations import is_local


class Patience(StrEnum):
    """How long others wait for a lock."""

    NONE = "are refused at once"
    SOME = "wait ten minutes"
    ENDLESS = "wait"


SECONDS = {Patience.NONE: 0.0, Patience.SOME: 600.0, Patience.ENDLESS: -1.0}
"""The timeouts of `LockHandle`."""


@dataclass(frozen=True)
class Lock:
    """One lock. ``holder`` describes the process that holds it, ``patience`` how long others wait.

    ``busy`` and ``hint`` are the error message if the wait fails; ``{home}`` (of a lease: the lakehouse), ``{path}`` (of a lease:
    its name) and ``{seconds}`` are filled in. ``of_machine``: it is a file even if the lakehouse is in an object store.
    """

    file: str
    holder: str
    patience: Patience = Patience.ENDLESS
    busy: str = "{path} is held by another process"
    hint: str | None = None
    of_machine: bool = False

    @property
    def lease(self) -> str:
        """The name of the lease: of `.events.write.lock`, events.write."""
        return self.file.removesuffix(".lock").replace("/.", ".").removeprefix(".")


class LockHandle(Protocol):
    """One use of a lock: filelock's FileLock, or a lease."""

    def acquire(self, timeout: float) -> object:
        """Take the lock; a negative timeout waits without end. Raises filelock's Timeout."""

    def release(self) -> None:
        """Release the lock."""


UP = Lock(
    ".up.lock",
    "`adtally up`",
    Patience.NONE,
    "adtally up runs on {home} already",
    "stop it, or name another --home",
    of_machine=True,
)
INGEST = Lock(
    ".ingest.lock",
    "an ingest, or `adtally fsck` while it reads",
    Patience.NONE,
    "another ingest (or fsck) runs on {home}",
    "stop it, or let it work",
)
PUBLISH = Lock(
    ".publish.lock", "a publisher", Patience.NONE, "another process publishes from {home}", "`adtally ingest --continuous` does"
)
ATTRIBUTION = Lock(".attribution.lock", "an attribution", Patience.SOME, "another attribution has held {path} for {seconds:.0f} s")
BILLING = Lock(".billing.lock", "a billing run")
CORRECTIONS = Lock(".corrections.lock", "a reconciliation, backfill or review")
MARTS = Lock(
    "marts/.build.lock", "a build of the marts", Patience.SOME, "another build of the marts has held {path} for {seconds:.0f} s"
)
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

LOCKS = (UP, INGEST, PUBLISH, ATTRIBUTION, BILLING, CORRECTIONS, MARTS, REWRITE, WRITE_EVENTS, WRITE_ORDERS, TORN)
"""All locks, in the order in which they are taken."""

WRITE_LOCKS = {"events": WRITE_EVENTS, "orders": WRITE_ORDERS}
"""The lock of the writers of each stream's tables."""


def lock_handle(settings: Settings, lock: Lock) -> LockHandle:
    """Return a lock that is not taken yet."""
    if lock.of_machine or is_local(settings.lakehouse_uri):
        path = settings.home_path / lock.file
        disk.make_folder(path.parent)
        return FileLock(path)
    return lease_of(settings.lakehouse_uri, settings.state_uri, lock.lease, settings.lease_seconds, commit_fence)


@contextmanager
def exclusive(settings: Settings, *locks: Lock, patience_seconds: float | None = None) -> Iterator[None]:
    """Hold ``locks``, taken in the order of LOCKS. ``patience_seconds`` replaces the patience of each.

    Raises BusyError if another process does not release one of them in time.
    """
    with ExitStack() as stack:
        for lock in sorted(locks, key=LOCKS.index):
            seconds = SECONDS[lock.patience] if patience_seconds is None else patience_seconds
            held = lock_handle(settings, lock)
            try:
                held.acquire(timeout=seconds)
            except Timeout:
                raise BusyError(_busy(settings, lock, held, seconds), hint=lock.hint) from None
            stack.callback(held.release)
        yield


def _busy(settings: Settings, lock: Lock, handle: LockHandle, seconds: float) -> str:
    if not isinstance(handle, Lease):
        return lock.busy.format(home=settings.home_path, path=settings.home_path / lock.file, seconds=seconds)
    holder = handle.describe()
    message = lock.busy.format(home=handle.lakehouse, path=f"the lease {lock.lease}", seconds=seconds)
    return f"{message}: {holder}" if holder else message


def is_held(settings: Settings, lock: Lock) -> bool:
    """Return whether a process holds ``lock`` now."""
    handle = lock_handle(settings, lock)
    if isinstance(handle, Lease):
        return handle.is_taken()
    try:
        handle.acquire(timeout=0)
    except Timeout:
        return True
    handle.release()
    return False
