"""Opens DuckDB with its ``delta`` extension from an installed package, without network."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs.errors import MachineError, TableCorruptionError
from spark_jobs.failure import one_line

Config = dict[str, str | bool | int | float | list[str]]


def connect_delta(config: Config | None = None) -> duckdb.DuckDBPyConnection:
    """Open a database in memory that can ``delta_scan``, with times in UTC.

    Raises MachineError if the package of the extension is missing or does not fit this DuckDB.
    """
    try:
        path = Path(str(files("duckdb_extension_delta"))) / "extensions" / f"v{duckdb.__version__}" / "delta.duckdb_extension"
        found = path.stat()
        # DuckDB checks a signature on each load, which takes 0.25 s. A file with the hash of its package needs no such check.
        is_pinned = _is_as_packaged(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        connection = duckdb.connect(":memory:", config={**(config or {}), "allow_unsigned_extensions": is_pinned})
        try:
            connection.execute(f"load {literal(path)}")
            connection.execute("set global timezone = 'UTC'")
        except BaseException:
            connection.close()
            raise
    except (ImportError, OSError, duckdb.Error) as error:
        raise MachineError(
            f"DuckDB's delta extension cannot be loaded: {one_line(error)}",
            hint="install duckdb-extension-delta in the version of duckdb",
        ) from error
    return connection


@cache
def _is_as_packaged(path: Path, _signature: tuple[int, ...]) -> bool:
    """Return whether a file of the extension's package has the hash that the package names; cached until the file changes."""
    for packaged in distribution("duckdb-extension-delta").files or ():
        if packaged.hash is not None and packaged.hash.mode == "sha256" and os.path.samefile(packaged.locate(), path):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            return base64.urlsafe_b64encode(digest).decode().rstrip("=") == packaged.hash.value
    return False


def literal(value: object) -> str:
    """Return the text of ``value`` as a quoted SQL literal."""
    return "'" + str(value).replace("'", "''") + "'"


def delta_scan(uri: str, version: int | None = None) -> str:
    """Return SQL that reads the Delta table at ``uri``: ``version``, or the newest."""
    return f"delta_scan({literal(uri)})" if version is None else f"delta_scan({literal(uri)}, version = {version})"


def keep_table(connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table, folder: Path) -> None:
    """Copy Arrow rows into the temporary table ``name``, through a file in ``folder``."""
    path = folder / f"{name}.parquet"  # registering the rows would import pandas, which takes longer
    pq.write_table(rows, path)
    connection.execute(f"create or replace temp table {name} as select * from read_parquet({literal(path)})")
    path.unlink()


@contextmanager
def translate_duckdb_errors(what: object) -> Iterator[None]:
    """Raise DuckDB's errors as TableCorruptionError, which names ``what`` could not be read."""
    try:
        yield
    except duckdb.Error as error:
        raise TableCorruptionError(
            f"{what} cannot be read: {one_line(error)}",
            hint="adtally fsck names what is damaged, and --repair what can be had again; what lies under recount/ may be deleted",
        ) from error


@cache
def task_connection() -> duckdb.DuckDBPyConnection:
    """Open this process's DuckDB for Arrow tables: one thread (Spark runs tasks in parallel), bounded memory, no downloads."""
    made = duckdb.connect()
    made.execute("set threads = 1")
    made.execute("set memory_limit = '1GB'")
    made.execute("set autoinstall_known_extensions = false")
    return made


def query_arrow(sql: str, table: pa.Table) -> pa.Table:
    """Run ``sql`` over ``table``, which it calls ``input``."""
    with task_connection().cursor() as own:  # two streams on the driver may run this at once
        own.register("input", table)
        return own.execute(sql).to_arrow_table()
