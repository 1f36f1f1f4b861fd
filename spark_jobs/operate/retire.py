"""Retires raw input: moves landing files and raw copies of topics to an archive after their retention, or drops them.

Raw input is retired only if nothing needs it any more: its batches are in the ledger, their hours are closed, the newest recount of
each hour found no difference after the hour's last batch, and their days are billed. A file that a batch set aside stays: an
operator may release it. The order makes a killed run safe: copy to the archive, commit the decision to `raw_retirements`, remove.
The next run finishes what is decided.

From then on a recount speaks only of the hours after the retired ones (`recountable_from`).
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from spark_jobs.audit.checkpoints import PREFIX
from spark_jobs.audit.inputs import ACCEPTED
from spark_jobs.audit.landing import LandedFile, landed_files
from spark_jobs.audit.plans import BatchPlan, read_plans
from spark_jobs.billing.job import billed_through
from spark_jobs.config import Settings
from spark_jobs.lake.acts import Act, act_info, complete_audit_log
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.landing_view import remove_landed
from spark_jobs.lake.locks import CORRECTIONS, REWRITE, exclusive
from spark_jobs.lake.places import open_place
from spark_jobs.lake.replaced_files import ReplacedFiles
from spark_jobs.lake.retirements import read_retirements, recountable_from
from spark_jobs.lake.tables import BATCH_LEDGER, RAW_RETIREMENTS, RAW_TABLES, RECONCILIATIONS, STREAMS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.watermark import read_closing
from spark_jobs.steps import Step, durable
from spark_jobs.units import from_micros

_FILES_AT_ONCE = 500  # archived, decided and removed together


@dataclass(frozen=True)
class RetireReport:
    """Landing files and rows of raw tables that were retired, or would be, and their bytes.

    ``waiting`` files and days are old enough and still needed: not recounted, not billed, or set aside. ``recountable_from`` is the
    first hour that a recount can speak of (None: all hours).
    """

    files: int = 0
    bytes: int = 0
    raw_days: list[str] = field(default_factory=list)
    waiting: int = 0
    archive: str | None = None
    recountable_from: datetime | None = None


@dataclass(frozen=True)
class _Settled:
    """The batches of a stream that need no raw input any more, and their newest hour with an accepted record (None: no such hour).

    Hours in which everything was rejected do not count: a lying clock may name any hour.
    """

    newest_hour: dict[tuple[str, int], datetime | None]


def retire(
    settings: Settings,
    *,
    now: datetime,
    dry_run: bool = False,
    run_id: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> RetireReport:
    """Retire what is older than ADTALLY_RAW_RETENTION and not needed; with ``dry_run`` only count it. Without a retention nothing.

    Recounts, reviews and backfills wait meanwhile.
    """
    if settings.raw_retention is None or not Lake(settings).exists(BATCH_LEDGER):
        return RetireReport(recountable_from=recountable_from(settings))
    run = _Run(settings, now, run_id or uuid.uuid4().hex, progress or (lambda _: None), dry_run)
    if dry_run:
        return run.retire()
    ensure_tables(settings)
    with exclusive(settings, CORRECTIONS):
        report = run.retire()
        complete_audit_log(settings)
    return report


class _Run:
    """One run, under the lock of corrections."""

    def __init__(self, settings: Settings, now: datetime, run_id: str, say: Callable[[str], None], dry_run: bool) -> None:
        assert settings.raw_retention is not None
        self._settings, self._now, self._run_id, self._say, self._dry_run = settings, now, run_id, say, dry_run
        self._lake = Lake(settings)
        self._before = now - timedelta(days=settings.raw_retention)
        self._replaced = ReplacedFiles(settings)

    def retire(self) -> RetireReport:
        files = size = waiting = 0
        days: list[str] = []
        for stream in STREAMS:
            if not self._dry_run:
                self._finish(stream)
            plans = read_plans(self._settings, self._lake.version(ACCEPTED[stream]) or 0, ACCEPTED[stream])
            settled = self._settled(stream)
            for group, still in self._files(stream, plans, settled):
                files, size, waiting = files + len(group), size + sum(one.raw.size for one, _ in group), waiting + still
                if group and not self._dry_run:
                    self._retire_files(stream, group)
            for day, rows in self._raw_days(stream, plans, settled):
                days.append(f"{RAW_TABLES[stream].name} {day}")
                if not self._dry_run:
                    self._retire_day(stream, day, rows)
        return RetireReport(files, size, days, waiting, self._settings.raw_archive_uri, recountable_from(self._settings))

    # --- what is not needed any more

    def _settled(self, stream: str) -> _Settled:
        """Return the batches whose hours are closed, recounted without a difference since their last batch, and billed."""
        snapshot = self._lake.pin(BATCH_LEDGER, RECONCILIATIONS)
        closing, billed = read_closing(self._settings), billed_through(self._settings)
        with self._lake.database() as database:
            rows = database.execute(
                f"""
                with ledger as (from {snapshot.scan(BATCH_LEDGER)}),
                booked as (select event_hour, max(ingested_at) as booked_at from ledger where event_hour is not null group by 1),
                runs as (
                    select event_hour, run_at, bool_and(cause = 'none' or is_repaired) as is_equal
                    from {snapshot.scan(RECONCILIATIONS)} where layer is distinct from 'marts' group by 1, 2
                ),
                newest as (select event_hour, max(run_at) as run_at, arg_max(is_equal, run_at) as is_equal from runs group by 1),
                recounted as (
                    select event_hour, coalesce(is_equal and run_at >= booked_at, false) as is_recounted
                    from booked left join newest using (event_hour)
                )
                select _query_id, _batch_id, event_hour, coalesce(is_recounted, false)
                from (
                    select _query_id, _batch_id, if(sum(accepted) != 0, event_hour, null) as event_hour
                    from ledger where stream = '{stream}' group by _query_id, _batch_id, ledger.event_hour
                ) left join recounted using (event_hour)
                """
            ).fetchall()
        newest: dict[tuple[str, int], datetime | None] = {}
        needed = set()
        for query, batch, hour, is_recounted in rows:
            key = (query, batch)
            newest.setdefault(key, None)
            if hour is None:
                continue
            if not (is_recounted and closing.is_closed(hour) and billed is not None and hour.date() < billed):
                needed.add(key)
            before = newest[key]
            newest[key] = hour if before is None else max(before, hour)
        return _Settled({key: hour for key, hour in newest.items() if key not in needed})

    def _files(
        self, stream: str, plans: list[BatchPlan], settled: _Settled
    ) -> Iterator[tuple[list[tuple[LandedFile, datetime | None]], int]]:
        """Yield groups of landing files to retire, each with its newest hour, and how many old files are still needed."""
        taken: dict[str, list[BatchPlan]] = {}
        for plan in plans:
            for file in plan.files:
                taken.setdefault(file.name, []).append(plan)
        group: list[tuple[LandedFile, datetime | None]] = []
        waiting = 0
        for name, found in landed_files(self._settings, stream).items():
            if from_micros(found.raw.mtime_ms * 1000) >= self._before:
                continue
            own = taken.get(name, [])
            if not own or not all(self._is_done(plan, found, settled) for plan in own):
                waiting += 1
                continue
            hours = [hour for plan in own if (hour := settled.newest_hour[plan.query_id, plan.batch_id]) is not None]
            group.append((found, max(hours, default=None)))
            if len(group) == _FILES_AT_ONCE:
                yield group, 0
                group = []
        yield group, waiting

    def _is_done(self, plan: BatchPlan, found: LandedFile, settled: _Settled) -> bool:
        """Return whether a batch has taken a landed file as it is now, and needs it no more."""
        state = (found.raw.mtime_ms, found.raw.size)
        is_same = any(
            self._replaced.present(one.name, one.modified_ms, one.size) == state for one in plan.files if one.name == found.name
        )
        return is_same and (plan.query_id, plan.batch_id) in settled.newest_hour and not plan.is_set_aside(found.name)

    def _raw_days(self, stream: str, plans: list[BatchPlan], settled: _Settled) -> Iterator[tuple[date, list[dict[str, Any]]]]:
        """Yield the days of a raw table to retire, each with a row of `raw_retirements` for each partition."""
        raw = RAW_TABLES[stream]
        snapshot = self._lake.pin(raw)
        if raw not in snapshot or not snapshot.files(raw):
            return
        with self._lake.database() as database:
            found = database.execute(
                f"""
                select ingested_date, '{PREFIX}' || cluster || '/' || source_topic || '/' || source_partition, min(source_offset),
                    max(source_offset) + 1, sum(octet_length(value))::bigint, max(ingested_at)
                from {snapshot.scan(raw)} where ingested_date < date '{self._before.date()}' group by 1, 2 order by 1, 2
                """
            ).fetchall()
        days: dict[date, list[dict[str, Any]] | None] = {}
        for day, name, first, end, size, at in found:
            own = [plan for plan in plans if any(r.name == name and r.start < end and first < r.end for r in plan.ranges)]
            is_read = _covers([(r.start, r.end) for plan in own for r in plan.ranges if r.name == name], first, end)
            is_done = is_read and all((plan.query_id, plan.batch_id) in settled.newest_hour and not plan.set_aside for plan in own)
            rows = days.setdefault(day, [])
            if rows is None or not is_done:
                days[day] = None
                continue
            hours = [hour for plan in own if (hour := settled.newest_hour[plan.query_id, plan.batch_id]) is not None]
            row = {"source_file": name, "first_offset": first, "end_offset": end, "ingested_date": day}
            rows.append(row | {"size_bytes": size, "modified_at": at, "newest_hour": max(hours, default=None)})
        yield from ((day, rows) for day, rows in days.items() if rows)

    # --- retiring

    def _retire_files(self, stream: str, group: list[tuple[LandedFile, datetime | None]]) -> None:
        self._say(f"retiring {len(group)} landing files of {stream}")
        rows = []
        landing = open_place(self._settings.landing_uri)
        for found, hour in group:
            with landing.local_files([found.name]) as (path,):
                digest, target = self._archive(path, found.name)
            row = {"source_file": found.name, "size_bytes": found.raw.size, "modified_at": from_micros(found.raw.mtime_ms * 1000)}
            rows.append(row | {"sha256": digest, "newest_hour": hour, "archived_to": target})
        self._decide(stream, rows)
        with durable(Step.RAW_REMOVED):
            remove_landed(self._settings, [found.name for found, _ in group])

    def _retire_day(self, stream: str, day: date, rows: list[dict[str, Any]]) -> None:
        raw = RAW_TABLES[stream]
        self._say(f"retiring {raw.name} of {day}")
        target = None
        files = self._lake.pin(raw).files(raw, ("ingested_date", [str(day)]))
        if self._settings.raw_archive_uri is not None:
            table = open_place(self._lake.uri(raw))
            for file in files:
                with table.local_files([unquote(file.path)]) as (path,):
                    _, target = self._archive(path, f"{raw.name}/{unquote(file.path)}")
            target = target and f"{self._settings.raw_archive_uri}/{raw.name}/ingested_date={day}"
        self._decide(stream, [{**row, "archived_to": target} for row in rows])
        self._remove_days(stream, {day})

    def _archive(self, path: Path, name: str) -> tuple[str, str | None]:
        """Copy a file to the archive; return its hash and where it is (None without an archive)."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self._settings.raw_archive_uri is None:
            return digest, None
        with durable(Step.RAW_ARCHIVED):
            open_place(self._settings.raw_archive_uri).upload(path, name)
        return digest, f"{self._settings.raw_archive_uri}/{name}"

    def _decide(self, stream: str, rows: Iterable[dict[str, Any]]) -> None:
        known = {"stream": stream, "retired_at": self._now, "run_id": self._run_id}
        made = [{**row, **known} for row in rows]
        arguments = {
            "stream": stream,
            "pieces": len(made),
            "archive": self._settings.raw_archive_uri,
            "first": made[0]["source_file"],
        }
        reason = f"older than {self._settings.raw_retention} days, recounted and billed"
        info = act_info(Act.RETIRE, reason=reason, arguments=arguments, now=self._now, run_id=self._run_id)
        table = pa.Table.from_pylist(made, RAW_RETIREMENTS.schema)
        self._lake.append(RAW_RETIREMENTS, table, Step.RAW_RETIREMENTS, info=info)

    def _remove_days(self, stream: str, days: set[date]) -> None:
        raw = RAW_TABLES[stream]
        with exclusive(self._settings, REWRITE):
            snapshot = self._lake.pin(raw)
            removed = snapshot.files(raw, ("ingested_date", [str(day) for day in days]))
            if removed:
                self._lake.commit(raw, Step.RAW_REMOVED, base=snapshot.version(raw), remove=removed)

    def _finish(self, stream: str) -> None:
        """Remove what an earlier run decided and did not remove: files that still are as they were, and days of the raw table."""
        retired = read_retirements(self._lake, stream)
        landed = landed_files(self._settings, stream) if retired.files else {}
        left = [name for name, found in landed.items() if (found.raw.mtime_ms, found.raw.size) in retired.files.get(name, ())]
        if left:
            with durable(Step.RAW_REMOVED):
                remove_landed(self._settings, left)
        rows = self._lake.rows(RAW_RETIREMENTS, "stream", "ingested_date").to_pylist()
        days = {row["ingested_date"] for row in rows if row["stream"] == stream and row["ingested_date"] is not None}
        if days:
            self._remove_days(stream, days)


def _covers(spans: list[tuple[int, int]], first: int, end: int) -> bool:
    """Return whether ``spans`` together have all offsets [first, end)."""
    for start, stop in sorted(spans):
        if start > first:
            return False
        first = max(first, stop)
    return first >= end
