"""Units of time and their conversions. Moments are datetimes in UTC, or whole microseconds since the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from spark_jobs.errors import UsageError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US
NO_HOUR = -(2**31)
"""The hour of a record without a readable time."""

HOUR = timedelta(hours=1)


def floor_hour(moment: datetime) -> datetime:
    """Return the start (UTC) of the hour that contains ``moment``, which has a zone."""
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def earlier(moment: datetime, by: timedelta) -> datetime:
    """Return ``moment - by``, but not before the year 1, the first that a datetime can hold."""
    start = datetime.min.replace(tzinfo=moment.tzinfo)
    return start if moment - start < by else moment - by


def to_micros(moment: datetime) -> int:
    """Return the whole microseconds from the epoch to ``moment``, which has a zone."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def from_micros(micros: int) -> datetime:
    """Return the moment ``micros`` microseconds after the epoch."""
    return EPOCH + timedelta(microseconds=micros)


def hour_number(moment: datetime) -> int:
    """Return the number of the hour that contains ``moment``: hours since the epoch."""
    return (moment - EPOCH) // HOUR


def hour_moment(hour: int) -> datetime | None:
    """Return the moment at which hour number ``hour`` begins; None for NO_HOUR."""
    return None if hour == NO_HOUR else EPOCH + timedelta(hours=hour)


@dataclass(frozen=True, order=True)
class HourRange:
    """The hours from ``start`` until before ``end``, both whole hours with a zone. Raises UsageError otherwise, or if empty."""

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
        """Return the range of the single hour that starts at ``hour``."""
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
