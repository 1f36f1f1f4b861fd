"""The lake: the Delta tables of one installation, read at fixed versions.

    lake = Lake(settings)
    snapshot = lake.pin(BATCH_LEDGER, EVENTS)                       # in this order: see `Lake.pin`
    with lake.database() as database:
        database.sql(f"select count(*) from {snapshot.scan(EVENTS)}")
    ids = snapshot.rows(EVENTS, "event_id", "fingerprint")

Writers are in `commit` and `writes`, locks in `locks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pyarrow as pa
from deltalake import DeltaTable

from spark_jobs.config import Settings
from spark_jobs.lake.duck import Config, connect_delta, delta_scan, translate_duckdb_errors
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.reading import TableFile, read_files, table_files
from spark_jobs.lake.tables import Table


class Lake:
    """The tables under the lakehouse root of ``settings``. Opening it reads nothing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def uri(self, table: Table) -> str:
        """Where a table is: a path, or an object store's URI."""
        return self.settings.table_uri(table.name)

    def log(self, table: Table) -> DeltaLog:
        """The table's log: its commits, id, transactions and metadata."""
        return DeltaLog(self.uri(table))

    def version(self, table: Table) -> int | None:
        """The newest version of a table; None if it does not exist. Raises TableCorruptionError as `DeltaLog` does."""
        return self.log(table).latest_version()

    def pin(self, *tables: Table) -> Snapshot:
        """The newest version of each table, read in the order given; tables that do not exist are left out.

        A writer commits a batch to `batch_ledger` last, so whoever pins the ledger first finds every batch of it whole in the
        tables pinned after it. Raises TableCorruptionError where a log is damaged.
        """
        found = {table.name: self.version(table) for table in tables}
        return Snapshot(self, {name: version for name, version in found.items() if version is not None})

    def at(self, versions: Mapping[str, int]) -> Snapshot:
        """Tables, by name, at versions that were pinned before."""
        return Snapshot(self, dict(versions))

    @contextmanager
    def database(self, *, memory: str | None = None, threads: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
        """A DuckDB of its own that can scan the tables, in UTC. It spills to a folder that is gone afterwards.

        ``memory`` is its limit, as "1200MB". Raises DuckDB's errors as TableCorruptionError.
        """
        with self.scratch("duckdb-") as spill, translate_duckdb_errors(self.settings.home_path):
            config: Config = {"temp_directory": str(spill)}
            if memory is not None:
                config["memory_limit"] = memory
            if threads is not None:
                config["threads"] = threads
            with connect_delta(config) as connection:
                yield connection

    @contextmanager
    def scratch(self, prefix: str) -> Iterator[Path]:
        """A new folder for temporary files, deleted at the end."""
        self.settings.scratch_path.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=prefix, dir=self.settings.scratch_path) as folder:
            yield Path(folder)


@dataclass(frozen=True)
class Snapshot:
    """Tables at fixed versions. ``versions`` are by table name."""

    lake: Lake
    versions: dict[str, int]

    def __contains__(self, table: Table) -> bool:
        return table.name in self.versions

    def version(self, table: Table) -> int:
        """The version of a pinned table. Raises KeyError if it was not pinned, or did not exist."""
        return self.versions[table.name]

    def and_pin(self, *tables: Table) -> Snapshot:
        """This snapshot and the newest versions of further tables."""
        return Snapshot(self.lake, {**self.versions, **self.lake.pin(*tables).versions})

    def scan(self, table: Table) -> str:
        """SQL for DuckDB that reads a table."""
        return delta_scan(self.lake.uri(table), self.version(table))

    def files(self, table: Table) -> list[TableFile]:
        """The data files of a table."""
        return table_files(DeltaTable(self.lake.uri(table), version=self.version(table)))

    def rows(self, table: Table, *columns: str, where_in: tuple[str, pa.Array] | None = None) -> pa.Table:
        """Rows of a table as Arrow: ``columns`` (none a partition column), by default all. No rows if it was not pinned.

        ``where_in`` keeps the rows whose column has one of the values. A column that an older table lacks is null.
        """
        schema = pa.schema([table.schema.field(name) for name in columns]) if columns else table.schema
        if table not in self:
            return schema.empty_table()
        return read_files(self.lake.uri(table), [file.path for file in self.files(table)], schema, where_in)
