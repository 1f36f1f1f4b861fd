"""Asks the published marts, read-only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from orchestration.marts.dbt_runner import one_line
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError

_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)


def query_marts(
    settings: Settings, sql: str, parameters: Mapping[str, Any] | None = None
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and rows of one reading statement over the published marts (schema ``main``, times UTC).

    The statement sees one whole build, the newest at the time it starts. It can neither write nor reach files. ``parameters`` are
    the values of its ``$name``.

    Raises AdtallyError when nothing has been published yet or the file cannot be read, UsageError when the SQL is
    wrong, does more than read or is not a single statement.
    """
    path = settings.marts_path
    if not path.is_file():
        raise AdtallyError(f"there are no marts yet at {path}", hint="run `adtally marts build` first")
    # Within a process, DuckDB gives every connection to a path the instance that is already open for it: connecting to
    # the path would show the old build to whoever still holds it open. An instance of its own that attaches the file
    # opens it anew.
    config: dict[str, str | bool | int | float | list[str]] = {"temp_directory": str(settings.scratch_path / "query")}
    with duckdb.connect(":memory:", config=config) as connection:
        try:
            connection.execute(f"attach '{_quoted(str(path))}' as marts (read_only)")
        except duckdb.Error as error:
            raise AdtallyError(
                f"the marts at {path} cannot be read: {one_line(str(error))}",
                hint="build them again with `adtally marts build`",
            ) from error
        connection.execute("use marts")
        connection.execute("set TimeZone = 'UTC'")
        connection.execute("set enable_external_access = false")
        connection.execute("set lock_configuration = true")
        try:
            statements = connection.extract_statements(sql)
            if len(statements) != 1:
                raise UsageError(f"a query is one SQL statement, not {len(statements)}")
            if statements[0].type not in _READING:
                raise UsageError(f"the marts are read-only: no {statements[0].type.name} statement")
            connection.execute(statements[0], dict(parameters) if parameters else None)
            columns = [str(column[0]) for column in connection.description or []]
            return columns, connection.fetchall()
        except duckdb.Error as error:
            raise UsageError(f"SQL: {one_line(str(error))}") from error


def _quoted(text: str) -> str:
    return text.replace("'", "''")
