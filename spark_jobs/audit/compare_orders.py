"""Compare the tables of orders with a recount, row by row.

A batch changes `orders` in the same commit that holds its plan. So the rows of every planned batch are compared, finished or not.
"""

from __future__ import annotations

from collections.abc import Collection

from spark_jobs.audit.checkpoints import PREFIX
from spark_jobs.audit.compare import Difference, HourSums, StreamComparison, differing_hours
from spark_jobs.audit.database import hour_in
from spark_jobs.audit.inputs import BatchState
from spark_jobs.lake.tables import ORDERS, REJECTED_ORDERS
from spark_jobs.units import EPOCH, HOUR, NO_HOUR

ORDERS_LEDGER_LAYER = "orders_ledger"
"""The layer that findings name for the rows of `batch_ledger` of the stream orders."""

# The recount's column and SQL of the table's value, where these differ from the column of `orders`.
_RENAMED = {
    "order_time": ("time_us", "epoch_us({}.order_time)"),
    "received_at": ("received_us", "epoch_us({}.received_at)"),
    "cancelled_at": ("cancelled_us", "epoch_us({}.cancelled_at)"),
    "source_file": ("name", "{}.source_file"),
    "source_line": ("line", "{}.source_line"),
    "ingested_at": ("ingested_us", "epoch_us({}.ingested_at)"),
    "_query_id": ("query_id", "{}._query_id"),
    "_batch_id": ("batch_id", "{}._batch_id"),
}
_COLUMNS = [
    (name, *_RENAMED.get(name, (name, f"{{}}.{name}"))) for name in ORDERS.schema.names if name not in ("order_id", "_run_id")
]


class OrdersComparison(StreamComparison):
    """The comparison of an OrdersRecount; see StreamComparison.

    Leaves further tables: `orders_lost` (rows as they must be) and `orders_over` (rows of the table to remove).
    """

    rejected = REJECTED_ORDERS
    ledger_layer = ORDERS_LEDGER_LAYER
    _compares_partial = False  # the hour of a missing cancellation is not known
    _same_reject = """
        and (e.is_trusted or not e.is_sure or e.records is not null or (k.fingerprint is not distinct from e.fingerprint
            and k.accepted_fingerprint is not distinct from e.accepted_fingerprint))
    """

    def _compare_accepted(self, hours: Collection[int]) -> tuple[list[Difference], list[HourSums]]:
        same = " and ".join(f"e.{ours} is not distinct from {theirs.format('f')}" for _, ours, theirs in _COLUMNS)
        differs = ", ".join(
            f"if(e.{ours} is distinct from {theirs.format('f')}, '{name}', null)" for name, ours, theirs in _COLUMNS
        )
        # A difference belongs to the hour of the row, otherwise to one of a record of the order.
        hour = ", ".join(
            f"if({name} in (from hours), {name}, null)" for name in ("e.hour", "f.hour", "e.placed_hour", "e.cancelled_hour")
        )
        self._database.execute(
            f"""
            create or replace temp view found_orders as
            select *, hour_of(epoch_us(order_time)) as hour from {self._database.scan(ORDERS)}
            where order_id in (select record_id from ids)
            """
        )
        sums = self._differing(hours)
        self._database.execute(
            f"""
            create or replace temp table held_orders as
            select f.*, coalesce({same}, false) as is_same, e.order_id is not null as is_expected, coalesce({hour}) as at_hour,
                row_number() over (partition by f.order_id order by coalesce({same}, false) desc, f._run_id nulls first) as copy
            from (from found_orders where order_id in (from differing)) f left join expected_orders e on e.order_id = f.order_id;
            create or replace temp table orders_over as
            select * from held_orders where at_hour is not null and (copy > 1 or not is_same);
            create or replace temp table orders_lost as
            select e.*, coalesce({hour}) as at_hour, list_filter([{differs}], name -> name is not null) as differs,
                f.order_id is not null as is_found
            from expected_orders e left join held_orders f on f.order_id = e.order_id and f.copy = 1
            where e.order_id in (from differing) and not coalesce(f.is_same, false) and coalesce({hour}) is not null
            """
        )
        findings = self._findings(
            ORDERS.name,
            f"""
            select at_hour as hour, case when state = '{BatchState.MISSED}' then {self._missed}
                when is_found then 'order_altered' else 'order_lost' end as cause, null as campaign_id,
                1 as expected, is_found::int as found, 0 as expected_nanos, 0 as found_nanos,
                'order ' || order_id || ' of ' || coalesce(name, 'a file that is gone') || ', line ' || line
                || if(is_found, ': ' || array_to_string(differs, ', '), '') as example
            from orders_lost
            union all
            select at_hour, if(copy > 1, 'order_twice', 'order_unknown'), null, 0, 1, 0, 0, 'order ' || order_id
            from orders_over where copy > 1 or not is_expected
            """,
        )
        return findings, sums

    def _differing(self, hours: Collection[int]) -> list[HourSums]:
        """Make table `differing`: the ids of orders in hours whose rows differ. Returns the sums of the hours asked.

        An hour differs if a sum of hashes over its rows, which does not depend on their order, differs.
        """
        our_hash = f"hash(order_id, {', '.join(ours for _, ours, _ in _COLUMNS)})"
        their_hash = f"hash(order_id, {', '.join(theirs.format('found_orders') for _, _, theirs in _COLUMNS)})"
        expected, found = (
            self._sums(f"select hour, count(*), sum({hashed}::hugeint), bit_xor({hashed}) from {table} group by hour")
            for table, hashed in (("expected_orders", our_hash), ("found_orders", their_hash))
        )
        chosen = hour_in(differing_hours(expected, found))
        self._database.execute(
            f"""
            create or replace temp table differing as
            select order_id from expected_orders where {chosen} union select order_id from found_orders where {chosen}
            """
        )
        sums = []
        for hour in {*hours} & {*expected, *found} - {NO_HOUR}:
            ours, theirs = expected.get(hour, [0])[0], found.get(hour, [0])[0]
            sums.append(HourSums(EPOCH + hour * HOUR, orders_expected=ours, orders_found=theirs))
        return sums

    def _missing_raw(self) -> list[Difference]:
        return self._findings(
            ORDERS.name,
            f"""
            select hour, 'raw_missing' as cause, null as campaign_id, 1 as expected, 1 as found, 0 as expected_nanos,
                0 as found_nanos, if(starts_with(name, '{PREFIX}'), '{self._raw_table} lacks records of order ' || order_id,
                    'a file with order ' || order_id || ' is gone or has changed since it was read') as example
            from expected_orders where is_gone and hour in (from hours)
            """,
        )
