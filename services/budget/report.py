"""Reports spend by campaign, the campaigns over their budget, and how far the service is behind the events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from services.budget.campaigns import Budget, budget_of
from services.budget.store import Store


@dataclass(frozen=True)
class CampaignSpend:
    """One campaign's day. ``spend_micros`` is rounded once, half away from zero. ``budget_micros`` None: no budget is known."""

    event_date: str
    campaign_id: str
    store_id: str
    currency: str
    impressions: int
    clicks: int
    spend_nanos: int
    spend_micros: int
    budget_micros: int | None
    is_over: bool


@dataclass(frozen=True)
class BudgetStatus:
    """The state of the service.

    ``event_minute``: the newest minute of an increment consumed. ``events_seconds_behind``: now less the end of that minute, at
    least 0. ``committed_at``: when the newest increment consumed was committed to Delta. ``consumed_seconds_after``: how long
    after that it was consumed. ``offsets_behind``: by partition, None if no broker was asked. ``kept_uuids`` identify
    redeliveries. Increments of days before ``sealed_before`` are put aside.
    """

    store: str
    topic: str
    event_minute: datetime | None
    events_seconds_behind: float | None
    committed_at: datetime | None
    consumed_seconds_after: float | None
    offsets_behind: dict[int, int] | None
    kept_uuids: int
    sealed_before: str | None
    aside: dict[str, int]
    campaigns: list[CampaignSpend] = field(default_factory=list)


def read_budget_status(
    path: Path,
    topic: str,
    *,
    now: datetime,
    budgets: Sequence[Budget] = (),
    day: str | None = None,
    offsets_behind: dict[int, int] | None = None,
) -> BudgetStatus:
    """Read the store's state, with the campaigns of ``day`` (YYYY-MM-DD; default: the newest day with spend).

    The service may run meanwhile. Raises BudgetUsageError if there is no such file.
    """
    with Store(path, read_only=True) as store:
        db = store.db
        db.execute("begin")  # all reads see one state
        row = db.execute("select event_minute_ms, committed_ms, consumed_ms from progress where topic = ?", (topic,)).fetchone()
        minute, committed, consumed = row or (None, None, None)
        sealed = db.execute("select sealed_before from topics where topic = ?", (topic,)).fetchone()
        (kept,) = db.execute("select count(*) from increments").fetchone()
        (newest,) = db.execute("select max(event_date) from keys").fetchone()
        rows = store.sums(day or newest) if day or newest else []
        asides = dict(store.asides())
    campaigns = []
    for row in rows:
        nanos, budget = row[6], budget_of(budgets, *row[:4])
        is_over = budget is not None and nanos > budget * 1000
        campaigns.append(CampaignSpend(*row, rounded_micros(nanos), budget, is_over))
    return BudgetStatus(
        store=str(path),
        topic=topic,
        event_minute=_moment(minute),
        events_seconds_behind=None if minute is None else max(0.0, now.timestamp() - minute / 1000 - 60),
        committed_at=_moment(committed),
        consumed_seconds_after=None if committed is None else (consumed - committed) / 1000,
        offsets_behind=offsets_behind,
        kept_uuids=kept,
        sealed_before=sealed[0] or None if sealed else None,
        aside=asides,
        campaigns=campaigns,
    )


def rounded_micros(nanos: int) -> int:
    """Round nanos to micros, half away from zero."""
    whole = (abs(nanos) + 500) // 1000
    return whole if nanos >= 0 else -whole


def _moment(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)
