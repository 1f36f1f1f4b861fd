"""Reads the data files of Delta tables and their rows as Arrow, without a Spark job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from spark_jobs.errors import TableCorruptionError
from spark_jobs.failure import one_line
from spark_jobs.lake.roots import open_root
from spark_jobs.lake.tables import Table

if TYPE_CHECKING:
    from pyarrow import dataset

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

    ``held`` is the table opened before: it is brought to the newest version, which reads only the new entries of the log.
    """
    try:
        if held is not None:
            held.update_incremental()
        return DeltaTable(uri, version=version) if held is None else held
    except DeltaError as error:
        name = uri.rsplit("/", 1)[-1]
        which = f"table {name}" if version is None else f"version {version} of table {name}"
        raise TableCorruptionError(
            f"{which} cannot be read: {one_line(error)}", hint="it may have been vacuumed; adtally fsck names what is damaged"
        ) from error


def table_files(held: DeltaTable) -> list[TableFile]:
    """Return the data files of a snapshot."""
    rows = pa.table(held.get_add_actions(flatten=True))
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


def file_paths(uri: str, version: int) -> list[str]:
    """Return the paths of a version's data files, as the log writes them."""
    return list(pa.table(open_table(uri, version).get_add_actions())["path"].to_pylist())


def full_path(uri: str, path: str) -> str:
    """Return the location of a data file, from its path in the log of the table at ``uri``."""
    return f"{uri}/{unquote(path)}"


def read_files(uri: str, paths: Sequence[str], schema: pa.Schema, where_in: tuple[str, pa.Array] | None = None) -> pa.Table:
    """Read columns of data files, named as in the log. ``schema`` may have no partition column.

    ``where_in`` keeps the rows whose column has one of the values. A column that a file lacks is null. Raises FileNotFoundError.
    """
    if not paths:
        return schema.empty_table()
    files = _dataset(uri, paths, schema)
    if where_in is None:
        return files.to_table()
    # not the scanner's filter: it cannot compare the statistics of string_view columns, which delta-rs writes
    name, values = where_in
    kept = [batch.filter(pc.is_in(batch[name], value_set=values)) for batch in files.to_batches()]
    return pa.Table.from_batches(kept, schema)


def read_batches(uri: str, paths: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Do as `read_files`, a batch at a time, file by file. Memory does not grow with the files."""
    for path in paths:
        yield from _dataset(uri, [path], schema).to_batches(batch_readahead=1, fragment_readahead=1)


def read_file_rows(uri: str, table: Table, file: TableFile) -> Iterator[pa.Table]:
    """Read all columns of a data file, the partition columns too. A second reading cuts the rows into the same parts."""
    for batch in _dataset(uri, [file.path], table.stored_schema).to_batches(use_threads=False):
        rows = pa.Table.from_batches([batch])
        for name in table.partition_by:
            value = pa.scalar(file.values[name]).cast(table.schema.field(name).type)
            rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
        yield rows.select(table.schema.names)


def _dataset(uri: str, paths: Sequence[str], schema: pa.Schema) -> dataset.Dataset:
    from pyarrow import dataset  # here: it imports pandas, which takes a second

    filesystem, root = open_root(uri)
    files = [full_path(root, path) for path in paths]
    return dataset.dataset(files, schema=schema, format="parquet", filesystem=filesystem)
