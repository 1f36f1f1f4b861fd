"""The errors of the budget service. Each says whether trying again can help (``retryable``) and what to do (``hint``)."""

from __future__ import annotations


class BudgetError(Exception):
    """The service cannot go on."""

    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class BudgetUsageError(BudgetError):
    """Wrong use: a file that is not this service's, a topic that is not there, a campaign file that cannot be read."""


class BudgetBusyError(BudgetError):
    """Another process consumes into the same file."""

    retryable = True


class BrokerError(BudgetError):
    """The broker does not answer, or refuses."""

    retryable = True


class GapError(BudgetError):
    """Messages that were never consumed are gone from the topic."""
