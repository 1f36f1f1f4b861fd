"""Reads from the published marts which campaigns spend their budget too early."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime

from orchestration.marts.query import query_marts
from spark_jobs.config import Settings
from spark_jobs.errors import UsageError
from spark_jobs.lake.marts import readable_marts


@dataclass(frozen=True)
class EarlySpend:
    """A campaign that passed 90 % of its budget before 80 % of the day, as of the first such minute (UTC)."""

    event_date: date
    campaign_id: str
    currency: str
    event_minute: datetime
    daily_budget_micros: int
    spent_micros: int
    projected_micros: int


def early_spends(settings: Settings) -> list[EarlySpend]:
    """Return the early spends of the newest day with spend, by campaign; none if no marts, or those of an older adtally, exist."""
    if readable_marts(settings) is None:
        return []
    try:
        _, rows = query_marts(
            settings,
            """
            select event_date, campaign_id, currency, event_minute, daily_budget_micros, spent_micros, projected_micros
            from fct_budget_pacing
            where is_alert and event_date = (select max(event_date) from fct_budget_pacing)
            qualify row_number() over (partition by campaign_id, currency order by event_minute) = 1
            order by campaign_id, currency
            """,
        )
    except UsageError:
        return []
    return [EarlySpend(*row) for row in rows]
