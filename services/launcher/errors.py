"""The errors of services on this machine. `adtally` prints each on one line; their exit status is 1, or 2 for wrong use."""

from __future__ import annotations

from spark_jobs.errors import AdtallyError, BusyError, UsageError


class ServiceError(AdtallyError):
    """A service did not start, did not end, or did not answer."""


class ServiceBusyError(ServiceError, BusyError):
    """Another process starts or stops the same service right now."""


class ServiceUsageError(ServiceError, UsageError):
    """Wrong use, or a port that is taken."""


class PinotQueryError(ServiceError):
    """Pinot refused a statement. ``code`` is Pinot's: 150 cannot be parsed, 190 no such table, 710 no such column."""

    def __init__(self, message: str, *, code: int, hint: str | None = None) -> None:
        super().__init__(f"query failed: {message}", hint=hint)
        self.code = code


class PartitionIdleError(ServiceError):
    """Pinot answers, and no part of it reads a partition of a table's topic."""
