"""Reads Delta tables, at fixed versions, and the marts with DuckDB."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb

Related = Mapping[str, tuple[str, int | None]]
"""Table name -> (URI, version or None for the newest)."""

_MEMORY = "2GB"
_HOUR = timedelta(hours=1)


def connect_marts(path: Path) -> duckdb.DuckDBPyConnection:
    """Open the current file of the marts, as ``marts``, in a new DuckDB instance."""
    spill = Path(tempfile.gettempdir()) / f"adtally-quality-{os.getpid()}"  # DuckDB creates it if needed, and removes it
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": _MEMORY,
        "autoinstall_known_extensions": False,
        "temp_directory": str(spill),
    }
    connection = duckdb.connect(":memory:", config=config)
    connection.execute(f"attach '{quoted(str(path))}' as marts (read_only)")
    connection.execute("set timezone = 'UTC'")
    return connection


def delta_scan(uri: str, version: int | None) -> str:
    """Return a table expression of a version of a Delta table.

    Files are chosen before the query runs: on an object store, DuckDB aborts the process if a query fails that chooses them.
    """
    at = "" if version is None else f", version = {int(version)}"
    return f"delta_scan('{quoted(uri)}'{at}, pushdown_filters = 'constant_only')"


def hour_literals(hour: datetime) -> dict[str, str]:
    """Return the placeholders of a suite's SQL as literals: the hour's bounds, date and number."""
    start = hour.astimezone(UTC)
    end = start + _HOUR
    return {
        "start": f"timestamptz '{start:%Y-%m-%d %H:%M:%S}+00'",
        "end": f"timestamptz '{end:%Y-%m-%d %H:%M:%S}+00'",
        "utc_start": f"timestamp '{start:%Y-%m-%d %H:%M:%S}'",
        "utc_end": f"timestamp '{end:%Y-%m-%d %H:%M:%S}'",
        "date": f"date '{start:%Y-%m-%d}'",
        "hour": str(start.hour),
    }


def records(connection: duckdb.DuckDBPyConnection, sql: str, limit: int) -> list[dict[str, Any]]:
    """Return the first rows of a query, with values that JSON can hold."""
    found = connection.execute(f"select * from ({sql}) limit {limit}")
    names = [column[0] for column in found.description or []]
    return [{name: _plain(value) for name, value in zip(names, row, strict=True)} for row in found.fetchall()]


def quoted(text: str) -> str:
    """Escape a text for single quotes in SQL."""
    return text.replace("'", "''")


def one_line(error: object) -> str:
    """Return an error's text on one line; of a long one the beginning and the end, for either may name the cause."""
    line = " ".join(str(error).split())
    return line if len(line) <= 300 else f"{line[:195]} ... {line[-100:]}"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%S.%fZ}"
    return str(value)
