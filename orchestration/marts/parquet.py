"""Query results, and whole marts, as Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs.errors import UsageError
from spark_jobs.lake.duck import literal


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


def export_marts(marts: Path, names: Iterable[str], folder: Path) -> Iterator[Path]:
    """Write each of the marts ``names`` of a DuckDB file as a Parquet file of its name into ``folder``; yield the files."""
    with duckdb.connect(str(marts), read_only=True) as connection:
        connection.execute("set TimeZone = 'UTC'")
        for name in names:
            types = [(column, kind) for column, kind, *_ in connection.execute(f'describe main."{name}"').fetchall()]
            target = folder / f"{name}.parquet"
            selected = f'select *{exact_integers(types)} from main."{name}"'
            connection.execute(f"copy ({selected}) to {literal(target)} (format parquet, compression zstd)")
            yield target


def exact_integers(types: Iterable[tuple[str, str]]) -> str:
    """Return what to add to ``select *`` so that Arrow and Parquet get integers of 128 bits exactly, as decimals.

    ``types``: column and type of each column. They have no such integers: DuckDB would make floating-point numbers of them.
    """
    wide = [column for column, kind in types if kind == "HUGEINT"]
    return f" replace ({', '.join(f'{each}::decimal(38, 0) as {each}' for each in wide)})" if wide else ""
