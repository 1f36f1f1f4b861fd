"""The errors of this package. A failed check is not an error but a result."""

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
    """Another process has been writing the data docs for too long."""

    retryable = True
