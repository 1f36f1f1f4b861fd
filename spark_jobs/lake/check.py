"""Checks every byte of a table's files: its log's checkpoints and its data files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.checked import stream_checksum
from spark_jobs.lake.data_files import named_checksum
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.places import Place, open_place
from spark_jobs.lake.reading import TableFile, open_table, table_files
from spark_jobs.lake.tables import Table


@dataclass(frozen=True)
class LogCheckpoint:
    """A checkpoint of a table's log. ``problem`` says why it cannot be read."""

    name: str
    path: str
    problem: str | None

    @property
    def version(self) -> int:
        """The version of the table that it describes."""
        return int(self.name.split(".")[0])


def has_log(lake: Lake, table: Table) -> bool:
    """Return whether a table's log has any file. A table that was not created yet has none."""
    return next(_log(lake, table).list(), None) is not None


def check_checkpoints(lake: Lake, table: Table) -> list[LogCheckpoint]:
    """Read each checkpoint of a table's log."""
    log, found = _log(lake, table), []
    for name in (file.name for file in log.list() if ".checkpoint" in file.name and file.name.endswith(".parquet")):
        problem = None
        try:
            with log.open(name) as file:
                _read_whole(file)
        except (OSError, pa.ArrowException) as error:
            problem = str(error)
        found.append(LogCheckpoint(name, f"{log.uri}/{name}", problem))
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
    files, name = open_place(lake.uri(table)), unquote(file.path)
    there = files.find(name)
    if there is None:
        return "file_missing", f"missing, with {file.rows} rows"
    if there.size != file.size:
        return "file_size", f"{there.size} bytes instead of {file.size}, with {file.rows} rows"
    named = named_checksum(name)
    try:
        with files.open(name) as opened:
            if named is not None and stream_checksum(opened) != named:
                return "file_damaged", f"its bytes are not those that were written, with {file.rows} rows"
            rows = _read_whole(opened) if named is None else pq.read_metadata(opened).num_rows
    except (OSError, pa.ArrowException, ValueError) as error:
        return "file_damaged", f"{error}, with {file.rows} rows"
    if file.rows is not None and rows != file.rows:
        return "file_rows", f"{rows} rows instead of {file.rows}"
    return None


def remove_checkpoint(lake: Lake, table: Table, name: str) -> None:
    """Remove a damaged checkpoint from a table's log. delta-rs reads the commits instead."""
    _log(lake, table).delete(["_last_checkpoint", name])


def remove_commit(lake: Lake, table: Table, version: int) -> None:
    """Remove the damaged file of a commit from a table's log, which a checkpoint covers."""
    open_place(lake.uri(table)).delete([lake.log(table).commit_file(version)])


def _log(lake: Lake, table: Table) -> Place:
    return open_place(f"{lake.uri(table)}/_delta_log")


def _read_whole(file: BinaryIO) -> int:
    """Read a Parquet file to its end, checking its pages' checksums if it has them; returns its number of rows."""
    rows = 0
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        for number in range(parquet.num_row_groups):
            rows += parquet.read_row_group(number, use_threads=False).num_rows
    return rows
