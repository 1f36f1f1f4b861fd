"""Read the files and rows of a Delta table as Arrow, without a Spark job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable

from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.roots import open_root

_KINDS = ("partition", "min", "max")


@dataclass(frozen=True)
class TableFile:
    """A data file of a table's version, as the log describes it: path within the table, size in bytes, number of rows.

    ``values`` are the values of the partition columns; ``low`` and ``high`` are the smallest and the largest value of each column
    that has statistics.
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
    """Return the paths of a version's data files, as the log has them."""
    return list(pa.table(DeltaTable(uri, version=version).get_add_actions())["path"].to_pylist())


def read_files(uri: str, paths: Sequence[str], schema: pa.Schema, where_in: tuple[str, pa.Array] | None = None) -> pa.Table:
    """Read the columns of ``schema`` (no partition column) from data files; ``paths`` are as the log has them.

    ``where_in`` (column, values): read only the rows in which the column has one of the values.
    """
    if not paths:
        return schema.empty_table()
    filesystem, root = open_root(uri)
    files = [f"{root}/{unquote(path)}" for path in paths]
    dataset = ds.dataset(files, schema=schema, format="parquet", filesystem=filesystem)
    if where_in is None:
        return dataset.to_table()
    # The scanner cannot filter: it fails to compare the statistics of string_view columns, which delta-rs writes.
    name, values = where_in
    kept = [batch.filter(pc.is_in(batch[name], value_set=values)) for batch in dataset.to_batches()]
    return pa.Table.from_batches(kept, schema)


def read_newest(uri: str, schema: pa.Schema) -> pa.Table:
    """Read the columns of ``schema`` from a table's newest version.

    Returns no rows if the table does not exist. A column that the table does not have yet is null.
    """
    version = DeltaLog(uri).latest_version()
    return schema.empty_table() if version is None else read_files(uri, file_paths(uri, version), schema)


def read_batches(uri: str, paths: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the rows that `read_files` returns in batches, file by file, so that memory does not grow with the files."""
    filesystem, root = open_root(uri)
    for path in paths:
        dataset = ds.dataset([f"{root}/{unquote(path)}"], schema=schema, format="parquet", filesystem=filesystem)
        yield from dataset.to_batches(batch_readahead=1, fragment_readahead=1)
