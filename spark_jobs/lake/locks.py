"""The locks that maintenance takes, files in ADTALLY_HOME. Taken in the order: corrections, rewrite, write of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from spark_jobs.config import Settings
from spark_jobs.errors import BusyError

REWRITE_LOCK = ".events.rewrite.lock"
PATIENCE_SECONDS = 600.0


@contextmanager
def rewriting(settings: Settings, *, patience_seconds: float | None = None) -> Iterator[None]:
    """Held by whoever takes data files out of a table: compaction, a correction that rewrites rows, vacuum.

    Two that rewrite the same files would each add their copy of the rows: Delta's own check of conflicts lets it pass where both
    only rearrange (docs/decisions/0005). Appends need no lock. Raises BusyError where another does not let go in time.
    """
    seconds = PATIENCE_SECONDS if patience_seconds is None else patience_seconds
    settings.home_path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.home_path / REWRITE_LOCK, timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"another compaction, correction or vacuum has held {settings.home_path / REWRITE_LOCK} for {seconds:.0f} s",
            hint="try again when it has ended",
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_lock(settings: Settings, stream: str) -> FileLock:
    """Held by whoever writes the tables of a stream, for a batch at most. That of events is `campaigns`' too."""
    return FileLock(settings.home_path / f".{stream}.write.lock")
