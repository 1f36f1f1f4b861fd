"""The DuckDB in which a recount works: the lake's tables at pinned versions, and temporary tables of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from spark_jobs.lake.duck import keep_table, literal
from spark_jobs.lake.lake import Snapshot
from spark_jobs.lake.scratch import scratch_folder
from spark_jobs.lake.tables import REJECTED_EVENTS, REJECTED_ORDERS, Table
from spark_jobs.units import HOUR_US, NO_HOUR

_MEMORY = "1200MB"


class Database:
    """A DuckDB over ``snapshot``. Its macro ``hour_of`` turns microseconds into the number of an hour, null into NO_HOUR."""

    def __init__(self, snapshot: Snapshot, connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
        self.snapshot = snapshot
        self._connection = connection
        self._folder = folder
        self.execute("set preserve_insertion_order = false")
        self.execute(
            f"create macro hour_of(us) as coalesce((us - ((us % {HOUR_US}) + {HOUR_US}) % {HOUR_US}) // {HOUR_US}, {NO_HOUR})"
        )

    def scan(self, table: Table) -> str:
        """Return SQL that reads a table at its pinned version."""
        scanned = self.snapshot.scan(table)
        if table in (REJECTED_EVENTS, REJECTED_ORDERS):  # an older table lacks the column `records` until the next ingest
            return f"(from {scanned} union all by name select null::bigint as records where false)"
        return scanned

    def execute(self, sql: str, parameters: Sequence[object] | None = None) -> duckdb.DuckDBPyConnection:
        """Run SQL statements."""
        return self._connection.execute(sql, parameters)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        return self.execute(sql).fetchall()

    def values(self, sql: str) -> list[Any]:
        """Return the values of a query with one column."""
        return [value for (value,) in self.rows(sql)]

    def arrow(self, sql: str) -> pa.Table:
        """Return the rows of a query as Arrow."""
        return self.execute(sql).to_arrow_table()

    def keep(self, name: str, rows: pa.Table) -> None:
        """Copy Arrow rows into the temporary table ``name``."""
        keep_table(self._connection, name, rows, self._folder)

    def keep_rows(self, name: str, rows: Collection[Sequence[object]], /, **columns: pa.DataType) -> None:
        """Copy rows into the temporary table ``name`` with ``columns``."""
        values = zip(*rows, strict=True) if rows else ([] for _ in columns)
        self.keep(name, pa.table({column: pa.array(held, columns[column]) for column, held in zip(columns, values, strict=True)}))

    def keep_hours(self, name: str, hours: Iterable[int]) -> None:
        """Copy hours into the temporary table ``name`` with the column ``hour``."""
        self.keep_rows(name, [(hour,) for hour in sorted(hours)], hour=pa.int64())


@contextmanager
def open_database(snapshot: Snapshot) -> Iterator[Database]:
    """Open a Database over ``snapshot``. Raises DuckDB's errors as TableCorruptionError."""
    lake = snapshot.lake
    with scratch_folder(lake.settings, "recount-") as folder, lake.database(memory=_MEMORY) as connection:
        yield Database(snapshot, connection, folder)


def path_list(paths: Iterable[str]) -> str:
    """Return paths as a list in SQL, in order."""
    return f"[{', '.join(map(literal, sorted(paths)))}]"


def hour_in(hours: Collection[int]) -> str:
    """Return a condition on the column ``hour``."""
    return f"hour in ({', '.join(map(str, sorted(hours)))})" if hours else "false"
