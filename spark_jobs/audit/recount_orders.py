"""Recount orders: derive each row of `orders` from all records of the order, by code that shares nothing with the ingest.

Records are read in the order of batches, then of files or offset ranges, then of lines or offsets.

- The first valid record of an order fixes its user, store, total and currency. A later record with other values is a conflict.
- Of the records that agree, the first `placed` and the first `cancelled` are accepted. The rest are duplicates, except that a
  `placed` with another order_time than the first `placed` is a conflict.
- The row has the values of the `placed` record, or of the `cancelled` one while there is no `placed`. A cancelled order stays
  cancelled. The row's batch is the batch of the record that was accepted last.
"""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

from spark_jobs.audit.contract import PAYLOAD, RULES
from spark_jobs.audit.database import Database
from spark_jobs.audit.engine import Recount, occurring, parsed_records
from spark_jobs.audit.inputs import Inputs
from spark_jobs.lake.tables import BATCH_LEDGER, ORDERS, REJECTED_ORDERS
from spark_jobs.units import HOUR_US, NO_HOUR

SHARED = tuple(name for name in PAYLOAD["orders"] if name != "status")
"""The fields that all records of an order agree in."""

_BEFORE_ALL = -1  # the place in the order of reading of batches whose plans are gone


def _fingerprint() -> str:
    """Return SQL for the low half of the MD5 of the fields that the fingerprint covers, as the signed number in the tables."""
    fields = ["time_us::varchar"]
    for rule in RULES["orders"]:
        if rule.name in PAYLOAD["orders"]:
            escaped = f"replace(replace({rule.name}, chr(1), chr(1) || 'e'), chr(31), chr(1) || 's')"
            fields.append(escaped if rule.kind == "id" else f"{rule.name}::varchar")
    half = f"md5_number_lower(concat_ws(chr(31), {', '.join(fields)}))"
    return f"({half}::hugeint - if({half} > {2**63 - 1}, {2**64}::hugeint, 0))::bigint"


_FINGERPRINT = _fingerprint()
_TRUSTED = """
    o bigint, b bigint, name varchar, region varchar, line bigint, record_id varchar, time_us bigint, received_us bigint,
    user_id varchar, store_id varchar, total_micros bigint, currency varchar, status varchar, is_late boolean, fingerprint bigint,
    outcome varchar, records bigint
"""
# Columns that the shared comparison needs and only events have.
_OF_EVENTS = """
    null::varchar as campaign_id, null::varchar as invalid_traffic_rule, 'none' as billing_model, 0::bigint as spend_nanos,
    null::varchar as rule_set
"""


class OrdersRecount(Recount):
    """The recount of orders; see Recount.

    ``count`` also makes `expected_orders`: a row per order that has a record, or a row of the table, in one of the hours asked.
    """

    def __init__(self, database: Database, inputs: Inputs) -> None:
        super().__init__(database, inputs)
        # A backfill does not judge orders again, so no hour has rules of its own.
        database.execute(
            "create temp table hour_rules (hour bigint, earliest_us bigint, future_skew_us bigint, events_version bigint)"
        )
        self._load_trusted()

    def _load_trusted(self) -> None:
        """Make the table `trusted`: rows whose raw input is missing count as their own records, so that no row is removed."""
        inputs = self.inputs
        self.database.execute(f"create temp table trusted ({_TRUSTED})")
        self.database.execute("create temp table doubtful (o bigint, b bigint)")
        if not (inputs.gone or inputs.waiting or inputs.lacking or inputs.lost):
            return
        lacking = [o for o, found in enumerate(inputs.occurrences) if found.batch in inputs.lacking]
        self.database.keep_rows("lacking", [(o,) for o in lacking], o=pa.int64())
        self.database.keep_rows("lost", [(b,) for b in inputs.lost], b=pa.int64())
        self._load_places(lacking)
        self.database.execute(
            f"""
            insert into doubtful select o, b from absent union all select o, b from occurrences where o in (from lacking)
            union all select {_BEFORE_ALL}, b from lost;
            update batches set is_partial = true where b in (select b from occurrences where o in (from lacking));
            create temp table placeless as
            select min_by({{'o': p.o, 'b': p.b}}, p.o) as spot, t.order_id
            from {self.database.scan(ORDERS)} t join places p on p.name = source_file
                and source_line >= first_line and source_line < end_line
            group by t.order_id;
            insert into placeless
            select {{'o': {_BEFORE_ALL}, 'b': coalesce(l.b, (select min(b) from lost))}}, t.order_id
            from {self.database.scan(ORDERS)} t
                left join (from batches semi join lost using (b)) l on l.query_id = _query_id and l.batch_id = _batch_id
                anti join covered c on c.name = t.source_file and t.source_line >= c.first_line and t.source_line < c.end_line
            where exists (from lost);
            insert into trusted by name
            select spot.o as o, spot.b as b, source_file as name, region, source_line as line, t.order_id as record_id,
                epoch_us(order_time) as time_us, epoch_us(received_at) as received_us, {", ".join(SHARED)},
                if(has_placed, 'placed', 'cancelled') as status, is_late, fingerprint
            from {self.database.scan(ORDERS)} t join placeless using (order_id);
            insert into trusted by name
            select distinct on (batches.b, source_file, source_line, outcome) p.o as o, batches.b as b, source_file as name,
                t.region as region, source_line as line, record_id, epoch_us(record_time) as time_us, outcome, records
            from {self.database.scan(REJECTED_ORDERS)} t join batches on _query_id = query_id and _batch_id = batch_id
                join (from places union all select {_BEFORE_ALL}, b, null, null, null from lost) p on p.b = batches.b
                    and (p.o = {_BEFORE_ALL} or p.name = source_file and source_line >= first_line and source_line < end_line)
            """
        )

    def _load_places(self, lacking: list[int]) -> None:
        """Make the tables `places`, where records are missing, and `covered`, all places that a known plan names."""
        known = [found for found in self.inputs.occurrences if found.batch not in self.inputs.lost]
        merged: dict[str, list[list[int]]] = {}
        for found in sorted(known, key=lambda one: (one.name, one.start)):
            spans = merged.setdefault(found.name, [])
            if spans and found.start <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], found.end)
            else:
                spans.append([found.start, found.end])
        covered = [(name, *span) for name, spans in merged.items() for span in spans]
        self.database.keep_rows("covered", covered, name=pa.string(), first_line=pa.int64(), end_line=pa.int64())
        self.database.execute("create temp table places as select o, b, name, first_line, end_line from absent")
        files = {str(entry.parquet) for o in lacking if (entry := self.inputs.occurrences[o].entry) is not None}
        if files:
            self.database.execute(
                f"""
                create temp table present as select filename, line from {parsed_records(files)};
                create temp table claimed as
                select source_file, source_line from {self.database.scan(ORDERS)}
                union select source_file, source_line from {self.database.scan(REJECTED_ORDERS)};
                insert into places
                select o, b, name, source_line, source_line + 1
                from claimed join occurrences on o in (from lacking) and name = source_file and source_line >= first_line
                    and source_line < end_line
                anti join present on filename = parquet and line = source_line
                """
            )

    def recorded_hours(self) -> set[int]:
        """Return all hours of which a table of orders has a row."""
        hours = self.database.values(
            f"""
            select distinct hour_of(epoch_us(event_hour)) from {self.database.scan(BATCH_LEDGER)}
                where stream = 'orders' and offered != 0
            union select distinct hour_of(epoch_us(order_time)) from {self.database.scan(ORDERS)}
            union select distinct hour_of(epoch_us(record_time)) from {self.database.scan(REJECTED_ORDERS)}
            """
        )
        return set(hours)

    def count(self, hours: Collection[int]) -> None:
        """Make tables `outcomes` and `expected_orders` for ``hours``.

        `outcomes` has one row per record of these hours: o, b, name, region, line, hour, record_id, outcome, is_late, and for a
        conflict both fingerprints as 16 hex digits. They are not ``is_sure`` where the order's own record is gone.
        `expected_orders` has the columns of the table under the recount's names, the hours of the accepted records, and the state
        of the row's batch.
        """
        self.database.keep_hours("hours", hours)
        self._read(hours)
        self._settle()
        self._expect_orders()
        shown = "printf('%016x', {})"
        self.database.execute(
            f"""
            create or replace temp table outcomes as
            select r.o, r.b, r.name, r.region, r.line, r.hour, r.record_id, r.time_us, r.received_us, false as is_trusted,
                verdict as outcome, r.is_late,
                if(verdict = 'conflict', {shown.format("r.fingerprint")}, null) as fingerprint,
                if(verdict = 'conflict', {shown.format("h.fingerprint")}, null) as accepted_fingerprint,
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
        """Make the tables `ids`, the orders concerned, and `records`, all records of these orders and all others in ``hours``."""
        self.database.execute(
            f"""
            create or replace temp table ids as
            select record_id, row_number() over () as n from (
                select order_id as record_id from {self.database.scan(ORDERS)} where hour_of(epoch_us(order_time)) in (from hours)
                union select record_id from {parsed_records(self._files_of(hours))}
                    where is_valid and hour_of(time_us) in (from hours)
            );
            create or replace temp table records as
            select n, o, b, name, region, line, record_id, time_us, hour_of(time_us) as hour, received_us, {", ".join(SHARED)},
                status, true as is_ok, is_late, fingerprint, true as is_trusted, null::varchar[] as reasons
            from trusted join ids using (record_id) where outcome is null;
            insert into records by name
            select n, o, b, name, region, line, record_id, time_us, hour, received_us, {", ".join(SHARED)}, status,
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
                from {occurring(self._all_files())} join batches using (b)
            ) left join ids using (record_id) where hour in (from hours) or (is_valid and n is not null)
            """
        )
        self._trust_cancellations()

    def _trust_cancellations(self) -> None:
        """Add cancellations without a record, if their raw input may be missing: a row does not name the place of one."""
        if not self.database.rows("select 1 from doubtful limit 1"):
            return
        spot = "{'o': o, 'b': b}"
        self.database.execute(
            f"""
            insert into records by name
            with unshown as (
                select t.* from {self.database.scan(ORDERS)} t
                where cancelled_at is not null and order_id in (select record_id from ids)
                    and not exists (from records r where r.is_ok and r.record_id = order_id and r.status = 'cancelled'
                        and r.received_us = epoch_us(cancelled_at))
            ), of_batch as (
                select query_id, batch_id, min_by({spot}, o) as spot from doubtful join batches using (b) group by all
            ), placed as (
                select unshown.order_id, coalesce(own.spot, if(first.spot.o < shown_until.last, first.spot, null)) as spot
                from unshown join (select record_id, max(o) as last from records where is_ok group by record_id) shown_until
                        on shown_until.record_id = unshown.order_id
                    left join of_batch own on own.query_id = _query_id and own.batch_id = _batch_id
                    cross join (select min_by({spot}, o) as spot from doubtful) first
            )
            select n, spot.o as o, spot.b as b, null as name, region, -1 as line, unshown.order_id as record_id,
                epoch_us(order_time) as time_us, hour_of(epoch_us(order_time)) as hour,
                epoch_us(cancelled_at) as received_us, {", ".join(SHARED)},
                'cancelled' as status, true as is_ok, is_late, fingerprint, true as is_trusted
            from unshown join placed using (order_id) join ids on record_id = unshown.order_id where spot is not null
            """
        )

    def _settle(self) -> None:
        """Make the tables `ok`, `heads` and `settled`.

        `ok` has the valid records with their ``pos`` in the order of reading, `heads` the accepted ones of each order, `settled`
        the verdict on each record and the record (``holder``) whose fingerprint the order had then.
        """
        agrees = " and ".join(f"ok.{name} = f.{name}" for name in SHARED)
        self.database.execute(
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
                when r.status = 'placed' and r.time_us != p.time_us then 'conflict' else 'duplicate' end as verdict,
                if(placed <= r.pos, placed, cancelled) as holder
            from agreeing r join heads using (n) left join agreeing p on p.pos = placed
            """
        )

    def _expect_orders(self) -> None:
        """Make the table `expected_orders`."""
        gone = [(o,) for o, found in enumerate(self.inputs.occurrences) if not found.is_waiting]
        self.database.keep_rows("gone", gone, o=pa.int64())
        self.database.execute(
            f"""
            create or replace temp table expected_orders as
            select m.record_id as order_id, m.time_us, m.hour, m.received_us, m.region,
                {", ".join(f"m.{name}" for name in SHARED)}, if(h.cancelled is null, 'placed', 'cancelled') as status,
                c.received_us as cancelled_us, h.placed is not null as has_placed, m.is_late, m.fingerprint, m.name, m.line,
                ingested_us, query_id, batch_id, state, p.hour as placed_hour,
                c.hour as cancelled_hour, coalesce(p.is_trusted and p.o in (from gone), false)
                    or coalesce(c.is_trusted and c.o in (from gone), false) as is_gone
            from heads h left join ok p on p.pos = h.placed left join ok c on c.pos = h.cancelled
                join ok m on m.pos = coalesce(h.placed, h.cancelled)
                join ok l on l.pos = greatest(h.placed, h.cancelled) join batches on batches.b = l.b
            """
        )
