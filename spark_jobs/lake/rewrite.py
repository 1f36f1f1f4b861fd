"""Commits that change where rows lie and not which rows there are: compaction, and taking one back. Through delta-rs.

Callers hold the rewrite lock. A commit of a compaction has ``dataChange: false`` in all its actions and the
id of the run in its commitInfo.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, WriterProperties
from deltalake.transaction import AddAction, RemoveAction

from spark_jobs.lake.commit import committing
from spark_jobs.lake.log import DeltaLog
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
    before, after = _files(uri, version - 1), _files(uri, version)
    now = int(time.time() * 1000)
    actions: list[AddAction | RemoveAction] = [
        RemoveAction(path, False, now, file["size_bytes"], _values(file, table))
        for path, file in after.items()
        if path not in before
    ]
    actions += [
        AddAction(
            path,
            file["size_bytes"],
            _values(file, table),
            now,
            data_change=False,
            stats=json.dumps({"numRecords": file["num_records"]}),
        )
        for path, file in before.items()
        if path not in after
    ]
    held = DeltaTable(uri)
    with committing(uri, held, Step.RESTORE, files=()):
        held.create_write_transaction(actions, mode="append", schema=held.schema(), partition_by=list(table.partition_by))


def _files(uri: str, version: int) -> dict[str, dict[str, Any]]:
    rows = pa.table(DeltaTable(uri, version=version).get_add_actions(flatten=True)).to_pylist()
    return {row["path"]: row for row in rows}


def _values(file: dict[str, Any], table: Table) -> dict[str, str | None]:
    held = {name: file[f"partition.{name}"] for name in table.partition_by}
    return {name: None if value is None else str(value) for name, value in held.items()}
