"""Checks every byte that adtally keeps: logs, data files, indexes, corrections, the ledger's sums and unfinished batches.

Repair discards and rebuilds derived data. It removes a damaged data file from its table and recounts the rows from the raw input.
Without ``repair`` nothing changes.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np

from spark_jobs.attribution.inputs import index_folder
from spark_jobs.config import Settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.corrections.run import correcting, writing
from spark_jobs.corrections.write_ahead import decided_corrections
from spark_jobs.errors import BusyError, TableCorruptionError
from spark_jobs.ingest.agreement import check_agreement
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.dedupe.shards import ShardedIndex, latest_key_index
from spark_jobs.ingest.events import bring_index_to, keys_of_version
from spark_jobs.ingest.finish import finish, stuck_batches
from spark_jobs.ingest.source import FilesSource
from spark_jobs.lake import check
from spark_jobs.lake.acts import Act, record_act
from spark_jobs.lake.checked import DamagedError
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read, set_aside
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import INGEST, exclusive
from spark_jobs.lake.log import commit_identity
from spark_jobs.lake.reading import TableFile
from spark_jobs.lake.removal import take_files_out
from spark_jobs.lake.retirements import recountable_from
from spark_jobs.lake.runs import check_runs
from spark_jobs.lake.scratch import scratch_folder
from spark_jobs.lake.tables import (
    BATCH_LEDGER,
    BATCH_TABLES,
    EVENTS,
    MINUTE_METRICS,
    ORDERS,
    REJECTED_EVENTS,
    REJECTED_ORDERS,
    TABLES,
    Table,
)
from spark_jobs.operate.status import read_status

RUNBOOK = "docs/runbooks/fsck.md"
_FILE_KINDS = ("file_missing", "file_size", "file_damaged", "file_rows")
_REPAIR = "adtally fsck --repair"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """One damage. docs/runbooks/fsck.md explains ``kind``; ``place`` is a table, or a path under the home.

    ``can_repair``: whether ``fsck --repair`` can repair it; ``way_out``: what to do if it cannot.
    """

    kind: str
    place: str
    detail: str
    can_repair: bool
    way_out: str
    is_repaired: bool = False
    path: str = ""  # of a data file, as in its table's log


@dataclass(frozen=True)
class FsckReport:
    """The findings, and how much was read: data files and their bytes, log commits. ``left_out``: parts in use by an ingest."""

    run_id: str
    findings: list[Finding]
    left_out: list[str]
    tables: int
    commits: int
    files: int
    bytes: int
    seconds: float

    @property
    def remaining(self) -> list[Finding]:
        """The findings that were not repaired."""
        return [found for found in self.findings if not found.is_repaired]


@dataclass
class _Scan:
    """The findings so far, and how much was read."""

    findings: list[Finding] = field(default_factory=list)
    tables: int = 0
    commits: int = 0
    files: int = 0
    bytes: int = 0

    def add(
        self, kind: str, place: str, detail: object, way_out: str = _REPAIR, *, can_repair: bool = True, path: str = ""
    ) -> None:
        text = " ".join(str(detail).split())[:400]
        self.findings.append(Finding(kind, place, text, can_repair, way_out, path=path))

    def has(self, *kinds: str) -> bool:
        return any(found.kind in kinds for found in self.findings)


def fsck(settings: Settings, *, repair: bool = False, progress: Progress | None = None) -> FsckReport:
    """Check everything; with ``repair`` repair what can be repaired, then check again.

    While an ingest runs, skips its key index and unfinished batch, and ``repair`` raises BusyError.
    """
    started, run_id, report = time.monotonic(), uuid.uuid4().hex, progress or (lambda _: None)
    with _ingest_lock(settings) as is_held:
        if repair and not is_held:
            raise BusyError(f"an ingest runs on {settings.home_path}", hint=f"stop it, then run {_REPAIR} again")
        first = _scan(settings, report, is_at_rest=is_held)
        findings = first.findings
        if repair and any(found.can_repair for found in findings):
            damage = Counter(f"{found.kind} in {found.place}" for found in findings if found.can_repair)
            with suppress(TableCorruptionError):  # the log itself may be damaged; the repair goes on
                record_act(settings, Act.RESTORE, run_id, reason="fsck --repair", arguments=damage, now=datetime.now(UTC))
            remarks = _repair(settings, first, run_id, report)
            left = [*_scan(settings, report, is_at_rest=True).findings, *remarks]
            same = {(found.kind, found.place, found.path) for found in left}
            repaired = [f for f in findings if (f.kind, f.place, f.path) not in same]
            findings = [*(replace(found, is_repaired=True) for found in repaired), *left]
    seconds = time.monotonic() - started
    left_out = [] if is_held else ["key index", "unfinished batches"]
    return FsckReport(run_id, findings, left_out, first.tables, first.commits, first.files, first.bytes, seconds)


@contextmanager
def _ingest_lock(settings: Settings) -> Iterator[bool]:
    """Hold the ingest's lock; yields False if an ingest holds it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(settings, INGEST))
        except BusyError:
            yield False
            return
        yield True


def _scan(settings: Settings, report: Progress, *, is_at_rest: bool) -> _Scan:
    scan, lake = _Scan(), Lake(settings)
    readable = [table for table in TABLES.values() if _check_log(lake, table, scan)]
    scan.tables = len(readable)
    for table in readable:
        _check_files(lake, table, scan, report)
    is_whole = not scan.has(*_FILE_KINDS) and len(readable) == len(TABLES)
    if is_at_rest:
        report("key index")
        _check_key_index(settings, scan, compare=is_whole)
    _check_attribution_index(settings, scan)
    _check_corrections(settings, scan)
    if is_whole:
        report("unfinished batches")
        for batch in stuck_batches(settings) if is_at_rest else ():
            names = ", ".join(batch.changed[:3])
            detail = f"batch {batch.transaction.batch_id} cannot be finished: {names} changed after it was committed"
            scan.add("batch_file_changed", batch.stream, detail, f"put the file back, or {_REPAIR}")
        if is_at_rest:
            _check_stream_checkpoints(settings, scan)
        report("ledger against tables")
        for problem in read_status(settings, check_all=True).problems if not scan.has("batch_file_changed") else ():
            if "incomplete; it will be finished" not in problem and "nothing ingested" not in problem:
                scan.add("books", BATCH_LEDGER.name, problem)
    return scan


def _check_log(lake: Lake, table: Table, scan: _Scan) -> bool:
    """Check a table's log. Returns whether the table can be read at its newest version; False if it was not created yet."""
    if not check.has_log(lake, table):
        return False
    log = lake.log(table)
    faults = log.faults()
    scan.commits += len(log.commit_sizes())
    checkpoints = check.check_checkpoints(lake, table)
    covered = max((one.version for one in checkpoints if one.problem is None), default=-1)
    damaged = [one for one in checkpoints if one.problem is not None]
    for fault in faults:
        if fault.is_tail:
            kind, way = "commit_torn", "adtally ingest sets it aside and does its work again"
        elif fault.version <= covered:
            kind, way = "commit_covered", "nothing: a checkpoint of the log has what it did; move the file away"
        else:
            kind, way = "commit_unreadable", f"put {fault.path} back from a backup; what only it did is lost"
        is_covered = kind == "commit_covered"
        scan.add(kind, table.name, f"version {fault.version}: {fault.problem}", way, can_repair=is_covered)
    is_readable = all(fault.version <= covered and not fault.is_tail for fault in faults) and not damaged
    has_all = 0 in log.commit_sizes() and not faults
    for one in damaged:
        way = _REPAIR if has_all else f"put {one.path} back from a backup"
        scan.add("log_checkpoint", table.name, f"{one.name}: {one.problem}", way, can_repair=has_all, path=one.name)
    if is_readable and (unreadable := check.table_problem(lake, table)) is not None:
        is_readable = False
        scan.add("log_unreadable", table.name, unreadable, f"see {RUNBOOK}", can_repair=False)
    return is_readable


def _check_files(lake: Lake, table: Table, scan: _Scan, report: Progress) -> None:
    """Check presence, size, pages and rows of every data file of the newest version."""
    files = check.newest_files(lake, table)
    since = recountable_from(lake.settings)
    for number, file in enumerate(files):
        if number % 20 == 0:
            report(f"{table.name}: {number:,} of {len(files):,} data files")
        scan.files += 1
        problem = check.file_problem(lake, table, file)
        if problem is None:
            scan.bytes += file.size
        else:
            can_repair = table in BATCH_TABLES and (since is None or _begins_after(table, file, since))
            retired = f"; it may have rows from before {since:%Y-%m-%dT%HZ}, whose raw input is retired" if since else ""
            way = _REPAIR if can_repair else f"put the file back from a backup{retired}; {RUNBOOK}"
            scan.add(problem[0], table.name, f"{file.path}: {problem[1]}", way, can_repair=can_repair, path=file.path)


def _begins_after(table: Table, file: TableFile, since: datetime) -> bool:
    """Return whether statistics show that no row of a data file is from before ``since``, the first hour that can be recounted."""
    if table is EVENTS:
        low = file.low.get("event_time")
    else:
        times = {MINUTE_METRICS: "event_minute", BATCH_LEDGER: "event_hour", ORDERS: "order_time"}
        low = file.low.get(times.get(table, "ingested_at"))
    if not isinstance(low, datetime):
        return False
    return (low if low.tzinfo else low.replace(tzinfo=UTC)) >= since


def _check_stream_checkpoints(settings: Settings, scan: _Scan) -> None:
    """Compare the checkpoints of the file streams with the tables."""
    for stream, tables, rejected in (
        ("events", [EVENTS, MINUTE_METRICS, BATCH_LEDGER], REJECTED_EVENTS),
        ("orders", [ORDERS, BATCH_LEDGER], REJECTED_ORDERS),
    ):
        source = FilesSource(settings, stream, checkpoints_to_read(settings))
        try:
            check_agreement(settings, source, tables, rejected)
        except TableCorruptionError as error:
            scan.add("checkpoint", stream, error.args[0])


def _check_key_index(settings: Settings, scan: _Scan, *, compare: bool) -> None:
    """Check every byte of the key index by its checksums, and compare its keys with the table's at the version it covers."""
    index = latest_key_index(settings)
    place = settings.key_index_path.name
    if index.problem is not None:
        scan.add("key_index", place, index.problem)
    if index.table_id is None or index.version < 0:
        return
    try:
        if isinstance(index, KeyIndex):
            check_runs(settings.key_index_path)
        if not compare:
            return
        if index.commit != commit_identity(Lake(settings).log(EVENTS).commit(index.version)):
            scan.add("key_index", place, f"table events no longer has the version {index.version} that it covers")
        elif _sums_of(settings, index) != _sums(keys_of_version(settings, index.version)):
            scan.add("key_index", place, f"its keys are not those of version {index.version} of events")
    except DamagedError as damage:
        scan.add("key_index", place, damage)
    except FileNotFoundError:  # a file of an older version was vacuumed: the ingest updates or rebuilds the index
        return


def _sums_of(settings: Settings, index: KeyIndex | ShardedIndex) -> tuple[int, int, int]:
    if isinstance(index, KeyIndex):
        return _sums(index.parts())
    with scratch_folder(settings, "fsck-") as folder:
        return _sums(index.parts(folder))


def _sums(parts: Iterator[Keys]) -> tuple[int, int, int]:
    """Return the number of keys, and two sums of their hashes that do not depend on their order."""
    rows, first, second = 0, 0, 0
    for keys in parts:
        mixed = keys.low * np.uint64(0x9E3779B97F4A7C15) ^ keys.high * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= keys.fingerprint * np.uint64(0x165667B19E3779F9)
        mixed ^= mixed >> np.uint64(29)
        rows += len(keys)
        first = (first + int(np.sum(mixed, dtype=np.uint64))) % 2**64
        second = (second + int(np.sum(mixed * mixed, dtype=np.uint64))) % 2**64
    return rows, first, second


def _check_attribution_index(settings: Settings, scan: _Scan) -> None:
    """Check every byte of the indexes of attribution by their checksums, whatever rules they were made with."""
    place = index_folder(settings)
    for folder in sorted(path for path in place.glob("*") if path.is_dir()):
        try:
            check_runs(folder)
        except DamagedError as damage:
            scan.add("attribution_index", f"{place.name}/{folder.name}", damage)


def _check_corrections(settings: Settings, scan: _Scan) -> None:
    """Find corrections that were decided and not finished: a killed repair, review or backfill."""
    for token in sorted(decided_corrections(settings)):
        scan.add("correction", f"corrections/{token}", "a correction was begun and not ended")


def _repair(settings: Settings, scan: _Scan, run_id: str, report: Progress) -> list[Finding]:
    """Repair the findings. Returns what the recount could not restore."""
    lake = Lake(settings)
    for found in scan.findings:
        if found.kind == "log_checkpoint" and found.can_repair:
            check.remove_checkpoint(lake, TABLES[found.place], found.path)
        elif found.kind == "commit_covered":
            version = int(found.detail.split(":")[0].removeprefix("version "))
            check.remove_commit(lake, TABLES[found.place], version)
    if scan.has("attribution_index"):
        shutil.rmtree(index_folder(settings))
    is_blocked = any(not found.can_repair and found.kind != "log_checkpoint" for found in scan.findings)
    damaged = [found for found in scan.findings if found.kind in _FILE_KINDS and found.can_repair]
    with writing(settings):
        for name in sorted({found.place for found in damaged}):
            report(f"taking damaged files out of {name}")
            paths = [found.path for found in damaged if found.place == name]
            take_files_out(lake, TABLES[name], paths, {"fsck": {"run_id": run_id, "files": paths}})
    if is_blocked:
        return []
    for batch in stuck_batches(settings):
        report(f"finishing batch {batch.transaction.batch_id} of {batch.stream}")
        finish(settings, batch)
    for found in scan.findings:
        if found.kind == "checkpoint":  # without it the ingest reads all input again, and counts nothing twice
            set_aside(settings, found.place, f"set-aside-{run_id[:8]}")
    remarks: list[Finding] = []
    if damaged or scan.has("books", "correction", "checkpoint"):
        remarks = _recount(settings, run_id, report)
    if scan.has("key_index") or damaged:
        report("rebuilding the key index")
        index = latest_key_index(settings)
        if scan.has("key_index"):
            index.problem = "fsck"
        bring_index_to(settings, index, lake.version(EVENTS) or 0)
    return remarks


def _recount(settings: Settings, run_id: str, report: Progress) -> list[Finding]:
    """Recount everything from the raw input, not from what an earlier recount has parsed, and repair."""
    shutil.rmtree(settings.recount_path / "parsed", ignore_errors=True)
    with correcting(settings):
        pass  # finishes a killed correction
    made = []
    for left in reconcile(settings, None, repair=True, run_id=run_id, progress=report).remaining:
        if left.layer != "marts":
            hour = "" if left.event_hour is None else f" of hour {left.event_hour:%Y-%m-%dT%HZ}"
            detail = f"{left.cause}{hour}: {left.rows_different} rows; {left.detail}"
            way = "docs/runbooks/reconciliation-difference.md"
            made.append(Finding("recount", left.layer, detail, can_repair=False, way_out=way))
    return made
