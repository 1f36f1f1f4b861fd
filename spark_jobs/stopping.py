"""Handles SIGTERM and SIGINT within seconds, whatever this process waits for.

The first signal asks for an end after the current batch; a second one ends the process at once. A process that does not end in
time, because Java or a disk does not answer, is killed. Nothing is lost: an interrupted batch runs again and decides the same.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from spark_jobs.errors import StoppedError

if TYPE_CHECKING:
    from spark_jobs.lake.locks import LockHandle

# seconds after the first signal
BATCH_SECONDS = 18.0  # until which the current batch may end by itself
_JAVA_SECONDS = 23.0  # after which Java is killed, so that calls that wait for it return
_PROCESS_SECONDS = 27.0  # after which this process is killed
_ONE_SIGNAL_SECONDS = 1.0  # within which a second signal counts as the same: two supervisors may each send one
_POLL_SECONDS = 0.25


class StopNow(BaseException):
    """Raised in the main thread by a signal before any batch has begun."""


class StopRequest:
    """Handles the signals in a ``with`` block. The first one sets ``event``.

    ``end_java`` kills the Java that this process started; ``status`` is the exit status if this process has to be killed.
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
        """Install the signal handlers. Call it again after a new Spark session, which replaces that of SIGINT."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, self._handle)
                self._previous.setdefault(number, before)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Make a signal in this block raise StopNow in the main thread."""
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
def lock_unless_stopped(lock: LockHandle, stopping: threading.Event) -> Iterator[None]:
    """Hold a lock, however long it takes to get it. Raises StoppedError if ``stopping`` is set before."""
    while not stopping.is_set():
        with suppress(Timeout):
            lock.acquire(timeout=_POLL_SECONDS)
            break
    else:
        raise StoppedError("stopped while another held the lock of this table")
    try:
        yield
    finally:
        lock.release()
