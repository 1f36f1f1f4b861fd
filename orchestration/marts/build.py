"""Builds the marts beside the published ones and publishes them whole.

A build makes the days again that changed since the last one, and takes the other days from it: its cost follows the change. The
SQL is that of the dbt project, compiled by dbt once for each state of the project. The marts are in groups by how often they are
built; `mart_build` says for each group what it was built from. If nothing is published, the project changed, or nobody can say what
changed, a build makes all days of all groups.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path

import duckdb

from orchestration.marts.assemble import assemble
from orchestration.marts.changes import DAY_OF, Changes, UnknownChanges, find_changes
from orchestration.marts.dbt_project import (
    DbtNode,
    MartsError,
    git_revision,
    project_dir,
    project_hash,
    project_version,
)
from orchestration.marts.manifest import load_manifest
from orchestration.marts.parquet import export_marts
from orchestration.marts.pins import pin_versions, table_ids
from orchestration.marts.project import SCOPES, Model, Project
from orchestration.marts.workspace import BuildFacts, Days, Workspace, plan_tests, published
from spark_jobs.config import Settings
from spark_jobs.errors import NamesFileError, UsageError
from spark_jobs.ingest.names import load_names
from spark_jobs.lake.duck import connect_delta, literal
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import MARTS, exclusive
from spark_jobs.lake.mart_days import are_moved, date_list, find_damage, frozen_files, frozen_folder
from spark_jobs.lake.marts import KEPT_AFTER, current_marts, publish_marts
from spark_jobs.lake.tables import CAMPAIGNS, NAMES, TABLES

GROUPS = ("near_real_time", "hourly")
"""The groups of marts, as dbt's tags name them."""


@dataclass(frozen=True)
class MartBuild:
    """A published build of ``groups``. ``versions``: Delta table -> version read; ``rows``: mart of the file -> number of rows.

    ``full_because``: why it made all days; None if it made those that changed, whose number is ``days``.
    """

    build_id: str
    built_at: datetime
    git_revision: str | None
    groups: tuple[str, ...]
    versions: dict[str, int]
    rows: dict[str, int]
    nodes: list[DbtNode]
    seconds: float
    path: Path
    full_because: str | None
    days: int

    @property
    def nodes_passed(self) -> int:
        """The number of models and tests that passed."""
        return sum(node.passed for node in self.nodes)


def build_marts(
    settings: Settings,
    group: str | None = None,
    *,
    is_full: bool = False,
    progress: Callable[[str], None] | None = None,
    now: datetime | None = None,
    patience_seconds: float | None = None,
    threads: int | None = None,
) -> MartBuild:
    """Build, check and publish the marts. Until then, and after a failure, what was published stays untouched.

    Pins the versions of the Delta tables (the ledger before the others), and finds in their logs which days changed since the
    last build. Builds and tests these days in a database of its own, writes a new file from them and from the published one, and
    publishes it as `spark_jobs.lake.marts` says: whoever has the old file open continues to read it.

    ``group``: one of GROUPS, tested by the tests that need no mart of another group. ``is_full``: make all days of all groups.
    ``progress`` gets a line at each step. ``now`` (with a zone) is the build's time; it decides which row of a campaign is the
    current one. ``patience_seconds``: how long to wait for another build, in place of ten minutes. ``threads``: those of DuckDB, by
    default one a core; a build of few rows costs a quarter less with one.

    Raises BusyError if another build does not end in time, AdtallyError if a table does not exist yet, MartsError if a model or
    test fails (the message has its name and rows that the test found), UsageError if the group is unknown.
    """
    if group is not None and group not in GROUPS:
        raise UsageError(f"there is no group of marts {group!r}", hint=f"one of {', '.join(GROUPS)}")
    say = progress or (lambda line: None)
    began = time.monotonic()
    folder = settings.marts_path.parent
    with exclusive(settings, MARTS, patience_seconds=patience_seconds):
        _remove_leftovers(folder)
        path = project_dir()
        project, formulas = Project(load_manifest(settings)), project_hash(path)
        replaced = current_marts(settings)
        versions = pin_versions(settings)
        try:
            versions[NAMES.name] = load_names(settings)
        except NamesFileError as error:
            say(f"{error}; the names stay as they were")
        say("pinned " + ", ".join(f"{name} at version {version}" for name, version in versions.items()))
        built_at, ids = (now or datetime.now(UTC)).astimezone(UTC), table_ids(settings)
        build_id = f"{built_at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
        # A folder, so that the database is called `marts` while it is built as well, and its spill files stay inside.
        new = folder / f".build-{build_id}" / settings.marts_path.name
        new.parent.mkdir(parents=True)
        try:
            with _database(settings, new.parent, replaced.path, threads) as connection:
                asked = GROUPS if group is None or is_full else (group,)
                before = _Before.read(connection, ids)
                try:
                    if is_full:
                        raise UnknownChanges("it was asked for")
                    plan = _changed_days(Lake(settings), connection, project, before, asked, formulas, ids, versions, settings)
                    groups, because = asked, None
                except UnknownChanges as reason:
                    groups, because = GROUPS, str(reason)
                    plan = None
                    say(f"building all days of all marts: {because}")
                facts = BuildFacts(
                    groups=groups,
                    build_id=build_id,
                    built_at=built_at,
                    git_revision=git_revision(path),
                    project_version=project_version(path),
                    project_hash=formulas,
                    inputs_hash=_hash_of_inputs(versions, ids),
                    previous=before.build_ids,
                    versions=versions,
                    table_ids=ids,
                )
                workspace = Workspace(connection, project, Lake(settings).at(versions), say)
                workspace.prepare(facts, has_published=plan is not None, folder=new.parent if plan is None else None)
                try:
                    days = _run(workspace, facts, plan)
                except MartsError as error:
                    raise _with_rows_kept(error, folder / "dbt") from None
                say(f"building the file of {'all' if days is None else len(days)} days")
                rows = assemble(
                    workspace,
                    new,
                    frozen_folder(settings),
                    facts,
                    has_published=plan is not None,
                    dropped_after=KEPT_AFTER,
                )
            export = partial(export_marts, new, rows)
            publish_marts(settings, new, build_id=build_id, built_at=built_at, replaces=replaced, export=export)
        finally:
            shutil.rmtree(new.parent, ignore_errors=True)
    seconds = time.monotonic() - began
    say(f"published build {build_id} after {seconds:.1f} s")
    return MartBuild(
        build_id=build_id,
        built_at=built_at,
        git_revision=facts.git_revision,
        groups=groups,
        versions=versions,
        rows=rows,
        nodes=workspace.nodes,
        seconds=seconds,
        path=settings.marts_path,
        full_because=because,
        days=0 if days is None else len(days),
    )


Plan = dict[str, frozenset[date]]
"""Scope -> the days that its models build again."""


@dataclass(frozen=True)
class _Before:
    """What the published file says of its builds, by group. ``is_readable``: there is one, of this or an older adtally."""

    build_ids: dict[str, str]
    hashes: set[str]
    versions: dict[str, dict[str, int]]
    table_ids: dict[str, dict[str, str]]
    damage: str | None
    is_readable: bool

    @classmethod
    def read(cls, connection: duckdb.DuckDBPyConnection, ids: Mapping[str, str]) -> _Before:
        sql = "select mart_group, build_id, project_hash, table_name, delta_version, table_id from published.main.mart_build"
        try:
            found = connection.execute(sql).fetchall()
        except duckdb.Error:  # there is none, or one of an older adtally
            return cls({}, set(), {}, {}, "nothing is published", is_readable=False)
        builds: dict[str, str] = {}
        versions: dict[str, dict[str, int]] = {}
        tables: dict[str, dict[str, str]] = {}
        for group, build_id, _, name, version, table_id in found:
            builds[group] = build_id
            versions.setdefault(group, {})[name] = version
            tables.setdefault(group, {})[name] = table_id
        return cls(builds, {row[2] for row in found}, versions, tables, None, is_readable=True)


def _changed_days(
    lake: Lake,
    connection: duckdb.DuckDBPyConnection,
    project: Project,
    before: _Before,
    groups: tuple[str, ...],
    formulas: str,
    ids: Mapping[str, str],
    versions: Mapping[str, int],
    settings: Settings,
) -> Plan:
    """Return which days the models of ``groups`` build again. Raises UnknownChanges if all days must be built."""
    if not before.is_readable:
        raise UnknownChanges("nothing is published that a build could start from")
    if set(before.build_ids) != set(GROUPS) or before.hashes != {formulas}:
        raise UnknownChanges("the dbt project has changed since the last build")
    if any(tables != dict(ids) for tables in before.table_ids.values()):
        raise UnknownChanges("a Delta table was created again since the last build")
    if are_moved(connection, "published", frozen_folder(settings)):
        raise UnknownChanges("the marts were moved since the last build")
    damage = find_damage(frozen_files(connection, "published"), frozen_folder(settings))
    if damage is not None:
        raise UnknownChanges(damage)
    models = [model for model in project.of_groups(groups) if model.day is not None]
    tables = [TABLES[name] for name in sorted(project.sources_of(models)) if TABLES[name] in DAY_OF or name == CAMPAIGNS.name]
    found = Changes()
    for group in groups:
        since = find_changes(lake, connection, tables, before.versions[group], versions)
        starts = [day for day in (found.budgets_from, since.budgets_from) if day is not None]
        found = Changes(found.days | since.days, found.orders | since.orders, min(starts, default=None))
    return {scope: found.scope(scope, _known_days(connection, models, scope)) for scope in SCOPES}


def _known_days(connection: duckdb.DuckDBPyConnection, models: list[Model], scope: str) -> list[date]:
    names = ", ".join(literal(model.name) for model in models if model.scope == scope) or "null"
    found = connection.execute(f"select distinct day from published.days.kept where model in ({names})").fetchall()
    return [day for (day,) in found]


def _run(workspace: Workspace, facts: BuildFacts, plan: Plan | None) -> Days:
    """Build and test the models of the groups: first those of events, then those of orders, then those that have no days.

    Returns the days of events that were built. Raises MartsError with all tests that failed.
    """
    models = workspace.project.of_groups(facts.groups)
    dated = [model for model in models if model.day is not None]
    whole = [model for model in models if model.is_whole]
    runs: list[list[Model]] = []
    if plan is None:
        runs = [dated]
    else:
        by_days: dict[frozenset[date], list[Model]] = {}
        for model in dated:
            if model.scope != "revenue" and plan[model.scope]:
                by_days.setdefault(plan[model.scope], []).append(model)
        runs = sorted(by_days.values(), key=lambda run: SCOPES.index(run[0].scope))
        runs.append([model for model in dated if model.scope == "revenue"])
    tests, last = plan_tests(workspace.project, runs, whole)
    for run, of_run in zip(runs, tests, strict=True):
        if run:
            days = None if plan is None else plan[run[0].scope]
            if days is not None and run[0].scope == "revenue":
                workspace.check()
                days |= _days_of_credits(workspace, models)
                if not days:
                    continue
            workspace.run(run, days, of_run)
    workspace.check()
    workspace.run_whole(whole, last)
    workspace.check()
    return None if plan is None else plan["days"]


def _days_of_credits(workspace: Workspace, models: list[Model]) -> frozenset[date]:
    """Return the days of touches and orders of the credits that are or were those of the orders built again."""
    [credits] = [model for model in models if model.name == "fct_attribution_credits"]
    if credits.name not in workspace.built:
        return frozenset()
    orders = date_list(workspace.built[credits.name] or []) or "null"
    found = workspace.connection.execute(
        f"""
        with credits as (
            select touch_date, order_date from marts.main."{credits.name}"
            union all
            select touch_date, order_date from {published(credits)} where order_date in ({orders})
        )
        select touch_date from credits union select order_date from credits
        """
    )
    return frozenset(day for (day,) in found.fetchall())


@contextmanager
def _database(
    settings: Settings, folder: Path, published_path: Path | None, threads: int | None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the database of a build, which spills into ``folder``, with the catalog ``published`` if there is a file."""
    config: dict[str, str | bool | int | float | list[str]] = {"temp_directory": str(folder / "spill")}
    if threads is not None:
        config["threads"] = threads
    with connect_delta(config, settings.lakehouse_uri) as connection:
        if published_path is not None:
            with suppress(duckdb.Error):  # damaged: it is built anew
                connection.execute(f"attach {literal(published_path)} as published (read_only)")
        yield connection


def _with_rows_kept(error: MartsError, folder: Path) -> MartsError:
    """Write the rows that failed tests found into a file, and return an error that names it."""
    kept = folder / "failed_rows.json"
    kept.unlink(missing_ok=True)
    if not error.rows:
        return error
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(error.rows, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return MartsError(str(error), f"rows in {kept}: {error.hint}", error.nodes, error.rows)


def _hash_of_inputs(versions: Mapping[str, int], ids: Mapping[str, str]) -> str:
    """Hash of the tables that a build reads: their ids and versions."""
    inputs = [[name, ids[name], version] for name, version in sorted(versions.items())]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed build left. The caller holds the lock, so no running build is among it."""
    for path in folder.glob(".build-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
