"""Moves rows between files through delta-rs: compaction, and undoing one. Callers hold the rewrite lock.

A commit of a compaction has ``dataChange: false`` in all its actions and the id of the run in its commitInfo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltalake import WriterProperties
from deltalake.exceptions import CommitFailedError

from spark_jobs.errors import CommitConflictError
from spark_jobs.lake.commit import committing
from spark_jobs.lake.lake import Lake, Partition
from spark_jobs.lake.log import RUN_KEY
from spark_jobs.lake.reading import open_table
from spark_jobs.lake.tables import Table
from spark_jobs.steps import Step

COMPACTED_SUFFIX = ".zstd.parquet"  # Delta's writers name the codec; batches and merges write snappy
_ROW_GROUP_ROWS = 65_536  # what a reader can skip within a file
_MEMORY_BYTES = 512 * 1024 * 1024  # more is spilled: an ingest may need the rest
_PROPERTIES = WriterProperties(compression="ZSTD", compression_level=1, max_row_group_size=_ROW_GROUP_ROWS)


def rearrange(
    lake: Lake, table: Table, base: int, partition: Partition, target_bytes: int, run_id: str, *, z_order: Sequence[str] = ()
) -> bool:
    """Rewrite a partition of version ``base``: all its rows in Z-order of columns; without columns, its small files as one.

    Returns whether a commit was made. Raises CommitConflictError if another writer has changed rows of the partition since.
    """
    common: dict[str, Any] = {
        "partition_filters": [(name, "=", value) for name, value in partition] or None,
        "target_size": target_bytes,
        "max_concurrent_tasks": 1,  # leaves the other core to the ingest
        "max_spill_size": _MEMORY_BYTES,
        "writer_properties": _PROPERTIES,
    }
    held = open_table(lake.uri(table), base)
    done: dict[str, Any] | None = None
    try:
        with committing(lake.uri(table), held, Step.COMPACTION, info={RUN_KEY: run_id}) as properties:
            common["commit_properties"] = properties
            done = held.optimize.z_order(z_order, **common) if z_order else held.optimize.compact(**common)
    except CommitFailedError as error:
        raise CommitConflictError(f"table {table.name} was changed while it was being compacted") from error
    return done is None or bool(done["numFilesRemoved"])  # None: the commit took effect, but delta-rs did not learn it


def version_of_run(lake: Lake, table: Table, run_id: str) -> int:
    """Return the version that the run committed."""
    return next(commit.version for commit in lake.log(table).commits_backwards() if commit.info.get(RUN_KEY) == run_id)


def take_back(lake: Lake, table: Table, version: int) -> None:
    """Undo the changes of ``version`` to the files of the table; later commits stay."""
    before, after = ({file.path: file for file in lake.at({table.name: v}).files(table)} for v in (version - 1, version))
    lake.commit(
        table,
        Step.RESTORE,
        remove=[file for path, file in after.items() if path not in before],
        restore=[file for path, file in before.items() if path not in after],
        changes_rows=False,
    )
