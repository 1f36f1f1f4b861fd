"""Turns rows of Delta tables into messages: a key (the record_uuid) and a JSON text, always with the same bytes.

A version's messages have a fixed order: by the files of its commit and the rows in them, then removed rows by key. So publishing
can continue within a version. Memory is bounded by a batch of rows and by the rows that a commit revises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.attribution.rules import MODELS
from spark_jobs.lake.duck import task_connection
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import TOKENS_KEY, Commit
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, MINUTE_METRICS, Table

Messages = Iterator[tuple[list[str], list[str]]]
"""Keys and values, a batch at a time."""

_ROWS = 50_000  # made into messages at a time


def uuid_sql(parts: str) -> str:
    """Return SQL of the MD5 of texts joined by 0x1F, written as a UUID. ``parts`` are SQL expressions, as from ``text_part``."""
    digest = f"md5(concat_ws(chr(31), {parts}))"
    pieces = ", ".join(f"substr({digest}, {start}, {length})" for start, length in ((1, 8), (9, 4), (13, 4), (17, 4), (21, 12)))
    return f"concat_ws('-', {pieces})"


def text_part(column: str) -> str:
    """Return SQL of a text after its length in characters and a colon, "-" for null."""
    return f"coalesce(length({column})::varchar || ':' || {column}, '-')"


def json_sql(fields: Mapping[str, str]) -> str:
    """Return SQL of a JSON object of expressions by name, with sorted keys."""
    pairs = ", ".join(f"'{name}': {fields[name]}" for name in sorted(fields))
    return f"to_json({{{pairs}}})::varchar"


class MetricsMessages:
    """`ads-metrics`: one message a row of `minute_metrics`."""

    table: Table = MINUTE_METRICS
    schema = MINUTE_METRICS.stored_schema

    def __init__(self, lake: Lake) -> None:
        self._lake = lake

    def of_commit(self, commit: Commit) -> Messages:
        """Return what a version added, or, if it also removed rows, what it changed.

        A removed row becomes a message with measures of 0. Raises FileNotFoundError if a file is missing.
        """
        added = self._lake.read_batches(self.table, commit.added_paths)
        rows: Iterable[pa.RecordBatch] = self._changed(commit).to_batches() if commit.data_removed else added
        return _messages(rows, lambda part: self._sql(commit.version, commit.committed_ms))

    def whole(self, version: int, committed: int) -> Messages:
        """Return all rows of a version."""
        paths = sorted(self._lake.at({self.table.name: version}).paths(self.table))
        return _messages(self._lake.read_batches(self.table, paths), lambda part: self._sql(version, committed))

    def _sql(self, version: int, committed: int) -> str:
        names = ("region", "campaign_id", "ad_id", "store_id", "placement", "currency", *_MEASURES)
        fields = {
            "record_uuid": "record_uuid",
            "version": str(version),
            "event_minute": "epoch_ms(event_minute)",
            "event_date": "strftime(make_timestamp(epoch_us(event_minute)), '%Y-%m-%d')",
            **{name: name for name in names},
            "query_id": "_query_id",
            "batch_id": "_batch_id",
            "run_id": "_run_id",
            "committed_at": str(committed),
        }
        return f"select record_uuid as key, {json_sql(fields)} as value from input"

    def _changed(self, commit: Commit) -> pa.Table:
        """Return the rows that a version changed: new ones, and, for uuids with a removed row, the remaining ones."""
        before, after = (self._lake.read_files(self.table, paths) for paths in (commit.removed_paths, commit.added_paths))
        with task_connection().cursor() as own:
            own.register("before", before)
            own.register("after", after)
            own.execute("create temp table come as from after except all from before")
            own.execute(
                "create temp table gone as select * from (from before except all from after) "
                "where record_uuid not in (select record_uuid from come)"
            )
            gone = own.execute("select distinct record_uuid from gone").to_arrow_table()["record_uuid"].combine_chunks()
            snapshot = self._lake.at({self.table.name: commit.version})
            held = snapshot.rows(self.table, where_in=("record_uuid", gone)) if len(gone) else self.schema.empty_table()
            own.register("held", held)
            nothing = ", ".join(f"0::bigint as {name}" for name in _MEASURES)
            one = f"qualify row_number() over (partition by record_uuid order by {_ROW_ORDER}) = 1"
            rows = own.execute(
                f"""
                select * from (
                    from (select distinct * from come)
                    union all by name from (select * from held {one})
                    union all by name from (
                        select * replace ({nothing}) from gone where record_uuid not in (select record_uuid from held) {one}
                    )
                ) order by record_uuid, {_ROW_ORDER}
                """
            ).to_arrow_table()
        return rows.cast(self.schema)


_MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")
_ROW_ORDER = ", ".join((*_MEASURES, "_query_id", "_batch_id", "_run_id"))


class CreditsMessages:
    """`attributed-orders`: one message an order and touch, or an order without one; and one for each touch that it lost."""

    table: Table = ATTRIBUTED_ORDERS
    columns = tuple(name for name in ATTRIBUTED_ORDERS.stored_schema.names if not name.endswith("_weights"))

    def __init__(self, lake: Lake) -> None:
        self._lake = lake

    def of_commit(self, commit: Commit) -> Messages:
        """Return what a version added, then the touches that orders lost against their previous revision.

        Those come from the current table, which keeps all revisions: from files with orders of the same times. Raises
        FileNotFoundError if a file is missing.
        """
        if TOKENS_KEY in commit.metadata:
            yield from self._erased(commit)
            return
        if commit.data_removed:
            yield from self._rewritten(commit)
            return
        revised: list[pa.Table] = []

        def noted() -> Iterator[pa.RecordBatch]:
            for batch in self._lake.read_batches(self.table, commit.added_paths, *self.columns):
                again = pa.Table.from_batches([batch]).filter(pc.greater(batch["revision"], 1))
                if again.num_rows:
                    revised.append(again.select(_HEAD))
                yield batch

        yield from _credit_messages(noted(), commit.version, is_current=True)
        if revised:
            dropped = self._dropped(pa.concat_tables(revised))
            yield from _credit_messages(dropped.to_batches(), commit.version, is_current=False)

    def whole(self, version: int, committed: int) -> Messages:
        """Return the latest revision of every order of a version, and every touch that only an earlier revision had."""
        paths = sorted(self._lake.at({self.table.name: version}).paths(self.table))
        with task_connection().cursor() as own:
            own.register("told", self._lake.read_files(self.table, paths, *_HEAD))
            latest = own.execute("select order_id, max(revision) as revision from told group by order_id").to_arrow_table()
            dropped = own.execute(_DROPPED_BY_LATEST).to_arrow_table()
        keys = _order_revision(latest)

        def current() -> Iterator[pa.RecordBatch]:
            for batch in self._lake.read_batches(self.table, paths, *self.columns):
                kept = batch.filter(pc.is_in(_order_revision(batch), value_set=keys))
                if kept.num_rows:
                    yield kept

        yield from _credit_messages(current(), version, is_current=True)
        yield from _credit_messages(dropped.to_batches(), version, is_current=False)

    def _dropped(self, revised: pa.Table) -> pa.Table:
        """Return the touches that revised orders (rows of _HEAD) lost against the previous revision, with the order's columns."""
        with task_connection().cursor() as own:
            own.register("revised", revised)
            own.register("before", self._earlier(revised))
            return own.execute(_DROPPED_BY_REVISION).to_arrow_table()

    def _earlier(self, revised: pa.Table) -> pa.Table:
        """Return the current table's rows (columns of _HEAD) of these orders, of all revisions."""
        narrow = self.table.schema_of(*_HEAD)
        span = pc.min_max(revised["order_time"]).as_py()
        files = self._lake.pin(self.table).files(self.table)
        paths = sorted(file.path for file in files if file.may_have("order_time", span["min"], span["max"]))
        ids = pc.unique(revised["order_id"].combine_chunks())
        found = [narrow.empty_table()]
        for batch in self._lake.read_batches(self.table, paths, *_HEAD):
            of_orders = batch.filter(pc.is_in(batch["order_id"], value_set=ids))
            if of_orders.num_rows:
                found.append(pa.Table.from_batches([of_orders]))
        return pa.concat_tables([part.cast(narrow) for part in found])

    def _erased(self, commit: Commit) -> Messages:
        """Return all messages of the orders of erased people, under the same keys, with their tokens.

        Not by comparison: the files of before are deleted. Also touches that only an earlier revision had, whose messages stay in
        the topic.
        """
        tokens = pa.array(commit.metadata[TOKENS_KEY], pa.string())
        after = self._lake.read_files(self.table, commit.added_paths, *self.columns, where_in=("user_id", tokens))
        if not after.num_rows:
            return
        with task_connection().cursor() as own:
            own.register("after", after)
            own.register("told", self._earlier(after))
            own.execute("create temp table latest as select order_id, max(revision) as revision from told group by order_id")
            come = own.execute(f"from after semi join latest using (order_id, revision) order by {_CREDIT_ORDER}").to_arrow_table()
            went = own.execute(_DROPPED_BY_LATEST).to_arrow_table()
        yield from _credit_messages(come.to_batches(), commit.version, is_current=True)
        yield from _credit_messages(went.to_batches(), commit.version, is_current=False)

    def _rewritten(self, commit: Commit) -> Messages:
        """Return what a version changed in place: latest revisions whose rows differ, and removed keys."""
        before, after = (
            self._lake.read_files(self.table, paths, *self.columns) for paths in (commit.removed_paths, commit.added_paths)
        )
        with task_connection().cursor() as own:
            own.register("before", before)
            own.register("after", after)
            own.execute("create temp table come as from after except from before")
            own.execute("create temp table gone as from before except from after")
            of = own.execute("select order_id, order_time from come union select order_id, order_time from gone").to_arrow_table()
            if not of.num_rows:
                return
            own.register("told", self._earlier(of))
            own.execute("create temp table latest as select order_id, max(revision) as revision from told group by order_id")
            come = own.execute(f"from come semi join latest using (order_id, revision) order by {_CREDIT_ORDER}").to_arrow_table()
            went = own.execute(
                f"""
                from gone semi join (select order_id, max(revision) as revision from (
                    select order_id, revision from gone union all select order_id, revision from latest) group by all
                ) using (order_id, revision)
                where not exists (from told where told.order_id = gone.order_id and told.revision = gone.revision
                    and told.touch_event_id is not distinct from gone.touch_event_id)
                order by {_CREDIT_ORDER}
                """
            ).to_arrow_table()
        yield from _credit_messages(come.to_batches(), commit.version, is_current=True)
        yield from _credit_messages(went.to_batches(), commit.version, is_current=False)


_TOUCH = ("touch_event_id", "touch_type", "touch_time", "campaign_id", "ad_id")
_ORDER_FIELDS = ("status", "order_time", "user_id", "store_id", "currency", "total_micros", "touches", "window_days", "reason")
_HEAD = ("order_id", "revision", *_ORDER_FIELDS, "rule_set", "attributed_at", *_TOUCH)
_CREDIT_ORDER = "order_id, revision, touch_event_id"
_OF_ORDER = ", ".join(f"o.{name}" for name in ("order_id", "revision", *_ORDER_FIELDS, "rule_set", "attributed_at"))
_OF_TOUCH = ", ".join(f"t.{name}" for name in _TOUCH)
_ONE_AN_ORDER = "qualify row_number() over (partition by order_id, revision order by touch_event_id) = 1"
_DROPPED_BY_REVISION = f"""
select {_OF_ORDER}, {_OF_TOUCH}
from (select * from revised {_ONE_AN_ORDER}) o join before t on t.order_id = o.order_id and t.revision = o.revision - 1
where not exists (from revised r where r.order_id = o.order_id and r.revision = o.revision
    and r.touch_event_id is not distinct from t.touch_event_id)
order by o.order_id, o.revision, t.touch_event_id
"""
_DROPPED_BY_LATEST = f"""
with newest as (select * from told qualify revision = max(revision) over (partition by order_id)),
    earlier as (
        select * from told qualify row_number() over (partition by order_id, touch_event_id order by revision desc) = 1
    )
select {_OF_ORDER}, {_OF_TOUCH}
from (select * from newest {_ONE_AN_ORDER}) o join earlier t on t.order_id = o.order_id and t.revision < o.revision
order by o.order_id, t.touch_event_id
"""


def _credit_messages(rows: Iterable[pa.RecordBatch], version: int, *, is_current: bool) -> Messages:
    return _messages(rows, lambda part: _credits_sql(part, version, is_current=is_current))


def _credits_sql(part: pa.Table, version: int, *, is_current: bool) -> str:
    """Return SQL from rows with the same ``window_days`` to messages; those of lost touches credit nothing."""
    windows = part["window_days"][0].as_py() or []
    identity = uuid_sql(f"{text_part('order_id')}, {text_part('touch_event_id')}")
    credits = {
        f"{model}_{days}d_micros": f"{model}_micros[{at}]" if is_current else "0"
        for model in MODELS
        for at, days in enumerate(windows, 1)
    }
    same = ("order_id", "status", "user_id", "store_id", "currency", "total_micros", "touch_event_id", "touch_type")
    fields = {
        "record_uuid": "key",
        "version": "revision",
        "is_current": "1" if is_current else "0",
        **{name: name for name in (*same, "campaign_id", "ad_id", "touches", "reason", "rule_set")},
        **{name: f"epoch_ms({name})" for name in ("order_time", "touch_time", "attributed_at")},
        **credits,
        "delta_version": str(version),
    }
    return f"select key, {json_sql(fields)} as value from (select *, {identity} as key from input)"


def _messages(rows: Iterable[pa.RecordBatch], sql_of: Callable[[pa.Table], str]) -> Messages:
    """Yield messages of rows in their order. ``sql_of`` returns the SQL for a part whose rows have the same ``window_days``."""
    for batch in rows:
        for start in range(0, batch.num_rows, _ROWS):
            for part in _split_by_windows(pa.Table.from_batches([batch.slice(start, _ROWS)])):
                with task_connection().cursor() as own:
                    own.register("input", part)
                    made = own.execute(sql_of(part)).to_arrow_table()
                yield made["key"].to_pylist(), made["value"].to_pylist()


def _split_by_windows(rows: pa.Table) -> Iterator[pa.Table]:
    """Cut ``rows`` where ``window_days`` changes, in their order."""
    if "window_days" not in rows.column_names or not rows.num_rows:
        yield rows
        return
    numbers = rows["window_days"].combine_chunks()
    values = numbers.to_pylist() if pc.count_distinct(numbers.value_lengths()).as_py() != 1 else None
    if values is None:  # usually all lists have the same length: compare them as a block, without a Python list a row
        width = len(numbers[0].as_py() or [])
        flat = numbers.flatten().to_numpy().reshape(-1, width) if width else None
        if flat is None or bool((flat == flat[0]).all()):
            yield rows
            return
        values = numbers.to_pylist()
    start = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[start]:
            yield rows.slice(start, end - start)
            start = end


def _order_revision(rows: pa.Table | pa.RecordBatch) -> pa.Array:
    """Join order and revision to one text."""
    found = pc.binary_join_element_wise(pc.cast(rows["revision"], pa.string()), pc.cast(rows["order_id"], pa.string()), ":")
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
