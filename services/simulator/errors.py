"""The errors of the simulator. Each says whether trying again can help (``retryable``) and what to do (``hint``)."""

from __future__ import annotations


class SimulationError(ValueError):
    """Arguments that cannot be right, or an output folder that already holds something."""

    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message


class DeliveryError(RuntimeError):
    """A cluster did not take all records. Sending them again is safe: they have the same ids."""

    retryable = True

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
