"""Small Delta tables written without Spark: Parquet by pyarrow, the log by hand. Enough for a reader to read."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import Schema

from spark_jobs.lake.tables import Table


def commit(root: Path, table: Table, rows: Sequence[dict[str, Any]], *, int96: bool = False) -> int:
    """Appends ``rows`` to the table under ``root``, creating it when missing; the version written.

    A column that a row leaves out is null. ``int96`` writes timestamps as Spark does by default.
    """
    folder = root / table.name
    log = folder / "_delta_log"
    log.mkdir(parents=True, exist_ok=True)
    version = len(list(log.glob("*.json")))
    columns = table.schema.names
    actions: list[dict[str, Any]] = [{"commitInfo": {"timestamp": 0}}]
    if version == 0:
        actions += [
            {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}},
            {
                "metaData": {
                    "id": str(uuid.uuid4()),
                    "format": {"provider": "parquet", "options": {}},
                    "schemaString": Schema.from_arrow(table.schema).to_json(),
                    "partitionColumns": list(table.partition_by),
                    "configuration": {},
                    "createdTime": 0,
                }
            },
        ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        assert not set(row) - set(columns), f"unknown columns {set(row) - set(columns)}"
        groups.setdefault(tuple(row.get(name) for name in table.partition_by), []).append(row)
    stored = [name for name in columns if name not in table.partition_by]
    for values, group in groups.items():
        data = pa.table({name: pa.array([row.get(name) for row in group], type=table.schema.field(name).type) for name in stored})
        path = folder / f"part-{uuid.uuid4()}.parquet"
        pq.write_table(data, path, use_deprecated_int96_timestamps=int96)
        actions.append(
            {
                "add": {
                    "path": path.name,
                    "partitionValues": {
                        name: None if value is None else str(value) for name, value in zip(table.partition_by, values, strict=True)
                    },
                    "size": path.stat().st_size,
                    "modificationTime": 0,
                    "dataChange": True,
                }
            }
        )
    (log / f"{version:020d}.json").write_text("\n".join(json.dumps(action) for action in actions) + "\n")
    return version


def utc(text: str) -> datetime:
    """``2026-03-10T10:00`` as a UTC time."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
