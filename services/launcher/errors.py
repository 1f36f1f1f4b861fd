"""The errors of the launcher. Each says whether trying again can help (``retryable``) and what to do (``hint``)."""

from __future__ import annotations


class ServiceError(Exception):
    """A service did not start, did not end, or did not answer."""

    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ServiceBusyError(ServiceError):
    """Another process starts or stops the same service right now."""

    retryable = True


class ServiceUsageError(ServiceError):
    """Wrong use, or a machine that lacks something: a port that is taken, a jar that is not the one pinned."""


class PinotQueryError(ServiceError):
    """Pinot refused a statement. ``code`` is its own: 150 cannot be parsed, 190 no such table, 710 no such column."""

    def __init__(self, message: str, *, code: int, hint: str | None = None) -> None:
        super().__init__(f"query failed: {message}", hint=hint)
        self.code = code


class PartitionIdleError(ServiceError):
    """Pinot answers, and no part of it reads a partition of a table's topic."""
