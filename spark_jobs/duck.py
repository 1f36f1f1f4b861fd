"""DuckDB with its ``delta`` extension, which comes as an installed package: no network is needed."""

from __future__ import annotations

import base64
import hashlib
import os
from functools import cache
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import duckdb
import pyarrow as pa

from spark_jobs.errors import MachineError
from spark_jobs.failure import one_line


def connect_delta(config: dict[str, str | bool | int | float | list[str]] | None = None) -> duckdb.DuckDBPyConnection:
    """A connection of its own, in memory, that can ``delta_scan``.

    Raises MachineError when the package of the extension is missing or does not fit this DuckDB.
    """
    try:
        path = Path(str(files("duckdb_extension_delta"))) / "extensions" / f"v{duckdb.__version__}" / "delta.duckdb_extension"
        found = path.stat()
        # DuckDB checks a signature on each load, a quarter of a second. A file with the hash that its package names needs none.
        is_pinned = _is_as_packaged(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        connection = duckdb.connect(":memory:", config={**(config or {}), "allow_unsigned_extensions": is_pinned})
        try:
            connection.execute("load '{}'".format(str(path).replace("'", "''")))
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
    """Whether a file of the extension's package has the hash that the package names; asked again when the file changes."""
    for packaged in distribution("duckdb-extension-delta").files or ():
        if packaged.hash is not None and packaged.hash.mode == "sha256" and os.path.samefile(packaged.locate(), path):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            return base64.urlsafe_b64encode(digest).decode().rstrip("=") == packaged.hash.value
    return False


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
