"""Ranges of whole hours in UTC: what closing, compaction, reconciliation and backfill work on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from spark_jobs.errors import UsageError

HOUR = timedelta(hours=1)


def floor_hour(moment: datetime) -> datetime:
    """The beginning of the hour (UTC) in which ``moment``, which has a zone, lies."""
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def earlier(moment: datetime, by: timedelta) -> datetime:
    """``moment`` less ``by``, and no earlier than the year 1, with which time begins here."""
    start = datetime.min.replace(tzinfo=moment.tzinfo)
    return start if moment - start < by else moment - by


@dataclass(frozen=True, order=True)
class HourRange:
    """The hours from ``start`` until before ``end``, both whole hours with a zone. Raises UsageError where it is none or empty."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        for moment in (self.start, self.end):
            if moment.tzinfo is None or floor_hour(moment) != moment:
                raise UsageError(f"{moment.isoformat()} is not a whole hour in UTC", hint="as in 2025-06-02T08:00:00Z")
        if self.end <= self.start:
            raise UsageError(f"the range from {self.start:%Y-%m-%dT%H:%MZ} to {self.end:%Y-%m-%dT%H:%MZ} holds no hour")

    @classmethod
    def of(cls, hour: datetime) -> HourRange:
        """The single hour that begins at ``hour``."""
        return cls(hour, hour + HOUR)

    def __iter__(self) -> Iterator[datetime]:
        hour = self.start
        while hour < self.end:
            yield hour
            hour += HOUR

    def __len__(self) -> int:
        return (self.end - self.start) // HOUR

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%dT%HZ} to {self.end:%Y-%m-%dT%HZ}"
