"""Recount orders: derive each row of `orders` from all records of the order, by code that shares nothing with the ingest.

Records are read in the order of batches, then of files or offset ranges, then of lines or offsets.

- The first valid record of an order fixes its user, store, total and currency. A later record with other values is a conflict.
- Of the records that agree, the first `placed` and the first `cancelled` are accepted. The rest are duplicates, except that a
  `placed` with another order_time than the first `placed` is a conflict.
- The row has the values of the `placed` record, or of the `cancelled` one while there is no `placed`. A cancelled order stays
  cancelled. The row's batch is the batch of the record that was accepted last.

A batch changes `orders` in the same commit that holds its plan. So the rows of every planned batch are compared, finished or not.
"""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

from spark_jobs.audit.compare import Comparison, Finding, HourSums
from spark_jobs.audit.raw import PREFIX
from spark_jobs.audit.truth import Recount, Rules, listed, occurring
from spark_jobs.lake.tables import ORDERS, REJECTED_ORDERS
from spark_jobs.units import HOUR_US, NO_HOUR

LEDGER_LAYER = "orders_ledger"
"""The layer that findings name for the rows of `batch_ledger` of stream orders."""

_SHARED = ("user_id", "store_id", "total_micros", "currency")
_BEFORE_ALL = -1  # the place in the order of reading of batches whose plans are gone

# column of `orders`, as the recount has it, as the table has it
_COLUMNS = (
    *(("order_time", "time_us", "epoch_us(order_time)"), ("received_at", "received_us", "epoch_us(received_at)")),
    *((name, name, name) for name in ("region", *_SHARED, "status")),
    ("cancelled_at", "cancelled_us", "epoch_us(cancelled_at)"),
    *((name, name, name) for name in ("has_placed", "is_late", "fingerprint")),
    *(("source_file", "name", "source_file"), ("source_line", "line", "source_line")),
    *(("ingested_at", "ingested_us", "epoch_us(ingested_at)"), ("_query_id", "query_id", "_query_id")),
    ("_batch_id", "batch_id", "_batch_id"),
)


def _escaped(column: str) -> str:
    return f"replace(replace({column}, chr(1), chr(1) || 'e'), chr(31), chr(1) || 's')"


# the low half of the MD5 of what the fingerprint covers, as the signed number that tables hold
_PAYLOAD = f"""
    concat_ws(chr(31), time_us::varchar, {_escaped("user_id")}, {_escaped("store_id")}, total_micros::varchar, currency, status)
"""
_FINGERPRINT = f"""
    (md5_number_lower({_PAYLOAD})::hugeint - if(md5_number_lower({_PAYLOAD}) > {2**63 - 1}, {2**64}::hugeint, 0))::bigint
"""
_TRUSTED = """
    o bigint, b bigint, name varchar, region varchar, line bigint, record_id varchar, time_us bigint, received_us bigint,
    user_id varchar, store_id varchar, total_micros bigint, currency varchar, status varchar, is_late boolean, fingerprint bigint,
    outcome varchar, records bigint
"""


class OrdersRecount(Recount):
    """The recount of orders in a DuckDB of its own; see Recount.

    ``count`` makes table `outcomes` (a row a record of the hours asked) and `expected_orders` (a row an order that has a record, or
    stands in the table, in one of them).
    """

    def _load_stream(self, rules: dict[int, Rules], prices: pa.Table | None) -> None:
        # no backfill judges orders anew, so no hour has rules of its own
        self.lake.execute(
            "create temp table hour_rules (hour bigint, earliest_us bigint, future_skew_us bigint, events_version bigint)"
        )
        self._load_trusted()

    def _load_trusted(self) -> None:
        """Rows whose raw input is not there stand for themselves, as records: nothing is taken back because it is gone."""
        inputs = self.inputs
        self._keep_set_aside()
        self.lake.execute(f"create temp table trusted ({_TRUSTED})")
        self.lake.execute("create temp table doubtful (o bigint, b bigint)")
        if not (inputs.gone or inputs.waiting or inputs.lacking or inputs.lost):
            return
        lacking = [o for o, found in enumerate(inputs.occurrences) if found.batch in inputs.lacking]
        self.keep("lacking", pa.table({"o": pa.array(lacking, pa.int64())}))
        self.keep("lost", pa.table({"b": pa.array(sorted(inputs.lost), pa.int64())}))
        self._load_places(lacking)
        self.lake.execute(
            f"""
            insert into doubtful select o, b from absent union all select o, b from occurrences where o in (from lacking)
            union all select {_BEFORE_ALL}, b from lost;
            update batches set is_partial = true where b in (select b from occurrences where o in (from lacking));
            create temp table placeless as
            select min_by({{'o': p.o, 'b': p.b}}, p.o) as spot, t.order_id
            from {self.scan(ORDERS.name)} t join places p on p.name = source_file
                and source_line >= first_line and source_line < end_line
            group by t.order_id;
            insert into placeless
            select {{'o': {_BEFORE_ALL}, 'b': coalesce(l.b, (select min(b) from lost))}}, t.order_id
            from {self.scan(ORDERS.name)} t
                left join (from batches semi join lost using (b)) l on l.query_id = _query_id and l.batch_id = _batch_id
                anti join covered c on c.name = t.source_file and t.source_line >= c.first_line and t.source_line < c.end_line
            where exists (from lost);
            insert into trusted by name
            select spot.o as o, spot.b as b, source_file as name, region, source_line as line, t.order_id as record_id,
                epoch_us(order_time) as time_us, epoch_us(received_at) as received_us, {", ".join(_SHARED)},
                if(has_placed, 'placed', 'cancelled') as status, is_late, fingerprint
            from {self.scan(ORDERS.name)} t join placeless using (order_id);
            insert into trusted by name
            select distinct on (batches.b, source_file, source_line, outcome) p.o as o, batches.b as b, source_file as name,
                t.region as region, source_line as line, record_id, epoch_us(record_time) as time_us, outcome, records
            from {self.scan(REJECTED_ORDERS.name)} t join batches on _query_id = query_id and _batch_id = batch_id
                join (from places union all select {_BEFORE_ALL}, b, null, null, null from lost) p on p.b = batches.b
                    and (p.o = {_BEFORE_ALL} or p.name = source_file and source_line >= first_line and source_line < end_line)
            """
        )

    def _load_places(self, lacking: list[int]) -> None:
        """Tables `places`, where records were that are not there now, and `covered`, all places that a known plan names."""
        known = [found for found in self.inputs.occurrences if found.batch not in self.inputs.lost]
        merged: dict[str, list[list[int]]] = {}
        for found in sorted(known, key=lambda one: (one.name, one.start)):
            spans = merged.setdefault(found.name, [])
            if spans and found.start <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], found.end)
            else:
                spans.append([found.start, found.end])
        covered = [(name, *span) for name, spans in merged.items() for span in spans]
        self.keep(
            "covered",
            pa.table(
                {
                    "name": pa.array([name for name, _, _ in covered], pa.string()),
                    "first_line": pa.array([start for _, start, _ in covered], pa.int64()),
                    "end_line": pa.array([end for _, _, end in covered], pa.int64()),
                }
            ),
        )
        self.lake.execute("create temp table places as select o, b, name, first_line, end_line from absent")
        files = {str(entry.parquet) for o in lacking if (entry := self.inputs.occurrences[o].entry) is not None}
        if files:
            self.lake.execute(
                f"""
                create temp table present as select filename, line from read_parquet({listed(files)}, filename = true);
                create temp table claimed as
                select source_file, source_line from {self.scan(ORDERS.name)}
                union select source_file, source_line from {self.scan(REJECTED_ORDERS.name)};
                insert into places
                select o, b, name, source_line, source_line + 1
                from claimed join occurrences on o in (from lacking) and name = source_file and source_line >= first_line
                    and source_line < end_line
                anti join present on filename = parquet and line = source_line
                """
            )

    def hours_held(self) -> set[int]:
        """All hours of which the raw input or a table has a record."""
        found = self.rows(
            f"""
            select distinct hour_of(epoch_us(event_hour)) from {self.scan("batch_ledger")} where stream = 'orders' and offered != 0
            union select distinct hour_of(epoch_us(order_time)) from {self.scan(ORDERS.name)}
            union select distinct hour_of(epoch_us(record_time)) from {self.scan(REJECTED_ORDERS.name)}
            """
        )
        return {hour for (hour,) in found} | set(self.records_by_hour()) | self._hours_set_aside()

    def count(self, hours: Collection[int]) -> None:
        """Make tables `outcomes` and `expected_orders` for ``hours``.

        `outcomes` has one row per record of these hours: o, b, name, region, line, hour, record_id, outcome, is_late, and for a
        conflict both fingerprints as 16 hex digits. They are not ``is_sure`` where the order's own record is gone.
        `expected_orders` has the columns of _COLUMNS under the recount's names, the hours of the accepted records, and the state of
        the row's batch.
        """
        self.keep("hours", pa.table({"hour": pa.array(sorted(hours), pa.int64())}))
        self._read(hours)
        self._settle()
        self._expect_orders()
        shown = "printf('%016x', {})"
        self.lake.execute(
            f"""
            create or replace temp table outcomes as
            select r.o, r.b, r.name, r.region, r.line, r.hour, r.record_id, r.time_us, false as is_trusted,
                told as outcome, r.is_late,
                if(told = 'conflict', {shown.format("r.fingerprint")}, null) as fingerprint,
                if(told = 'conflict', {shown.format("h.fingerprint")}, null) as accepted_fingerprint,
                not h.is_trusted as is_sure,
                null::varchar[] as reasons, null::bigint as records, {_OF_EVENTS}
            from ok r join settled s using (pos) join ok h on h.pos = s.holder where r.hour in (from hours) and not r.is_trusted
            union all by name
            select o, b, name, region, line, hour, record_id, time_us, false as is_trusted, 'rejected' as outcome, true as is_sure,
                reasons, {_OF_EVENTS}
            from records where not is_ok and hour in (from hours)
            union all by name
            select o, b, name, region, line, hour_of(time_us) as hour, record_id, time_us, true as is_trusted, outcome,
                records, {_OF_EVENTS}
            from trusted where outcome is not null and hour in (from hours)
            union all by name
            select o, b, name, region, line, {NO_HOUR} as hour, true as is_trusted, 'rejected' as outcome, reasons, {_OF_EVENTS}
            from set_aside where {NO_HOUR} in (from hours)
            """
        )

    def _read(self, hours: Collection[int]) -> None:
        """Tables `ids`, the orders concerned, and `records`, all that is said of them and all else in ``hours``."""
        files, near = self.all_files(), self._files_of(hours)
        of_files = f"select record_id from read_parquet({listed(near)}) where is_valid and hour_of(time_us) in (from hours)"
        self.lake.execute(
            f"""
            create or replace temp table ids as
            select record_id, row_number() over () as n from (
                select order_id as record_id from {self.scan(ORDERS.name)} where hour_of(epoch_us(order_time)) in (from hours)
                union {of_files if near else "select null where false"}
            );
            create or replace temp table records as
            select n, o, b, name, region, line, record_id, time_us, hour_of(time_us) as hour, received_us, {", ".join(_SHARED)},
                status, true as is_ok, is_late, fingerprint, true as is_trusted, null::varchar[] as reasons
            from trusted join ids using (record_id) where outcome is null
            """
        )
        if files:
            self.lake.execute(
                f"""
                insert into records by name
                select n, o, b, name, region, line, record_id, time_us, hour, received_us, {", ".join(_SHARED)}, status,
                    is_valid and time_us >= earliest_us and time_us <= received_us + future_skew_us as is_ok,
                    received_us >= (hour + 1) * {HOUR_US} + hour_grace_us as is_late,
                    if(is_valid, {_FINGERPRINT}, null) as fingerprint, false as is_trusted,
                    list_concat(
                        coalesce(reasons, []), if(time_us < earliest_us, ['order_time_out_of_range'], []),
                        if(time_us > received_us + future_skew_us, ['order_time_in_future'], [])
                    ) as reasons
                from (
                    select r.* exclude (region, received_us), o, b, name, coalesce(r.region, occurrences.region) as region,
                        hour_of(time_us) as hour, coalesce(r.received_us, ingested_us) as received_us, earliest_us, future_skew_us,
                        hour_grace_us
                    from {occurring(files)} join batches using (b)
                ) left join ids using (record_id) where hour in (from hours) or (is_valid and n is not null)
                """
            )
        self._trust_cancellations()

    def _trust_cancellations(self) -> None:
        """A row does not say where its cancellation was. One that no record tells may come from raw input that is not there."""
        if not self.rows("select 1 from doubtful limit 1"):
            return
        spot = "{'o': o, 'b': b}"
        self.lake.execute(
            f"""
            insert into records by name
            with untold as (
                select t.* from {self.scan(ORDERS.name)} t
                where cancelled_at is not null and order_id in (select record_id from ids)
                    and not exists (from records r where r.is_ok and r.record_id = order_id and r.status = 'cancelled'
                        and r.received_us = epoch_us(cancelled_at))
            ), of_batch as (
                select query_id, batch_id, min_by({spot}, o) as spot from doubtful join batches using (b) group by all
            ), placed as (
                select untold.order_id, coalesce(own.spot, if(first.spot.o < told.last, first.spot, null)) as spot
                from untold join (select record_id, max(o) as last from records where is_ok group by record_id) told
                        on told.record_id = untold.order_id
                    left join of_batch own on own.query_id = _query_id and own.batch_id = _batch_id
                    cross join (select min_by({spot}, o) as spot from doubtful) first
            )
            select n, spot.o as o, spot.b as b, null as name, region, -1 as line, untold.order_id as record_id,
                epoch_us(order_time) as time_us, hour_of(epoch_us(order_time)) as hour,
                epoch_us(cancelled_at) as received_us, {", ".join(_SHARED)},
                'cancelled' as status, true as is_ok, is_late, fingerprint, true as is_trusted
            from untold join placed using (order_id) join ids on record_id = untold.order_id where spot is not null
            """
        )

    def _settle(self) -> None:
        """Tables `ok`, the valid records with their ``pos`` in the order of reading, `heads`, the accepted ones of each order, and
        `settled`: what became of each, and the record whose fingerprint the order had then."""
        agrees = " and ".join(f"ok.{name} = f.{name}" for name in _SHARED)
        self.lake.execute(
            f"""
            create or replace temp table ok as
            select *, row_number() over (order by o, line) as pos from records where is_ok;
            create or replace temp table agreeing as
            select ok.pos, ok.n, ok.status, ok.time_us, {agrees} as agrees
            from ok join (select n, min(pos) as first from ok group by n) using (n) join ok f on f.pos = first;
            create or replace temp table heads as
            select n, min(pos) filter (agrees and status = 'placed') as placed,
                min(pos) filter (agrees and status = 'cancelled') as cancelled
            from agreeing group by n;
            create or replace temp table settled as
            select r.pos, case when r.pos = placed or r.pos = cancelled then 'accepted' when not r.agrees then 'conflict'
                when r.status = 'placed' and r.time_us != p.time_us then 'conflict' else 'duplicate' end as told,
                if(placed <= r.pos, placed, cancelled) as holder
            from agreeing r join heads using (n) left join agreeing p on p.pos = placed
            """
        )

    def _expect_orders(self) -> None:
        gone = [o for o, found in enumerate(self.inputs.occurrences) if not found.is_waiting]
        self.keep("gone", pa.table({"o": pa.array(gone, pa.int64())}))
        self.lake.execute(
            f"""
            create or replace temp table expected_orders as
            select m.record_id as order_id, m.time_us, m.hour, m.received_us, m.region,
                {", ".join(f"m.{name}" for name in _SHARED)}, if(h.cancelled is null, 'placed', 'cancelled') as status,
                c.received_us as cancelled_us, h.placed is not null as has_placed, m.is_late, m.fingerprint, m.name, m.line,
                ingested_us, query_id, batch_id, state, p.hour as placed_hour,
                c.hour as cancelled_hour, coalesce(p.is_trusted and p.o in (from gone), false)
                    or coalesce(c.is_trusted and c.o in (from gone), false) as is_gone
            from heads h left join ok p on p.pos = h.placed left join ok c on c.pos = h.cancelled
                join ok m on m.pos = coalesce(h.placed, h.cancelled)
                join ok l on l.pos = greatest(h.placed, h.cancelled) join batches on batches.b = l.b
            """
        )


_OF_EVENTS = """
    null::varchar as campaign_id, null::varchar as invalid_traffic_rule, 'none' as billing_model, 0::bigint as spend_nanos,
    null::varchar as rule_set
"""


class OrdersComparison(Comparison):
    """The comparison of an OrdersRecount; see Comparison.

    Leaves `orders_lost` (rows as they must be) and `orders_over` (rows of the table that must go), and tables of rejects and of the
    ledger as Comparison does.
    """

    rejected = REJECTED_ORDERS
    ledger_layer = LEDGER_LAYER
    _compares_partial = False  # the hour of a cancellation that is gone is not known
    _same_reject = """
        and (e.is_trusted or not e.is_sure or e.records is not null or (k.fingerprint is not distinct from e.fingerprint
            and k.accepted_fingerprint is not distinct from e.accepted_fingerprint))
    """

    def __init__(self, recount: OrdersRecount) -> None:
        super().__init__(recount)

    def run(self, hours: Collection[int]) -> tuple[list[Finding], list[HourSums]]:
        """Count ``hours`` and compare them."""
        self._recount.count(hours)
        self._expect()
        findings, sums = self._orders()
        findings += self._rejects(hours)
        findings += self._ledger()
        findings += self._gone()
        return sorted(findings, key=lambda f: (f.hour, f.layer, f.cause)), sums

    def _orders(self) -> tuple[list[Finding], list[HourSums]]:
        same = " and ".join(f"e.{ours} is not distinct from {_of('f', theirs)}" for _, ours, theirs in _COLUMNS)
        differs = ", ".join(f"if(e.{ours} is distinct from {_of('f', theirs)}, '{name}', null)" for name, ours, theirs in _COLUMNS)
        # the hour that a difference is told of: the row's own, else one that a record of the order lies in
        hour = ", ".join(
            f"if({name} in (from hours), {name}, null)" for name in ("e.hour", "f.hour", "e.placed_hour", "e.cancelled_hour")
        )
        self._lake.execute(
            f"""
            create or replace temp view found_orders as
            select *, hour_of(epoch_us(order_time)) as hour from {self._recount.scan(ORDERS.name)}
            where order_id in (select record_id from ids)
            """
        )
        sums = self._differing()
        self._lake.execute(
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
            select at_hour as hour, case state when 'missed' then {self._missed} else if(is_found, 'order_altered', 'order_lost')
                end as cause, null as campaign_id, 1 as expected, is_found::int as found, 0 as expected_nanos, 0 as found_nanos,
                'order ' || order_id || ' of ' || coalesce(name, 'a file that is gone') || ', line ' || line
                || if(is_found, ': ' || array_to_string(differs, ', '), '') as example
            from orders_lost
            union all
            select at_hour, if(copy > 1, 'order_twice', 'order_unknown'), null, 0, 1, 0, 0, 'order ' || order_id
            from orders_over where copy > 1 or not is_expected
            """,
        )
        return findings, sums

    def _differing(self) -> list[HourSums]:
        """Make table `differing`: the ids of orders in hours whose rows differ. Returns the sums of the hours asked.

        An hour differs if a sum of hashes over its rows, which does not depend on their order, differs.
        """
        sides = []
        for table, place in (("expected_orders", 1), ("found_orders", 2)):
            hashed = f"hash(order_id, {', '.join(column[place] for column in _COLUMNS)})"
            rows = self._recount.rows(
                f"select hour, count(*), sum({hashed}::hugeint), bit_xor({hashed}) from {table} group by hour"
            )
            sides.append({hour: rest for hour, *rest in rows})
        wrong = [hour for hour in {*sides[0], *sides[1]} if sides[0].get(hour) != sides[1].get(hour)]
        chosen = f"hour in ({', '.join(map(str, sorted(wrong)))})" if wrong else "false"
        self._lake.execute(
            f"""
            create or replace temp table differing as
            select order_id from expected_orders where {chosen} union select order_id from found_orders where {chosen}
            """
        )
        asked = {hour for (hour,) in self._recount.rows("from hours")}
        counts = [(hour, *(side.get(hour, [0])[0] for side in sides)) for hour in sorted(asked & {*sides[0], *sides[1]})]
        return [HourSums(hour, orders_expected=expected, orders_found=found) for hour, expected, found in counts]

    def _gone(self) -> list[Finding]:
        """Orders that cannot be recounted because a file of theirs, or a raw record, is gone or has changed."""
        return self._findings(
            ORDERS.name,
            f"""
            select hour, 'raw_missing' as cause, null as campaign_id, 1 as expected, 1 as found, 0 as expected_nanos,
                0 as found_nanos, if(starts_with(name, '{PREFIX}'), '{self._raw_table} lacks records of order ' || order_id,
                    'a file with order ' || order_id || ' is gone or has changed since it was read') as example
            from expected_orders where is_gone and hour in (from hours)
            """,
        )


def _of(side: str, sql: str) -> str:
    return sql.replace("(", f"({side}.") if "(" in sql else f"{side}.{sql}"
