"""The suites, a module a table."""

from __future__ import annotations

from expectations.suites.batch_ledger import BATCH_LEDGER
from expectations.suites.events import EVENTS
from expectations.suites.marts import MART_SUITES
from expectations.suites.minute_metrics import MINUTE_METRICS
from expectations.suites.orders import ORDERS
from expectations.suites.suite import Suite

SUITES: dict[str, Suite] = {suite.table: suite for suite in (EVENTS, ORDERS, MINUTE_METRICS, BATCH_LEDGER)}
MARTS: dict[str, Suite] = {suite.table: suite for suite in MART_SUITES}

__all__ = ["MARTS", "SUITES", "Suite"]
