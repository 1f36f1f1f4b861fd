"""Finds the closed hours, from the progress of the sources or an operator's decision, without Spark.

Hour H is closed when the progress of every source is past H + 1 h + ADTALLY_HOUR_GRACE. A source is a stream and a region of the
ledger; its progress is the newest time of receipt, at most the time of ingestion, so neither a fast clock of a sender nor the wall
clock closes an hour. A silent source, and a cluster of kafka.toml without any event yet, keep the hours open until they send, are
retired (ADTALLY_RETIRED_SOURCES), or an operator closes the hours (table `hour_closings`). The progress of a region with only
unread files is the time of the oldest file, which is read first. Nothing closes before the first event was read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.config import Settings
from spark_jobs.errors import UsageError
from spark_jobs.ingest.files.landing import oldest_file_at, region_folders
from spark_jobs.ingest.kafka.config import read_kafka
from spark_jobs.lake.acts import Act, act_info, complete_audit_log
from spark_jobs.lake.chain import append_linked
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.landing_view import refresh_landing
from spark_jobs.lake.tables import BATCH_LEDGER, HOUR_CLOSINGS, STREAMS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step
from spark_jobs.units import HOUR, HourRange, earlier, floor_hour

_SOURCE = ("stream", "source", "region")
_LEDGER_COLUMNS = (*_SOURCE, "event_hour", "accepted", "max_received_at", "ingested_at", "_run_id")


@dataclass(frozen=True)
class SourceProgress:
    """The progress of one source. ``progress_at`` None: no record of it was accepted yet.

    Such a source keeps no hour open, unless it ``is_awaited``: a cluster of kafka.toml without any event yet. A region with only
    unread files is awaited too; its progress is the modification time of the oldest file.
    """

    stream: str
    source: str
    region: str
    progress_at: datetime | None
    last_ingested_at: datetime | None
    is_silent: bool
    is_retired: bool
    is_awaited: bool = False

    @property
    def name(self) -> str:
        """The name in ADTALLY_RETIRED_SOURCES."""
        return f"{self.stream}/{self.region}"


@dataclass(frozen=True)
class Closing:
    """The closed hours: those that end at or before ``closed_through`` (None: none).

    ``by_hand_through`` is the part that operators closed, ``first_hour`` the earliest hour with an accepted record.
    """

    closed_through: datetime | None = None
    by_hand_through: datetime | None = None
    first_hour: datetime | None = None
    sources: list[SourceProgress] = field(default_factory=list)

    @property
    def silent(self) -> list[SourceProgress]:
        """The sources that keep hours open because they are silent."""
        return [source for source in self.sources if source.is_silent]

    def is_closed(self, hour: datetime) -> bool:
        """Whether the hour that begins at ``hour`` is closed."""
        return self.closed_through is not None and self.closed_through - hour >= HOUR


def read_closing(settings: Settings) -> Closing:
    """Read which hours are closed; none if nothing was ingested."""
    lake = Lake(settings)
    ledger = lake.rows(BATCH_LEDGER, *_LEDGER_COLUMNS)
    # rows of corrections do not show what a source has sent, except those that a repair wrote in place of lost ones
    ledger = ledger.filter(pc.or_(pc.is_null(ledger["_run_id"]), pc.is_valid(ledger["max_received_at"])))
    sources = _sources(settings, ledger)
    progress = [source.progress_at for source in sources if source.progress_at is not None and not source.is_retired]
    is_held = any(source.is_awaited and not source.progress_at and not source.is_retired for source in sources)
    # neither orders alone nor unread files close an hour
    is_held |= not any(source.stream == "events" and source.progress_at and not source.is_awaited for source in sources)
    through = floor_hour(earlier(min(progress), settings.hour_grace)) if progress and not is_held else None
    by_hand = pc.max(lake.rows(HOUR_CLOSINGS, "closed_through")["closed_through"]).as_py()
    hours = ledger.filter(pc.greater(ledger["accepted"], 0))["event_hour"]
    return Closing(
        closed_through=max((moment for moment in (through, by_hand) if moment is not None), default=None),
        by_hand_through=by_hand,
        first_hour=pc.min(hours).as_py(),
        sources=sources,
    )


def close_by_hand(settings: Settings, through: datetime, *, reason: str, closed_by: str, now: datetime | None = None) -> Closing:
    """Close all hours that end at or before ``through``, whatever the sources say; returns the closed hours.

    Raises UsageError if ``through`` is no whole hour, is in the future or closes no open hour, and without a reason or a name.
    """
    if through.tzinfo is None or floor_hour(through) != through:
        raise UsageError(f"{through.isoformat()} is not a whole hour in UTC", hint="as in 2025-06-02T08:00:00Z")
    if not reason.strip() or not closed_by.strip():
        raise UsageError("closing hours by hand needs a reason and the name of who closes them")
    now = now or datetime.now(UTC)
    closing = read_closing(settings)
    newest = max((source.progress_at for source in closing.sources if source.progress_at is not None), default=now)
    if through > max(newest, now):
        raise UsageError(f"{_text(through)} lies in the future", hint=f"it is {now:%Y-%m-%dT%H:%MZ}")
    if closing.closed_through is not None and through <= closing.closed_through:
        raise UsageError(f"the hours through {_text(through)} are closed already", hint=f"through {_text(closing.closed_through)}")
    ensure_tables(settings)
    row: dict[str, Any] = {"closed_through": through, "reason": reason.strip(), "closed_by": closed_by.strip(), "closed_at": now}
    info = act_info(Act.CLOSE, reason=row["reason"], arguments={"through": through}, now=now, by=row["closed_by"])
    append_linked(Lake(settings), HOUR_CLOSINGS, lambda _: [row], Step.HOUR_CLOSINGS, batch_id=0, info=info)
    complete_audit_log(settings)
    return read_closing(settings)


def require_closed(settings: Settings, hours: HourRange) -> None:
    """Raise UsageError if an hour of ``hours`` is open; it names the first one and the silent sources."""
    closing = read_closing(settings)
    first_open = next((hour for hour in hours if not closing.is_closed(hour)), None)
    if first_open is None:
        return
    closed = f"closed through {_text(closing.closed_through)}" if closing.closed_through else "no hour is closed yet"
    silent = ", ".join(
        f"{source.name} ({f'since {source.progress_at:%Y-%m-%dT%H:%MZ}' if source.progress_at else 'nothing came yet'})"
        for source in closing.silent
    )
    waits = f"; silent: {silent}, see docs/runbooks/silent-source.md" if silent else ""
    unread = [source.name for source in closing.sources if source.is_awaited and not (source.is_silent or source.is_retired)]
    if unread:
        waits += f"; landed and not ingested yet: {', '.join(unread)}"
    raise UsageError(f"hour {_text(first_open)} is not closed", hint=f"{closed}{waits}")


def _sources(settings: Settings, ledger: pa.Table) -> list[SourceProgress]:
    received, ingested = ledger["max_received_at"], ledger["ingested_at"]
    progress = pc.if_else(pc.greater(received, ingested), ingested, received)  # null where nothing was accepted
    groups = ledger.append_column("progress_at", progress).group_by(list(_SOURCE))
    rows = groups.aggregate([("progress_at", "max"), ("ingested_at", "max")]).sort_by([(name, "ascending") for name in _SOURCE])
    known = []
    for row in rows.to_pylist():
        is_retired = f"{row['stream']}/{row['region']}" in settings.retired_sources
        place = (row["stream"], row["source"], row["region"])
        known.append(SourceProgress(*place, row["progress_at_max"], row["ingested_at_max"], False, is_retired))
    newest = max((one.progress_at for one in known if one.progress_at is not None and not one.is_retired), default=None)
    for at, one in enumerate(known):
        if newest is not None and one.progress_at is not None and not one.is_retired:
            known[at] = replace(one, is_silent=newest - one.progress_at > settings.silent_after)
    known += _unread(settings, {(source.stream, source.source, source.region) for source in known})
    heard = {source.region for source in known if (source.stream, source.source) == ("events", "kafka") and source.progress_at}
    for name in (cluster.name for cluster in read_kafka(settings).consumed if cluster.name not in heard):
        is_retired = f"events/{name}" in settings.retired_sources
        known = [source for source in known if (source.stream, source.source, source.region) != ("events", "kafka", name)]
        known.append(SourceProgress("events", "kafka", name, None, None, not is_retired, is_retired, is_awaited=True))
    return known


def _unread(settings: Settings, known: set[tuple[str, str, str]]) -> Iterator[SourceProgress]:
    """Yield the regions with landed files of which none was read. Files are read in the order of their modification times."""
    refresh_landing(settings)
    for stream in STREAMS:
        for region in region_folders(settings.landing_path / stream):
            if (stream, "files", region) in known:
                continue
            oldest = oldest_file_at(settings.landing_path, stream, region)
            if oldest is not None:
                is_retired = f"{stream}/{region}" in settings.retired_sources
                yield SourceProgress(stream, "files", region, oldest, None, False, is_retired, is_awaited=True)


def _text(hour: datetime) -> str:
    return f"{hour:%Y-%m-%dT%HZ}"
