"""Writes data files of Delta tables with Arrow. No reader sees a file until a commit names it.

Spark's Python workers import this module, so it must not need a session.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from spark_jobs import disk
from spark_jobs.lake.checked import file_checksum
from spark_jobs.lake.roots import local_path, open_root
from spark_jobs.lake.tables import Table

MAX_OPEN_FILES = 96
_PENDING_ROWS = 262_144
_PENDING_BYTES = 64 * 1024 * 1024  # a raw line may have a megabyte
_LAST_BOUND = datetime(9999, 12, 31, 23, 59, 59, 999_000, UTC)
_ENDING = ".snappy.parquet"
_NAMED_CHECKSUM = re.compile(r"-x([0-9a-f]{16})\.snappy\.parquet$")
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def named_checksum(path: str) -> str | None:
    """Return the checksum of the whole file (`file_checksum`) from its name.

    None if the name has none: delta-rs wrote the file, or it is in an object store.
    """
    found = _NAMED_CHECKSUM.search(path)
    return None if found is None else found[1]


@dataclass(frozen=True)
class DataFile:
    """A written file: path within the table, size in bytes, partition values in Delta's form, statistics as JSON."""

    path: str
    size: int
    rows: int
    partition: dict[str, str | None]
    stats: str


class DataFileWriter:
    """Write rows into one Parquet file per partition, or several if more than MAX_OPEN_FILES partitions alternate.

    Buffers up to _PENDING_ROWS rows or _PENDING_BYTES. Use it as a context manager: at the end ``files`` is complete and the
    files are synced to the disk. The commit that names the files syncs their folders.
    """

    def __init__(self, uri: str, table: Table) -> None:
        self._filesystem, self._root = open_root(uri)
        self._local = local_path(uri)
        self._table = table
        self._is_wide = "raw" in table.schema.names
        self._pending: dict[tuple[str | None, ...], list[pa.Table]] = {}
        self._pending_rows = self._pending_bytes = 0
        self._open: dict[tuple[str | None, ...], _OpenFile] = {}
        self.files: list[DataFile] = []

    def __enter__(self) -> DataFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        for key in list(self._open):
            self._close(key)
        if kind is None and self._local is not None:
            disk.sync_files(self._local / unquote(file.path) for file in self.files)

    def write(self, rows: pa.Table) -> None:
        """Add rows: the table's columns in any order, with the table's types."""
        if not rows.num_rows:
            return
        rows = rows.select(self._table.schema.names)
        for key, part in _partitions(rows, self._table.partition_by):
            self._pending.setdefault(key, []).append(part)
        self._pending_rows += rows.num_rows
        self._pending_bytes += rows.get_total_buffer_size() if self._is_wide else 0
        if self._pending_rows >= _PENDING_ROWS or self._pending_bytes >= _PENDING_BYTES:
            self._flush()

    def _flush(self) -> None:
        for key, parts in self._pending.items():
            held = self._open.pop(key, None)
            if held is None:
                while len(self._open) >= MAX_OPEN_FILES:
                    self._close(next(iter(self._open)))
                held = _OpenFile(self._filesystem, self._root, self._local, self._table, key)
            self._open[key] = held  # last in the dict: the first one is closed when there are too many
            held.writer.write_table(pa.concat_tables(parts).cast(self._table.stored_schema))
        self._pending.clear()
        self._pending_rows = self._pending_bytes = 0

    def _close(self, key: tuple[str | None, ...]) -> None:
        self.files.append(self._open.pop(key).close())


class _OpenFile:
    def __init__(self, filesystem: fs.FileSystem, root: str, local: Path | None, table: Table, key: tuple[str | None, ...]) -> None:
        self._partition = dict(zip(table.partition_by, key, strict=True))
        folders = [f"{name}={_NO_PARTITION if value is None else quote(value)}" for name, value in self._partition.items()]
        self._path = "/".join([*folders, f"part-{uuid.uuid4()}{_ENDING}"])
        self._local = local
        self._stats_columns = table.stats_columns
        target = f"{root}/{self._path}"
        filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
        self._sink = filesystem.open_output_stream(target)
        self._metadata: list[pq.FileMetaData] = []
        self.writer = pq.ParquetWriter(
            self._sink,
            table.stored_schema,
            compression="snappy",
            write_statistics=list(table.stats_columns),
            store_schema=False,
            write_page_checksum=True,  # `adtally fsck` checks it
            metadata_collector=self._metadata,
        )

    def close(self) -> DataFile:
        self.writer.close()
        size = int(self._sink.tell())
        self._sink.close()
        if self._local is not None:
            written = self._local / self._path
            self._path = f"{self._path.removesuffix(_ENDING)}-x{file_checksum(written)}{_ENDING}"
            written.rename(self._local / self._path)
        (metadata,) = self._metadata
        return DataFile(self._path, size, metadata.num_rows, self._partition, _stats(metadata, self._stats_columns))


def _partitions(rows: pa.Table, names: tuple[str, ...]) -> list[tuple[tuple[str | None, ...], pa.Table]]:
    """Split ``rows`` by their partition values (as Delta writes them), and drop the partition columns."""
    rest = rows.drop_columns(list(names)) if names else rows
    if not names:
        return [((), rest)]
    code = np.zeros(rows.num_rows, dtype=np.int64)
    values: list[list[str | None]] = []
    for name in names:
        encoded = rows[name].combine_chunks().dictionary_encode(null_encoding="encode")
        values.append([None if value is None else str(value) for value in encoded.dictionary.to_pylist()])
        code = code * len(values[-1]) + encoded.indices.to_numpy(zero_copy_only=False)
    codes, at = np.unique(code, return_inverse=True)
    found = []
    order = np.argsort(at, kind="stable")
    ends = np.cumsum(np.bincount(at))
    for number, (combined, end) in enumerate(zip(codes.tolist(), ends.tolist(), strict=True)):
        key: list[str | None] = []
        for column in reversed(values):
            combined, index = divmod(combined, len(column))
            key.append(column[index])
        start = int(ends[number - 1]) if number else 0
        part = rest if len(codes) == 1 else rest.take(pa.array(order[start:end]))
        found.append((tuple(reversed(key)), part))
    return found


def _stats(metadata: pq.FileMetaData, names: tuple[str, ...]) -> str:
    """Return Delta's statistics of a file (JSON), from Parquet's statistics of its row groups."""
    lowest: dict[str, Any] = {}
    highest: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    positions = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    for name in names:
        groups = [metadata.row_group(i).column(positions[name]).statistics for i in range(metadata.num_row_groups)]
        nulls[name] = sum(group.null_count for group in groups)
        ranges = [(group.min, group.max) for group in groups if group.has_min_max]
        if ranges:
            lowest[name] = _edge(min(low for low, _ in ranges), up=False)
            if (bound := _edge(max(high for _, high in ranges), up=True)) is not None:
                highest[name] = bound
    return json.dumps({"numRecords": metadata.num_rows, "minValues": lowest, "maxValues": highest, "nullCount": nulls})


def _edge(value: Any, *, up: bool) -> Any:
    """Return a bound as Delta writes it: a date as text, a time in milliseconds, rounded up if it is an upper bound.

    None for an upper bound in the last millisecond of the year 9999: rounded up, it would exceed Delta's years.
    """
    if not isinstance(value, datetime):
        return value.isoformat() if isinstance(value, date) else value
    moment = value.astimezone(UTC)
    if up and moment.microsecond % 1000:
        if moment > _LAST_BOUND:
            return None
        moment += timedelta(milliseconds=1)
    return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"  # strftime writes the year 1 as "1"
