"""Who acts: the user, host and command that the audit log names (`lake/acts.py`)."""

from __future__ import annotations

import getpass
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Actor:
    """Who acts. ``run_id`` is Dagster's; an act's own run id replaces a missing one."""

    user_name: str
    host: str
    command: str
    run_id: str | None = None

    @classmethod
    def of_process(cls, command: str | None = None, run_id: str | None = None) -> Actor:
        """Return the user of this process, on its host. ``command`` defaults to the program.

        Arguments are left out: they may name a person.
        """
        user = "unknown"
        with suppress(OSError, KeyError):  # a container may run under a number without a name
            user = getpass.getuser()
        return cls(user, socket.gethostname(), command or Path(sys.argv[0]).name, run_id)


_actor: Actor | None = None  # of the whole process: its threads act for it too


@contextmanager
def acting_as(actor: Actor) -> Iterator[None]:
    """Let the acts of this process during the block be those of ``actor``. Without it they are those of the process."""
    global _actor
    before, _actor = _actor, actor
    try:
        yield
    finally:
        _actor = before


def present_actor() -> Actor:
    """Return the actor of the innermost `acting_as`, or the user of this process."""
    return _actor or Actor.of_process()
