"""Reads the Delta tables of one installation at fixed versions, and changes them in durable commits.

    lake = Lake(settings)
    snapshot = lake.pin(BATCH_LEDGER, EVENTS)                       # in this order: see `Lake.pin`
    with lake.database() as database:
        database.sql(f"select count(*) from {snapshot.scan(EVENTS)}")
    ids = snapshot.rows(EVENTS, "event_id", "fingerprint")
    lake.append(RULE_SETS, rows, Step.RULE_SETS)

Locks are in `locks`, creation and upgrades of tables in `writes`, compaction in `rewrite`, vacuum in `removal`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.transaction import AddAction, RemoveAction

from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.commit import WRITE_ERRORS, Attempts, Transaction, committing, has_seen
from spark_jobs.lake.data_files import DataFile, DataFileWriter
from spark_jobs.lake.duck import Config, attach_delta, connect_delta, delta_scan, literal, translate_duckdb_errors, use_credentials
from spark_jobs.lake.locations import is_local
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.reading import (
    TableFile,
    TableSize,
    file_paths,
    full_path,
    open_table,
    partitioned_paths,
    read_batches,
    read_file_rows,
    read_files,
    table_files,
    table_size,
)
from spark_jobs.lake.scratch import scratch_folder
from spark_jobs.lake.tables import Table
from spark_jobs.steps import Step

Partition = tuple[tuple[str, str], ...]
"""Partition columns and their values as Delta writes them; empty: all of the table."""


class Lake:
    """The tables under the lakehouse root of ``settings``. Opening it reads nothing.

    It keeps the tables that it writes open, so that the next commit reads only the new entries of the log.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._newest: dict[str, DeltaTable] = {}
        self._pinned: dict[str, tuple[int, DeltaTable]] = {}

    def uri(self, table: Table) -> str:
        """Return the location of a table: a path, or an object store's URI."""
        return self.settings.table_uri(table.name)

    def log(self, table: Table) -> DeltaLog:
        """Return the table's log: its commits, id, transactions and metadata."""
        return DeltaLog(self.uri(table))

    def exists(self, table: Table) -> bool:
        """Return whether a table has been created."""
        return self.log(table).exists()

    def version(self, table: Table) -> int | None:
        """Return the newest version of a table; None if it does not exist. Raises TableCorruptionError as `DeltaLog` does."""
        return self.log(table).latest_version()

    def table_id(self, table: Table) -> str | None:
        """Return the id of a table, None if it does not exist. A table that was deleted and created again has another id."""
        return self.log(table).table_id() if self.exists(table) else None

    def is_readable(self, table: Table, version: int) -> bool:
        """Return whether the log still describes a version of a table."""
        try:
            open_table(self.uri(table), version)
        except TableCorruptionError:
            return False
        return True

    def pin(self, *tables: Table) -> Snapshot:
        """Pin the newest version of each table, in the order given; leaves out tables that do not exist.

        A writer commits a batch to `batch_ledger` last. So if you pin the ledger first, the tables pinned after it contain every
        batch of it completely. Raises TableCorruptionError if a log is damaged.
        """
        found = {table.name: self.version(table) for table in tables}
        return Snapshot(self, {name: version for name, version in found.items() if version is not None})

    def open_for_reading(self, table: Table, version: int) -> DeltaTable:
        """Open a table at a version. Keeps the last version of each table, because an opening reads the log."""
        known = self._pinned.get(table.name)
        if known is None or known[0] != version:
            known = self._pinned[table.name] = version, open_table(self.uri(table), version)
        return known[1]

    def at(self, versions: Mapping[str, int]) -> Snapshot:
        """Return a snapshot of tables, by name, at versions that were pinned before."""
        return Snapshot(self, dict(versions))

    def rows(self, table: Table, *columns: str) -> pa.Table:
        """Read rows of a table's newest version, as `Snapshot.rows`; no rows if it does not exist."""
        return self.pin(table).rows(table, *columns)

    def scan(self, table: Table, version: int | None = None) -> str:
        """Return SQL for DuckDB that reads a table at a version, or at its newest."""
        return delta_scan(self.uri(table), version)

    def scan_files(self, table: Table, paths: Sequence[str]) -> str:
        """Return SQL for DuckDB that reads the stored columns of data files, named as in the log."""
        return f"read_parquet([{', '.join(literal(full_path(self.uri(table), path)) for path in paths)}])"

    def read_files(
        self, table: Table, paths: Sequence[str], *columns: str, where_in: tuple[str, pa.Array] | None = None
    ) -> pa.Table:
        """Read ``columns`` (default: all stored) of data files, named as in the log. Raises FileNotFoundError.

        ``where_in`` keeps the rows whose column has one of the values.
        """
        return read_files(self.uri(table), paths, table.schema_of(*columns), where_in)

    def read_batches(self, table: Table, paths: Sequence[str], *columns: str) -> Iterator[pa.RecordBatch]:
        """Do as `read_files`, a batch at a time, file by file. Memory does not grow with the files."""
        return read_batches(self.uri(table), paths, table.schema_of(*columns))

    def read_file_rows(self, table: Table, file: TableFile) -> Iterator[pa.Table]:
        """Read all columns of a data file, the partition columns too. A second reading cuts the rows into the same parts."""
        return read_file_rows(self.uri(table), table, file)

    @contextmanager
    def database(self, *, memory: str | None = None, threads: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open a DuckDB that can scan the tables, in UTC. It spills to a folder that is deleted at the end.

        ``memory`` is its limit, as "1200MB". Raises DuckDB's errors as TableCorruptionError.
        """
        tables = f"the tables of {self.settings.lakehouse_uri}"
        with scratch_folder(self.settings, "duckdb-") as spill, translate_duckdb_errors(tables):
            limits: Config = {"memory_limit": memory} if memory is not None else {}
            if threads is not None:
                limits["threads"] = threads
            locations = (self.settings.lakehouse_uri, self.settings.landing_uri)
            remote = next((uri for uri in locations if not is_local(uri)), "")  # one secret serves all buckets
            with connect_delta({"temp_directory": str(spill), **limits}, remote) as connection:
                yield connection

    def renew_credentials(self, database: duckdb.DuckDBPyConnection) -> None:
        """Let a database of `database` that is open for long go on reading a store after the credentials have changed."""
        use_credentials(database, self.settings.lakehouse_uri)

    def last_transaction(self, table: Table, app_id: str) -> int | None:
        """Return the version of a table's newest transaction of ``app_id``; None if it has none, or does not exist."""
        return open_table(self.uri(table)).transaction_version(app_id) if self.exists(table) else None

    def has(self, table: Table, transaction: Transaction) -> bool:
        """Return whether a table has the write of a transaction."""
        return (table.name in self._newest or self.exists(table)) and has_seen(
            self.uri(table), self._open_newest(table), transaction
        )

    def writer(self, table: Table) -> DataFileWriter:
        """Return a writer of data files of a table. No reader sees a file until `commit` names it."""
        return DataFileWriter(self.uri(table), table)

    def commit(
        self,
        table: Table,
        step: Step,
        *,
        base: int | None = None,
        add: Sequence[DataFile] = (),
        remove: Sequence[TableFile] = (),
        restore: Sequence[TableFile] = (),
        transaction: Transaction | None = None,
        metadata: Mapping[str, object] | None = None,
        info: Mapping[str, str] | None = None,
        changes_rows: bool = True,
        mode: Literal["append", "overwrite"] = "append",
        schema: pa.Schema | None = None,
        batch_id: int | None = None,
    ) -> bool:
        """Make one durable commit; returns whether it was made: not if the table has seen ``transaction``.

        ``base`` is the version that the writer decided on, by default the newest. Delta refuses the commit if a later one
        contradicts it: removed the same files, or has the same transaction's app id. ``add`` are files that `writer` wrote,
        ``remove`` files of the table, ``restore`` files of an earlier version. ``metadata`` becomes the user metadata as JSON,
        ``info`` further entries of the commitInfo. ``changes_rows`` False: the commit only moves rows between files. ``mode``
        overwrite removes all files of the table; ``schema`` replaces its schema. ``batch_id``, by default the transaction's, names
        the step for crash tests.
        """
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            RemoveAction(file.path, changes_rows, now, file.size, file.partition) for file in remove
        ]
        added = [(file, json.dumps({"numRecords": file.rows})) for file in restore] + [(file, file.stats) for file in add]
        actions += [AddAction(file.path, file.size, file.partition, now, changes_rows, stats) for file, stats in added]
        if batch_id is None:
            batch_id = transaction.batch_id if transaction else 0
        # Only a commit that removes given files can contradict a later one, so any other is decided again on the newest version.
        rebases = base is not None or bool(remove)
        tries = Attempts()
        while True:
            held = self._open_newest(table) if base is None else self._open_for_commit(table, base)
            if tries.took_effect(self.uri(table)):
                return True
            if transaction is not None and has_seen(self.uri(table), held, transaction):
                return False
            try:
                with committing(
                    self.uri(table),
                    held,
                    step,
                    batch_id,
                    files=add,
                    transaction=transaction,
                    metadata=metadata,
                    info=info,
                    rebases=rebases,
                    tries=tries,
                ) as properties:
                    held.create_write_transaction(
                        actions,
                        mode=mode,
                        schema=held.schema() if schema is None else Schema.from_arrow(schema),
                        partition_by=list(table.partition_by),
                        commit_properties=properties,
                    )
                return True
            except WRITE_ERRORS as error:
                tries.wait_or_raise(error, conflicts=not rebases)

    def append(
        self,
        table: Table,
        rows: pa.Table,
        step: Step,
        *,
        transaction: Transaction | None = None,
        metadata: Mapping[str, object] | None = None,
        info: Mapping[str, str] | None = None,
    ) -> bool:
        """Add rows to a table in one commit, once per transaction; returns whether the commit was made."""
        return self.commit(table, step, add=self._write(table, rows), transaction=transaction, metadata=metadata, info=info)

    def replace(self, table: Table, rows: pa.Table, step: Step, *, metadata: Mapping[str, object] | None = None) -> None:
        """Replace the whole content of a table in one commit."""
        self.commit(table, step, add=self._write(table, rows), metadata=metadata, mode="overwrite")

    def _write(self, table: Table, rows: pa.Table) -> list[DataFile]:
        with self.writer(table) as writer:
            writer.write(rows)
        return writer.files

    def _open_for_commit(self, table: Table, version: int) -> DeltaTable:
        """Open a table at a version. Keeps it no longer, because the commit brings it to its own version."""
        held = self.open_for_reading(table, version)
        self._pinned.pop(table.name, None)
        return held

    def _open_newest(self, table: Table) -> DeltaTable:
        self._newest[table.name] = open_table(self.uri(table), held=self._newest.get(table.name))
        return self._newest[table.name]


@dataclass(frozen=True)
class Snapshot:
    """Tables at fixed versions. ``versions`` are by table name."""

    lake: Lake
    versions: dict[str, int]

    def __contains__(self, table: Table) -> bool:
        return table.name in self.versions

    def version(self, table: Table) -> int:
        """Return the version of a pinned table. Raises KeyError if it was not pinned, or did not exist."""
        return self.versions[table.name]

    def and_pin(self, *tables: Table) -> Snapshot:
        """Return this snapshot with the newest versions of further tables."""
        return Snapshot(self.lake, {**self.versions, **self.lake.pin(*tables).versions})

    def scan(self, table: Table) -> str:
        """Return SQL for DuckDB that reads a table."""
        return self.lake.scan(table, self.version(table))

    def attach(self, database: duckdb.DuckDBPyConnection, table: Table) -> str:
        """Let ``database`` read a table's log once; return SQL that reads the table in it, as often as wanted."""
        name = f"pinned_{table.name}"
        database.execute(attach_delta(self.lake.uri(table), self.version(table), name))
        return name

    def columns(self, table: Table) -> list[str]:
        """Return the columns of a table at its version. A table of an older adtally may lack some."""
        return [field.name for field in self._open(table).schema().fields]

    def files(self, table: Table, *partitions: tuple[str, Collection[str]]) -> list[TableFile]:
        """Return the data files of a table: those with one of the values of each partition column given."""
        return table_files(self._open(table), *partitions)

    def size(self, table: Table) -> TableSize:
        """Return the size of a table."""
        return table_size(self._open(table))

    def paths(self, table: Table) -> list[str]:
        """Return the paths of a table's data files, as the log writes them."""
        return file_paths(self._open(table))

    def paths_in(self, table: Table, partitions: Collection[tuple[Any, ...]]) -> list[str]:
        """Return the paths of the data files of some partitions: the values of the partition columns."""
        return [path for path, values in partitioned_paths(self._open(table), table) if values in partitions]

    def partitions(self, table: Table, *partitions: tuple[str, Collection[str]]) -> dict[Partition, list[TableFile]]:
        """Return the data files of `files` by partition; leaves out files without one of its values."""
        found: dict[Partition, list[TableFile]] = {}
        for file in self.files(table, *partitions):
            values: list[tuple[str, Any]] = [(name, file.values[name]) for name in table.partition_by]
            if all(value is not None for _, value in values):
                found.setdefault(tuple((name, str(value)) for name, value in values), []).append(file)
        return found

    def rows(self, table: Table, *columns: str, where_in: tuple[str, pa.Array] | None = None) -> pa.Table:
        """Read ``columns`` (default: all stored) of a table as Arrow; no rows if the table was not pinned.

        ``where_in`` keeps the rows whose column has one of the values. A column that an older table lacks is null.
        """
        schema = table.schema_of(*columns)
        if table not in self:
            return schema.empty_table()
        return read_files(self.lake.uri(table), self.paths(table), schema, where_in)

    def _open(self, table: Table) -> DeltaTable:
        return self.lake.open_for_reading(table, self.version(table))
