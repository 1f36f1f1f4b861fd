"""Reads the data files of Delta tables and their rows as Arrow, without a Spark job."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from spark_jobs.errors import StoreError, TableCorruptionError
from spark_jobs.lake.failures import describe_error, read_again, translate_store_errors
from spark_jobs.lake.locations import is_local
from spark_jobs.lake.places import open_place
from spark_jobs.lake.store import delta_options
from spark_jobs.lake.tables import Table

if TYPE_CHECKING:
    from pyarrow import dataset

_NOT_LISTED = "LogSegment end version"  # delta-rs: the list ends before the version
_KINDS = ("partition", "min", "max")
_STATISTICS_STEP = timedelta(milliseconds=1)  # Delta's statistics have times in milliseconds


@dataclass(frozen=True)
class TableFile:
    """A data file of a table's version in the log: path within the table, size in bytes, number of rows.

    ``values`` are those of the partition columns; ``low`` and ``high`` the smallest and largest of each column with statistics.
    """

    path: str
    size: int
    rows: int | None
    values: dict[str, Any]
    low: dict[str, Any]
    high: dict[str, Any]

    @property
    def partition(self) -> dict[str, str | None]:
        """Return the values of the partition columns as Delta writes them."""
        return {name: None if value is None else str(value) for name, value in self.values.items()}

    def may_have(self, column: str, start: datetime, end: datetime) -> bool:
        """Return whether the file may have rows with ``start <= column <= end``. True without statistics of the column."""
        low, high = self.low.get(column), self.high.get(column)
        if low is None or high is None:
            return True
        low, high = (at if at.tzinfo else at.replace(tzinfo=UTC) for at in (low, high))
        return bool(low <= end and start - high <= _STATISTICS_STEP)


def open_table(uri: str, version: int | None = None, held: DeltaTable | None = None) -> DeltaTable:
    """Open a table at a version, or at its newest. Raises TableCorruptionError if it cannot be read.

    ``held`` is the table opened before: it is brought to the newest version, which reads only the new entries of the log. It is
    opened anew if the credentials for the store have changed.
    """
    options = delta_options(uri)

    def opened() -> DeltaTable:
        with translate_store_errors("open", uri):
            if held is None or held._storage_options != options:
                try:
                    return DeltaTable(uri, version=version, storage_options=options)
                except DeltaError as error:
                    _raise_if_list_lags(uri, version, error)
                    raise
            held.update_incremental()
            return held

    try:
        return read_again(opened)
    except (DeltaError, OSError) as error:
        if is_local(uri) and isinstance(error, OSError):
            raise
        name = uri.rsplit("/", 1)[-1]
        which = f"table {name}" if version is None else f"version {version} of table {name}"
        raise TableCorruptionError(
            f"{which} cannot be read: {describe_error(error)}", hint="it may have been vacuumed; adtally fsck names what is damaged"
        ) from error


def _raise_if_list_lags(uri: str, version: int | None, error: DeltaError) -> None:
    """Raise StoreError if a version cannot be read because the store's list does not have its commit, which is there."""
    if version is None or is_local(uri) or _NOT_LISTED not in str(error):
        return
    commit = f"_delta_log/{version:020d}.json"
    if open_place(uri).find(commit) is not None:
        raise StoreError(
            f"list {uri}/_delta_log failed: it lacks {commit}, which is there", hint="the store's lists lag"
        ) from error


def table_files(held: DeltaTable, *partitions: tuple[str, Collection[str]]) -> list[TableFile]:
    """Return the data files of a snapshot: those with one of the values, as Delta writes them, of each partition column given."""
    rows = _add_actions(held, flatten=True)
    for name, values in partitions:
        rows = rows.filter(pc.is_in(rows[f"partition.{name}"].cast(pa.string()), value_set=pa.array(list(values), pa.string())))
    parts = {kind: {n.split(".", 1)[1]: n for n in rows.column_names if n.startswith(f"{kind}.")} for kind in _KINDS}
    return [
        TableFile(
            row["path"],
            row["size_bytes"],
            row["num_records"],
            *({name: row[column] for name, column in parts[kind].items()} for kind in _KINDS),
        )
        for row in rows.to_pylist()
    ]


@dataclass(frozen=True)
class TableSize:
    """The number of a table's data files, their bytes, and the rows as their statistics say; None if a file has none."""

    files: int
    bytes: int
    rows: int | None


def table_size(held: DeltaTable) -> TableSize:
    """Return the size of a snapshot."""
    actions = _add_actions(held)
    sizes, rows = actions["size_bytes"], actions["num_records"]
    return TableSize(len(sizes), pc.sum(sizes).as_py() or 0, None if rows.null_count else pc.sum(rows).as_py() or 0)


def file_paths(held: DeltaTable) -> list[str]:
    """Return the paths of a snapshot's data files, as the log writes them."""
    return list(_add_actions(held)["path"].to_pylist())


def partitioned_paths(held: DeltaTable, table: Table) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the path of each data file of a snapshot, and its values of the partition columns."""
    actions = _add_actions(held)
    values = (pc.struct_field(actions["partition"], name).to_pylist() for name in table.partition_by)
    yield from zip(actions["path"].to_pylist(), zip(*values, strict=True), strict=True)


def _add_actions(held: DeltaTable, *, flatten: bool = False) -> pa.Table:
    # not pa.table, which imports pandas to see whether it is given a frame; that takes longer than the rest
    return pa.RecordBatchReader.from_stream(held.get_add_actions(flatten=flatten)).read_all()


def full_path(uri: str, path: str) -> str:
    """Return the location of a data file, from its path in the log of the table at ``uri``."""
    return f"{uri}/{unquote(path)}"


def read_files(uri: str, paths: Sequence[str], schema: pa.Schema, where_in: tuple[str, pa.Array] | None = None) -> pa.Table:
    """Read columns of data files, named as in the log. ``schema`` may have no partition column.

    ``where_in`` keeps the rows whose column has one of the values. A column that a file lacks is null.

    Raises FileNotFoundError if a file is missing or damaged. Both can be so of a file that an old commit names and that vacuum or
    fsck has taken out of the table; a caller that follows commits then reads the table instead.
    """
    if not paths:
        return schema.empty_table()
    with _damaged_as_missing(uri), _dataset(uri, paths, schema) as files:
        if where_in is None:
            return files.to_table()
        # not the scanner's filter: it cannot compare the statistics of string_view columns, which delta-rs writes
        name, values = where_in
        kept = [batch.filter(pc.is_in(batch[name], value_set=values)) for batch in files.to_batches()]
        return pa.Table.from_batches(kept, schema)


def read_batches(uri: str, paths: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Do as `read_files`, a batch at a time, file by file. Memory does not grow with the files."""
    for path in paths:
        with _damaged_as_missing(uri), _dataset(uri, [path], schema) as file:
            yield from file.to_batches(batch_readahead=1, fragment_readahead=1)


def read_file_rows(uri: str, table: Table, file: TableFile) -> Iterator[pa.Table]:
    """Read all columns of a data file, the partition columns too. A second reading cuts the rows into the same parts."""
    with _dataset(uri, [file.path], table.stored_schema) as stored:
        for batch in stored.to_batches(use_threads=False):
            rows = pa.Table.from_batches([batch])
            for name in table.partition_by:
                value = pa.scalar(file.values[name]).cast(table.schema.field(name).type)
                rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
            yield rows.select(table.schema.names)


@contextmanager
def _damaged_as_missing(uri: str) -> Iterator[None]:
    """Raise FileNotFoundError if Arrow cannot decode a data file. Errors of the disk or the store keep their kind."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, FileNotFoundError):
            raise
        raise FileNotFoundError(f"a data file of {uri} is damaged (adtally fsck): {error}") from error


@contextmanager
def _dataset(uri: str, paths: Sequence[str], schema: pa.Schema) -> Iterator[dataset.Dataset]:
    """Yield the rows of data files. Those in a store are copied to the disk first.

    A copy takes one request a file. Arrow's threads would call Python for a file system of ours, and a thread that does so while
    the process ends aborts the process.
    """
    from pyarrow import dataset  # here: it imports pandas, which takes a second

    with open_place(uri).local_files([unquote(path) for path in paths]) as files:
        yield dataset.dataset([str(file) for file in files], schema=schema, format="parquet")
