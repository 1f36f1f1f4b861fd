"""Reads daily budgets from a campaigns CSV of the input contract (docs/metrics.md)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from services.budget.errors import BudgetUsageError

_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Budget:
    """One row of a campaign: micros a day, and its period of validity (``valid_to`` None: no end)."""

    campaign_id: str
    store_id: str
    currency: str
    daily_budget_micros: int
    valid_from: datetime
    valid_to: datetime | None


def read_budgets(path: Path) -> list[Budget]:
    """Return the rows of a CSV file, or of all CSV files of a folder. Raises BudgetUsageError that names the file and line."""
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    return [budget for file in files for budget in _read_file(file)]


def _read_file(file: Path) -> list[Budget]:
    found = []
    line = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                line = reader.line_num
                budget, valid_to = int(row["daily_budget_micros"]), _moment(row["valid_to"]) if row["valid_to"] else None
                names = (row["campaign_id"], row["store_id"], row["currency"])
                found.append(Budget(*names, budget, _moment(row["valid_from"]), valid_to))
    except OSError as error:
        raise BudgetUsageError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, csv.Error):
        hint = "the format is that of the landing folder"
        raise BudgetUsageError(f"{file}, line {line}, is no row of campaigns", hint=hint) from None
    return found


def budget_of(budgets: Sequence[Budget], day: str, campaign_id: str, store_id: str, currency: str) -> int | None:
    """Return the micros that a campaign may spend on a day, or None without a row. Of several valid rows the newest counts."""
    start = datetime.fromisoformat(day).replace(tzinfo=UTC)
    names = (campaign_id, store_id, currency)
    valid = [
        row
        for row in budgets
        if (row.campaign_id, row.store_id, row.currency) == names
        and row.valid_from < start + _DAY
        and (row.valid_to is None or row.valid_to > start)
    ]
    return max(valid, key=lambda row: row.valid_from).daily_budget_micros if valid else None


def _moment(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    if value.tzinfo is None:
        raise ValueError("no zone")
    return value.astimezone(UTC)
