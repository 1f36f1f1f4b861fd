"""Runs the steps after counting, in order: find invalid traffic, credit orders, bill closed days."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from spark_jobs.attribution.job import AttributionReport, attribute
from spark_jobs.billing.job import BillingReport, bill
from spark_jobs.config import Settings
from spark_jobs.traffic.review import ReviewReport, review


@dataclass(frozen=True)
class Settlement:
    """The reports of one run."""

    review: ReviewReport
    attribution: AttributionReport
    billing: BillingReport


def settle(
    settings: Settings, *, run_id: str | None = None, now: datetime | None = None, progress: Callable[[str], None] | None = None
) -> Settlement:
    """Update reviews, credits and the billing ledger to what is ingested; writes nothing if nothing changed.

    The order matters: an invalid click is neither credited nor billed. A killed run gives the same result when run again.
    """
    name = run_id or uuid.uuid4().hex
    return Settlement(
        review(settings, run_id=name, now=now, progress=progress),
        attribute(settings, run_id=name, now=now, progress=progress),
        bill(settings, run_id=name, now=now, progress=progress),
    )
