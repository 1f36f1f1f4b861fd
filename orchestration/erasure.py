"""Carries out erasures to the end: the engine's rewrite, then new marts, a recount, and the proof with its receipt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime

from orchestration.marts.build import build_marts
from orchestration.reconciliation import run_reconciliation
from spark_jobs.config import Settings
from spark_jobs.erasure.job import Receipt, erase, prove
from spark_jobs.lake.marts import current_marts


def carry_out_erasures(
    settings: Settings,
    user_ids: Iterable[str] = (),
    *,
    now: datetime | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Receipt]:
    """Erase ``user_ids`` and everybody in the queue, and finish what was killed; returns a receipt for each erasure proven.

    Builds the marts again, in full, if there were any. Raises AdtallyError, and keeps the erasure unproven, if an id is still
    somewhere, a total has changed, or the recount differs.
    """
    runs = erase(settings, user_ids, now=now, say=progress)
    if not runs:
        return []
    if any(run.had_marts for run in runs) and current_marts(settings).path is None:
        build_marts(settings, is_full=True, progress=progress)
    progress("recounting")
    report = run_reconciliation(settings, None, repair=False, progress=progress)
    progress("looking for what is left")
    return [prove(settings, run, now=now, reconciled=not report.remaining) for run in runs]
