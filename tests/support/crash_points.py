"""The steps at which the crash tests kill a process."""

from __future__ import annotations

from spark_jobs.steps import Step

CORRECTION: tuple[Step, ...] = (
    Step.CORRECTION_DECIDED,
    Step.CORRECTED_EVENTS,
    Step.CORRECTED_REJECTS,
    Step.CORRECTED_METRICS,
    Step.CORRECTED_ORDERS,
    Step.CORRECTED_ORDER_REJECTS,
    Step.CORRECTED_LEDGER,
    Step.RESTATEMENTS,
    Step.HOUR_RULES,
    Step.RECONCILIATIONS,
    Step.CORRECTION_DONE,
)
"""The steps of a correction, in their order."""

_OWN_STEPS = (
    Step.CAMPAIGNS,
    Step.EVENTS,
    Step.KEY_INDEX,
    Step.REJECTED_EVENTS,
    Step.MINUTE_METRICS,
    Step.EVENTS_LEDGER,
    Step.ORDERS,
    Step.REJECTED_ORDERS,
    Step.ORDERS_LEDGER,
)

# Every point of a batch at which the tests kill it: before and after each of our steps, and around Spark's two steps ("before
# offsets" is the same point as "after commits" of the previous batch).
CRASH_POINTS: tuple[tuple[str, Step], ...] = (
    ("after", Step.OFFSETS),
    *((moment, step) for step in _OWN_STEPS for moment in ("before", "after")),
    ("before", Step.COMMITS),
    ("after", Step.COMMITS),
)
