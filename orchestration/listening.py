"""Lets whoever runs assets in its own process hear of their progress: the demo shows it as a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[object], None]

_LISTENER: ContextVar[Listener] = ContextVar("listener", default=lambda said: None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the context, ``listener`` hears of what assets that run in this thread do: batches of an ingest, lines of a build."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def listener() -> Listener:
    """Whom to tell. Ask for it in the thread of the asset, tell it from any."""
    return _LISTENER.get()
