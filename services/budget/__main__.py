"""``python -m services.budget``: the service alone, without the rest of adtally."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from services.budget.campaigns import read_budgets
from services.budget.errors import BudgetError, BudgetUsageError
from services.budget.report import read_budget_status
from services.budget.service import KEEP_DAYS, BudgetService, stop_on_signals


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit status is 0 done, 1 it could not go on, 2 wrong use."""
    parser = argparse.ArgumentParser(prog="python -m services.budget", description=__doc__)
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--topic", default="ads-metrics")
    parser.add_argument("--store", type=Path, required=True, help="the SQLite file")
    parser.add_argument("--keep-days", type=int, default=KEEP_DAYS, help="days whose uuids are kept; 0 keeps all")
    parser.add_argument("--campaigns", type=Path, help="CSV of the campaigns, or a folder of them")
    parser.add_argument("--once", action="store_true", help="end when all that is there is consumed")
    parser.add_argument("--from-start", action="store_true", help="read again what is there")
    parser.add_argument("--accept-gap", action="store_true", help="go on although messages are gone")
    parser.add_argument("--status", action="store_true", help="consume nothing")
    told = parser.parse_args(arguments)
    client = {"bootstrap.servers": told.bootstrap_servers}
    service = BudgetService(told.store, client, told.topic, keep_days=told.keep_days or None)
    stop = threading.Event()
    try:
        if not told.status:
            stop_on_signals(stop)
            service.run(stop, once=told.once, from_start=told.from_start, accept_gap=told.accept_gap)
        budgets = read_budgets(told.campaigns) if told.campaigns else []
        found = read_budget_status(told.store, told.topic, now=datetime.now(UTC), budgets=budgets, offsets_behind=service.lags())
    except BudgetError as error:
        print(f"budget: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BudgetUsageError) else 1
    print(json.dumps(dataclasses.asdict(found), default=str, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
