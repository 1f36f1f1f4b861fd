"""Checks every byte of a table's files: its log's checkpoints and its data files. For lakehouses on a local path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.checked import file_checksum
from spark_jobs.lake.data_files import named_checksum
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.reading import TableFile, full_path, open_table, table_files
from spark_jobs.lake.tables import Table


@dataclass(frozen=True)
class LogCheckpoint:
    """A checkpoint of a table's log. ``problem`` says why it cannot be read."""

    path: Path
    problem: str | None

    @property
    def version(self) -> int:
        """The version of the table that it describes."""
        return int(self.path.name.split(".")[0])


def log_folder(lake: Lake, table: Table) -> Path:
    """Return the folder of a table's log. A table that was not created yet has none."""
    return Path(lake.uri(table)) / "_delta_log"


def check_checkpoints(lake: Lake, table: Table) -> list[LogCheckpoint]:
    """Read each checkpoint of a table's log."""
    found = []
    for path in sorted(log_folder(lake, table).glob("*.checkpoint*.parquet")):
        problem = None
        try:
            _read_whole(path)
        except (OSError, pa.ArrowException) as error:
            problem = str(error)
        found.append(LogCheckpoint(path, problem))
    return found


def table_problem(lake: Lake, table: Table) -> str | None:
    """Return why a table cannot be opened at its newest version; None if it can."""
    try:
        open_table(lake.uri(table))
    except (TableCorruptionError, OSError) as error:
        return str(error.args[0] if isinstance(error, TableCorruptionError) else error)
    return None


def newest_files(lake: Lake, table: Table) -> list[TableFile]:
    """Return the data files of a table's newest version. Unlike `Lake.pin`, accepts a damaged commit that a checkpoint covers."""
    return table_files(open_table(lake.uri(table)))


def file_problem(lake: Lake, table: Table, file: TableFile) -> tuple[str, str] | None:
    """Return the kind (see docs/runbooks/fsck.md) and details of a data file's problem; None if it has none."""
    path = Path(full_path(lake.uri(table), file.path))
    try:
        size = path.stat().st_size
    except OSError:
        return "file_missing", f"missing, with {file.rows} rows"
    if size != file.size:
        return "file_size", f"{size} bytes instead of {file.size}, with {file.rows} rows"
    named = named_checksum(path.name)
    try:
        if named is not None and file_checksum(path) != named:
            return "file_damaged", f"its bytes are not those that were written, with {file.rows} rows"
        rows = _read_whole(path) if named is None else pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException, ValueError) as error:
        return "file_damaged", f"{error}, with {file.rows} rows"
    if file.rows is not None and rows != file.rows:
        return "file_rows", f"{rows} rows instead of {file.rows}"
    return None


def remove_checkpoint(lake: Lake, table: Table, name: str) -> None:
    """Remove a damaged checkpoint from a table's log. delta-rs reads the commits instead."""
    folder = log_folder(lake, table)
    (folder / "_last_checkpoint").unlink(missing_ok=True)
    (folder / name).unlink()


def _read_whole(path: Path) -> int:
    """Read a Parquet file to its end, checking its pages' checksums if it has them; returns its number of rows."""
    rows = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.num_row_groups):
            rows += file.read_row_group(number, use_threads=False).num_rows
    return rows
