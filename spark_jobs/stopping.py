"""SIGTERM and SIGINT: heard within seconds, whatever this process waits for.

The first one asks for an end after the current batch; a second one ends at once. A process that does not come to its end in time,
because Java or a disk does not answer, is ended: nothing is lost by that, for a batch that was cut off is made again as it was.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from spark_jobs.errors import StoppedError

BATCH_SECONDS = 18.0  # for the current batch to end by itself
_JAVA_SECONDS = 23.0  # after the first signal: then Java is ended, and who waits for it is let go
_PROCESS_SECONDS = 27.0  # then the process
_ONE_SIGNAL_SECONDS = 1.0  # a supervisor and its own supervisor may both send one
_POLL_SECONDS = 0.25


class StopNow(BaseException):
    """Raised in the main thread by a signal that comes while nothing has begun yet."""


class StopRequest:
    """Hears the signals in a ``with`` block. ``event`` is set by the first one.

    ``end_java`` ends Java where it is this process's own; ``status`` is the exit status of a process that had to be ended.
    """

    def __init__(self, end_java: Callable[[], None] = lambda: None, *, status: int | None = None) -> None:
        self.event = threading.Event()
        self._end_java = end_java
        self._status = status
        self._done = threading.Event()
        self._raises = False
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.listen()
        if self._status is not None:
            threading.Thread(target=self._enforce, daemon=True, name="stop").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals; again after something else took them, as a new Spark session takes SIGINT."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, self._handle)
                self._previous.setdefault(number, before)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In this block a signal raises StopNow in the main thread, whatever it waits for."""
        self._raises = True
        try:
            if self.event.is_set():
                raise StopNow
            yield
        finally:
            self._raises = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.event.is_set():
            self._first = now
            self.event.set()
            if self._raises:
                self._raises = False
                raise StopNow
        elif now - self._first > _ONE_SIGNAL_SECONDS and self._status is not None:
            self._end_java()
            os._exit(130)

    def _enforce(self) -> None:
        self.event.wait()
        if self._done.wait(_JAVA_SECONDS):
            return
        self._end_java()
        if self._done.wait(_PROCESS_SECONDS - _JAVA_SECONDS):
            return
        print("adtally: ended, for it did not stop in time; nothing is lost", file=sys.stderr, flush=True)
        os._exit(self._status or 0)


@contextmanager
def lock_unless_stopped(lock: FileLock, stopping: threading.Event) -> Iterator[None]:
    """Hold a lock, waiting for it as long as it takes. Raises StoppedError where ``stopping`` is set meanwhile."""
    while not stopping.is_set():
        try:
            lock.acquire(timeout=_POLL_SECONDS)
            break
        except Timeout:
            continue
    else:
        raise StoppedError("stopped while another held the lock of this table")
    try:
        yield
    finally:
        lock.release()
