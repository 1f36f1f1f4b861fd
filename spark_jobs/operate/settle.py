"""What follows from counting, in its order: invalid traffic found, orders credited, closed days billed."""

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
    """What one run did."""

    review: ReviewReport
    attribution: AttributionReport
    billing: BillingReport


def settle(
    settings: Settings,
    *,
    run_id: str | None = None,
    now: datetime | None = None,
    progress: Callable[[str], None] | None = None,
) -> Settlement:
    """Bring reviews, credits and the billing ledger up to what is ingested; where nothing changed, nothing is written.

    The order matters: a click found invalid is neither credited nor billed. Killed and run again it comes to the same.
    """
    name = run_id or uuid.uuid4().hex
    return Settlement(
        review(settings, run_id=name, now=now, progress=progress),
        attribute(settings, run_id=name, now=now, progress=progress),
        bill(settings, run_id=name, now=now, progress=progress),
    )
