"""``python -m services.budget``: run the budget service alone, without the rest of adtally."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from services.budget.campaigns import read_budgets
from services.budget.errors import BudgetError
from services.budget.report import read_budget_status
from services.budget.service import KEEP_DAYS, BudgetService


def main() -> int:
    """Run the service. Return the exit status: 0 done, 1 it cannot continue, 2 wrong use."""
    parser = argparse.ArgumentParser(prog="python -m services.budget", description=__doc__)
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--topic", default="ads-metrics")
    parser.add_argument("--store", type=Path, required=True, help="the SQLite file")
    parser.add_argument("--keep-days", type=int, default=KEEP_DAYS, help="keep the uuids of so many days; 0 keeps all")
    parser.add_argument("--campaigns", type=Path, help="CSV of the campaigns, or a folder of them")
    parser.add_argument("--once", action="store_true", help="end when all present messages are consumed")
    parser.add_argument("--from-start", action="store_true", help="read the topic again")
    parser.add_argument("--accept-gap", action="store_true", help="continue although messages were deleted")
    parser.add_argument("--status", action="store_true", help="consume nothing")
    options = parser.parse_args()
    client = {"bootstrap.servers": options.bootstrap_servers}
    service = BudgetService(options.store, client, options.topic, keep_days=options.keep_days or None)
    stop = threading.Event()
    try:
        if not options.status:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            service.run(stop, once=options.once, from_start=options.from_start, accept_gap=options.accept_gap)
        budgets = read_budgets(options.campaigns) if options.campaigns else []
        found = read_budget_status(
            options.store, options.topic, now=datetime.now(UTC), budgets=budgets, offsets_behind=service.lags()
        )
    except BudgetError as error:
        print(f"budget: error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(dataclasses.asdict(found), default=str, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
