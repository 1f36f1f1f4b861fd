"""The published marts for the pages: one build open at a time, shared by all requests, exchanged when another is published."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import duckdb
import pyarrow.parquet as pq

from orchestration.console.recent import Recent
from orchestration.console.tables import Row, fetch_rows
from orchestration.marts.parquet import exact_integers
from orchestration.marts.query import BUILD_COLUMN, open_marts
from orchestration.marts.render import render
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.failure import one_line
from spark_jobs.lake.marts import readable_marts

Signature = tuple[int, int, int]

_COLUMNS = (
    "select column_name, data_type from duckdb_columns() "
    "where database_name = 'marts' and schema_name = 'main' and table_name = $name order by column_index"
)
_ROWS_A_PART = 20_000


@dataclass
class OpenBuild:
    """A build of the marts. It stays readable, whole, until it is closed, although another one is published meanwhile.

    ``build_id`` and ``built_at`` are those of the near-real-time group, ``versions`` the Delta versions that it read by table.
    """

    signature: Signature
    connection: duckdb.DuckDBPyConnection
    resources: ExitStack
    build_id: str = ""
    built_at: datetime | None = None
    versions: dict[str, int] = field(default_factory=dict)
    derived: Recent[Any] = field(default_factory=lambda: Recent(64))
    """What pages derive from the build, such as the choices of a filter."""
    readers: int = 0
    is_replaced: bool = False

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A cursor on the build, which the caller closes."""
        cursor = self.connection.cursor()
        cursor.execute("use marts")  # a cursor does not inherit it
        return cursor

    def rows(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
        """The rows of a statement, as dicts. ``parameters`` are the values of its ``$name``; others than it names are ignored.

        Raises AdtallyError where the file lacks what it asks for: another adtally built it.
        """
        try:
            with self.cursor() as cursor:
                return fetch_rows(cursor, sql, parameters)
        except (duckdb.CatalogException, duckdb.BinderException) as error:
            raise AdtallyError(
                f"the published marts are of another adtally: {one_line(error)}", hint="run `adtally marts build`"
            ) from error


class PublishedMarts:
    """Opens the newest published build."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._open: OpenBuild | None = None
        self._path: Path | None = None

    def build_id(self) -> str:
        """Look whether a newer build was published, and return the id of the newest; empty where there is none.

        Pages only open what this found: they do not wait for a store.
        """
        try:
            self._path = readable_marts(self._settings)
            with self.opened() as build:
                return build.build_id
        except AdtallyError:
            return ""

    @contextmanager
    def opened(self) -> Iterator[OpenBuild]:
        """The newest build, for the time of the context. Raises AdtallyError where none was published or it cannot be read."""
        with self._lock:
            build = self._newest()
            build.readers += 1
        try:
            yield build
        finally:
            with self._lock:
                build.readers -= 1
                if build.is_replaced and not build.readers:
                    build.resources.close()

    def close(self) -> None:
        """Close the build that is open."""
        with self._lock:
            self._replace(None)

    def _newest(self) -> OpenBuild:
        path = readable_marts(self._settings) if self._path is None else self._path
        try:
            if path is None:
                raise FileNotFoundError
            found = path.stat()
        except OSError:
            self._replace(None)
            raise AdtallyError("no marts have been published yet", hint="run `adtally marts build`") from None
        signature = (found.st_dev, found.st_ino, found.st_mtime_ns)
        if self._open is None or self._open.signature != signature:
            self._replace(self._load(signature))
        assert self._open is not None
        return self._open

    def _load(self, signature: Signature) -> OpenBuild:
        with ExitStack() as resources:
            connection = resources.enter_context(open_marts(self._settings))
            build = OpenBuild(signature, connection, ExitStack())
            for row in build.rows("select * from mart_build where mart_group = 'near_real_time'"):
                build.build_id, build.built_at = row["build_id"], row["built_at"]
                build.versions[row["table_name"]] = row["delta_version"]
            build.resources = resources.pop_all()
            return build

    def _replace(self, build: OpenBuild | None) -> None:
        old, self._open = self._open, build
        if old is not None:
            old.is_replaced = True
            if not old.readers:
                with suppress(duckdb.Error):
                    old.resources.close()


def export_mart(build: OpenBuild, name: str, form: str, file: IO[bytes]) -> None:
    """Write a whole mart into a file as csv or parquet, a part at a time. The last column is the id of the build.

    Texts that a spreadsheet would run as formulas begin with an apostrophe in CSV. Raises UsageError if there is no such mart.
    """
    columns = build.rows(_COLUMNS, {"name": name})
    if not columns:
        raise UsageError(f"there is no mart {name!r}", hint='`adtally query "show tables"` lists them')
    replaced = exact_integers((column["column_name"], column["data_type"]) for column in columns)
    stamp = "exported_build" if any(column["column_name"] == BUILD_COLUMN for column in columns) else BUILD_COLUMN
    with build.cursor() as cursor:
        reader = cursor.execute(f'select *{replaced}, $build as {stamp} from "{name}"', {"build": build.build_id})
        batches = reader.to_arrow_reader(_ROWS_A_PART)
        if form == "parquet":
            with pq.ParquetWriter(file, batches.schema, compression="zstd") as writer:
                for batch in batches:
                    writer.write_batch(batch)
            return
        file.write((render(batches.schema.names, [], "csv") + "\n").encode())
        for batch in batches:
            rows = [list(row.values()) for row in batch.to_pylist()]
            file.write((render(batches.schema.names, rows, "csv").partition("\n")[2] + "\n").encode())
