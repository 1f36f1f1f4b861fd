"""Daily budgets, from a campaigns CSV of the input contract (docs/metrics.md)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from services.budget.errors import BudgetUsageError

_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Budget:
    """A campaign's row: micros a day, and from when until when (None: open)."""

    campaign_id: str
    store_id: str
    currency: str
    daily_budget_micros: int
    valid_from: datetime
    valid_to: datetime | None


def read_budgets(path: Path) -> list[Budget]:
    """The rows of a CSV file, or of all of a folder. Raises BudgetUsageError that names the file and line."""
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    return [budget for file in files for budget in _of_file(file)]


def _of_file(file: Path) -> list[Budget]:
    found = []
    line = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                line = reader.line_num
                found.append(
                    Budget(
                        row["campaign_id"],
                        row["store_id"],
                        row["currency"],
                        int(row["daily_budget_micros"]),
                        _moment(row["valid_from"]),
                        _moment(row["valid_to"]) if row["valid_to"] else None,
                    )
                )
    except OSError as error:
        raise BudgetUsageError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, csv.Error):
        raise BudgetUsageError(
            f"{file}, line {line}, is no row of campaigns", hint="the format is that of the landing folder"
        ) from None
    return found


def budget_of(budgets: list[Budget], day: str, campaign_id: str, store_id: str, currency: str) -> int | None:
    """Micros that a campaign may spend on a day, None where no row says so. Of several that are valid on it the last one."""
    start = datetime.fromisoformat(day).replace(tzinfo=UTC)
    names = (campaign_id, store_id, currency)
    fitting = [
        each
        for each in budgets
        if (each.campaign_id, each.store_id, each.currency) == names
        and each.valid_from < start + _DAY
        and (each.valid_to is None or each.valid_to > start)
    ]
    return max(fitting, key=lambda each: each.valid_from).daily_budget_micros if fitting else None


def _moment(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    if value.tzinfo is None:
        raise ValueError("no zone")
    return value.astimezone(UTC)
