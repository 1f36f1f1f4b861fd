"""Builds the marts beside the published ones and puts them in their place by one rename."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb
from filelock import FileLock, Timeout

from orchestration.marts.dbt_runner import (
    DbtFolders,
    git_revision,
    install_delta_extension,
    one_line,
    project_dir,
    run_dbt,
)
from orchestration.marts.pins import pin_versions
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, BusyError

_LEFTOVERS = ".build-*"


@dataclass(frozen=True)
class MartBuild:
    """A published build. ``versions``: Delta table -> version read; ``rows``: mart -> number of rows."""

    build_id: str
    built_at: datetime
    git_revision: str | None
    versions: dict[str, int]
    rows: dict[str, int]
    nodes_passed: int
    seconds: float
    path: Path


def build_marts(settings: Settings, *, progress: Callable[[str], None] | None = None, now: datetime | None = None) -> MartBuild:
    """Builds, checks and publishes the marts; what was published stays untouched until then, and after a failure.

    The versions of the Delta tables are pinned first (the ledger before the others). dbt then builds every model and
    runs every unit test and data test in a new file, which takes the place of ``settings.marts_path`` by a rename:
    whoever has the old file open goes on reading the old build.

    ``progress`` gets a line at each step. ``now`` (with a zone) is the build's time; it decides which row of a campaign
    is the current one.

    Raises BusyError when another build runs, AdtallyError when a table does not exist yet or a model or test fails
    (its name is in the message, dbt's run_results.json is kept), UsageError when the lakehouse is not a local path.
    """
    say = progress or (lambda line: None)
    began = time.monotonic()
    folder = settings.marts_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".build.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError("another build of the marts runs", hint="wait until it is done") from None
    try:
        _remove_leftovers(folder)
        built_at = (now or datetime.now(UTC)).astimezone(UTC)
        build_id = f"{built_at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
        versions = pin_versions(settings)
        say("pinned " + ", ".join(f"{name} at version {version}" for name, version in versions.items()))
        install_delta_extension()
        project = project_dir()
        revision = git_revision(project)
        # A folder, so that the database is called `marts` while it is built as well, and its spill files stay inside.
        workplace = folder / f".build-{build_id}"
        workplace.mkdir()
        try:
            new = workplace / settings.marts_path.name
            passed = run_dbt(
                "build",
                project=project,
                folders=_dbt_folders(folder),
                variables={
                    "lakehouse": settings.lakehouse_uri,
                    "delta_versions": versions,
                    "build_id": build_id,
                    "built_at": f"{built_at:%Y-%m-%d %H:%M:%S.%f}",
                    "git_revision": revision or "",
                },
                environment={
                    "ADTALLY_DBT_MARTS_PATH": str(new),
                    "ADTALLY_DBT_WORK_PATH": str(workplace / "work.duckdb"),
                },
                progress=progress,
            )
            rows = _seal(new)
            _publish(new, settings.marts_path)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
        seconds = time.monotonic() - began
        say(f"published build {build_id} after {seconds:.1f} s")
        return MartBuild(
            build_id=build_id,
            built_at=built_at,
            git_revision=revision,
            versions=versions,
            rows=rows,
            nodes_passed=passed,
            seconds=seconds,
            path=settings.marts_path,
        )
    finally:
        lock.release()


def _dbt_folders(folder: Path) -> DbtFolders:
    folders = DbtFolders(target=folder / "dbt" / "target", logs=folder / "dbt" / "logs")
    folders.target.mkdir(parents=True, exist_ok=True)
    folders.logs.mkdir(parents=True, exist_ok=True)
    return folders


def _remove_leftovers(folder: Path) -> None:
    """Removes what a build that was killed left. The caller holds the lock, so no running build is among them."""
    for path in folder.glob(_LEFTOVERS):
        if path.name == ".build.lock":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _seal(path: Path) -> dict[str, int]:
    """Checkpoints the new file so that it needs no WAL, and counts the rows of its tables. Raises AdtallyError."""
    try:
        with duckdb.connect(str(path)) as connection:
            connection.execute("checkpoint")
            names = connection.execute(
                "select table_name from duckdb_tables() "
                "where database_name = current_database() and schema_name = 'main' order by table_name"
            ).fetchall()
            rows = {}
            for (name,) in names:
                counted = connection.execute(f'select count(*) from main."{name}"').fetchone()
                rows[str(name)] = int(counted[0]) if counted else 0
    except duckdb.Error as error:
        raise AdtallyError(f"the new marts cannot be closed: {one_line(str(error))}") from error
    wal = path.with_name(path.name + ".wal")
    if wal.exists():
        raise AdtallyError(f"the new marts still have a write-ahead log of {wal.stat().st_size} bytes")
    if not rows:
        raise AdtallyError("dbt built no mart")
    return rows


def _publish(new: Path, published: Path) -> None:
    """Makes ``new`` durable and renames it onto ``published``; either the old build or the new one is there, whole."""
    _fsync(new)
    # A log that somebody's writing session left beside the old file must not be replayed into the new one.
    published.with_name(published.name + ".wal").unlink(missing_ok=True)
    new.replace(published)
    _fsync(published.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
