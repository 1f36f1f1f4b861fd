"""Fills in the columns that name the batch of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from spark_jobs.lake.tables import Table
from spark_jobs.units import DAY_US


@dataclass(frozen=True)
class Stamp:
    """A batch: the streaming query's id, the batch id, the time of ingestion in microseconds."""

    query_id: str
    batch_id: int
    ingested_us: int


def stamped(rows: pa.Table, table: Table, stamp: Stamp) -> pa.Table:
    """Return ``rows`` with the table's columns in its order and types: the batch's filled in, other missing ones null."""
    values = _values(stamp)
    columns = [
        rows[field.name].cast(field.type)
        if field.name in rows.column_names
        else constant(values.get(field.name), rows.num_rows, field.type)
        for field in table.schema
    ]
    return pa.Table.from_arrays(columns, schema=table.schema)


def stamped_records(records: list[dict[str, Any]], table: Table, stamp: Stamp) -> pa.Table:
    """Return ``records`` as rows of ``table``, with the batch's columns filled in, unknown fields dropped, missing ones null."""
    return pa.Table.from_pylist([{**record, **_values(stamp)} for record in records], table.schema)


def _values(stamp: Stamp) -> dict[str, Any]:
    return {
        "_query_id": stamp.query_id,
        "_batch_id": stamp.batch_id,
        "ingested_at": stamp.ingested_us,
        "ingested_date": stamp.ingested_us // DAY_US,
    }


def constant(value: Any, rows: int, kind: pa.DataType) -> pa.Array:
    """Return a column with the same value ``rows`` times; nulls for None. Times and dates are given as numbers."""
    if value is None:
        return pa.nulls(rows, kind)
    number = pa.int64() if pa.types.is_timestamp(kind) else pa.int32() if pa.types.is_date32(kind) else kind
    return pa.repeat(pa.scalar(value, number), rows).cast(kind)
