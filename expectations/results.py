"""The results of a validation."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any


class Severity(StrEnum):
    """ERROR: the data are wrong, so nothing may be built from them. WARN: a person should look."""

    ERROR = "error"
    WARN = "warn"


@dataclass(frozen=True)
class CheckOutcome:
    """The result of one expectation. ``observed`` None: it was not judged (``expected`` says why), which counts as met.

    ``observed`` is the number of unexpected rows, or what ``expected`` names instead. ``failing_rows``: a few examples, with the
    columns that identify a row and the column concerned.
    """

    name: str
    expectation: str
    column: str
    severity: Severity
    success: bool
    observed: float | None
    expected: str
    failing_rows: list[dict[str, Any]]


@dataclass(frozen=True)
class HourValidation:
    """The result for a table's hour (None: all of it) at one Delta version (None: not a Delta table).

    ``success``: every expectation is met. ``error_failed``: one of severity error is not, so nothing may be built from the hour.
    ``page``: its page of the data docs.
    """

    table: str
    hour: datetime | None
    version: int | None
    success: bool
    error_failed: bool
    results: list[CheckOutcome]
    rows: int
    seconds: float
    page: Path | None = None

    @property
    def failed(self) -> list[CheckOutcome]:
        """The expectations that are not met, errors first."""
        return sorted((r for r in self.results if not r.success), key=lambda r: (r.severity is not Severity.ERROR, r.name))
