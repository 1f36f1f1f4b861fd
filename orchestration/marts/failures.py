"""The rows that a failed dbt test found: read from the build before it is thrown away, and kept for whoever looks into it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import duckdb

from orchestration.marts.dbt_runner import DbtError, DbtNode
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.duck import connect_delta, literal

ROWS_KEPT = 20
_CHARACTERS_SHOWN = 120

Rows = dict[str, list[dict[str, Any]]]
"""Test (dbt's unique id) -> the first rows that it found."""


class MartsError(AdtallyError):
    """A build of the marts failed; what was published stays. ``nodes``: what became of each model and test that ran."""

    def __init__(self, cause: DbtError, rows: Rows, kept: Path | None) -> None:
        hint = f"rows in {kept}: {_first(rows)}" if kept is not None else cause.hint
        super().__init__(str(cause.args[0]), hint=hint)
        self.nodes: list[DbtNode] = cause.nodes
        self.rows = rows


def failing_rows(nodes: Iterable[DbtNode], marts: Path, work: Path) -> Rows:
    """The first rows that each failed test of ``nodes`` found in the build in ``marts`` and ``work``.

    A test whose SQL cannot be run again (a model that it reads was not built) is left out.
    """
    failed = [node for node in nodes if node.status == "fail" and node.unique_id.startswith("test.") and node.compiled]
    if not failed or not marts.is_file() or not work.is_file():
        return {}
    found: Rows = {}
    with connect_delta() as connection:  # the staging models are views into the lakehouse
        for path, name in ((marts, "marts"), (work, "work")):
            connection.execute(f"attach {literal(path)} as {name} (read_only)")
        for node in failed:
            with contextlib.suppress(duckdb.Error):
                rows = connection.execute(f"select * from ({node.compiled}\n) limit {ROWS_KEPT}").fetchall()
                names = [column[0] for column in connection.description or []]
                found[node.unique_id] = [dict(zip(names, map(_plain, row), strict=True)) for row in rows]
    return found


def keep_rows(rows: Rows, path: Path) -> Path | None:
    """Write ``rows`` as JSON in place of those of an earlier failure; the file, None where there is nothing to keep."""
    path.unlink(missing_ok=True)
    if not rows:
        return None
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return path


def _first(rows: Rows) -> str:
    """The first row of the first test, for a message of one line."""
    row: Mapping[str, Any] = next((found[0] for found in rows.values() if found), {})
    shown = ", ".join(f"{name} {value}" for name, value in row.items() if value is not None)
    return shown if len(shown) <= _CHARACTERS_SHOWN else shown[: _CHARACTERS_SHOWN - 3] + "..."


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
