"""The hourly partitions that the lakehouse's assets share: one per event hour, in UTC."""

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
    """Return every hour from the day of ``settings.start_date``, with the current one: the stream writes into it.

    Without a start date, the first day is that of ``first_hour`` of the hours with accepted records; if there are none, today. The
    code location decides this when it loads. Load it again after an ingest of older hours.
    """
    now = now or datetime.now(UTC)
    start = settings.start_date
    if start is None and (version := Lake(settings).version(BATCH_LEDGER)) is not None:
        with Ledger.open(settings) as ledger:
            start = first_hour(ledger.accepted_hours(version, now))
    start = start or now
    day = start.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return dg.HourlyPartitionsDefinition(start_date=day, timezone="UTC", fmt=KEY_FORMAT, end_offset=1)


def first_hour(filled: Sequence[datetime]) -> datetime | None:
    """Return the first of the hours with records (ascending) that gets a partition; None if there are no hours.

    Goes from the newest hour backwards and adds older hours while at least one in HOURS_A_RECORD of the added hours has records. So
    one event of the year 2000, from a wrong clock, does not make a partition of each hour since.
    """
    if not filled:
        return None
    first, found = filled[-1], 0
    for hour in reversed(filled[:-1]):
        found += 1
        if found * HOURS_A_RECORD >= (first - hour) // HOUR:
            first, found = hour, 0
    return first


def key_of(hour: datetime) -> str:
    """Return the partition key of the hour that begins at ``hour``."""
    return hour.astimezone(UTC).strftime(KEY_FORMAT)


def hour_of(key: str) -> datetime:
    """Return the hour of a partition key. Raises UsageError if it is not a key."""
    try:
        return datetime.strptime(key, KEY_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise UsageError(f"{key!r} is not a partition", hint=f"as in {datetime.now(UTC):%Y-%m-%d}-08:00") from None


def hours_of(keys: dg.PartitionKeyRange) -> HourRange:
    """Return the hours of a range of partition keys, both ends included."""
    return HourRange(hour_of(keys.start), hour_of(keys.end) + HOUR)


def range_tags(hours: HourRange) -> dict[str, str]:
    """Return the tags of a run of all ``hours``."""
    return {RANGE_START_TAG: key_of(hours.start), RANGE_END_TAG: key_of(hours.end - HOUR)}


def contiguous(hours: Iterable[datetime], *, longest: int) -> Iterator[HourRange]:
    """Yield ``hours`` (ascending) as ranges without a gap, each of ``longest`` hours at most."""
    current: HourRange | None = None
    for hour in hours:
        if current is not None and hour == current.end and len(current) < longest:
            current = HourRange(current.start, hour + HOUR)
            continue
        if current is not None:
            yield current
        current = HourRange.of(hour)
    if current is not None:
        yield current
