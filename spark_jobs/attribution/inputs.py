"""The inputs of attribution: touches and orders by user and store, revisions of orders, and the changes since a version.

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
from spark_jobs.attribution.rules import MODELS
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
# The length separates user and store, whatever characters they have.
_OF_PAIR = "md5_number(strlen(user_id) || ':' || user_id || store_id) as digest"


def index_folder(settings: Settings) -> Path:
    """Return the folder of the indexes, which attribution rebuilds from the tables if they are missing."""
    return settings.home_path / "attribution_index"


@dataclass(frozen=True)
class Position:
    """The version up to which a table was read. A table that was deleted and created again has another id."""

    table_id: str
    version: int


@dataclass(frozen=True)
class Source:
    """A table as rows of an index: the columns to read, and SQL that makes KEY_FIELDS and the payload from them (``input``).

    ``whole`` is SQL over the rows of all parts, for a table with one index row per rows of several files.
    """

    table: Table
    columns: tuple[str, ...]
    payload: pa.Schema
    sql: str
    folder: str
    whole: str | None = None

    def rows(self, lake: Lake, paths: Sequence[str]) -> pa.Table:
        """Read the rows of data files."""
        return query_arrow(self.sql, lake.read_files(self.table, paths, *self.columns))


def touches(*, with_impressions: bool, exempt_users: Collection[str] = ()) -> Source:
    """Return the source of clicks (and impressions). Only billable ones count, without those of ``exempt_users``."""
    conditions = [f"not {is_exempt_sql(sorted(exempt_users))}"] if exempt_users else []
    conditions += [] if with_impressions else ["event_type = 'click'"]
    chosen = f" where {' and '.join(conditions)}" if conditions else ""
    return Source(
        EVENTS,
        ("event_id", "event_type", "event_time", "campaign_id", "ad_id", "store_id", "user_id", "invalid_traffic_rule"),
        pa.schema([("event_id", pa.string()), ("is_click", pa.bool_()), ("campaign_id", pa.string()), ("ad_id", pa.string())]),
        f"""
        select {_HALVES}, epoch_us(event_time) as time_us, md5_number_lower(event_id) as id,
            invalid_traffic_rule is null as counts, event_id, event_type = 'click' as is_click, campaign_id, ad_id
        from (select *, {_OF_PAIR} from input{chosen})
        """,
        "touches",
    )


ORDERS_SOURCE = Source(
    ORDERS,
    ("order_id", "order_time", "user_id", "store_id", "currency", "total_micros", "status", "is_late"),
    pa.schema(
        {
            **dict.fromkeys(("order_id", "user_id", "store_id", "currency"), pa.string()),
            "total_micros": pa.int64(),
            "is_cancelled": pa.bool_(),
            "is_late": pa.bool_(),
        }
    ),
    f"""
    select {_HALVES}, epoch_us(order_time) as time_us, md5_number_lower(order_id) as id, true as counts,
        order_id, user_id, store_id, currency, total_micros, status = 'cancelled' as is_cancelled,
        coalesce(is_late, false) as is_late
    from (select *, {_OF_PAIR} from input)
    """,
    "orders",
)

_ORDER_COLUMNS = ("status", "order_time", "currency", "total_micros")
_TOUCH_COLUMNS = ("touch_event_id", "touch_type", "touch_time", "campaign_id", "ad_id")
_REVISION_COLUMNS = (*_ORDER_COLUMNS, *_TOUCH_COLUMNS, "window_days", *(f"{model}_micros" for model in MODELS))
"""The columns of `attributed_orders` that decide an order's credits."""

# A row's part of an order's fingerprint, which does not depend on the order of the rows.
_ROW_HASH = f"hash({', '.join(f'epoch_us({name})' if name.endswith('_time') else name for name in _REVISION_COLUMNS)})"
REVISIONS_SOURCE = Source(
    ATTRIBUTED_ORDERS,
    ("order_id", "revision", *_REVISION_COLUMNS, "rule_set"),
    pa.schema({"fingerprint": pa.uint64(), "rule_set": pa.string(), "is_cancelled": pa.bool_()}),
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
    """Return the fingerprints of orders 0, 1, ... from their rows of `attributed_orders`; ``order`` has each row's order.

    Two revisions with the same fingerprint have the same credits.
    """
    numbered = rows.append_column("number", pa.array(order))
    found = query_arrow(f"select bit_xor({_ROW_HASH}) as fingerprint from input group by number order by number", numbered)
    made: npt.NDArray[np.uint64] = found["fingerprint"].to_numpy()
    return made


def order_keys(order_ids: pa.ChunkedArray) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the halves of the keys of orders in the index of REVISIONS_SOURCE."""
    ids = pa.table({"order_id": order_ids})
    hashed = query_arrow(f"select {_HALVES} from (select md5_number(order_id) as digest from input)", ids)
    return hashed["low"].to_numpy(), hashed["high"].to_numpy()


class CannotFollow(Exception):
    """A commit, or a data file that it names, is gone."""


def position_of(lake: Lake, table: Table) -> Position:
    """Return the newest version of a table, which must exist."""
    log = lake.log(table)
    return Position(log.table_id(), log.latest_version() or 0)


def changes(lake: Lake, source: Source, since: Position, upto: Position) -> Iterator[tuple[int, pa.Table]]:
    """Yield each version after ``since`` that changes rows, with its new and changed rows. A removed row does not count.

    Raises CannotFollow if ``since`` is of another table, newer than ``upto``, or too old.
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
        removed = own.execute("select * replace (false as counts) from (from before except from after)").to_arrow_table()
        added = own.execute("from after except from before").to_arrow_table()
    return pa.concat_tables([removed, added.cast(removed.schema)])


def updated_index(lake: Lake, source: Source, upto: Position) -> RowIndex:
    """Open an index and bring it up to ``upto`` by the commits since its version, or rebuild it from the whole table."""
    folder = index_folder(lake.settings) / source.folder
    index = RowIndex(folder, source.payload, f"duckdb {duckdb.__version__}\n{source.sql}")
    log = lake.log(source.table)
    commit = commit_identity(log.commit(upto.version))
    try:
        if index.table_id is None or index.commit != commit_identity(log.commit(index.version)):
            raise CannotFollow
        if index.table_id == upto.table_id and index.version == upto.version:
            return index
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
            rows_of_parts = list(parts)
            parts = iter([query_arrow(source.whole, pa.concat_tables(rows_of_parts))] if rows_of_parts else [])
        index.rebuild(upto.table_id, parts, upto.version, commit)
    return index


def table_parts(
    lake: Lake, source: Source, version: int, where: tuple[str, datetime, datetime] | None = None
) -> Iterator[pa.Table]:
    """Yield all rows of a table in the order of their partitions, about _PART_ROWS at a time.

    ``where`` is a time column with its first and last moment: files without rows in between are skipped.
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
