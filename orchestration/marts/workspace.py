"""Runs the compiled models and tests of the dbt project in one DuckDB, over all days or over some.

Each model that is kept by days is built for the days that changed: its SQL is the same, and the views that stand for the Delta
tables have the rows of these days alone. A model that reads another one across days reads `all_days`: what is published, with the
new rows in place of those of their days.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from pathlib import Path

import duckdb

from orchestration.marts.changes import DAY_OF, monday_of, restriction
from orchestration.marts.dbt_project import ROWS_KEPT, DbtNode, MartsError, Rows
from orchestration.marts.project import Model, Project, Test
from spark_jobs.failure import one_line
from spark_jobs.lake.duck import literal
from spark_jobs.lake.failures import store_failure
from spark_jobs.lake.lake import Snapshot
from spark_jobs.lake.mart_days import NO_DAY, date_list
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, TABLES

_BUILDS = (
    "mart_group varchar, build_id varchar, built_at timestamp, git_revision varchar, project_version varchar, "
    "project_hash varchar, inputs_hash varchar, previous_build_id varchar"
)
_VERSIONS = "table_name varchar, table_id varchar, delta_version bigint"
BUILD_TABLES = {
    "builds": _BUILDS,
    "versions": _VERSIONS,
    "earlier": f"{_BUILDS}, {_VERSIONS}, dbt_version varchar, duckdb_version varchar",
    "days": "event_date date",
}
"""The tables that tell the models what the build is, and their columns: see the macro `build_table`."""

Days = frozenset[date] | None
"""Days of a run; None: all."""


@dataclass(frozen=True)
class BuildFacts:
    """What the models are told about the build: rows of `builds` and `versions`, see the macro `build_table`."""

    groups: tuple[str, ...]
    build_id: str
    built_at: datetime
    git_revision: str | None
    project_version: str
    project_hash: str
    inputs_hash: str
    previous: dict[str, str]
    versions: dict[str, int]
    table_ids: dict[str, str]


@dataclass
class Workspace:
    """A database with the catalogs ``marts`` and ``work``, and ``published`` if the build starts from published marts.

    ``built``: model -> the days that were built, None: all. ``results``: results so far, by the node's id.
    """

    connection: duckdb.DuckDBPyConnection
    project: Project
    snapshot: Snapshot
    say: Callable[[str], None]
    built: dict[str, Days] = field(default_factory=dict)
    results: dict[str, DbtNode] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    _attached: set[str] = field(default_factory=set)
    _days: Days = None

    @property
    def nodes(self) -> list[DbtNode]:
        """The result of each model and test: one, although several runs may need a model that nobody keeps."""
        return list(self.results.values())

    def prepare(self, facts: BuildFacts, *, has_published: bool, folder: Path | None) -> None:
        """Create the catalogs and what the models are told. All days may need more than memory has: then files in ``folder``."""
        run = self.connection.execute
        for catalog in ("marts", "work"):
            place = ":memory:" if folder is None else str(folder / f"{catalog}-of-all-days.duckdb")
            run(f"attach {literal(place)} as {catalog}")
        for schema in ("work.main", "work.lakehouse", "work.build", "work.all_days", "marts.main"):
            run(f"create schema if not exists {schema}")
        for name, columns in BUILD_TABLES.items():
            run(f"create table work.build.{name} ({columns})")
        told = (facts.build_id, facts.built_at, facts.git_revision, facts.project_version, facts.project_hash, facts.inputs_hash)
        for group in facts.groups:
            run(f"insert into work.build.builds values ({sql_values(group, *told, facts.previous.get(group))})")
        for name, version in facts.versions.items():
            run(f"insert into work.build.versions values ({sql_values(name, facts.table_ids[name])}, {version})")
        if has_published:
            groups = sql_values(*facts.groups)
            run(f"insert into work.build.earlier by name from published.main.mart_build where mart_group not in ({groups})")

    def run(self, models: Sequence[Model], days: Days, tests: Sequence[Test]) -> None:
        """Build models that are kept by days, for ``days``, and run their tests. `check` raises what failed."""
        scratch = self.project.scratch_of([*models, *tests])
        self._open_sources([*models, *scratch], days)
        self._list_days(days)
        self._days = days
        self.built |= {model.name: days for model in models}
        together = {each.unique_id for each in models}
        missing = self._build_all([*models, *scratch], together)
        for model in models:
            if model.unique_id not in missing:
                self._refuse_other_days(model, days)
        for test in tests:
            if not missing & set(test.parents):
                self._test(test, together)

    def run_whole(self, models: Sequence[Model], tests: Sequence[Test]) -> None:
        """Build the models that have no days, from all days of the others, and run their tests."""
        scratch = self.project.scratch_of(models)
        self._open_sources([*models, *scratch], None)
        missing = self._build_all([*models, *scratch], set())
        dated = {model.unique_id for model in self.project.order if model.name in self.built}
        for test in tests:
            if not missing & set(test.parents):
                self._test(test, set() if test.needs_all_days else dated)

    def check(self) -> None:
        """Raise MartsError if a model or a test has failed."""
        failed = [node.label for node in self.nodes if node.failed]
        if failed:
            raise self._error(failed)

    def replaced(self, model: Model) -> Days:
        """Return the days of ``model`` that this build replaces: of weeks the first."""
        days = self.built[model.name]
        return frozenset(map(monday_of, days)) if days is not None and model.scope == "weeks" else days

    def all_days(self, model: Model) -> str:
        """Return the SQL name of all rows of a model that is kept by days."""
        target, new = f'work.all_days."{model.name}"', f'marts.main."{model.name}"'
        if model.name not in self.built:
            sql = f"select * from {published(model)}"
        elif (days := self.replaced(model)) is None:
            sql = f"select * from {new}"
        else:
            listed = date_list(days) or "null"
            kept = f"coalesce({model.day}, date '{NO_DAY}') not in ({listed})" if days else "true"
            sql = f"select * from {published(model)} where {kept} union all by name select * from {new}"
        self.connection.execute(f"create or replace view {target} as {sql}")
        return target

    def _open_sources(self, models: Iterable[Model], days: Days) -> None:
        for name in sorted(self.project.sources_of(models)):
            table = TABLES[name]
            attached = f"pinned_{name}"
            if attached not in self._attached:
                self.snapshot.attach(self.connection, table)
                self._attached.add(attached)
            # of a table without partitions all files are looked into: once, not for each model and test that reads it
            kind = "table" if days is not None and table in DAY_OF and not table.partition_by else "view"
            self.connection.execute(
                f"create or replace {kind} work.lakehouse.{name} as select * from {attached} where {restriction(table, days)}"
            )

    def _list_days(self, days: Days) -> None:
        """Fill the table of the days that a run builds. A full build has all days of orders and of their touches."""
        self.connection.execute("create or replace table work.build.days (event_date date)")
        if days:
            self.connection.execute(f"insert into work.build.days select unnest([{date_list(days)}])")
        elif days is None and f"pinned_{ATTRIBUTED_ORDERS.name}" in self._attached:
            self.connection.execute(
                f"""
                insert into work.build.days
                select cast(unnest(generate_series(cast(min(time) as date), cast(max(time) as date), interval 1 day)) as date)
                from (
                    select unnest([order_time, touch_time]) as time from work.lakehouse.{ATTRIBUTED_ORDERS.name}
                )
                """
            )

    def _build_all(self, models: Iterable[Model], together: set[str]) -> set[str]:
        """Build models, each after its parents; return those that could not be built, or need one of these."""
        chosen = {model.unique_id for model in models}
        missing: set[str] = set()
        for model in self.project.order:
            if model.unique_id in chosen and (missing & set(model.parents) or not self._build(model, together)):
                missing.add(model.unique_id)
        return missing

    def _build(self, model: Model, together: set[str]) -> bool:
        began = time.perf_counter()
        sql, message = self._resolved(model, together), ""
        try:
            if not model.groups:
                kind = "view" if model.is_view else "table"
                self.connection.execute(f'create or replace {kind} work.main."{model.name}" as {sql}')
            elif not model.columns:
                self.connection.execute(f'create or replace table marts.main."{model.name}" as {sql}')
            else:
                message = self._create_by_contract(model, sql)
        except duckdb.Error as error:
            message = str(error)
        self._note(model.unique_id, "error" if message else "success", began, message=message)
        return not message

    def _create_by_contract(self, model: Model, sql: str) -> str:
        """Create the table of a mart with the columns and types that its contract says; return how its SQL breaks the contract."""
        table = f'marts.main."{model.name}"'
        self.connection.execute(f"create or replace table {table} as {sql}")
        found = {name: kind for name, kind, *_ in self.connection.execute(f"describe {table}").fetchall()}
        wanted = {name: kind.upper() for name, (kind, _) in model.columns.items()}
        if found != wanted:
            wrong = [f"{name} {found.get(name, 'is missing')}" for name in wanted if found.get(name) != wanted[name]]
            wrong += [f"{name} {kind} is not in it" for name, kind in found.items() if name not in wanted]
            return f"This model has an enforced contract that failed: {', '.join(wrong)}"
        if not model.required:
            return ""
        nulls = ", ".join(f'count(*) - count("{name}")' for name in model.required)
        [counts] = self.connection.execute(f"select {nulls} from {table}").fetchall()
        missing = [name for name, count in zip(model.required, counts, strict=True) if count]
        return f"NOT NULL constraint failed: {model.name}.{', '.join(missing)}" if missing else ""

    def _refuse_other_days(self, model: Model, days: Days) -> None:
        """Raise MartsError if a model has made a row of a day that it was not to build: it would be there twice."""
        replaced = self.replaced(model)
        if days is None or replaced is None:
            return
        outside = f"coalesce({model.day}, date '{NO_DAY}') not in ({date_list(replaced)})"
        [(rows,)] = self.connection.execute(f'select count(*) from marts.main."{model.name}" where {outside}').fetchall()
        if rows:
            raise MartsError(
                f"{model.name} has {rows} rows of days that did not change",
                "build all days with `adtally marts build --full`, and report this",
                self.nodes,
                {},
            )

    def _test(self, test: Test, together: set[str]) -> None:
        began = time.perf_counter()
        sql = self._resolved(test, together)
        failures, message = 0, ""
        try:
            [(failures,)] = self.connection.execute(f"select count(*) from ({sql}\n)").fetchall()
        except duckdb.Error as error:
            message = str(error)
        status = "error" if message else "pass" if not failures else "warn" if test.is_warning else "fail"
        self._note(test.unique_id, status, began, failures=failures, message=message)
        if status == "fail":
            found = self.connection.execute(f"select * from ({sql}\n) limit {ROWS_KEPT}")
            names = [column[0] for column in found.description or []]
            self.rows[test.unique_id] = [dict(zip(names, map(_plain, row), strict=True)) for row in found.fetchall()]

    def _note(self, unique_id: str, status: str, began: float, *, failures: int = 0, message: str = "") -> None:
        seconds = time.perf_counter() - began
        node = DbtNode(unique_id, status, seconds, failures, one_line(message))
        earlier = self.results.get(unique_id)
        if earlier is not None:
            node = replace(earlier if earlier.failed else node, seconds=earlier.seconds + seconds)
        self.results[unique_id] = node
        kind, _, name, *_ = unique_id.split(".")
        self.say(f"{status} {kind} {name} in {seconds:.2f} s")

    def _resolved(self, node: Model | Test, together: set[str]) -> str:
        """Return the SQL of a model or test with the names that the relations have here."""
        sql = node.sql
        for parent in self.project.parents_of(node):
            if not parent.groups:
                continue
            target = f'marts.main."{parent.name}"'
            if parent.day is None:
                if parent.name not in self._whole_built:
                    target = published(parent)
            elif isinstance(node, Model) and parent.name in node.days_before:
                target = f"({self._days_before(parent, node.days_before[parent.name])})"
            elif parent.unique_id not in together:
                target = self.all_days(parent)
            sql = sql.replace(parent.relation, target)
        return sql

    @property
    def _whole_built(self) -> set[str]:
        names = {unique_id.split(".")[2] for unique_id in self.results if unique_id.startswith("model.")}
        return {model.name for model in self.project.order if model.is_whole and model.name in names}

    def _days_before(self, parent: Model, count: int) -> str:
        """Return SQL of the rows of the days that a run builds, and of so many days before them."""
        everything, dated = self.all_days(parent), (self._days or frozenset()) - {NO_DAY}
        if not dated:
            return f"select * from {everything}"
        return f"select * from {everything} where {parent.day} >= date '{min(dated) - timedelta(days=count)}'"

    def _error(self, failed: list[str]) -> MartsError:
        for node in self.nodes:
            if node.failed and (failure := store_failure(node.message)) is not None:
                raise failure
        shown = ", ".join(failed[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else "")
        first = next((found[0] for found in self.rows.values() if found), {})
        hint = one_line(", ".join(f"{name} {value}" for name, value in first.items() if value is not None), 120)
        return MartsError(f"the marts failed: {shown}", hint, self.nodes, self.rows)


def sql_values(*values: str | datetime | None) -> str:
    """Return values as SQL literals. DuckDB's parameters would import pandas for them, which takes a second."""
    return ", ".join(
        "null"
        if value is None
        else f"timestamp {literal(value.replace(tzinfo=None))}"
        if isinstance(value, datetime)
        else literal(value)
        for value in values
    )


def published(model: Model) -> str:
    """Return the SQL name of a model in the published file."""
    return f'published.{"main" if model.is_mart else "intermediate"}."{model.name}"'


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def plan_tests(project: Project, runs: Sequence[Sequence[Model]], whole: Sequence[Model]) -> tuple[list[list[Test]], list[Test]]:
    """Return the tests of each run and those of the models without days: the tests all of whose models are built.

    A test belongs to the last run that builds one of its models; one of models that nobody keeps to the first that has them all.
    """
    of_runs: list[list[Test]] = [[] for _ in runs]
    last: list[Test] = []
    scratch = [{model.unique_id for model in project.scratch_of(models)} for models in runs]
    kept = [{model.unique_id for model in models} for models in runs]
    of_whole = {model.unique_id for model in whole}
    scratch_of_whole = {model.unique_id for model in project.scratch_of(whole)}
    for test in project.tests:
        parents = project.parents_of(test)
        groups = {model.unique_id for model in parents if model.groups}
        others = {model.unique_id for model in parents if not model.groups}
        if not groups <= set().union(of_whole, *kept):
            continue
        if groups & of_whole or not parents:
            if not others:
                last.append(test)
            continue
        at = next(_places(groups, others, kept, scratch), None)
        if at is not None:
            of_runs[at].append(test)
        elif not groups and others <= scratch_of_whole:
            last.append(test)
    place = {model.unique_id: number for number, model in enumerate(project.order)}

    def first_cause(test: Test) -> int:
        return max((place[parent] for parent in test.parents), default=0)

    return [sorted(tests, key=first_cause) for tests in of_runs], sorted(last, key=first_cause)


def _places(groups: set[str], others: set[str], kept: Sequence[set[str]], scratch: Sequence[set[str]]) -> Iterator[int]:
    order = range(len(kept)) if not groups else range(len(kept) - 1, -1, -1)
    yield from (at for at in order if (not groups or groups & kept[at]) and (others <= scratch[at] or groups))
