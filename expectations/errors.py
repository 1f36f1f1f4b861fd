"""What can go wrong while checking. A failed check is no error: it is a result."""

from __future__ import annotations


class ExpectationsError(Exception):
    """Something could not be checked. ``hint`` says what to do."""

    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}: {hint}")
        self.hint = hint


class UnknownTableError(ExpectationsError):
    """There is no suite of that name."""


class UnreadableTableError(ExpectationsError):
    """A table, a version of it, or the file of the marts cannot be read."""


class DocsBusyError(ExpectationsError):
    """Somebody else has been writing the data docs for longer than one waits."""

    retryable = True
