"""Turns DuckDB's error of a wrong statement into a message: the caret stays aligned, and the marts' tables are suggested."""

from __future__ import annotations

import difflib
import re

import duckdb

from spark_jobs.errors import UsageError
from spark_jobs.failure import one_line

_UNKNOWN_TABLE = re.compile(r"Table with name (?P<name>\S+) does not exist!")


class SqlError(UsageError):
    """A wrong statement. ``excerpt``: its line, and below it a caret where DuckDB stopped."""

    def __init__(self, message: str, *, hint: str | None, excerpt: str) -> None:
        super().__init__(message, hint=hint)
        self.excerpt = excerpt


def sql_error(error: duckdb.Error, connection: duckdb.DuckDBPyConnection) -> SqlError:
    """Return the error of a statement over the attached marts. DuckDB would suggest its own tables, such as pg_enum."""
    said, line, caret = str(error).partition("\nLINE ")
    hint = None
    unknown = _UNKNOWN_TABLE.search(said)
    if unknown:
        said = said[: unknown.end()]
        listed = "select table_name from information_schema.tables where table_catalog = 'marts' and table_schema = 'main'"
        found = connection.execute(listed)
        like = difflib.get_close_matches(unknown["name"].lower(), [str(name) for (name,) in found.fetchall()], cutoff=0.5)
        hint = f"did you mean {' or '.join(like)}?" if like else "`adtally query 'show tables'` lists the tables"
    return SqlError(f"SQL: {one_line(said)}", hint=hint, excerpt=f"{line.strip()} {caret}".rstrip() if line else "")
