"""Reads what a lakehouse holds without Spark, in the form that the checks of the chaos simulator take."""

from __future__ import annotations

from typing import Any

from spark_jobs.config import Settings
from spark_jobs.lake.duck import connect_delta

_TIMES = {"event_time", "received_at", "ingested_at", "order_time", "cancelled_at", "event_hour", "event_minute", "max_received_at"}


class Held:
    """Reader of the tables of a home, without Spark."""

    def __init__(self, home: Settings) -> None:
        self._home = home
        self._database = connect_delta(lakehouse=home.lakehouse_uri)
        self._database.execute("set timezone = 'UTC'")

    def rows(self, table: str, columns: str) -> list[tuple[Any, ...]]:
        return self._database.execute(f"select {columns} from delta_scan('{self._home.table_uri(table)}')").fetchall()

    def dicts(self, table: str, columns: str) -> list[dict[str, Any]]:
        """Rows as dicts; the times among ``columns`` as microseconds."""
        names = columns.replace(",", " ").split()
        listed = ", ".join(f"epoch_us({name})" if name in _TIMES else name for name in names)
        return [dict(zip(names, row, strict=True)) for row in self.rows(table, listed)]

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()
