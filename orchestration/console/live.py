"""The live figures: the increments of complete batches of the newest days, kept up to date commit by commit.

`batch_ledger` is pinned before `minute_metrics`, and increments count only once the ledger has their batch, as in the marts. So a
batch that is half committed never shows. Only the data files that new commits add are read.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import duckdb

from orchestration.console.tables import Row, fetch_rows
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.failure import one_line
from spark_jobs.lake.lake import Lake, Snapshot
from spark_jobs.lake.tables import BATCH_LEDGER, MINUTE_METRICS, Table

DAYS = 2
"""The newest days with data that are kept: a day and the one before it."""

_MEMORY = "384MB"  # more is spilled
_COMMITS = 500  # a log that is further ahead is read anew
_FOLD_ROWS = 200_000
MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")
_KEY = "event_minute, region, store_id, campaign_id, currency"
_STORED_KEY = f"event_minute::timestamp as {_KEY}"  # of the table, whose times have a zone
SUMS = ", ".join(f"sum({name})::hugeint as {name}" for name in MEASURES)
_BATCH = "_query_id, _batch_id"
_PROGRESS = "max(max_received_at)::timestamp as received_at, max(ingested_at)::timestamp as ingested_at"


@dataclass(frozen=True)
class LiveState:
    """What the live figures contain: the pinned versions, and the newest of what the ledger says. Times are UTC without a zone.

    ``received_at``: the newest receipt of a record; ``ingested_at``: when its batch was ingested; ``days``: the days that are kept,
    the newest last. ``problem`` says why there are no figures.
    """

    ledger: int = -1
    metrics: int = -1
    received_at: datetime | None = None
    ingested_at: datetime | None = None
    days: tuple[date, ...] = ()
    problem: str = ""


class LiveFigures:
    """Reads the increments and answers questions on them. One thread refreshes, any thread asks."""

    def __init__(self, settings: Settings) -> None:
        self._lake = Lake(settings)
        self._resources = ExitStack()
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._is_loaded = False  # before that, there is no table to ask
        self._table_ids: tuple[str | None, ...] = ()
        self._lock = threading.Lock()
        self.state = LiveState()

    @property
    def poll_seconds(self) -> float:
        """The shortest time between two refreshes."""
        return self._lake.log(BATCH_LEDGER).poll_seconds

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection = None
            self._resources.close()

    def refresh(self) -> LiveState:
        """Read what was committed since the last call; returns what the figures contain then. Damage becomes its ``problem``."""
        with self._lock:
            try:
                self.state = self._refreshed()
            except AdtallyError as error:
                self._table_ids = ()
                self.state = LiveState(problem=one_line(error))
            return self.state

    def rows(self, sql: str, parameters: dict[str, Any] | None = None) -> list[Row]:
        """The rows of a statement over table ``minutes``: event_minute, region, store_id, campaign_id, currency and the measures.

        ``parameters`` are the values of its ``$name``; others than it names are ignored.
        """
        if self._connection is None or not self._is_loaded:
            return []
        with self._connection.cursor() as cursor:
            return fetch_rows(cursor, sql, parameters)

    def _refreshed(self) -> LiveState:
        if not self._lake.exists(BATCH_LEDGER) or not self._lake.exists(MINUTE_METRICS):
            return LiveState(problem="nothing has been ingested yet: run `adtally ingest`")
        snapshot = self._lake.pin(BATCH_LEDGER, MINUTE_METRICS)
        ledger, metrics = snapshot.version(BATCH_LEDGER), snapshot.version(MINUTE_METRICS)
        if self._table_ids and (ledger, metrics) == (self.state.ledger, self.state.metrics):
            return self.state
        table_ids = tuple(self._lake.table_id(table) for table in (BATCH_LEDGER, MINUTE_METRICS))
        if self._connection is None:
            self._connection = self._resources.enter_context(self._lake.database(memory=_MEMORY, threads=2))
        self._lake.renew_credentials(self._connection)
        is_known = table_ids == self._table_ids
        ledger_files = self._new_files(snapshot, BATCH_LEDGER, self.state.ledger) if is_known else None
        metrics_files = self._new_files(snapshot, MINUTE_METRICS, self.state.metrics) if ledger_files is not None else None
        with self._connection.cursor() as cursor:
            cursor.execute("begin")
            if ledger_files is None or metrics_files is None:
                self._load(cursor, snapshot)
            else:
                self._follow(cursor, ledger_files, metrics_files)
            state = self._state(cursor, ledger, metrics)
            cursor.execute("commit")
        self._is_loaded = True
        self._table_ids = table_ids
        return state

    def _new_files(self, snapshot: Snapshot, table: Table, after: int) -> list[str] | None:
        """The data files that commits after a version added; None where the table must be read anew: rows went, or too many."""
        until = snapshot.version(table)
        if after < 0 or until < after or until - after > _COMMITS:
            return None
        commits = self._lake.log(table).commits(after, until)
        if commits is None or any(commit.data_removed for commit in commits):
            return None
        return [path for commit in commits for path in commit.added_paths]

    def _load(self, cursor: duckdb.DuckDBPyConnection, snapshot: Snapshot) -> None:
        """Read the newest days whole."""
        metrics, ledger = snapshot.scan(MINUTE_METRICS), snapshot.scan(BATCH_LEDGER)
        [(newest,)] = cursor.execute(f"select max(event_date) from {metrics}").fetchall()
        since = (newest or date(1970, 1, 1)) - timedelta(days=DAYS - 1)
        cursor.execute(f"create or replace table batches as select distinct {_BATCH} from {ledger}")
        cursor.execute(f"create or replace table progress as select {_PROGRESS} from {ledger}")
        cursor.execute(
            f"create or replace table pending as select {_BATCH}, {_STORED_KEY}, {SUMS} from {metrics} "
            f"where event_date >= date '{since}' group by all"
        )
        cursor.execute(f"create or replace table minutes as select {_KEY}, {', '.join(MEASURES)} from pending limit 0")
        self._complete(cursor)

    def _follow(self, cursor: duckdb.DuckDBPyConnection, ledger_files: list[str], metrics_files: list[str]) -> None:
        """Add the rows of new files."""
        if ledger_files:
            ledger = self._lake.scan_files(BATCH_LEDGER, ledger_files)
            cursor.execute(f"insert into batches select distinct {_BATCH} from {ledger} anti join batches using ({_BATCH})")
            cursor.execute(
                "update progress set received_at = greatest(progress.received_at, new.received_at), "
                f"ingested_at = greatest(progress.ingested_at, new.ingested_at) from (select {_PROGRESS} from {ledger}) new"
            )
        if metrics_files:
            metrics = self._lake.scan_files(MINUTE_METRICS, metrics_files)
            cursor.execute(f"insert into pending select {_BATCH}, {_STORED_KEY}, {SUMS} from {metrics} group by all")
        self._complete(cursor)

    def _complete(self, cursor: duckdb.DuckDBPyConnection) -> None:
        """Move the increments of complete batches into the figures, and forget the days before the newest ones."""
        complete = f"pending semi join batches using ({_BATCH})"
        cursor.execute(f"insert into minutes select {_KEY}, {SUMS} from {complete} group by all")
        cursor.execute(f"delete from pending where ({_BATCH}) in (select ({_BATCH}) from batches)")
        [(newest, rows)] = cursor.execute("select max(event_minute)::date, count(*) from minutes").fetchall()
        if newest is not None:
            cursor.execute(f"delete from minutes where event_minute < date '{newest - timedelta(days=DAYS - 1)}'")
        if rows > _FOLD_ROWS:
            cursor.execute(f"create or replace table minutes as select {_KEY}, {SUMS} from minutes group by all")

    def _state(self, cursor: duckdb.DuckDBPyConnection, ledger: int, metrics: int) -> LiveState:
        [(received_at, ingested_at)] = cursor.execute("from progress").fetchall()
        days = cursor.execute("select distinct event_minute::date from minutes order by 1").fetchall()
        return LiveState(ledger, metrics, received_at, ingested_at, tuple(day for (day,) in days))


def utc_now() -> datetime:
    """The time in UTC, without a zone, as the tables are read."""
    return datetime.now(UTC).replace(tzinfo=None)
