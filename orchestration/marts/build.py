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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
from filelock import FileLock, Timeout

from orchestration.marts.dbt_runner import (
    DbtNode,
    git_revision,
    install_delta_extension,
    project_dir,
    project_hash,
    project_version,
    run_dbt_build,
)
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


@dataclass(frozen=True)
class MartBuild:
    """A published build of ``groups``. ``versions``: Delta table -> version read; ``rows``: mart of the file -> number of rows."""

    build_id: str
    built_at: datetime
    git_revision: str | None
    groups: tuple[str, ...]
    versions: dict[str, int]
    rows: dict[str, int]
    nodes: list[DbtNode]
    seconds: float
    path: Path

    @property
    def nodes_passed(self) -> int:
        """The number of models and tests that passed."""
        return sum(node.passed for node in self.nodes)


def build_marts(
    settings: Settings,
    group: str | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    now: datetime | None = None,
    with_unit_tests: bool = False,
) -> MartBuild:
    """Build, check and publish the marts. Until then, and after a failure, what was published stays untouched.

    Pins the versions of the Delta tables (the ledger before the others). dbt then builds the models and runs their tests in a new
    file, which replaces ``settings.marts_path`` by a rename: whoever has the old file open continues to read the old build.

    ``group``: one of GROUPS, which is built in a copy of the published file and tested by the tests that need no mart of another
    group. All are built if nothing is published, or if another version of the dbt project built it. ``progress`` gets a line at
    each step. ``now`` (with a zone) is the build's time; it decides which row of a campaign is the current one.
    ``with_unit_tests``: dbt's unit tests as well, which judge the SQL and not the data.

    Raises BusyError if another build runs, AdtallyError if a table does not exist yet, MartsError if a model or test fails (the
    message has its name and rows that the test found), UsageError if the lakehouse is not a local path or the group is unknown.
    """
    if group is not None and group not in GROUPS:
        raise UsageError(f"there is no group of marts {group!r}", hint=f"one of {', '.join(GROUPS)}")
    say = progress or (lambda line: None)
    began = time.monotonic()
    folder = settings.marts_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".build.lock").acquire(timeout=0)
    except Timeout:
        raise BusyError("another build of the marts runs", hint="wait until it is done") from None
    with lock:
        _remove_leftovers(folder)
        project = project_dir()
        formulas, previous = project_hash(project), _published_builds(settings.marts_path)
        groups = (group,) if group is not None and _has_all_groups(previous, formulas) else GROUPS
        versions = pin_versions(settings)
        try:
            versions[NAMES.name] = load_names(settings)
        except NamesFileError as error:
            say(f"{error}; the names stay as they were")
        say("pinned " + ", ".join(f"{name} at version {version}" for name, version in versions.items()))
        install_delta_extension()
        built_at, revision, ids = (now or datetime.now(UTC)).astimezone(UTC), git_revision(project), table_ids(settings)
        build_id = f"{built_at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
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
        new = folder / f".build-{build_id}" / settings.marts_path.name
        new.parent.mkdir()
        try:
            if groups != GROUPS:
                shutil.copyfile(settings.marts_path, new)
            selection = _selection(groups, with_unit_tests=with_unit_tests)
            nodes = run_dbt_build(folder / "dbt", new, selection=selection, variables=variables, progress=progress)
            _add_history(new, settings.marts_path, since=built_at - _HISTORY_KEPT)
            rows = _seal(new)
            _publish(new, settings.marts_path)
        finally:
            shutil.rmtree(new.parent, ignore_errors=True)
    seconds = time.monotonic() - began
    say(f"published build {build_id} after {seconds:.1f} s")
    return MartBuild(
        build_id=build_id,
        built_at=built_at,
        git_revision=revision,
        groups=groups,
        versions=versions,
        rows=rows,
        nodes=[replace(node, compiled="") for node in nodes],  # the SQL is needed after a failure only
        seconds=seconds,
        path=settings.marts_path,
    )


@dataclass(frozen=True)
class _PublishedBuild:
    """The build of a group of marts in the published file. ``project_hash`` is empty if the build does not say it."""

    build_id: str
    project_hash: str


def _published_builds(published: Path) -> dict[str, _PublishedBuild]:
    """Return group of marts -> its build, as the published file says. Empty if there is no file, or an older adtally built it."""
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
    """Return the options of dbt that choose what to build and test."""
    chosen = [] if with_unit_tests else ["--exclude-resource-type", "unit_test"]
    if groups != GROUPS:  # cautious: a test of marts of which one is not built here would compare two builds
        chosen += ["--select", *(f"+tag:{group}" for group in groups), "--indirect-selection", "cautious"]
    return chosen


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed build left. The caller holds the lock, so no running build is among it."""
    for path in folder.glob(".build-*"):
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
    """Checkpoint the new file so that it needs no WAL; return the number of rows by table. Raises AdtallyError."""
    try:
        with duckdb.connect(str(path)) as connection:
            connection.execute("checkpoint")
            names = connection.execute(
                "select table_name from duckdb_tables() "
                "where database_name = current_database() and schema_name = 'main' order by table_name"
            ).fetchall()
            rows = {name: connection.execute(f'select count(*) from main."{name}"').fetchall()[0][0] for (name,) in names}
    except duckdb.Error as error:
        raise AdtallyError(f"the new marts cannot be closed: {one_line(str(error))}") from error
    wal = path.with_name(path.name + ".wal")
    if wal.exists():
        raise AdtallyError(f"the new marts still have a write-ahead log of {wal.stat().st_size} bytes")
    if not rows:
        raise AdtallyError("dbt built no mart")
    return rows


def _publish(new: Path, published: Path) -> None:
    """Make ``new`` durable and rename it to ``published``; either the old build or the new one is there, whole."""
    disk.sync_file(new)
    # DuckDB must not replay into the new file a log that a writing session left beside the old one.
    published.with_name(published.name + ".wal").unlink(missing_ok=True)
    disk.replace(new, published)
