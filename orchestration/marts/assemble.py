"""Writes the file of a build: the new days of its marts, the frozen days and the other marts of the file that it replaces."""

from __future__ import annotations

import json
from datetime import date, datetime, timedelta
from itertools import groupby
from pathlib import Path

from orchestration.marts.parquet import exact_integers
from orchestration.marts.project import Model
from orchestration.marts.workspace import BuildFacts, Workspace, sql_values
from spark_jobs import disk
from spark_jobs.lake.duck import literal
from spark_jobs.lake.mart_days import NO_DAY, create_days, create_views, date_list, describe_file

KEEPS_OPEN = "near_real_time"
"""The group of marts whose days stay open for a while. The others are built seldom, and their days frozen at once."""

_NEWEST = 2  # days that are always open
_AT_ONCE = 31  # changed days of a build that are open at first
_CLOSED_AFTER = timedelta(hours=1)  # without a change
_HISTORY_KEPT = timedelta(days=90)


def assemble(
    workspace: Workspace, new: Path, folder: Path, facts: BuildFacts, *, has_published: bool, dropped_after: timedelta
) -> dict[str, int]:
    """Write the closed DuckDB file ``new``, and its new frozen files into ``folder``; return the number of rows by mart.

    The workspace has built all models of the groups of ``facts``. ``dropped_after``: how long a file that is not shown any more is
    still kept.
    """
    run = workspace.connection.execute
    run(f"attach {literal(new)} as new")
    run("begin")  # each statement of its own would wait for the disk
    create_days(workspace.connection, "new")
    written: list[Path] = []
    for model in workspace.project.order:
        if model.is_whole:
            _copy_whole(workspace, model, facts)
        elif model.day is not None:
            _Days(workspace, model, folder, facts, written, has_published=has_published).write()
    _describe(workspace, facts, has_published=has_published, dropped_after=dropped_after)
    create_views(workspace.connection, "new", folder)
    disk.sync_files(written)
    for made in {path.parent for path in written}:
        disk.sync_folder(made)
    rows = _count_rows(workspace)
    run("commit")
    run("checkpoint new")
    run("detach new")
    return rows


def _count_rows(workspace: Workspace) -> dict[str, int]:
    run = workspace.connection.execute
    by_days = dict(run("select model, sum(rows)::bigint from new.days.kept group by model").fetchall())
    marts = sorted((model for model in workspace.project.order if model.is_mart), key=lambda model: model.name)
    return {
        model.name: run(f'select count(*) from new.main."{model.name}"').fetchall()[0][0]
        if model.is_whole
        else int(by_days.get(model.name, 0))
        for model in marts
    }


def _copy_whole(workspace: Workspace, model: Model, facts: BuildFacts) -> None:
    run = workspace.connection.execute
    is_built = bool(set(model.groups) & set(facts.groups))
    target = f'new.main."{model.name}"'
    run(f'create table {target} as from {"marts" if is_built else "published"}.main."{model.name}"')
    if model.name == "mart_build_history":
        _add_history(workspace, facts)
    _comment(workspace, model, target)


def _add_history(workspace: Workspace, facts: BuildFacts) -> None:
    """Add the builds of the last days from the history of the file that is replaced."""
    if facts.previous:
        since = facts.built_at.replace(tzinfo=None) - _HISTORY_KEPT
        workspace.connection.execute(
            "insert into new.main.mart_build_history by name select * from published.main.mart_build_history "
            f"anti join new.main.mart_build_history using (mart_group, build_id) where built_at >= timestamp '{since}'"
        )


def _comment(workspace: Workspace, model: Model, target: str) -> None:
    run = workspace.connection.execute
    if model.description:
        run(f"comment on table {target} is {literal(model.description)}")
    for name, (_, description) in model.columns.items():
        if description:
            run(f'comment on column {target}."{name}" is {literal(" ".join(description.split()))}')


class _Days:
    """The days of a model."""

    def __init__(
        self, workspace: Workspace, model: Model, folder: Path, facts: BuildFacts, written: list[Path], *, has_published: bool
    ) -> None:
        self._run = workspace.connection.execute
        self._workspace, self._model, self._folder, self._facts, self._written = workspace, model, folder, facts, written
        self._now = facts.built_at.replace(tzinfo=None)
        self._day = f"coalesce({model.day}, date '{NO_DAY}')"
        self._new, self._open = f'marts.main."{model.name}"', f'new.days."{model.name}"'
        self._is_built = model.name in workspace.built
        self._before = f'published.days."{model.name}"' if has_published else None
        self._keeps_open = KEEPS_OPEN in model.groups

    def write(self) -> None:
        """Write open rows, frozen files, and which file has which day."""
        model = self._model
        self._run(f"create table {self._open} as from {self._new if self._is_built else self._before} limit 0")
        _comment(self._workspace, model, self._open)
        described = f"{sql_values(model.name)}, {model.is_mart}, {sql_values(model.day)}"
        self._run(f"insert into new.days.models values ({described})")
        changed = self._rows_by_day() if self._is_built else {}
        replaced = self._workspace.replaced(model) if self._is_built else frozenset[date]()
        kept: list[tuple[date, str, datetime, int]] = []
        if self._before is not None and replaced is not None:
            kept = self._keep(replaced)
        newest = set(sorted({*changed, *(day for day, *_ in kept)} - {NO_DAY})[-_NEWEST:])
        at_once = replaced is not None and len(changed) <= _AT_ONCE
        opened = [day for day in changed if self._keeps_open and (day in newest or at_once)]
        self._move(self._new, {day: changed[day] for day in opened}, self._facts.build_id, self._now)
        self._freeze(self._new, {day: rows for day, rows in changed.items() if day not in opened}, self._facts.build_id, self._now)
        for day, build_id, changed_at, rows in kept:
            is_open = self._keeps_open and (day in newest or self._now - changed_at < _CLOSED_AFTER)
            (self._move if is_open else self._freeze)(self._before or "", {day: rows}, build_id, changed_at)

    def _keep(self, replaced: frozenset[date]) -> list[tuple[date, str, datetime, int]]:
        """Carry over the frozen days that are not replaced; return the open ones."""
        where = f"model = {literal(self._model.name)}" + (f" and day not in ({date_list(replaced)})" if replaced else "")
        self._run(f"insert into new.days.kept select * from published.days.kept where {where} and file is not null")
        found = self._run(
            f"select day, build_id, changed_at, rows from published.days.kept where {where} and file is null order by day"
        )
        return found.fetchall()

    def _rows_by_day(self) -> dict[date, int]:
        return dict(self._run(f"select {self._day} as day, count(*) from {self._new} group by day order by day").fetchall())

    def _move(self, source: str, days: dict[date, int], build_id: str, changed_at: datetime) -> None:
        """Copy the rows of days into the file."""
        if days:
            self._run(f"insert into {self._open} from {source} where {self._day} in ({date_list(days)})")
            self._note(days, build_id, None, changed_at)

    def _freeze(self, source: str, days: dict[date, int], build_id: str, changed_at: datetime) -> None:
        """Write the rows of days into a frozen file for each month."""
        for _, month in groupby(sorted(days), key=lambda day: (day.year, day.month)):
            part = {day: days[day] for day in month}
            name = f"{self._model.name}/{min(part)}-{self._facts.build_id}.parquet"
            target = self._folder / name
            disk.make_folder(target.parent)
            types = [(column, kind) for column, kind, *_ in self._run(f"describe {self._open}").fetchall()]
            # rows in the order of their days, so that a reader of one skips the others
            order = f"order by {self._day}" if len(part) > 1 else ""
            self._run(
                f"copy (select *{exact_integers(types)} from {source} where {self._day} in ({date_list(part)}) {order}) "
                f"to {literal(target)} (format parquet, compression zstd)"
            )
            file = describe_file(target)
            self._written.append(target)
            self._run(
                f"insert into new.days.files values ({sql_values(name, self._model.name)}, {len(part)}, {file.size}, "
                f"{sql_values(file.sha256)})"
            )
            self._note(part, build_id, name, changed_at)

    def _note(self, days: dict[date, int], build_id: str, file: str | None, changed_at: datetime) -> None:
        listed = ", ".join(f"(date '{day}', {rows})" for day, rows in days.items())
        self._run(
            f"insert into new.days.kept select {sql_values(self._model.name)}, day, {sql_values(build_id, file, changed_at)}, rows "
            f"from (values {listed}) as days (day, rows)"
        )


def _describe(workspace: Workspace, facts: BuildFacts, *, has_published: bool, dropped_after: timedelta) -> None:
    """Fill the tables that say which builds and files the days come from, and which files only readers of earlier builds need."""
    run, now = workspace.connection.execute, facts.built_at.replace(tzinfo=None)
    run(f"insert into new.days.builds values ({sql_values(facts.build_id, now, json.dumps(facts.versions, sort_keys=True))})")
    if has_published:
        run("insert into new.days.builds from published.days.builds where build_id in (select build_id from new.days.kept)")
        run(
            "insert into new.days.files from published.days.files where file in (select file from new.days.kept) "
            "and file not in (select file from new.days.files)"
        )
    elif not run(
        "from duckdb_tables() where database_name = 'published' and schema_name = 'days' and table_name = 'dropped'"
    ).fetchall():
        return  # nothing was published, or by an older adtally
    gone = "file not in (select file from new.days.files)"
    run(f"insert into new.days.dropped select file, timestamp '{now}' from published.days.files where {gone}")
    since = now - dropped_after
    run(f"insert into new.days.dropped from published.days.dropped where {gone} and dropped_at >= timestamp '{since}'")
