"""Reports what the stream committed: materialisations of the tables' partitions, from the ledger's Delta versions.

It reports each version of the ledger once, in chunks of bounded size. When hours close, it also reports those without a record, as
partitions with 0 rows: they are empty, not missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from orchestration.assets.lakehouse import TABLE_ASSETS
from orchestration.ledger import Cell, Ledger
from orchestration.partitions import hourly_partitions, key_of
from orchestration.up.instance import request_reload
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER, CAMPAIGNS, HOUR_CLOSINGS, NAMES
from spark_jobs.texts import duration
from spark_jobs.units import HOUR, floor_hour

SECONDS_BETWEEN = 60
HOURS_A_TICK = 72
COMMITS_A_TICK = 200

Event = dg.AssetMaterialization | dg.AssetObservation

STREAM_OF = {
    "ad_events": "events",
    "rejected_events": "events",
    "minute_metrics": "events",
    "orders": "orders",
    "rejected_orders": "orders",
}
STREAMS = ("events", "orders")


@dataclass(frozen=True)
class Progress:
    """The sensor's cursor.

    ``reported``: the ledger's version through which all commits are reported. ``until`` and ``after``: while versions through
    ``until`` are being reported, hours through ``after`` are done. ``empty_through``: empty hours before it are reported. ``seen``:
    the versions of the ledger and of the closings in which empty hours were searched. ``table_id`` and ``start``: the ledger and
    the first partition that this cursor is valid for. ``campaigns`` and ``names``: the reported versions of these tables.
    """

    table_id: str | None = None
    start: str | None = None
    reported: int = -1
    until: int | None = None
    after: str | None = None
    campaigns: int = -1
    names: int = -1
    empty_through: str | None = None
    seen: tuple[int, int] = (-1, -1)

    @classmethod
    def from_cursor(cls, cursor: str | None) -> Progress:
        """Return the progress of a cursor, or a new one if the cursor is missing or has another form."""
        try:
            stored = json.loads(cursor or "{}")
            return cls(**{**stored, "seen": tuple(stored.get("seen", (-1, -1)))})
        except (TypeError, ValueError):
            return cls()

    def to_cursor(self) -> str:
        """Return the cursor that Dagster stores."""
        return json.dumps(asdict(self))


def stream_progress_sensor(hours: dg.HourlyPartitionsDefinition) -> dg.SensorDefinition:
    """Return the sensor for these partitions."""

    @dg.sensor(
        name="stream_progress",
        minimum_interval_seconds=SECONDS_BETWEEN,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports what the ingest committed, per table and event hour: rows, money, lag, Delta versions. Hours that "
        "closed without a record are reported as empty.",
    )
    def stream_progress(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        """Report what was committed since the last tick."""
        before = Progress.from_cursor(context.cursor)
        settings = load_settings()
        progress, events, early = report_progress(settings, hours, before, now=datetime.now(UTC))
        if early:
            if hourly_partitions(settings).start < hours.start:
                request_reload(settings)
            context.log.warning(
                "%d hours with records are before the first partition, %s. If they are too few for partitions, `adtally reconcile` "
                "recounts them; ADTALLY_START_DATE gives them partitions",
                early,
                hours.start.isoformat(),
            )
        reported = f"{len(events)} events report the commits through version {progress.reported} of the ledger"
        reason = reported if events else "nothing new was committed"
        return dg.SensorResult(asset_events=events, skip_reason=reason, cursor=progress.to_cursor())

    return stream_progress


def report_progress(
    settings: Settings, hours: dg.HourlyPartitionsDefinition, progress: Progress, *, now: datetime
) -> tuple[Progress, list[Event], int]:
    """Return the progress after the next chunk, the chunk's events, and the number of hours without a partition.

    That number counts hours with accepted records only. Records that were rejected for their time are reported without an hour.
    """
    log = Lake(settings).log(BATCH_LEDGER)
    newest = log.latest_version()
    if newest is None:
        return Progress(), [], 0
    first = log.commit(0)
    table_id = first.table_id if first is not None else progress.table_id
    start = hours.start.isoformat()
    rebuilt = newest < progress.reported or (progress.table_id is not None and progress.table_id != table_id)
    if rebuilt or (progress.start is not None and start < progress.start):  # report everything again, to the new partitions
        progress = Progress()
    progress = replace(progress, table_id=table_id, start=start)
    if progress.reported < newest or progress.until is not None:
        # Continue the version that was begun. Else report all commits at first, and later a limited number.
        next_version = newest if progress.reported < 0 else min(newest, progress.reported + COMMITS_A_TICK)
        until = next_version if progress.until is None else min(newest, progress.until)
        return _report_commits(settings, hours, progress, until, now)
    progress, events = _report_replaced(settings, progress)
    progress, empty = _report_empty(settings, hours, progress, newest)
    return progress, [*events, *empty], 0


def _report_commits(
    settings: Settings, hours: dg.HourlyPartitionsDefinition, progress: Progress, until: int, now: datetime
) -> tuple[Progress, list[Event], int]:
    latest = floor_hour(now) + HOUR  # a clock may be a little ahead
    after = datetime.fromisoformat(progress.after) if progress.after else None
    with Ledger.open(settings) as ledger:
        cells = ledger.added(progress.reported, until)
        inside = {cell.hour for cell in cells if cell.hour is not None and hours.start <= cell.hour <= latest}
        early = {cell.hour for cell in cells if cell.accepted and cell.hour is not None and cell.hour < hours.start}
        left = sorted(hour for hour in inside if after is None or hour > after)
        chunk = left[:HOURS_A_TICK]
        lake = Lake(settings)
        versions = {asset.key: lake.version(asset.table) for asset in TABLE_ASSETS}
        report = _Report(cells, ledger.totals(until, chunk), ledger.increments(chunk), versions)
    events: list[Event] = [event for hour in chunk for event in report.hour(hour)]
    if after is None:
        events += report.without_hour(inside)
    if len(left) > len(chunk):
        return replace(progress, until=until, after=chunk[-1].isoformat()), events, len(early)
    return replace(progress, reported=until, until=None, after=None), events, len(early)


def _report_replaced(settings: Settings, progress: Progress) -> tuple[Progress, list[Event]]:
    """Report the tables that files of the landing folder replace as a whole, if their version is new."""
    found = Lake(settings).pin(CAMPAIGNS, NAMES).versions
    new: dict[str, Any] = {name: version for name, version in found.items() if version != getattr(progress, name)}
    events: list[Event] = [dg.AssetMaterialization(name, metadata={"delta_version": version}) for name, version in new.items()]
    return replace(progress, **new), events


def _report_empty(
    settings: Settings, hours: dg.HourlyPartitionsDefinition, progress: Progress, newest: int
) -> tuple[Progress, list[dg.AssetMaterialization]]:
    """Report a chunk of the closed hours in which a table got no rows."""
    closings = Lake(settings).version(HOUR_CLOSINGS)
    seen = (newest, -1 if closings is None else closings)
    if seen == progress.seen:
        return progress, []
    from spark_jobs.operate.watermark import read_closing

    closing = read_closing(settings)
    if closing.closed_through is None or closing.first_hour is None:
        return replace(progress, seen=seen), []
    through = datetime.fromisoformat(progress.empty_through) if progress.empty_through else closing.first_hour
    begin = max(through, closing.first_hour, hours.start)
    with Ledger.open(settings) as ledger:
        closed = ledger.hours(newest, begin, closing.closed_through) if begin < closing.closed_through else []
        chunk = closed[:HOURS_A_TICK]
        filled = ledger.totals(newest, chunk)
    events = [
        dg.AssetMaterialization(key, partition=key_of(hour), metadata={"rows_added": 0, "rows_in_hour": 0})
        for hour in chunk
        for key in (*STREAM_OF, "batch_ledger")
        if not any((stream, hour) in filled for stream in STREAMS if STREAM_OF.get(key, stream) == stream)
    ]
    if len(closed) > len(chunk):  # the rest at the next tick, since `seen` is unchanged
        return replace(progress, empty_through=(chunk[-1] + HOUR).isoformat()), events
    reached = max(begin, closing.closed_through)
    return replace(progress, empty_through=reached.isoformat(), seen=seen), events


class _Report:
    """The events of one chunk."""

    def __init__(
        self,
        added: Iterable[Cell],
        totals: dict[tuple[str, datetime], Cell],
        increments: dict[datetime, int],
        versions: dict[str, int | None],
    ) -> None:
        self._added = {(cell.stream, cell.hour): cell for cell in added}
        self._totals, self._increments, self._versions = totals, increments, versions

    def hour(self, hour: datetime) -> list[dg.AssetMaterialization]:
        """Return one materialisation per table that got rows in this hour."""
        cells = [(key, self._added.get((stream, hour))) for key, stream in STREAM_OF.items()]
        events = [self._event(key, hour, self._of_table(key, cell, hour)) for key, cell in cells if cell is not None]
        rows = [self._added[stream, hour] for stream in STREAMS if (stream, hour) in self._added]
        total = [self._totals[stream, hour] for stream in STREAMS if (stream, hour) in self._totals]
        figures = {
            "rows_added": sum(cell.rows for cell in rows),
            "rows_in_hour": sum(cell.rows for cell in total),
            "batches": sum(cell.batches for cell in rows),
            "corrections": sum(cell.corrections for cell in rows),
        }
        return [*events, self._event("batch_ledger", hour, figures)]

    def without_hour(self, inside: set[datetime]) -> list[dg.AssetObservation]:
        """Return how many records have a time that is invalid or outside the partitions, by the table that keeps them."""
        found = []
        for key, stream in (("rejected_events", "events"), ("rejected_orders", "orders")):
            outside = [cell for (of, hour), cell in self._added.items() if of == stream and hour not in inside]
            rejected = sum(cell.rejected + cell.conflict for cell in outside)
            if rejected:
                found.append(dg.AssetObservation(key, metadata={"rejected_without_partition": rejected}))
        return found

    def _of_table(self, key: str, cell: Cell, hour: datetime) -> dict[str, Any]:
        total = self._totals.get((cell.stream, hour), cell)
        common: dict[str, Any] = {"batches": cell.batches}
        if cell.lag_seconds is not None:  # the number for the chart, the text for people
            common |= {"lag_seconds": round(cell.lag_seconds, 3), "lag": duration(cell.lag_seconds)}
        if key in ("rejected_events", "rejected_orders"):
            added, so_far = cell.conflict + cell.rejected, total.conflict + total.rejected
            outcomes = {"rejected": cell.rejected, "conflict": cell.conflict, "duplicate": cell.duplicate}
            return {"rows_added": added, "rows_in_hour": so_far, **outcomes, **common}
        if key == "minute_metrics":
            rows = self._increments.get(hour, 0)
            return {"events_added": cell.accepted, "events_in_hour": total.accepted, "rows_in_hour": rows, **common}
        outcomes = {name: getattr(cell, name) for name in ("offered", "duplicate", "conflict", "rejected", "late")}
        return {"rows_added": cell.accepted, "rows_in_hour": total.accepted, **outcomes, **common}

    def _event(self, key: str, hour: datetime, figures: dict[str, Any]) -> dg.AssetMaterialization:
        known = {name: value for name, value in {**figures, "delta_version": self._versions[key]}.items() if value is not None}
        return dg.AssetMaterialization(key, partition=key_of(hour), metadata=known)
