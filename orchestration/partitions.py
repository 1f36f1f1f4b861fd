"""The hourly partitions that the lakehouse's assets share: one an event hour, in UTC."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

import dagster as dg

from orchestration.ledger import Ledger
from spark_jobs.config import Settings
from spark_jobs.errors import UsageError
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER
from spark_jobs.units import HOUR, HourRange

KEY_FORMAT = "%Y-%m-%d-%H:%M"
HOURS_A_RECORD = 1_000
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"


def hourly_partitions(settings: Settings, *, now: datetime | None = None) -> dg.HourlyPartitionsDefinition:
    """Every hour from the day of ``settings.start_date`` on, the running one included: the stream writes into it.

    Without a start date: from the day of ``first_of`` the hours with accepted records, or today where nothing has been ingested.
    Decided once, when the code location loads; load it again when older hours were ingested since.
    """
    now = now or datetime.now(UTC)
    start = settings.start_date or first_of(_held_hours(settings, now)) or now
    day = start.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return dg.HourlyPartitionsDefinition(start_date=day, timezone="UTC", fmt=KEY_FORMAT, end_offset=1)


def first_of(held: Sequence[datetime]) -> datetime | None:
    """The first of ``held`` (ascending) that deserves a partition; None where there is none.

    From the newest hour backwards, older hours are taken in while at least one in HOURS_A_RECORD of the hours that this adds is
    held. So one event of the year 2000 does not make a partition of each hour since: a clock that lies decides nothing.
    """
    if not held:
        return None
    first, found = held[-1], 0
    for hour in reversed(held[:-1]):
        found += 1
        if found * HOURS_A_RECORD >= (first - hour) // HOUR:
            first, found = hour, 0
    return first


def _held_hours(settings: Settings, now: datetime) -> list[datetime]:
    """The hours with accepted records, up to ``now``."""
    version = Lake(settings).version(BATCH_LEDGER)
    if version is None:
        return []
    with Ledger.open(settings) as ledger:
        return ledger.held_hours(version, now)


def key_of(hour: datetime) -> str:
    """The partition key of the hour that begins at ``hour``."""
    return hour.astimezone(UTC).strftime(KEY_FORMAT)


def hour_of(key: str) -> datetime:
    """The hour of a partition key. Raises UsageError where it is none."""
    try:
        return datetime.strptime(key, KEY_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise UsageError(f"{key!r} is not a partition", hint=f"as in {datetime.now(UTC):%Y-%m-%d}-08:00") from None


def hours_of(keys: dg.PartitionKeyRange) -> HourRange:
    """The hours of a range of partition keys, both ends included."""
    return HourRange(hour_of(keys.start), hour_of(keys.end) + HOUR)


def range_tags(hours: HourRange) -> dict[str, str]:
    """The tags of a run that takes all of ``hours`` at once."""
    return {RANGE_START_TAG: key_of(hours.start), RANGE_END_TAG: key_of(hours.end - HOUR)}


def contiguous(hours: Iterable[datetime], *, longest: int) -> Iterator[HourRange]:
    """``hours`` (ascending) as ranges without a gap, none of more than ``longest`` hours."""
    start = end = None
    for hour in hours:
        if start is None or end is None:
            start, end = hour, hour + HOUR
        elif hour == end and (end - start) // HOUR < longest:
            end = hour + HOUR
        else:
            yield HourRange(start, end)
            start, end = hour, hour + HOUR
    if start is not None and end is not None:
        yield HourRange(start, end)
