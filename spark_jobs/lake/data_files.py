"""Writes data files of Delta tables with Arrow. No reader sees a file until a commit names it.

Spark's Python workers import this module, so it must not need a session.
"""

from __future__ import annotations

import json
import re
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs import disk
from spark_jobs.lake.checked import file_checksum
from spark_jobs.lake.places import Place, open_place
from spark_jobs.lake.tables import Table

MAX_OPEN_FILES = 96
_UPLOADS_AT_ONCE = 8
_PENDING_ROWS = 262_144
_PENDING_BYTES = 64 * 1024 * 1024  # a raw line may have a megabyte
_LAST_BOUND = datetime(9999, 12, 31, 23, 59, 59, 999_000, UTC)
_ENDING = ".snappy.parquet"
_NAMED_CHECKSUM = re.compile(r"-x([0-9a-f]{16})\.snappy\.parquet$")
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def named_checksum(path: str) -> str | None:
    """Return the checksum of the whole file (`file_checksum`) from its name.

    None if the name has none: delta-rs wrote the file.
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
    files are synced to the disk, or uploaded to the store. The commit that names the files syncs their folders.
    """

    def __init__(self, uri: str, table: Table) -> None:
        place = open_place(uri)
        self._uploads = _Uploads(place) if place.is_remote else None
        self._folder = Path(uri) if self._uploads is None else self._uploads.folder
        self._table = table
        self._is_wide = "raw" in table.schema.names
        self._pending: dict[tuple[str | None, ...], list[pa.Table]] = {}
        self._pending_rows = self._pending_bytes = 0
        self._open: dict[tuple[str | None, ...], _OpenFile] = {}
        self.files: list[DataFile] = []

    def __enter__(self) -> DataFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        with self._uploads or nullcontext():
            if kind is None:
                self._flush()
            for key in list(self._open):
                self._close(key)
            if kind is None:
                if self._uploads is not None:
                    self._uploads.wait()
                else:
                    disk.sync_files(self._folder / file.path for file in self.files)

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
                held = _OpenFile(self._folder, self._table, key)
            self._open[key] = held  # last in the dict: the first one is closed when there are too many
            held.writer.write_table(pa.concat_tables(parts).cast(self._table.stored_schema))
        self._pending.clear()
        self._pending_rows = self._pending_bytes = 0

    def _close(self, key: tuple[str | None, ...]) -> None:
        self.files.append(self._open.pop(key).close())
        if self._uploads is not None:
            self._uploads.add(self.files[-1].path)


class _Uploads:
    """Uploads files of a temporary folder to a store while others are being written. A context manager: the end deletes the folder.

    A data file is one request this way, and has its checksum in its name; a killed writer leaves no parts behind in the store.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._temporary = TemporaryDirectory(prefix="adtally-", dir=disk.scratch_folder())
        self._pool = ThreadPoolExecutor(_UPLOADS_AT_ONCE, thread_name_prefix="upload")
        self._started: list[Future[None]] = []
        self.folder = Path(self._temporary.name)

    def __enter__(self) -> _Uploads:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._temporary.cleanup()

    def add(self, path: str) -> None:
        """Start the upload of a complete file."""
        self._started.append(self._pool.submit(self._upload, path))

    def wait(self) -> None:
        """Return when all files are in the store. Raises StoreError."""
        for upload in self._started:
            upload.result()

    def _upload(self, path: str) -> None:
        self._place.upload(self.folder / path, path)
        (self.folder / path).unlink()


class _OpenFile:
    def __init__(self, root: Path, table: Table, key: tuple[str | None, ...]) -> None:
        self._partition = dict(zip(table.partition_by, key, strict=True))
        folders = [f"{name}={_NO_PARTITION if value is None else quote(value)}" for name, value in self._partition.items()]
        self._path = "/".join([*folders, f"part-{uuid.uuid4()}{_ENDING}"])
        self._root = root
        self._stats_columns = table.stats_columns
        root.joinpath(*folders).mkdir(parents=True, exist_ok=True)
        self._sink = pa.OSFile(str(root / self._path), "wb")
        self._metadata: list[pq.FileMetaData] = []
        self.writer = pq.ParquetWriter(
            self._sink,
            table.stored_schema,
            **_encodings(table),
            write_statistics=list(table.stats_columns),
            store_schema=False,
            metadata_collector=self._metadata,
        )

    def close(self) -> DataFile:
        self.writer.close()
        size = int(self._sink.tell())
        self._sink.close()
        written = self._root / self._path
        self._path = f"{self._path.removesuffix(_ENDING)}-x{file_checksum(written)}{_ENDING}"
        written.rename(self._root / self._path)
        (metadata,) = self._metadata
        return DataFile(self._path, size, metadata.num_rows, self._partition, _stats(metadata, self._stats_columns))


@cache
def _encodings(table: Table) -> dict[str, Any]:
    """Return the options of ParquetWriter that say how to store each column. They take a third off the time of writing.

    Only texts repeat enough for a dictionary. A key of one column never repeats and hardly compresses.
    """
    columns = dict(map(_leaf, table.stored_schema))
    distinct = table.key if len(table.key) == 1 else ()
    return {
        "compression": {name: "none" if name in distinct else "snappy" for name in columns},
        "use_dictionary": [name for name, kind in columns.items() if name not in distinct and not _is_number(kind)],
    }


def _leaf(field: pa.Field) -> tuple[str, pa.DataType]:
    """Return Parquet's path of a column, and the type of its values."""
    return (f"{field.name}.list.element", field.type.value_type) if pa.types.is_list(field.type) else (field.name, field.type)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_primitive(kind) or pa.types.is_decimal(kind))


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
