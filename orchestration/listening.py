"""Passes the progress of assets to a caller that runs them in its own process: the demo shows it as a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[object], None]

_LISTENER: ContextVar[Listener] = ContextVar("listener", default=lambda progress: None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener`` with the progress of assets that run in this thread: batches of an ingest, lines of a build."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def listener() -> Listener:
    """Return the listener of this thread. Any thread may call it."""
    return _LISTENER.get()
