"""Query results as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs.errors import UsageError


def parquet(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    """Return a Parquet file of ``rows``. Whole numbers beyond 64 bits become decimals; a column without a value has type null.

    Raises UsageError if two columns have one name.
    """
    if len(set(columns)) != len(columns):
        raise UsageError("two columns have one name", hint="name them apart with `as`")
    table = pa.table([_array([row[index] for row in rows]) for index in range(len(columns))], names=list(columns))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _array(values: list[Any]) -> pa.Array:
    if any(isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63 for value in values):
        return pa.array([None if value is None else Decimal(value) for value in values], pa.decimal128(38, 0))
    return pa.array([str(value) if isinstance(value, UUID) else value for value in values])
