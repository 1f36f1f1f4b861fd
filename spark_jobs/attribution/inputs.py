"""What attribution reads: touches and orders, by user and store, the revisions of orders, and what changed since when.

Each of the three has an index (``spark_jobs.attribution.index``) that follows the commits of its table, or is rebuilt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs.attribution.index import KEY_FIELDS, RowIndex
from spark_jobs.config import Settings
from spark_jobs.lake.checked import DamagedError
from spark_jobs.lake.duck import query_arrow, task_connection
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import Commit, commit_identity
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, EVENTS, ORDERS, Table
from spark_jobs.rules.exempt import is_exempt_sql

_PART_ROWS = 1_000_000  # rows of a table that are read at a time
_KEYS = ", ".join(field.name for field in KEY_FIELDS)
_HALVES = "(digest & 18446744073709551615)::ubigint as low, (digest >> 64)::ubigint as high"
# the length tells user and store apart, whatever characters they have
_OF_PAIR = "md5_number(strlen(user_id) || ':' || user_id || store_id) as digest"


def index_folder(settings: Settings) -> Path:
    """The indexes of attribution: derived from the tables, rebuilt from them when missing."""
    return settings.home_path / "attribution_index"


@dataclass(frozen=True)
class Position:
    """The version of a table up to which something was read. The id tells a table from another of the same name."""

    table_id: str
    version: int


@dataclass(frozen=True)
class Source:
    """A table as rows of an index: the columns to read, and SQL from them (``input``) to KEY_FIELDS and the payload."""

    table: Table
    columns: tuple[str, ...]
    payload: pa.Schema
    sql: str
    folder: str
    whole: str | None = None  # SQL from the rows of all parts, where one row needs those of several files

    def index(self, settings: Settings) -> RowIndex:
        """Open its index."""
        return RowIndex(index_folder(settings) / self.folder, self.payload, f"duckdb {duckdb.__version__}\n{self.sql}")

    def rows(self, lake: Lake, paths: Sequence[str]) -> pa.Table:
        """Read the rows of data files."""
        return query_arrow(self.sql, lake.read_files(self.table, paths, *self.columns))


def touches(*, with_impressions: bool, exempt_users: Collection[str] = ()) -> Source:
    """Clicks (and impressions) of `events`; only billable ones count, and none of ``exempt_users``."""
    conditions = [f"not {is_exempt_sql(sorted(exempt_users))}"] if exempt_users else []
    conditions += [] if with_impressions else ["event_type = 'click'"]
    chosen = f" where {' and '.join(conditions)}" if conditions else ""
    return Source(
        EVENTS,
        (*("event_id", "event_type", "event_time", "campaign_id", "ad_id", "store_id", "user_id"), "invalid_traffic_rule"),
        pa.schema([("event_id", pa.string()), ("is_click", pa.bool_()), ("campaign_id", pa.string()), ("ad_id", pa.string())]),
        f"""
        select {_HALVES}, epoch_us(event_time) as time_us, md5_number_lower(event_id) as id,
            invalid_traffic_rule is null as counts, event_id, event_type = 'click' as is_click, campaign_id, ad_id
        from (select *, {_OF_PAIR} from input{chosen})
        """,
        "touches",
    )


ORDER_PAYLOAD = pa.schema(
    [
        *(("order_id", pa.string()), ("user_id", pa.string()), ("store_id", pa.string()), ("currency", pa.string())),
        *(("total_micros", pa.int64()), ("is_cancelled", pa.bool_()), ("is_late", pa.bool_())),
    ]
)
ORDERS_SOURCE = Source(
    ORDERS,
    ("order_id", "order_time", "user_id", "store_id", "currency", "total_micros", "status", "is_late"),
    ORDER_PAYLOAD,
    f"""
    select {_HALVES}, epoch_us(order_time) as time_us, md5_number_lower(order_id) as id, true as counts,
        order_id, user_id, store_id, currency, total_micros, status = 'cancelled' as is_cancelled,
        coalesce(is_late, false) as is_late
    from (select *, {_OF_PAIR} from input)
    """,
    "orders",
)

# the row's part of an order's fingerprint: all that its credits are; together they do not depend on the rows' order
_ROW_HASH = (
    "hash(status, epoch_us(order_time), currency, total_micros, touch_event_id, touch_type, epoch_us(touch_time), campaign_id, "
    "ad_id, window_days, last_click_micros, first_click_micros, linear_micros, position_based_micros, time_decay_micros)"
)
REVISION_PAYLOAD = pa.schema([("fingerprint", pa.uint64()), ("rule_set", pa.string()), ("is_cancelled", pa.bool_())])
REVISIONS_SOURCE = Source(
    ATTRIBUTED_ORDERS,
    (
        *("order_id", "revision", "status", "order_time", "currency", "total_micros", "touch_event_id", "touch_type", "touch_time"),
        *("campaign_id", "ad_id", "window_days", "last_click_micros", "first_click_micros", "linear_micros"),
        *("position_based_micros", "time_decay_micros", "rule_set"),
    ),
    REVISION_PAYLOAD,
    f"""
    select {_HALVES}, revision as time_us, 0::ubigint as id, true as counts, fingerprint, rule_set, is_cancelled
    from (
        select md5_number(order_id) as digest, revision, bit_xor({_ROW_HASH}) as fingerprint, any_value(rule_set) as rule_set,
            any_value(status) = 'cancelled' as is_cancelled
        from input group by order_id, revision
    )
    """,
    "revisions",
    f"""
    select {_KEYS}, bit_xor(fingerprint) as fingerprint, any_value(rule_set) as rule_set, bool_or(is_cancelled) as is_cancelled
    from input group by {_KEYS}
    """,
)


def fingerprints(rows: pa.Table, order: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Fingerprints of orders 0, 1, ..., each of which has rows of `attributed_orders`; ``order`` is each row's.

    Two revisions with the same fingerprint credit the same.
    """
    numbered = rows.append_column("number", pa.array(order))
    found = query_arrow(f"select bit_xor({_ROW_HASH}) as fingerprint from input group by number order by number", numbered)
    made: npt.NDArray[np.uint64] = found["fingerprint"].to_numpy()
    return made


def order_keys(order_ids: pa.ChunkedArray) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The halves by which REVISIONS_SOURCE finds orders."""
    hashed = query_arrow(
        f"select {_HALVES} from (select md5_number(order_id) as digest from input)", pa.table({"order_id": order_ids})
    )
    return hashed["low"].to_numpy(), hashed["high"].to_numpy()


class CannotFollow(Exception):
    """A commit, or a data file that it names, is gone."""


def position_of(lake: Lake, table: Table) -> Position:
    """The newest version of a table, which exists."""
    log = lake.log(table)
    return Position(log.table_id(), log.latest_version() or 0)


def changes(lake: Lake, source: Source, since: Position, upto: Position) -> Iterator[tuple[int, pa.Table]]:
    """Rows that the versions after ``since`` added or changed, one table for each such version. A removed row does not count.

    Raises CannotFollow if ``since`` is of another table, ahead of it, or too long ago.
    """
    if since.table_id != upto.table_id or since.version > upto.version:
        raise CannotFollow
    log = lake.log(source.table)
    for version in range(since.version + 1, upto.version + 1):
        commit = log.commit(version)
        if commit is None:
            raise CannotFollow
        if not commit.changes_rows:
            continue
        try:
            rows = _changed(lake, source, commit)
        except FileNotFoundError:
            raise CannotFollow from None
        if rows.num_rows:
            yield version, rows


def _changed(lake: Lake, source: Source, commit: Commit) -> pa.Table:
    if not commit.data_removed:
        rows = source.rows(lake, commit.added_paths)
        return rows.filter(rows["counts"])  # an index does not need rows that never counted
    if commit.metadata.get("keys") == "kept":  # a correction writes the rows that it changes into separate files
        return source.rows(lake, commit.metadata.get("changed_files", commit.metadata["added_files"]))
    before, after = source.rows(lake, commit.removed_paths), source.rows(lake, commit.added_paths)
    with task_connection().cursor() as own:
        own.register("before", before)
        own.register("after", after)
        gone = own.execute("select * replace (false as counts) from (from before except from after)").to_arrow_table()
        come = own.execute("from after except from before").to_arrow_table()
    return pa.concat_tables([gone, come.cast(gone.schema)])


def bring_to(lake: Lake, source: Source, index: RowIndex, upto: Position) -> None:
    """Make an index cover ``upto``: from the commits since its version, or from the whole table."""
    log = lake.log(source.table)
    commit = commit_identity(log.commit(upto.version))
    try:
        if index.table_id is None or index.commit != commit_identity(log.commit(index.version)):
            raise CannotFollow
        if index.table_id == upto.table_id and index.version == upto.version:
            return
        pending: list[pa.Table] = []
        for version, rows in changes(lake, source, Position(index.table_id, index.version), upto):
            pending.append(rows)
            if sum(part.num_rows for part in pending) >= _PART_ROWS:
                index.append(pa.concat_tables(pending), version, commit_identity(log.commit(version)))
                pending = []
        index.append(pa.concat_tables(pending) if pending else index.schema.empty_table(), upto.version, commit)
    except (CannotFollow, DamagedError):
        parts: Iterator[pa.Table] = (rows.filter(rows["counts"]) for rows in table_parts(lake, source, upto.version))
        if source.whole is not None:
            held = list(parts)
            parts = iter([query_arrow(source.whole, pa.concat_tables(held))] if held else [])
        index.rebuild(upto.table_id, parts, upto.version, commit)


def table_parts(
    lake: Lake, source: Source, version: int, where: tuple[str, datetime, datetime] | None = None
) -> Iterator[pa.Table]:
    """All rows of a table, some at a time, in the order of their partitions.

    ``where``: a time column of the table, and the first and the last moment; skips files without rows of that time.
    """
    by = source.table.partition_by
    files = lake.at({source.table.name: version}).files(source.table)
    files.sort(key=lambda file: [(file.values[name] is None, file.values[name]) for name in by])
    paths = [file.path for file in files if where is None or file.may_have(*where)]
    pending: list[pa.RecordBatch] = []
    for batch in lake.read_batches(source.table, paths, *source.columns):
        pending.append(batch)
        if sum(part.num_rows for part in pending) >= _PART_ROWS:
            yield query_arrow(source.sql, pa.Table.from_batches(pending))
            pending = []
    if pending:
        yield query_arrow(source.sql, pa.Table.from_batches(pending))
