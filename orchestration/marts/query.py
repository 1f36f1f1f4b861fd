"""Queries the published marts, read-only."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import duckdb

from orchestration.marts.sql_errors import sql_error
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.failure import one_line
from spark_jobs.lake.duck import literal
from spark_jobs.lake.mart_days import frozen_folder
from spark_jobs.lake.marts import readable_marts
from spark_jobs.lake.scratch import scratch_folder
from spark_jobs.texts import duration

_EXPLAIN = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*explain\b", re.DOTALL | re.IGNORECASE)

# The allowed table functions: they read no file, run no SQL given as text and change no setting. It is a list of what is allowed,
# since DuckDB has table functions that act, such as `enable_logging`.
_TABLE_FUNCTIONS = re.compile(
    r"unnest|range|generate_series|repeat|repeat_row|summary|json_each|json_tree|icu_calendar_names|pg_timezone_names"
    r"|duckdb_\w+|pragma_\w+"
)
_ACTING_FUNCTIONS = ("write_log", "setseed", "nextval")
BUILD_COLUMN = "mart_build"
_BUILDS = "select build_id from marts.main.mart_build group by build_id order by min(built_at), build_id"


def query_marts(
    settings: Settings, sql: str, parameters: Mapping[str, Any] | None = None, *, with_build: bool = False
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return column names and rows of one SELECT over the published marts (schema ``main``, times UTC), or of its EXPLAIN.

    The statement sees one whole build, the newest at its start. It can neither write nor read files; the settings limit its memory,
    spill and time. ``parameters`` are the values of its ``$name``. ``with_build`` adds a last column BUILD_COLUMN with the ids of
    the builds that the marts come from, the newest last.

    Raises AdtallyError if nothing is published yet, the file cannot be read, or the statement exceeds a limit; UsageError if the
    SQL is wrong, does more than read, or is not a single statement.
    """
    with open_marts(settings) as connection:
        try:
            statement = _reading_statement(connection, sql)
            with _time_limit(connection, settings):
                connection.execute(statement, dict(parameters) if parameters else None)
                columns = [str(column[0]) for column in connection.description or []]
                found = connection.fetchall()
            if not with_build:
                return columns, found
            build = " ".join(row[0] for row in connection.execute(_BUILDS).fetchall())
            return [*columns, BUILD_COLUMN], [(*row, build) for row in found]
        except duckdb.OutOfMemoryException as error:
            raise AdtallyError(
                f"the query needs more than it may have: {one_line(str(error).splitlines()[0])}",
                hint="ADTALLY_QUERY_MEMORY and ADTALLY_QUERY_SPILL set what it may",
            ) from error
        except duckdb.Error as error:
            raise sql_error(error, connection) from error


@contextmanager
def open_marts(settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a DuckDB with the published marts attached and everything else locked.

    A process has one DuckDB instance per path: a connection to the path would show the old build while somebody has it open. A
    separate instance that attaches the file opens the new build.

    An attached file stays among DuckDB's `allowed_paths`, for writing too. So it is attached by a second name (a hard link), which
    is then removed: the allowed path does not exist any more.

    Raises AdtallyError if nothing is published yet, or the file cannot be read.
    """
    path = readable_marts(settings)
    if path is None:
        raise AdtallyError(f"there are no marts yet at {settings.marts_path}", hint="run `adtally marts build` first")
    with scratch_folder(settings, "marts-") as folder:
        config: dict[str, str | bool | int | float | list[str]] = {
            "temp_directory": str(folder / "spill"),
            "memory_limit": _bytes(settings.query_memory),
            "max_temp_directory_size": _bytes(settings.query_spill),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "python_enable_replacements": False,  # a name in the SQL is no variable of this program
        }
        with duckdb.connect(":memory:", config=config) as connection:
            link = folder / path.name
            with suppress(OSError):  # no hard links here: then only the kind of the statement keeps it from writing
                os.link(path, link)
            name = literal(link if link.exists() else path)
            try:
                connection.execute(f"attach {name} as marts (read_only)")
            except duckdb.Error as error:
                raise AdtallyError(
                    f"the marts at {path} cannot be read: {one_line(str(error))}",
                    hint="build them again with `adtally marts build`",
                ) from error
            link.unlink(missing_ok=True)
            connection.execute("use marts")
            connection.execute("set TimeZone = 'UTC'")
            # the views read the frozen days there; a statement that names a file is refused as any other
            connection.execute(f"set allowed_directories = [{literal(f'{frozen_folder(settings)}/')}]")
            connection.execute("set enable_external_access = false")
            connection.execute("set lock_configuration = true")
            yield connection


def _bytes(size: str) -> str:
    """Convert a size of the settings, such as 512m or 2g, to DuckDB's form."""
    return f"{size[:-1]}{'GiB' if size.endswith('g') else 'MiB'}"


def _reading_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    """Return the only statement in ``sql``. Raises UsageError unless it is a SELECT, or EXPLAIN of one without ANALYZE."""
    statement = _only(connection, sql)
    if statement.type == duckdb.StatementType.EXPLAIN:
        explained = _EXPLAIN.sub("", sql, count=1)
        try:
            _require_select(connection, explained)
        except (UsageError, duckdb.Error):
            raise UsageError("only EXPLAIN SELECT is allowed, without ANALYZE and other options: the marts are read-only") from None
        return _only(connection, f"explain {explained}")
    _require_select(connection, sql)
    return statement


def _only(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise UsageError(f"a query is one SQL statement, not {len(statements)}")
    return statements[0]


def _require_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raise UsageError unless DuckDB's parser finds one SELECT with allowed functions."""
    statement = _only(connection, sql)
    if statement.type != duckdb.StatementType.SELECT:
        raise UsageError(f"the marts are read-only: no {statement.type.name} statement")
    [(text,)] = connection.execute(f"select json_serialize_sql({literal(sql)})").fetchall()  # a parameter would import pandas
    parsed = json.loads(text)
    if parsed["error"]:  # a PRAGMA, which DuckDB rewrites as a SELECT
        raise UsageError("the marts are read-only: a query is a SELECT statement")
    for name in _refused_functions(parsed["statements"]):
        raise UsageError(f"the function {name} is not available here: a query reads the marts and nothing else")


def _refused_functions(node: object) -> Iterator[str]:
    if isinstance(node, list):
        for part in node:
            yield from _refused_functions(part)
    elif isinstance(node, dict):
        name = str(node.get("function_name", "")).lower()
        if name in _ACTING_FUNCTIONS:
            yield name
        if node.get("type") == "TABLE_FUNCTION":
            table_function = str(node["function"].get("function_name", "")).lower()
            if not _TABLE_FUNCTIONS.fullmatch(table_function):
                yield table_function
        for part in node.values():
            yield from _refused_functions(part)


@contextmanager
def _time_limit(connection: duckdb.DuckDBPyConnection, settings: Settings) -> Iterator[None]:
    """Interrupt the connection, and raise AdtallyError, if the context takes longer than the settings allow."""
    limit = settings.query_timeout.total_seconds()
    passed = threading.Event()

    def interrupt() -> None:
        passed.set()
        connection.interrupt()

    timer = threading.Timer(limit, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException:
        if not passed.is_set():
            raise
        raise AdtallyError(
            f"the query took longer than {duration(limit)}", hint="ADTALLY_QUERY_TIMEOUT sets how long it may"
        ) from None
    finally:
        timer.cancel()
