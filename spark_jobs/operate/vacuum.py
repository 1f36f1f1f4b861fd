"""Deletes data files that nothing needs any more.

It deletes a file that its table removed longer ago than the retention, and an older file that no commit names (of a killed batch).
Whatever their age, it keeps files that one of these needs: a killed batch, which runs again on the version before it; the key index
and publishing, if they are behind; the published marts. It never touches table `campaigns`: a recount judges each batch by the
prices of its time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import takewhile

import duckdb

from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError, UsageError
from spark_jobs.failure import one_line
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import REWRITE, exclusive
from spark_jobs.lake.marts import current_marts
from spark_jobs.lake.removal import delete_unneeded_files, unneeded_files
from spark_jobs.lake.runs_copy import copied_version
from spark_jobs.lake.tables import CAMPAIGNS, EVENTS, ORDERS, TABLES, Table
from spark_jobs.lake.torn import mend_tables
from spark_jobs.operate.retire import RetireReport, retire
from spark_jobs.publish.progress import read_publications

# A batch or a build may write files, or pin versions, this long before it commits or publishes.
SHORTEST_RETENTION = timedelta(hours=1)
_HOUR = timedelta(hours=1)
_STREAMS = {EVENTS.name: "events", ORDERS.name: "orders"}


@dataclass(frozen=True)
class TableVacuum:
    """One table: the files that were deleted, or would be, and their bytes.

    ``kept_versions`` stay readable whatever their age; ``reasons`` says why. ``paths`` are relative to the table.
    """

    table: str
    files: int
    bytes: int
    kept_versions: list[int]
    reasons: dict[int, str]
    paths: list[str]


@dataclass(frozen=True)
class VacuumReport:
    """All existing tables, and the raw input that was retired (`operate/retire.py`)."""

    tables: list[TableVacuum]
    dry_run: bool
    seconds: float
    raw: RetireReport = field(default_factory=RetireReport)


def vacuum(
    settings: Settings,
    *,
    dry_run: bool,
    retention: timedelta | None = None,
    progress: Callable[[str], None] | None = None,
    now: datetime | None = None,
    run_id: str | None = None,
) -> VacuumReport:
    """Retire old raw input, then delete the data files that are not needed; with ``dry_run`` only list both.

    An ingest may run meanwhile.

    ``retention`` (default ADTALLY_VACUUM_RETENTION) is rounded up to whole hours. Raises UsageError if it is below
    SHORTEST_RETENTION, BusyError while a compaction or a correction runs, TableCorruptionError if the published marts do not name
    their versions.
    """
    started = time.monotonic()
    retention = settings.vacuum_retention if retention is None else retention
    if retention < SHORTEST_RETENTION:
        raise UsageError(
            f"a retention of {retention.total_seconds() / 3600:g} h is too short: a running batch or build may need such files",
            hint=f"at least {SHORTEST_RETENTION // _HOUR} h",
        )
    done = []
    mend_tables(settings)
    raw = retire(settings, now=now or datetime.now(UTC), dry_run=dry_run, run_id=run_id, progress=progress)
    with exclusive(settings, REWRITE):
        lake = Lake(settings)
        of_marts = _versions_of_marts(settings)
        for table in TABLES.values():
            if table is CAMPAIGNS or not lake.exists(table):
                continue
            if progress is not None:
                progress(table.name)
            reasons = _needed_versions(lake, table, of_marts.get(table.name, []))
            done.append(_vacuum_table(lake, table, -(-retention // _HOUR), reasons, dry_run=dry_run))
    return VacuumReport(done, dry_run, time.monotonic() - started, raw)


def _vacuum_table(lake: Lake, table: Table, hours: int, reasons: dict[int, str], *, dry_run: bool) -> TableVacuum:
    kept = sorted(reasons)
    sizes = unneeded_files(lake, table, hours, kept)
    paths = sorted(sizes)
    if paths and not dry_run:
        paths = sorted(sizes.keys() & set(delete_unneeded_files(lake, table, hours, kept)))
    return TableVacuum(table.name, len(paths), sum(sizes[path] for path in paths), kept, reasons, paths)


def _needed_versions(lake: Lake, table: Table, of_marts: list[int]) -> dict[int, str]:
    """Return the versions of a table that must stay readable, and why; without those that the log no longer has."""
    found: dict[int, str] = dict.fromkeys(of_marts, "the published marts were built from it")
    if table.name in _STREAMS:
        for query, before in _before_last_batches(lake, table).items():
            found[before] = f"the last batch of {query} is decided by it, should it run again"
    if table is EVENTS:
        found |= dict.fromkeys(_versions_of_index(lake), "the key index reads files of it to catch up")
    found |= dict.fromkeys(_versions_to_publish(lake, table), "files of it are still to be published")
    return {version: reason for version, reason in sorted(found.items()) if lake.is_readable(table, version)}


def _before_last_batches(lake: Lake, table: Table) -> dict[str, int]:
    """Return the version before the last batch of each query of the stream: the ingest reads it again if that batch was killed."""
    stream, settings = _STREAMS[table.name], lake.settings
    queries = {}
    checkpoints = checkpoints_to_read(settings)
    for folder in (checkpoints / stream, *sorted(checkpoints.glob(f"{stream}-*"))):
        with suppress(FileNotFoundError):
            queries[json.loads((folder / "metadata").read_text("utf-8"))["id"]] = folder.name
    found: dict[str, int] = {}
    for commit in lake.log(table).commits_backwards() if queries else ():
        if commit.txn is not None and commit.txn[0] in queries:
            found[queries.pop(commit.txn[0])] = commit.version - 1
            if not queries:
                break
    return found


def _versions_of_index(lake: Lake) -> list[int]:
    """Return versions with the files that the key index has yet to read and a later compaction removed."""
    index = KeyIndex(lake.settings.key_index_path)
    # without a table id the index is built from the newest version
    covered = [] if index.table_id is None else [index.version]
    copied = copied_version(lake.settings, lake.settings.key_index_path)
    covered += [] if copied is None else [copied]
    return _before_removals(lake, EVENTS, min(covered)) if covered else []


def _versions_to_publish(lake: Lake, table: Table) -> list[int]:
    """Return versions with the files that unpublished commits added and later commits removed."""
    topics = [topic for topic in read_publications(lake.settings) if topic.table == table.name]
    return [version for topic in topics for version in _before_removals(lake, table, topic.version)]


def _before_removals(lake: Lake, table: Table, after: int | None) -> list[int]:
    """Return the version before each commit later than ``after`` that removed files."""
    later = takewhile(lambda commit: after is None or commit.version > after, lake.log(table).commits_backwards())
    return [commit.version - 1 for commit in later if commit.removed]


def _versions_of_marts(settings: Settings) -> dict[str, list[int]]:
    """Return table -> versions from which the published marts were built."""
    path = current_marts(settings).path
    if path is None:
        return {}
    try:
        with duckdb.connect(str(path), read_only=True) as marts:
            rows = marts.sql("select distinct table_name, delta_version from mart_build").fetchall()
    except duckdb.Error as error:
        raise TableCorruptionError(
            f"{path} does not say which versions it needs: {one_line(error)}",
            hint="build the marts again, or move the file away",
        ) from error
    found: dict[str, list[int]] = {}
    for table, version in rows:
        found.setdefault(table, []).append(version)
    return found
