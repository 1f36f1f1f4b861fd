"""Published marts that a test edits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb


@contextmanager
def edit_marts(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a file of marts for writing. Its marts by day, which are views of frozen and open days, become tables of their own."""
    with duckdb.connect(str(path)) as marts:
        views = "select view_name from duckdb_views() where schema_name = 'main' and not internal"
        for (name,) in marts.execute(views).fetchall():
            marts.execute(f'create table days."own {name}" as from main."{name}"')
            marts.execute(f'drop view main."{name}"')
            marts.execute(f'create table main."{name}" as from days."own {name}"')
            marts.execute(f'drop table days."own {name}"')
        yield marts
