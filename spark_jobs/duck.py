"""DuckDB with its ``delta`` extension, which comes as an installed package: no network is needed."""

from __future__ import annotations

from functools import cache

import duckdb
import pyarrow as pa

from spark_jobs.errors import MachineError

_is_verified = False


def connect_delta(config: dict[str, str | bool | int | float | list[str]] | None = None) -> duckdb.DuckDBPyConnection:
    """A connection of its own, in memory, that can ``delta_scan``.

    Raises MachineError when the package of the extension is missing or does not fit this DuckDB.
    """
    global _is_verified
    # DuckDB checks the extension's signature on each load, a quarter of a second: once a process is enough
    connection = duckdb.connect(":memory:", config={**(config or {}), "allow_unsigned_extensions": _is_verified})
    try:
        from duckdb_extensions import import_extension

        import_extension("delta", con=connection)
        connection.execute("load delta")
    except (ImportError, OSError, RuntimeError, duckdb.Error) as error:
        connection.close()
        raise MachineError(
            f"DuckDB's delta extension cannot be loaded: {' '.join(str(error).split())[:300]}",
            hint="install duckdb-extension-delta in the version of duckdb",
        ) from error
    _is_verified = True
    return connection


@cache
def task_connection() -> duckdb.DuckDBPyConnection:
    """This process's DuckDB for Arrow tables: one thread (Spark owns the parallelism), bounded memory, no extension fetched."""
    made = duckdb.connect()
    made.execute("set threads = 1")
    made.execute("set memory_limit = '1GB'")
    made.execute("set autoinstall_known_extensions = false")
    return made


def query_arrow(sql: str, table: pa.Table) -> pa.Table:
    """The result of ``sql`` over ``table``, which is called ``input`` in it."""
    with task_connection().cursor() as own:  # on the driver two streams may be here at once
        own.register("input", table)
        return own.execute(sql).to_arrow_table()
