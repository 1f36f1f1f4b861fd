"""Checks of the files of a table, to the last byte: its log's checkpoints and its data files. For lakehouses on a local path."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.checked import file_checksum
from spark_jobs.lake.data_files import named_checksum
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.reading import TableFile, full_path, open_table, table_files
from spark_jobs.lake.tables import Table


def has_log(lake: Lake, table: Table) -> bool:
    """Whether a table has the folder of its log. A table that was not created yet has none."""
    return _log_folder(lake, table).is_dir()


def checkpoint_problems(lake: Lake, table: Table) -> dict[str, str | None]:
    """What is wrong with each checkpoint of a table's log, by file name; None: nothing."""
    return {path.name: _checkpoint_problem(path) for path in sorted(_log_folder(lake, table).glob("*.checkpoint*.parquet"))}


def checkpoint_version(name: str) -> int:
    """The version of a checkpoint, from its file name."""
    return int(name.split(".")[0])


def checkpoint_path(lake: Lake, table: Table, name: str) -> Path:
    """The file of a checkpoint."""
    return _log_folder(lake, table) / name


def table_problem(lake: Lake, table: Table) -> str | None:
    """Why a table cannot be opened at its newest version; None: it can."""
    try:
        open_table(lake.uri(table))
    except (TableCorruptionError, OSError) as error:
        return str(error.args[0] if isinstance(error, TableCorruptionError) else error)
    return None


def newest_files(lake: Lake, table: Table) -> list[TableFile]:
    """The data files of a table's newest version. Unlike `Lake.pin`, accepts a damaged commit that a checkpoint covers."""
    return table_files(open_table(lake.uri(table)))


def file_problem(lake: Lake, table: Table, file: TableFile) -> tuple[str, str] | None:
    """What is wrong with a data file: the kind of finding (see docs/runbooks/fsck.md), and details. None: nothing."""
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
    (_log_folder(lake, table) / "_last_checkpoint").unlink(missing_ok=True)
    checkpoint_path(lake, table, name).unlink()


def remove_commit(lake: Lake, table: Table, version: int) -> None:
    """Remove an unreadable commit from a table's log. The caller has made sure that a checkpoint has what it did."""
    Path(lake.log(table).commit_path(version)).unlink(missing_ok=True)


def _log_folder(lake: Lake, table: Table) -> Path:
    return Path(lake.uri(table)) / "_delta_log"


def _checkpoint_problem(path: Path) -> str | None:
    try:
        _read_whole(path)
    except (OSError, pa.ArrowException) as error:
        return str(error)
    return None


def _read_whole(path: Path) -> int:
    """Read a Parquet file to its end, against the checksums of its pages if it has them; returns its rows."""
    rows = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.num_row_groups):
            rows += file.read_row_group(number, use_threads=False).num_rows
    return rows
