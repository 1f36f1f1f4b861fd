"""Runs work in a thread beside other code."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")
_NICENESS = 10


@contextmanager
def in_background(
    name: str, run: Callable[[threading.Event], None], *, wait_seconds: Callable[[], float | None] = lambda: 0.0
) -> Iterator[None]:
    """Call ``run`` in a thread during the block. Its argument is set when the block ends.

    Then this waits up to ``wait_seconds()`` for the thread to end (None: as long as it takes).
    """
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(wait_seconds())


class Task(Generic[T]):
    """A call in a thread, whose result is fetched later. It leaves the processor to others that want it."""

    def __init__(self, name: str, call: Callable[[], T]) -> None:
        """Start the call."""
        self._call = call
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether `result` would not have to wait."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the end of the call, whether it fails or not."""
        self._thread.join()

    def result(self) -> T:
        """Wait for the end of the call. Returns its result, or raises its error."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # on Linux this is the priority of a thread
            self._results.append(self._call())
        except BaseException as error:
            self._error = error
