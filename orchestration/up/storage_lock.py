"""Lets machines that share Dagster's storage exclude each other, by locks in the database.

Each is an advisory lock of Postgres that a connection holds: it ends with its process, and with its machine once the database
misses the answers to its keepalives. A machine that cannot reach the database loses its locks, but cannot queue a run either.
A storage in ADTALLY_HOME has one user, `adtally up`, and needs no such lock.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from spark_jobs.config import Settings
from spark_jobs.errors import MachineError
from spark_jobs.failure import one_line

if TYPE_CHECKING:
    from psycopg2.extensions import connection

DAEMON = "daemon"
"""Held by the machine that runs the schedules, the sensors and the watch over runs."""

QUEUE = "queue"
"""Held while a machine takes a run from the queue: two that take at once would both see a free pool."""

PREPARATION = "preparation"
"""Held while a code server creates the tables of the storage."""

_TURN_SECONDS = 0.5
# A machine that is switched off or cut off says nothing: the database ends its connection after some 20 s.
_SESSION = (
    "set tcp_keepalives_idle = 5; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3; set idle_session_timeout = 0"
)


def machine_lock(socket: str) -> str:
    """Return the name of the lock that the code server at ``socket`` holds while it runs."""
    return f"machine {socket}"


def check_storage(settings: Settings) -> None:
    """Raise MachineError if Dagster's storage is shared and does not answer."""
    lock = StorageLock(settings, "check")
    try:
        lock.try_acquire()
    except Exception as error:  # psycopg2's, of several kinds
        raise MachineError(f"Dagster's storage does not answer: {one_line(error)}", hint="see ADTALLY_DAGSTER_STORAGE") from None
    finally:
        lock.close()


class StorageLock:
    """A lock of Dagster's storage. Without a shared storage it is always free. Use it from one thread at a time."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._url = settings.dagster_storage
        self._key = int.from_bytes(hashlib.sha256(f"adtally {name}".encode()).digest()[:8], "big", signed=True)
        self._connection: connection | None = None

    def try_acquire(self) -> bool:
        """Take the lock if it is free; return whether this object holds it now. Raises psycopg2's errors."""
        if self._url is None or self.is_held():
            return True
        try:
            return self._ask("select pg_try_advisory_lock(%s)")
        except Exception:
            self.close()
            raise

    def is_held(self) -> bool:
        """Return whether this object holds the lock. A lock whose connection broke is not held."""
        if self._url is None:
            return True
        # The two halves of a key of 64 bits, as pg_locks shows them.
        held = (
            "select exists (select from pg_locks where pid = pg_backend_pid() and locktype = 'advisory' and granted "
            "and (classid::bigint << 32) | objid::bigint = %s)"
        )
        try:
            return self._connection is not None and self._ask(held)
        except Exception:  # psycopg2's, of several kinds
            self.close()
            return False

    def release(self) -> None:
        """Give the lock back, and keep the connection. Raises psycopg2's errors."""
        if self._connection is not None:
            self._ask("select pg_advisory_unlock(%s)")

    def close(self) -> None:
        """End the connection, and with it the hold on the lock."""
        if self._connection is not None:
            with suppress(Exception):  # it is broken
                self._connection.close()
            self._connection = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock within the context; wait until it is free."""
        while not self.try_acquire():
            time.sleep(_TURN_SECONDS)
        try:
            yield
        finally:
            self.close()

    def _ask(self, question: str) -> bool:
        import psycopg2  # here: only a shared storage needs it

        if self._connection is None:
            assert self._url is not None
            self._connection = psycopg2.connect(
                self._url.get_secret_value().replace("+psycopg2", "", 1),
                connect_timeout=10,
                keepalives_idle=5,
                keepalives_interval=5,
                keepalives_count=3,
            )
            self._connection.autocommit = True
            with self._connection.cursor() as cursor:
                cursor.execute(_SESSION)
        with self._connection.cursor() as cursor:
            cursor.execute(question, (self._key,))
            row = cursor.fetchone()
        return row is not None and bool(row[0])
