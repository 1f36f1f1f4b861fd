"""Opens DuckDB with its extensions ``delta`` and, for object stores, ``httpfs``, from installed packages, without network."""

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
from typing import TYPE_CHECKING

import duckdb

from spark_jobs.errors import MachineError, TableCorruptionError
from spark_jobs.failure import one_line
from spark_jobs.lake.failures import describe_error, translate_store_errors
from spark_jobs.lake.locations import is_local
from spark_jobs.lake.store import access_to

if TYPE_CHECKING:
    import pyarrow as pa

_HTTP_SETTINGS = {"http_retries": 8, "http_retry_wait_ms": 100, "http_retry_backoff": 2, "http_timeout": 30}  # 25 s of waits
Config = dict[str, str | bool | int | float | list[str]]


def connect_delta(config: Config | None = None, lakehouse: str = "") -> duckdb.DuckDBPyConnection:
    """Open a database in memory that can ``delta_scan``, with times in UTC. It can read an object store if ``lakehouse`` is in one.

    Raises MachineError if the package of an extension is missing or does not fit this DuckDB.
    """
    connection = duckdb.connect(":memory:", config={**(config or {}), **delta_config(lakehouse)})
    try:
        load_delta(connection, lakehouse)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def delta_cursor(lakehouse: str, **config: str | int) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a cursor of a database that this process opens once: loading the extensions takes longer than reading a small table."""
    database = _shared_database(lakehouse, tuple(config.items()))
    use_credentials(database, lakehouse)
    with database.cursor() as cursor:
        yield cursor


@cache
def _shared_database(lakehouse: str, config: tuple[tuple[str, str | int], ...]) -> duckdb.DuckDBPyConnection:
    return connect_delta(dict(config), lakehouse)


def delta_config(lakehouse: str = "") -> dict[str, bool]:
    """Return the options with which to open a DuckDB that shall `load_delta`. Raises MachineError as `connect_delta`."""
    # DuckDB checks a signature on each load, which takes 0.25 s. A file with the hash of its package needs no such check.
    paths = {name: _extension_path(name) for name in _extensions(lakehouse)}
    return {"allow_unsigned_extensions": all(_is_as_packaged(name, path, _signature(path)) for name, path in paths.items())}


def load_delta(connection: duckdb.DuckDBPyConnection, lakehouse: str = "") -> None:
    """Make a database as `connect_delta` says."""
    for name in _extensions(lakehouse):
        try:
            connection.execute(f"load {literal(_extension_path(name))}")
        except duckdb.Error as error:
            raise _not_loaded(name, error) from error
    connection.execute("set global timezone = 'UTC'")
    use_credentials(connection, lakehouse)
    if not is_local(lakehouse):
        for setting, value in _HTTP_SETTINGS.items():
            connection.execute(f"set global {setting} = {value}")
        connection.execute("set global enable_http_metadata_cache = true")  # data files never change: no HEAD a scan
        connection.execute("set global parquet_metadata_cache = true")


def use_credentials(connection: duckdb.DuckDBPyConnection, lakehouse: str) -> None:
    """Give a connection the present credentials of the lakehouse's store: those that it was opened with may expire."""
    secret = duckdb_secret(lakehouse)
    if secret is not None:
        try:
            connection.execute(secret)
        except duckdb.Error as error:
            raise MachineError(
                f"DuckDB refuses the credentials of {lakehouse}: {type(error).__name__}"
            ) from None  # its text has them


def duckdb_secret(uri: str) -> str | None:
    """Return the statement that lets a DuckDB connection, with ``httpfs`` loaded, read a location. None for a local path.

    The statement has the credentials in clear: run it, and show it to nobody.
    """
    access = access_to(uri)
    if access is None:
        return None
    scheme, _, host = (access.endpoint or "").partition("://")
    values: dict[str, str | bool | None] = {
        "key_id": access.key_id,
        "secret": access.secret,
        "session_token": access.token,
        "region": access.region,
        "endpoint": host.rstrip("/") or None,
        "use_ssl": None if access.endpoint is None else scheme == "https",
        "url_style": None if access.endpoint is None else "path",
    }
    given = ", ".join(
        f"{name} {str(value).lower() if isinstance(value, bool) else literal(value)}"
        for name, value in values.items()
        if value is not None
    )
    return f"create or replace secret adtally_store (type s3, {given})"


def _extensions(lakehouse: str) -> tuple[str, ...]:
    return ("delta",) if is_local(lakehouse) else ("delta", "httpfs")


def _extension_path(name: str) -> Path:
    try:
        path = Path(str(files(f"duckdb_extension_{name}"))) / f"extensions/v{duckdb.__version__}/{name}.duckdb_extension"
        path.stat()
    except (ImportError, OSError) as error:
        raise _not_loaded(name, error) from error
    return path


def _not_loaded(name: str, error: Exception) -> MachineError:
    return MachineError(
        f"DuckDB's {name} extension cannot be loaded: {one_line(error)}",
        hint=f"install duckdb-extension-{name} in the version of duckdb",
    )


def _signature(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@cache
def _is_as_packaged(extension: str, path: Path, _signature: tuple[int, ...]) -> bool:
    """Return whether a file of an extension's package has the hash that the package names; cached until the file changes."""
    for packaged in distribution(f"duckdb-extension-{extension}").files or ():
        if packaged.hash is not None and packaged.hash.mode == "sha256" and os.path.samefile(packaged.locate(), path):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            return base64.urlsafe_b64encode(digest).decode().rstrip("=") == packaged.hash.value
    return False


def literal(value: object) -> str:
    """Return the text of ``value`` as a quoted SQL literal."""
    return "'" + str(value).replace("'", "''") + "'"


# Files are chosen before a query runs. By default DuckDB reads the log again while a query with a join or a limit runs, to skip
# more files. If such a query then fails on an object store, the log's reader aborts the whole process.
_FILTERS = ("pushdown_filters", "'constant_only'")


def delta_scan(uri: str, version: int | None = None) -> str:
    """Return SQL that reads the Delta table at ``uri``: ``version``, or the newest."""
    at = "" if version is None else f", version = {version}"
    return f"delta_scan({literal(uri)}{at}, {' = '.join(_FILTERS)})"


def attach_delta(uri: str, version: int, name: str) -> str:
    """Return SQL by which the Delta table at ``uri`` can be read as ``name``, as often as wanted; its log is read once."""
    return f"attach {literal(uri)} as {name} (type delta, pin_snapshot, version {version}, {' '.join(_FILTERS)})"


def keep_table(connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table, folder: Path) -> None:
    """Copy Arrow rows into the temporary table ``name``, through a file in ``folder``."""
    import pyarrow.parquet as pq  # a query of the marts needs no Arrow, and loading it takes 0.2 s

    path = folder / f"{name}.parquet"  # registering the rows would import pandas, which takes longer
    pq.write_table(rows, path)
    connection.execute(f"create or replace temp table {name} as select * from read_parquet({literal(path)})")
    path.unlink()


@contextmanager
def translate_duckdb_errors(what: object) -> Iterator[None]:
    """Raise DuckDB's errors as TableCorruptionError, which names ``what`` could not be read; those of a store as StoreError."""
    try:
        with translate_store_errors("read", str(what)):
            yield
    except duckdb.Error as error:
        raise TableCorruptionError(
            f"{what} cannot be read: {describe_error(error)}",
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
