"""Marts by day: which file has the rows of a day of a mart.

The file of the marts has the rows of open days, those that still change, in its schema ``days``. A closed day is frozen: its
rows are in a Parquet file of the folder `frozen_folder`, which never changes and which later builds share. A view per mart joins
both, so a reader sees one table. ``days.kept`` says for each mart and day which file has its rows and which build made them,
``days.builds`` from which versions of the Delta tables.

A frozen file may have days that a later build made again: its rows of these days count no more, and the view leaves them out.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import duckdb

from spark_jobs.config import Settings
from spark_jobs.lake.duck import literal

TABLES_OF_DAYS = {
    "models": "model varchar, is_mart boolean, day varchar",
    "kept": "model varchar, day date, build_id varchar, file varchar, changed_at timestamp, rows bigint",
    "builds": "build_id varchar, built_at timestamp, delta_versions varchar",
    "files": "file varchar, model varchar, days bigint, bytes bigint, sha256 varchar",
    "dropped": "file varchar, dropped_at timestamp",
}
"""The tables of the schema ``days`` that describe the others. ``kept.file`` is null for an open day; ``files.days`` is how many
days a file was written with; ``dropped`` are files that an earlier build shows, which a reader may still have open."""

FROZEN = "frozen"
"""The folder of the frozen files, on this machine and in a store."""

NO_DAY = date.min
"""The day of rows that have none: of records without a readable time."""


@dataclass(frozen=True)
class MartFile:
    """A file of a build."""

    size: int
    sha256: str


def frozen_folder(settings: Settings) -> Path:
    """Return this machine's folder of frozen files."""
    return settings.marts_path.with_name(FROZEN)


def describe_file(path: Path) -> MartFile:
    """Return the size and the hash of a file."""
    with path.open("rb") as file:
        return MartFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def create_days(connection: duckdb.DuckDBPyConnection, catalog: str) -> None:
    """Create the schemas and tables that describe days, in an attached file."""
    for schema in ("days", "intermediate"):
        connection.execute(f"create schema {catalog}.{schema}")
    for name, columns in TABLES_OF_DAYS.items():
        connection.execute(f"create table {catalog}.days.{name} ({columns})")


def create_views(connection: duckdb.DuckDBPyConnection, catalog: str, folder: Path | str) -> None:
    """Create the view of each model that is kept by days: its open rows, and its frozen days in ``folder``, a path or a URI.

    Gives it the comments of its table of open rows.
    """
    use = connection.execute("select current_database() || '.' || current_schema()").fetchall()[0][0]
    parts: dict[str, list[tuple[str, bool, list[date]]]] = {}
    for model, file, is_complete, days in _parts(connection, catalog):
        parts.setdefault(model, []).append((file, is_complete, days))
    columns: dict[str, list[tuple[str, str, str | None]]] = {}
    for model, column, kind, comment in connection.execute(
        "select table_name, column_name, data_type, comment from duckdb_columns() "
        f"where database_name = {literal(catalog)} and schema_name = 'days' order by table_name, column_index"
    ).fetchall():
        columns.setdefault(model, []).append((column, kind, comment))
    comments = dict(
        connection.execute(
            "select table_name, comment from duckdb_tables() "
            f"where database_name = {literal(catalog)} and schema_name = 'days' and comment is not null"
        ).fetchall()
    )
    models = connection.execute(f"select model, is_mart, day from {catalog}.days.models order by model").fetchall()
    connection.execute(f"use {catalog}")
    try:
        for model, is_mart, day in models:
            view = f'{"main" if is_mart else "intermediate"}."{model}"'
            # Parquet has no integers of 128 bits: the files have decimals instead
            selected = ", ".join(_column(name, kind) for name, kind, _ in columns[model])
            complete = [file for file, is_complete, _ in parts.get(model, []) if is_complete]
            scans = [f"select {selected} from {_read(folder, complete)}"] if complete else []
            scans += [
                f"select {selected} from {_read(folder, [file])} where coalesce({day}, date '{NO_DAY}') in ({date_list(days)})"
                for file, is_complete, days in parts.get(model, [])
                if not is_complete
            ]
            scans.append(f'select * from days."{model}"')
            connection.execute(f"create or replace view {view} as {' union all '.join(scans)}")
            if model in comments:
                connection.execute(f"comment on view {view} is {literal(comments[model])}")
            for name, _, comment in columns[model]:
                if comment is not None:
                    connection.execute(f'comment on column {view}."{name}" is {literal(comment)}')
    finally:
        connection.execute(f"use {use}")


def _column(name: str, kind: str) -> str:
    return f'"{name}"::hugeint as "{name}"' if kind == "HUGEINT" else f'"{name}"'


def _read(folder: Path | str, files: Iterable[str]) -> str:
    return f"read_parquet([{', '.join(literal(f'{folder}/{file}') for file in files)}])"


def date_list(days: Iterable[date]) -> str:
    """Return days as a list of SQL literals."""
    return ", ".join(f"date '{day}'" for day in sorted(days))


def frozen_files(connection: duckdb.DuckDBPyConnection, catalog: str) -> dict[str, MartFile]:
    """Return the frozen files that a file of marts shows, by name."""
    found = connection.execute(f"select file, bytes, sha256 from {catalog}.days.files").fetchall()
    return {file: MartFile(size, digest) for file, size, digest in found}


@dataclass(frozen=True)
class FrozenDays:
    """The frozen files of a file of marts. ``shown``: by name; ``dropped``: those of earlier builds."""

    shown: dict[str, MartFile]
    dropped: set[str]


def read_frozen(path: Path) -> FrozenDays:
    """Return the frozen days that a closed file of marts says; none if it has none."""
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"attach {literal(path)} as closed (read_only)")
        try:
            shown = frozen_files(connection, "closed")
        except duckdb.CatalogException:
            return FrozenDays({}, set())
        dropped = {file for (file,) in connection.execute("select file from closed.days.dropped").fetchall()}
        return FrozenDays(shown, dropped)


def _parts(connection: duckdb.DuckDBPyConnection, catalog: str) -> list[tuple[str, str, bool, list[date]]]:
    """Return model, file, whether all days of the file count, and those that count."""
    return connection.execute(
        f"""
        select
            kept.model, kept.file, count(*) = any_value(files.days), list(kept.day order by kept.day)
        from {catalog}.days.kept as kept
        inner join {catalog}.days.files as files on kept.file = files.file
        group by kept.model, kept.file order by kept.model, kept.file
        """
    ).fetchall()


def find_damage(files: Mapping[str, MartFile], folder: Path) -> str | None:
    """Return what is wrong with frozen files: one is missing or has another size. None if nothing is."""
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != file.size:
            return f"{path} has {path.stat().st_size} bytes instead of {file.size}"
    return None


def are_moved(connection: duckdb.DuckDBPyConnection, catalog: str, folder: Path) -> bool:
    """Return whether views read frozen files of another folder: the home was moved or copied since the build."""
    views = f"select sql from duckdb_views() where database_name = {literal(catalog)} and not internal"
    return any("read_parquet" in sql and literal(f"{folder}/")[:-1] not in sql for (sql,) in connection.execute(views).fetchall())


def remove_others(folder: Path, kept: Iterable[str]) -> None:
    """Delete the frozen files that nobody needs: dropped long ago, or left by a killed build."""
    names = set(kept)
    if not folder.is_dir():
        return
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
