"""Commits that change where rows lie and not which rows there are: compaction, and taking one back. Through delta-rs.

Callers hold the rewrite lock. A commit of a compaction has ``dataChange: false`` in all its actions and the
id of the run in its commitInfo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltalake import CommitProperties, DeltaTable, WriterProperties

from spark_jobs.lake.commit import commit_files, committing
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.reading import table_files
from spark_jobs.lake.tables import Table
from spark_jobs.steps import Step

RUN_KEY = "adtallyCompaction"  # in the commitInfo
COMPACTED_SUFFIX = ".zstd.parquet"  # Delta's writers name the codec; batches and merges write snappy
_ROW_GROUP_ROWS = 65_536  # what a reader can skip within a file
_MEMORY_BYTES = 512 * 1024 * 1024  # more is spilled: an ingest may need the rest
_PROPERTIES = WriterProperties(compression="ZSTD", compression_level=1, max_row_group_size=_ROW_GROUP_ROWS)

Partition = tuple[tuple[str, str], ...]
"""Partition columns and their values as Delta writes them; empty: all of the table."""


def rearrange(
    uri: str, held: DeltaTable, partition: Partition, target_bytes: int, run_id: str, *, z_order: Sequence[str] = ()
) -> bool:
    """Rewrite a partition of a table's snapshot: all its rows in Z-order of columns; without columns, its small files as one.

    Returns whether a commit was made. Raises deltalake's CommitFailedError where rows of the partition were changed meanwhile.
    """
    common: dict[str, Any] = {
        "partition_filters": [(name, "=", value) for name, value in partition] or None,
        "target_size": target_bytes,
        "max_concurrent_tasks": 1,  # the other core is the ingest's
        "max_spill_size": _MEMORY_BYTES,
        "writer_properties": _PROPERTIES,
        "commit_properties": CommitProperties(custom_metadata={RUN_KEY: run_id}),
    }
    with committing(uri, held, Step.COMPACTION):
        done = held.optimize.z_order(z_order, **common) if z_order else held.optimize.compact(**common)
    return bool(done["numFilesRemoved"])


def version_of_run(uri: str, run_id: str) -> int:
    """The version that the run has committed."""
    return next(commit.version for commit in DeltaLog(uri).commits_backwards() if commit.info.get(RUN_KEY) == run_id)


def take_back(uri: str, table: Table, version: int) -> None:
    """Undo what ``version`` did to the files of the table, and nothing that was committed since."""
    before, after = ({file.path: file for file in table_files(DeltaTable(uri, version=v))} for v in (version - 1, version))
    commit_files(
        DeltaTable(uri),
        uri,
        table,
        Step.RESTORE,
        remove=[file for path, file in after.items() if path not in before],
        restore=[file for path, file in before.items() if path not in after],
        changes_rows=False,
    )
