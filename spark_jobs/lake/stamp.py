"""The columns that say which batch wrote a row, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from spark_jobs.lake.tables import Table
from spark_jobs.units import DAY_US


@dataclass(frozen=True)
class Stamp:
    """The batch's own columns: the streaming query's id, the batch id, the time of ingestion in microseconds."""

    query_id: str
    batch_id: int
    ingested_us: int


def stamped(rows: pa.Table, table: Table, stamp: Stamp) -> pa.Table:
    """``rows`` as rows of ``table``: its columns in its order and types, the batch's filled in, all others that lack null."""
    values = _values(stamp)
    columns = []
    for field in table.schema:
        if field.name in rows.column_names:
            columns.append(rows[field.name].cast(field.type))
        else:
            columns.append(constant(values.get(field.name), rows.num_rows, field.type))
    return pa.Table.from_arrays(columns, schema=table.schema)


def stamped_records(records: list[dict[str, Any]], table: Table, stamp: Stamp) -> pa.Table:
    """``records`` as rows of ``table``: the batch's columns set, fields it lacks left out, missing ones null."""
    return pa.Table.from_pylist([{**record, **_values(stamp)} for record in records], table.schema)


def _values(stamp: Stamp) -> dict[str, Any]:
    return {
        "_query_id": stamp.query_id,
        "_batch_id": stamp.batch_id,
        "ingested_at": stamp.ingested_us,
        "ingested_date": stamp.ingested_us // DAY_US,
    }


def constant(value: Any, rows: int, kind: pa.DataType) -> pa.Array:
    """A column with the same value ``rows`` times; null where it is None."""
    if value is None:
        return pa.nulls(rows, kind)
    if pa.types.is_timestamp(kind):
        return pa.repeat(pa.scalar(value, pa.int64()), rows).cast(kind)
    if pa.types.is_date32(kind):
        return pa.repeat(pa.scalar(value, pa.int32()), rows).cast(kind)
    return pa.repeat(pa.scalar(value, kind), rows)
