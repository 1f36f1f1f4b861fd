"""Checks that everything adtally keeps is whole, down to the bytes, and repairs what can be had again.

Reads all of it: each table's log and data files, the indexes, the corrections, the books, and the batches that wait to be finished.
Repair discards derived data and builds it again; it takes a damaged data file out of its table and recounts its rows from the raw
input. Nothing is changed without ``repair``.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from spark_jobs.attribution.inputs import index_folder
from spark_jobs.config import Settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.corrections.run import correcting, writing
from spark_jobs.errors import BusyError, TableCorruptionError
from spark_jobs.ingest.agreement import check_agreement
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.events import bring_index_to, keys_of_version
from spark_jobs.ingest.finish import finish, stuck_batches
from spark_jobs.ingest.source import FilesSource
from spark_jobs.lake import check
from spark_jobs.lake.checked import DamagedError
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import INGEST, exclusive
from spark_jobs.lake.log import commit_identity
from spark_jobs.lake.removal import take_files_out
from spark_jobs.lake.roots import require_local
from spark_jobs.lake.runs import check_runs
from spark_jobs.lake.tables import (
    BATCH_LEDGER,
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
# tables whose rows the recount can restore from the raw input
_FROM_RAW = {table.name for table in (EVENTS, REJECTED_EVENTS, MINUTE_METRICS, BATCH_LEDGER, ORDERS, REJECTED_ORDERS)}
_OF_FILES = ("file_missing", "file_size", "file_damaged", "file_rows")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """Something that is damaged. docs/runbooks/fsck.md explains ``kind``; ``place`` is a table, or a path under the home.

    ``can_repair``: whether ``fsck --repair`` can repair it; ``way_out``: what to do if it cannot.
    """

    kind: str
    place: str
    detail: str
    can_repair: bool
    way_out: str
    is_repaired: bool = False
    path: str = ""  # of a data file, as its table's log has it


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
class _Look:
    findings: list[Finding] = field(default_factory=list)
    tables: int = 0
    commits: int = 0
    files: int = 0
    bytes: int = 0

    def add(self, kind: str, place: str, detail: object, way_out: str = "", *, can_repair: bool = True, path: str = "") -> None:
        text = " ".join(str(detail).split())[:400]
        self.findings.append(Finding(kind, place, text, can_repair, way_out or "adtally fsck --repair", path=path))

    def has(self, *kinds: str) -> bool:
        return any(found.kind in kinds for found in self.findings)


def fsck(settings: Settings, *, repair: bool = False, progress: Say | None = None) -> FsckReport:
    """Check everything; with ``repair`` repair what can be repaired, then check again.

    While an ingest runs, skips its key index and unfinished batch, and ``repair`` raises BusyError. Raises UsageError for a
    lakehouse that is not on a local path.
    """
    require_local(settings, "fsck")
    started, run_id, say = time.monotonic(), uuid.uuid4().hex, progress or (lambda _: None)
    with _ingest_lock(settings) as is_held:
        if repair and not is_held:
            raise BusyError(f"an ingest runs on {settings.home_path}", hint="stop it, then run adtally fsck --repair again")
        first = _look(settings, say, is_at_rest=is_held)
        findings = first.findings
        if repair and any(found.can_repair for found in findings):
            remarks = _repair(settings, first, run_id, say)
            left = [*_look(settings, say, is_at_rest=True).findings, *remarks]
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


# --- looking


def _look(settings: Settings, say: Say, *, is_at_rest: bool) -> _Look:
    look, lake = _Look(), Lake(settings)
    readable = [table for table in TABLES.values() if _look_at_log(lake, table, look)]
    look.tables = len(readable)
    for table in readable:
        _look_at_files(lake, table, look, say)
    whole = not look.has(*_OF_FILES) and len(readable) == len(TABLES)
    if is_at_rest:
        say("key index")
        _look_at_key_index(settings, look, compare=whole)
    _look_at_attribution_index(settings, look)
    _look_at_corrections(settings, look)
    if whole:
        say("unfinished batches")
        for batch in stuck_batches(settings) if is_at_rest else ():
            names = ", ".join(batch.changed[:3])
            detail = f"batch {batch.transaction.batch_id} cannot be finished: {names} changed after it was committed"
            look.add("batch_file_changed", batch.stream, detail, "put the file back, or adtally fsck --repair")
        if is_at_rest:
            _look_at_checkpoints(settings, look)
        say("ledger against tables")
        for problem in read_status(settings).problems if not look.has("batch_file_changed") else ():
            if "incomplete; it will be finished" not in problem and "nothing ingested" not in problem:
                look.add("books", BATCH_LEDGER.name, problem)
    return look


def _look_at_log(lake: Lake, table: Table, look: _Look) -> bool:
    """Whether the table can be read at its newest version. A table without a log was not created yet."""
    if not check.has_log(lake, table):
        return False
    log = lake.log(table)
    faults = log.faults()
    look.commits += len(log.commit_sizes())
    checkpoints = check.checkpoint_problems(lake, table)
    covered = max((check.checkpoint_version(name) for name, problem in checkpoints.items() if problem is None), default=-1)
    damaged = {name: problem for name, problem in checkpoints.items() if problem is not None}
    is_readable = True
    for fault in faults:
        if fault.is_tail:
            is_readable = False
            way = "adtally ingest sets it aside and does its work again"
            look.add("commit_torn", table.name, f"version {fault.version}: {fault.problem}", way, can_repair=False)
        elif fault.version <= covered:
            way = "nothing: a checkpoint of the log has what it did; move the file away"
            look.add("commit_covered", table.name, f"version {fault.version}: {fault.problem}", way)
        else:
            is_readable = False
            way = f"put {fault.path} back from a backup; what only it did is lost"
            look.add("commit_unreadable", table.name, f"version {fault.version}: {fault.problem}", way, can_repair=False)
    has_all = 0 in log.commit_sizes() and not faults
    for name, problem in damaged.items():
        way = "adtally fsck --repair" if has_all else f"put {check.checkpoint_path(lake, table, name)} back from a backup"
        look.add("log_checkpoint", table.name, f"{name}: {problem}", way, can_repair=has_all, path=name)
    if is_readable and not damaged and (unreadable := check.table_problem(lake, table)) is not None:
        is_readable = False
        look.add("log_unreadable", table.name, unreadable, f"see {RUNBOOK}", can_repair=False)
    return is_readable and not damaged


def _look_at_files(lake: Lake, table: Table, look: _Look, say: Say) -> None:
    """Check presence, size, pages and rows of every data file of the newest version."""
    files = check.newest_files(lake, table)
    can_repair = table.name in _FROM_RAW
    way = "adtally fsck --repair" if can_repair else f"put the file back from a backup; {RUNBOOK}"
    for number, file in enumerate(files):
        if number % 20 == 0:
            say(f"{table.name}: {number:,} of {len(files):,} data files")
        look.files += 1
        problem = check.file_problem(lake, table, file)
        if problem is None:
            look.bytes += file.size
        else:
            look.add(problem[0], table.name, f"{file.path}: {problem[1]}", way, can_repair=can_repair, path=file.path)


def _look_at_checkpoints(settings: Settings, look: _Look) -> None:
    """Compare the checkpoints of the file streams with the tables."""
    for stream, tables, rejected in (
        ("events", [EVENTS, MINUTE_METRICS, BATCH_LEDGER], REJECTED_EVENTS),
        ("orders", [ORDERS, BATCH_LEDGER], REJECTED_ORDERS),
    ):
        source = FilesSource(settings, stream)
        try:
            check_agreement(settings, source, tables, rejected)
        except TableCorruptionError as error:
            look.add("checkpoint", stream, error.args[0], path=str(source.checkpoint))


def _look_at_key_index(settings: Settings, look: _Look, *, compare: bool) -> None:
    """Check every byte of the key index by its checksums, and compare its keys with the table's at the version it covers."""
    index = KeyIndex(settings.key_index_path)
    place = settings.key_index_path.name
    if index.problem is not None:
        look.add("key_index", place, index.problem)
    if index.table_id is None or index.version < 0:
        return
    try:
        check_runs(settings.key_index_path)
        if not compare:
            return
        if index.commit != commit_identity(Lake(settings).log(EVENTS).commit(index.version)):
            look.add("key_index", place, f"table events no longer has the version {index.version} that it covers")
        elif _sums(index.parts()) != _sums(keys_of_version(settings, index.version)):
            look.add("key_index", place, f"its keys are not those of version {index.version} of events")
    except DamagedError as damage:
        look.add("key_index", place, damage)
    except FileNotFoundError:  # of an older version, vacuumed: it cannot be compared, and is caught up or rebuilt
        return


def _sums(parts: Iterator[Keys]) -> tuple[int, int, int]:
    """The number of keys, and two sums of their hashes that do not depend on their order."""
    rows, first, second = 0, 0, 0
    for keys in parts:
        mixed = keys.low * np.uint64(0x9E3779B97F4A7C15) ^ keys.high * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= keys.fingerprint * np.uint64(0x165667B19E3779F9)
        mixed ^= mixed >> np.uint64(29)
        rows += len(keys)
        first = (first + int(np.sum(mixed, dtype=np.uint64))) % 2**64
        second = (second + int(np.sum(mixed * mixed, dtype=np.uint64))) % 2**64
    return rows, first, second


def _look_at_attribution_index(settings: Settings, look: _Look) -> None:
    """Check every byte of the indexes of attribution by their checksums, whatever rules they were made with."""
    place = index_folder(settings)
    for folder in sorted(path for path in place.glob("*") if path.is_dir()):
        try:
            check_runs(folder)
        except DamagedError as damage:
            look.add("attribution_index", f"{place.name}/{folder.name}", damage)


def _look_at_corrections(settings: Settings, look: _Look) -> None:
    """Find corrections that were decided and not finished: a killed repair, review or backfill."""
    folders = sorted(settings.corrections_path.iterdir()) if settings.corrections_path.is_dir() else []
    for folder in folders:
        if not folder.name.startswith("."):
            look.add("correction", f"corrections/{folder.name}", "a correction was begun and not ended")


# --- repairing


def _repair(settings: Settings, look: _Look, run_id: str, say: Say) -> list[Finding]:
    """Repair what was found. Returns what the recount could not give back."""
    lake = Lake(settings)
    for found in look.findings:
        if found.kind == "log_checkpoint" and found.can_repair:
            check.remove_checkpoint(lake, TABLES[found.place], found.path)
        elif found.kind == "commit_covered":
            version = int(found.detail.split(":")[0].removeprefix("version "))
            check.remove_commit(lake, TABLES[found.place], version)
    if look.has("attribution_index"):
        shutil.rmtree(index_folder(settings))
    is_blocked = any(not found.can_repair and found.kind != "log_checkpoint" for found in look.findings)
    damaged = [found for found in look.findings if found.kind in _OF_FILES and found.can_repair]
    with writing(settings):
        for name in sorted({found.place for found in damaged}):
            say(f"taking damaged files out of {name}")
            paths = [found.path for found in damaged if found.place == name]
            take_files_out(lake, TABLES[name], paths, {"fsck": {"run_id": run_id, "files": paths}})
    if is_blocked:
        return []
    for batch in stuck_batches(settings):
        say(f"finishing batch {batch.transaction.batch_id} of {batch.stream}")
        finish(settings, batch)
    for found in look.findings:
        if found.kind == "checkpoint":  # without it all input is read again, and nothing counts twice
            os.replace(found.path, f"{found.path}.set-aside-{run_id[:8]}")
    remarks: list[Finding] = []
    if damaged or look.has("books", "correction", "checkpoint"):
        remarks = _recount(settings, run_id, say)
    if look.has("key_index") or damaged:
        say("rebuilding the key index")
        index = KeyIndex(settings.key_index_path)
        if look.has("key_index"):
            index.problem = "fsck"
        bring_index_to(settings, index, lake.version(EVENTS) or 0)
    return remarks


def _recount(settings: Settings, run_id: str, say: Say) -> list[Finding]:
    """Recount everything from the raw input, not from what an earlier recount has parsed, and repair."""
    shutil.rmtree(settings.recount_path / "parsed", ignore_errors=True)
    with correcting(settings):
        pass  # a killed correction is finished first
    report = reconcile(settings, None, repair=True, run_id=run_id, progress=say)
    made = []
    for left in report.remaining:
        if left.layer != "marts":
            hour = "" if left.event_hour is None else f" of hour {left.event_hour:%Y-%m-%dT%HZ}"
            detail = f"{left.cause}{hour}: {left.rows_different} rows; {left.detail}"
            way = "docs/runbooks/reconciliation-difference.md"
            made.append(Finding("recount", left.layer, detail, can_repair=False, way_out=way))
    return made
