"""The errors of the budget service."""

from __future__ import annotations

from services.errors import HintedError


class BudgetError(HintedError):
    """The service cannot continue."""


class BudgetUsageError(BudgetError):
    """Wrong use: a file of another program, a missing topic, a campaign file that cannot be read."""

    exit_code = 2


class BudgetBusyError(BudgetError):
    """Another process consumes into the same file."""

    retryable = True


class BrokerError(BudgetError):
    """The broker does not answer, or refuses."""

    retryable = True


class GapError(BudgetError):
    """Messages that were never consumed were deleted from the topic."""
