"""Runs a reconciliation that includes the marts: a repair builds them again if they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestration.marts import build_marts
from spark_jobs.config import Settings
from spark_jobs.corrections.reconcile import ReconcileReport, check_marts, reconcile
from spark_jobs.operate.watermark import require_closed
from spark_jobs.units import HourRange


def run_reconciliation(
    settings: Settings,
    hours: HourRange | None,
    *,
    repair: bool = False,
    run_id: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> ReconcileReport:
    """Recount ``hours`` (None: all hours of the ledger), compare, and with ``repair`` correct what differs.

    A repair builds marts again that contradict their tables, and compares them again. Raises UsageError if an hour is not closed.
    """
    if hours is not None:
        require_closed(settings, hours)
    report = reconcile(settings, hours, repair=repair, run_id=run_id, progress=progress)
    if not repair or not any(found.layer == "marts" for found in report.differences):
        return report
    # from all days: the tables have not changed, the marts are wrong all the same
    build_marts(settings, is_full=True, progress=progress)
    still = {(found.event_hour, found.campaign_id) for found in check_marts(settings, hours)}
    differences = [
        replace(found, is_repaired=True) if found.layer == "marts" and (found.event_hour, found.campaign_id) not in still else found
        for found in report.differences
    ]
    return replace(report, differences=differences)
