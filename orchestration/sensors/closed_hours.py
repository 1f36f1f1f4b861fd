"""Starts the checks, the recount, the compaction and the marts of hours that have closed, and of no others."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import dagster as dg

from orchestration.ledger import Ledger
from orchestration.partitions import contiguous, key_of, range_tags
from spark_jobs.config import load_settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER
from spark_jobs.units import HourRange

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

SECONDS_BETWEEN = 120
HOURS_A_RUN = 48
RUNS_A_TICK = 4


def closed_hours_sensor(hours: dg.HourlyPartitionsDefinition, job: UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    """Return the sensor that runs ``job`` for these partitions."""

    @dg.sensor(
        name="closed_hours",
        job=job,
        minimum_interval_seconds=SECONDS_BETWEEN,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Runs the maintenance of hours that every source has passed, contiguous ones in one run. Names the sources "
        "that are silent and hold hours open.\n\nRunbook: `docs/runbooks/silent-source.md`",
    )
    def closed_hours(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        """Request runs of the hours that closed since the last tick."""
        from spark_jobs.operate.watermark import read_closing

        settings = load_settings()
        closing = read_closing(settings)
        silent = ", ".join(source.name for source in closing.silent)
        waits = f"; silent sources hold hours open: {silent}" if silent else ""
        version = Lake(settings).version(BATCH_LEDGER)
        if closing.closed_through is None or closing.first_hour is None or version is None:
            return dg.SensorResult(skip_reason=f"no hour is closed yet{waits}", cursor=context.cursor)
        begin = max(_asked_through(context.cursor, hours) or closing.first_hour, hours.start)
        with Ledger.open(settings) as ledger:
            closed = ledger.hours(version, begin, closing.closed_through)
        ranges = list(contiguous(closed, longest=HOURS_A_RUN))[:RUNS_A_TICK]
        if not ranges:
            reason = f"closed through {closing.closed_through:%Y-%m-%dT%HZ}, all of it asked for{waits}"
            return dg.SensorResult(skip_reason=reason, cursor=context.cursor)
        return dg.SensorResult(run_requests=[_request(found) for found in ranges], cursor=_cursor(hours, ranges[-1].end))

    return closed_hours


def _cursor(hours: dg.HourlyPartitionsDefinition, through: datetime) -> str:
    """Return the interval from the first partition through the end of the requested hours, as ISO 8601."""
    return f"{hours.start.isoformat()}/{through.isoformat()}"


def _asked_through(cursor: str | None, hours: dg.HourlyPartitionsDefinition) -> datetime | None:
    """Return the end of the requested hours; None if there were none, or if the partitions begin earlier now."""
    if not cursor:
        return None
    start, _, through = cursor.rpartition("/")
    earlier = bool(start) and hours.start < datetime.fromisoformat(start)
    return None if earlier else datetime.fromisoformat(through)


def _request(hours: HourRange) -> dg.RunRequest:
    run_key = f"closed-hours-{key_of(hours.start)}-{len(hours)}"
    if len(hours) == 1:
        return dg.RunRequest(run_key=run_key, partition_key=key_of(hours.start))
    return dg.RunRequest(run_key=run_key, tags=range_tags(hours))
