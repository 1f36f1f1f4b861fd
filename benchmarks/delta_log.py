"""Read a Delta table by its log and Parquet alone, so that what is checked is not read by what wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq


def version_file(table: Path, version: int) -> Path:
    """The log entry of a version."""
    return table / "_delta_log" / f"{version:020d}.json"


def actions(entry: Path) -> Iterator[dict[str, dict[str, object]]]:
    """The actions of one log entry. Raises ValueError if it is not whole."""
    for line in filter(None, entry.read_text("utf-8").split("\n")):
        yield json.loads(line)


def added_files(table: Path, version: int) -> list[Path]:
    """Data files that a version added."""
    return [table / unquote(str(a["add"]["path"])) for a in actions(version_file(table, version)) if "add" in a]


def active_files(table: Path) -> list[Path]:
    """Data files of the newest version: the whole log replayed (the runs are short, so no entry has expired)."""
    files: dict[str, Path] = {}
    version = 0
    while (entry := version_file(table, version)).exists():
        for action in actions(entry):
            if "add" in action:
                files[str(action["add"]["path"])] = table / unquote(str(action["add"]["path"]))
            if "remove" in action:
                files.pop(str(action["remove"]["path"]), None)
        version += 1
    return list(files.values())


def row_count(files: list[Path]) -> int:
    """Rows by the footers."""
    return sum(pq.read_metadata(file).num_rows for file in files)


def read_columns(files: list[Path], columns: list[str]) -> pa.Table:
    """Some columns of some data files; columns that partition the table are not in them."""
    return pa.concat_tables([pq.ParquetFile(file).read(columns=columns) for file in files])


def column_sums(files: list[Path], columns: list[str]) -> dict[str, int]:
    """Sum of each whole-number column."""
    sums = dict.fromkeys(columns, 0)
    for file in files:
        table = pq.ParquetFile(file).read(columns=columns)
        for name in columns:
            sums[name] += table.column(name).cast(pa.int64()).combine_chunks().sum().as_py() or 0
    return sums
