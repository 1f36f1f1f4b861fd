"""Builds the marts beside the published ones and puts them in their place by one rename.

The marts are in groups by how often they are built. A build of one group starts from a copy of the published file, so that the
marts of the others stay as they were, and `mart_build` says for each group what it was built from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
from filelock import FileLock, Timeout

from orchestration.marts.dbt_runner import (
    DbtError,
    DbtFolders,
    DbtNode,
    git_revision,
    install_delta_extension,
    project_dir,
    project_hash,
    project_version,
    run_dbt,
)
from orchestration.marts.failures import MartsError, failing_rows, keep_rows
from orchestration.marts.pins import pin_versions, table_ids
from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, BusyError, NamesFileError, UsageError
from spark_jobs.failure import one_line
from spark_jobs.ingest.names import load_names
from spark_jobs.lake.tables import NAMES

GROUPS = ("near_real_time", "hourly")
"""The groups of marts, as dbt's tags name them."""

_HISTORY_KEPT = timedelta(days=90)
_LEFTOVERS = ".build-*"


@dataclass(frozen=True)
class MartBuild:
    """A published build of ``groups``. ``versions``: Delta table -> version read; ``rows``: mart of the file -> number of rows."""

    build_id: str
    built_at: datetime
    git_revision: str | None
    groups: tuple[str, ...]
    versions: dict[str, int]
    rows: dict[str, int]
    nodes_passed: int
    nodes: list[DbtNode]
    seconds: float
    path: Path


def build_marts(
    settings: Settings,
    group: str | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    now: datetime | None = None,
    with_unit_tests: bool = False,
) -> MartBuild:
    """Builds, checks and publishes the marts; what was published stays untouched until then, and after a failure.

    The versions of the Delta tables are pinned first (the ledger before the others). dbt then builds the models and runs their
    tests in a new file, which takes the place of ``settings.marts_path`` by a rename: whoever has the old file open goes on reading
    the old build.

    ``group``: build the marts of one of GROUPS only, with the tests that need no mart of another, in a copy of what is published.
    All of them are built if nothing is published, or if another version of the dbt project built what is.
    ``progress`` gets a line at each step. ``now`` (with a zone) is the build's time; it decides which row of a campaign is the
    current one. ``with_unit_tests``: those of dbt as well. They judge the SQL and not the data, so a change of the project needs
    them and a build does not.

    Raises BusyError when another build runs, AdtallyError when a table does not exist yet, MartsError when a model or test fails
    (its name is in the message, the rows that a test found are in it and in a file), UsageError when the lakehouse is not a local
    path or there is no such group.
    """
    if group is not None and group not in GROUPS:
        raise UsageError(f"there is no group of marts {group!r}", hint=f"one of {', '.join(GROUPS)}")
    say = progress or (lambda line: None)
    began = time.monotonic()
    folder = settings.marts_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _only_build(folder):
        _remove_leftovers(folder)
        built_at = (now or datetime.now(UTC)).astimezone(UTC)
        build_id = f"{built_at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
        project = project_dir()
        formulas = project_hash(project)
        previous = _published_builds(settings.marts_path)
        groups = (group,) if group is not None and _has_all_groups(previous, formulas) else GROUPS
        versions = pin_versions(settings)
        try:
            versions[NAMES.name] = load_names(settings)
        except NamesFileError as error:
            say(f"{error}; the names stay as they were")
        say("pinned " + ", ".join(f"{name} at version {version}" for name, version in versions.items()))
        install_delta_extension()
        revision = git_revision(project)
        ids = table_ids(settings)
        variables = {
            "lakehouse": settings.lakehouse_uri,
            "delta_versions": versions,
            "mart_groups": list(groups),
            "build_id": build_id,
            "built_at": f"{built_at:%Y-%m-%d %H:%M:%S.%f}",
            "git_revision": revision or "",
            "project_version": project_version(project),
            "project_hash": formulas,
            "inputs_hash": _hash_of_inputs(versions, ids),
            "table_ids": ids,
            "previous_build_ids": {name: build.build_id for name, build in previous.items()},
        }
        # A folder, so that the database is called `marts` while it is built as well, and its spill files stay inside.
        workplace = folder / f".build-{build_id}"
        workplace.mkdir()
        try:
            new = workplace / settings.marts_path.name
            if groups != GROUPS:
                shutil.copyfile(settings.marts_path, new)
            nodes = _run_dbt(folder, new, _selection(groups, with_unit_tests=with_unit_tests), variables, progress)
            _add_history(new, settings.marts_path, since=built_at - _HISTORY_KEPT)
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
            groups=groups,
            versions=versions,
            rows=rows,
            nodes_passed=sum(node.passed for node in nodes),
            nodes=[replace(node, compiled="") for node in nodes],  # the SQL is for whoever looks into a failure
            seconds=seconds,
            path=settings.marts_path,
        )


@contextmanager
def _only_build(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".build.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError("another build of the marts runs", hint="wait until it is done") from None
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class _PublishedBuild:
    """The build of a group of marts in the published file. ``project_hash`` is empty if the build does not say it."""

    build_id: str
    project_hash: str


def _published_builds(published: Path) -> dict[str, _PublishedBuild]:
    """Group of marts -> its build, as the published file says. Empty if there is no file, or an older adtally built it."""
    if not published.is_file():
        return {}
    try:
        with duckdb.connect(str(published), read_only=True) as connection:
            found = connection.execute("select distinct mart_group, build_id, project_hash from main.mart_build").fetchall()
    except duckdb.Error:
        return {}
    return {group: _PublishedBuild(build_id, hash_of or "") for group, build_id, hash_of in found}


def _has_all_groups(published: dict[str, _PublishedBuild], formulas: str) -> bool:
    """Return whether every group of marts is published, built by the dbt project with this hash: all have the columns of today."""
    return set(published) == set(GROUPS) and {build.project_hash for build in published.values()} == {formulas}


def _hash_of_inputs(versions: Mapping[str, int], ids: Mapping[str, str]) -> str:
    """Hash of the tables that a build reads: their ids and versions."""
    inputs = [[name, ids[name], version] for name, version in sorted(versions.items())]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


def _selection(groups: tuple[str, ...], *, with_unit_tests: bool) -> list[str]:
    """The options of dbt that choose what to build and test."""
    # a test of marts of which one is not built here would compare two builds
    partial = ["--select", *(f"+tag:{group}" for group in groups), "--indirect-selection", "cautious"]
    return [*([] if groups == GROUPS else partial), *([] if with_unit_tests else ["--exclude-resource-type", "unit_test"])]


def _run_dbt(
    folder: Path, new: Path, selection: list[str], variables: Mapping[str, object], progress: Callable[[str], None] | None
) -> list[DbtNode]:
    """Builds and tests what is selected in ``new``. Raises MartsError with the rows that failed tests found."""
    work = new.with_name("work.duckdb")
    try:
        return run_dbt(
            "build",
            project=project_dir(),
            folders=_dbt_folders(folder),
            variables=variables,
            environment={"ADTALLY_DBT_MARTS_PATH": str(new), "ADTALLY_DBT_WORK_PATH": str(work)},
            selection=selection,
            progress=progress,
        )
    except DbtError as error:
        rows = failing_rows(error.nodes, new, work)
        raise MartsError(error, rows, keep_rows(rows, folder / "dbt" / "failed_rows.json")) from error


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


def _add_history(new: Path, published: Path, *, since: datetime) -> None:
    """Copy the builds of ``since`` and later from `mart_build_history` of the published file, if it has that table.

    Raises AdtallyError if the new file cannot be written.
    """
    if not published.is_file():
        return
    kept = "select * from main.mart_build_history where built_at >= $1"
    try:
        with duckdb.connect(str(published), read_only=True) as connection:
            earlier = connection.execute(kept, [since.replace(tzinfo=None)]).to_arrow_table()
    except duckdb.Error:  # an older adtally built it
        return
    columns_of_table = "select column_name from duckdb_columns() where table_name = 'mart_build_history'"
    try:
        with duckdb.connect(str(new)) as connection:
            connection.register("earlier", earlier)
            columns = [name for (name,) in connection.execute(columns_of_table).fetchall() if name in earlier.column_names]
            connection.execute(
                f"insert into main.mart_build_history by name select {', '.join(columns)} from earlier "
                "anti join main.mart_build_history using (mart_group, build_id)"
            )
    except duckdb.Error as error:
        raise AdtallyError(f"the history of the builds cannot be copied: {one_line(str(error))}") from error


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
    disk.sync_file(new)
    # A log that somebody's writing session left beside the old file must not be replayed into the new one.
    published.with_name(published.name + ".wal").unlink(missing_ok=True)
    disk.replace(new, published)
