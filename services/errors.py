"""The base of the errors of the simulator and the budget service, which import nothing of the other packages."""

from __future__ import annotations


class HintedError(Exception):
    """An error on one line: what is wrong, and in parentheses what to do (``hint``).

    ``exit_code`` is the process's exit status: 1 a failure, 2 wrong use. ``retryable``: trying again can help.
    """

    exit_code = 1
    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
