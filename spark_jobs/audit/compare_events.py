"""Compare the tables of events with a recount: `events` row by row, `minute_metrics` by sums per batch and key."""

from __future__ import annotations

from collections.abc import Collection

from spark_jobs.audit.compare import Difference, HourSums, StreamComparison, differing_hours
from spark_jobs.audit.contract import PAYLOAD
from spark_jobs.audit.database import hour_in
from spark_jobs.audit.inputs import BatchState
from spark_jobs.audit.recount_events import EventsRecount
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, MINUTE_METRICS, REJECTED_EVENTS
from spark_jobs.units import EPOCH, HOUR, MINUTE_US, NO_HOUR

METRIC_KEYS = ("region", "campaign_id", "ad_id", "store_id", "placement", "currency")
_PLAIN = (*PAYLOAD["events"], "region", "billing_model", "is_late")
# What the rules of invalid traffic decide. An older table, without these columns, has nulls.
_MARKS = ("invalid_traffic_rule", "invalid_traffic_rules", "rule_set", "spend_nanos", "coalesce(invalid_spend_nanos, 0)")
_PLACE = ("record_id", "time_us", "received_us", "name", "line", "query_id", "batch_id", "ingested_us", "hour")
_MINUTE = f"time_us - time_us % {MINUTE_US}"


# The measures of an increment, from one of its records.
_OF_RECORD = {
    "impressions": "(event_type = 'impression' and invalid_traffic_rule is null)::int",
    "clicks": "(event_type = 'click' and invalid_traffic_rule is null)::int",
    "invalid_impressions": "(event_type = 'impression' and invalid_traffic_rule is not null)::int",
    "invalid_clicks": "(event_type = 'click' and invalid_traffic_rule is not null)::int",
    "spend_nanos": "spend_nanos",
    "invalid_spend_nanos": "coalesce(invalid_spend_nanos, 0)",
}
METRIC_MEASURES = tuple(_OF_RECORD)


class EventsComparison(StreamComparison):
    """The comparison of an EventsRecount; see StreamComparison. ``cause`` is that of all increments that differ, if it is known.

    Leaves further tables: `events_lost` (records) and `events_over` (rows of the table); `metrics_over` (rows that occur twice) and
    `metrics_delta` (what to add: expected less found).
    """

    rejected = REJECTED_EVENTS
    ledger_layer = BATCH_LEDGER.name

    def __init__(self, recount: EventsRecount, *, cause: str | None = None) -> None:
        super().__init__(recount)
        self._cause = "null" if cause is None else f"'{cause}'"

    def _compare_accepted(self, hours: Collection[int]) -> tuple[list[Difference], list[HourSums]]:
        sums, wrong = self._find_events(hours)
        return self._events(wrong) + self._metrics(hours), sums

    @staticmethod
    def _hash(*names: str) -> str:
        return f"hash({', '.join((*names, *_PLAIN, *_MARKS))})"

    def _find_events(self, hours: Collection[int]) -> tuple[list[HourSums], list[int]]:
        """Return the sums of the hours, and the hours in which a row differs: where a sum of the rows' hashes differs."""
        by_partition = "(epoch(event_date)::bigint // 3600 + event_hour)"
        self._database.execute(
            f"""
            create or replace temp view expected_events as
            select *, {self._hash(*_PLACE)} as h from expected where outcome = 'accepted'
            """
        )
        names = ("event_id", "epoch_us(event_time)", "epoch_us(received_at)", "source_file", "source_line")
        hashed = self._hash(*names, "_query_id", "_batch_id", "epoch_us(ingested_at)", by_partition)
        found = self._found(EVENTS, by_partition, _days("event_date", hours, with_hour="event_hour"))
        self._database.execute(f"create or replace temp view found_events as select *, {hashed} as h from ({found})")
        measures = "count(*), coalesce(sum(spend_nanos), 0)::hugeint, sum(h::hugeint), bit_xor(h)"
        expected, found_sums = (
            self._sums(f"select hour, {measures} from {side} group by hour") for side in ("expected_events", "found_events")
        )
        sums = []
        for hour in {*expected, *found_sums, *hours} - {NO_HOUR}:
            (ours, our_nanos), (theirs, their_nanos) = expected.get(hour, [0, 0])[:2], found_sums.get(hour, [0, 0])[:2]
            sums.append(HourSums(EPOCH + hour * HOUR, ours, theirs, our_nanos, their_nanos))
        return sums, differing_hours(expected, found_sums)

    def _events(self, wrong: list[int]) -> list[Difference]:
        chosen = hour_in(wrong)
        self._database.execute(
            f"""
            create or replace temp table held as
            select *, row_number() over (partition by event_id, h order by _run_id nulls first) as copy
            from found_events where {chosen};
            create or replace temp table events_lost as
            select * from expected_events e where {chosen} and not exists (
                from held where held.h = e.h and held.event_id = e.record_id);
            create or replace temp table events_over as
            select held.*, held.copy > 1 and held.h in (select h from expected_events where {chosen}) as is_copy
            from held where copy > 1 or not exists (
                from expected_events e where {chosen.replace("hour", "e.hour")} and e.h = held.h and e.record_id = held.event_id)
            """
        )
        raw_ids = f"union {self._recount.raw_ids('select event_id from events_over')}" if wrong else ""
        cost = "{0}.spend_nanos + coalesce({0}.invalid_spend_nanos, 0)"
        same = " and ".join(
            [
                *(f"l.{name} is not distinct from o.{name}" for name in _PLAIN),
                "l.time_us is not distinct from epoch_us(o.event_time)",
                "l.received_us is not distinct from epoch_us(o.received_at)",
                f"{cost.format('l')} = {cost.format('o')}",
            ]
        )
        return self._findings(
            EVENTS.name,
            f"""
            with known as (
                select record_id from trusted where is_valid {raw_ids}
            ), over as (
                select *, row_number() over (partition by event_id, source_file, source_line, _query_id, _batch_id, is_copy) as n
                from events_over
            ), altered as (
                select l.hour, l.campaign_id,
                    if({same}, 'mark_wrong', 'event_altered') as cause,
                    l.spend_nanos as expected_nanos, o.spend_nanos as found_nanos, l.record_id,
                    l.name, l.line, l.query_id, l.batch_id
                from events_lost l join over o on o.n = 1 and not o.is_copy and o.event_id = l.record_id
                    and o.source_file = l.name and o.source_line = l.line and o._query_id = l.query_id and o._batch_id = l.batch_id
            )
            select hour, cause, campaign_id, 1 as expected, 1 as found, expected_nanos, found_nanos,
                'event ' || record_id as example
            from altered
            union all
            select hour, if(state = '{BatchState.MISSED}', {self._missed}, 'event_lost'), campaign_id, 1, 0, spend_nanos, 0,
                'event ' || record_id || ' of ' || name || ', line ' || line
            from events_lost anti join altered using (record_id, name, line, query_id, batch_id)
            union all
            select hour, case when is_copy then 'event_twice' when event_id in (from known) then 'id_accepted_twice'
                else 'event_unknown' end, campaign_id, 0, 1, 0, spend_nanos, 'event ' || event_id
            from over where not (n = 1 and not is_copy and exists (
                from altered a where a.record_id = event_id and a.name = source_file and a.line = source_line
                    and a.query_id = _query_id and a.batch_id = _batch_id))
            """,
        )

    def _metrics(self, hours: Collection[int]) -> list[Difference]:
        found = self._found(MINUTE_METRICS, "hour_of(epoch_us(event_minute))", _days("event_date", hours))
        self._database.execute(f"create or replace temp view found_metrics as {found}")
        chosen = self._hours_of_increments()
        keys = ", ".join(("query_id", "batch_id", "minute_us", *METRIC_KEYS))
        self._database.execute(
            f"""
            create or replace temp table held_metrics as
            select *, row_number() over (partition by record_uuid order by _run_id nulls first) as copy from found_metrics
            where {chosen};
            create or replace temp table metrics_over as select *, true as is_copy from held_metrics where copy > 1;
            create or replace temp table metrics_delta as
            select {keys}, any_value(hour) as hour, any_value(state) as state,
                {", ".join(f"(coalesce(sum(e_{m}), 0) - coalesce(sum(f_{m}), 0))::hugeint as {m}" for m in METRIC_MEASURES)},
                coalesce(sum(e_spend_nanos), 0)::hugeint as expected_nanos, coalesce(sum(f_spend_nanos), 0)::hugeint as found_nanos,
                count(e_rows) as expected_rows, count(f_rows) as found_rows,
                case when {self._cause} is not null then {self._cause}
                    when found_rows = 0 then {self._if_missing("increment_missing", "any_value(state)")}
                    when expected_rows = 0 then 'increment_unknown'
                    else 'increment_altered' end as cause
            from (
                select query_id, batch_id, {_MINUTE} as minute_us, {", ".join(METRIC_KEYS)}, hour, state,
                    {", ".join(f"sum({sql}) as e_{m}" for m, sql in _OF_RECORD.items())}, 1 as e_rows
                from expected where outcome = 'accepted' and {chosen} group by all
                union all by name
                select _query_id as query_id, _batch_id as batch_id, epoch_us(event_minute) as minute_us, {", ".join(METRIC_KEYS)},
                    hour, state, {", ".join(f"{m} as f_{m}" for m in METRIC_MEASURES)}, 1 as f_rows
                from held_metrics where copy = 1
            ) group by {keys} having {" or ".join(f"{m} != 0" for m in METRIC_MEASURES)}
            """
        )
        return self._findings(
            MINUTE_METRICS.name,
            """
            select hour, cause, campaign_id, expected_rows as expected, found_rows as found,
                expected_nanos, found_nanos, 'batch ' || batch_id || ', ad ' || coalesce(ad_id, 'none') as example
            from metrics_delta
            union all
            select hour, 'increment_twice', campaign_id, 0, 1, 0, spend_nanos, 'record_uuid ' || record_uuid from metrics_over
            """,
        )

    def _hours_of_increments(self) -> str:
        """Return a condition for the hours in which an increment differs or occurs twice.

        Two sides agree per key where sums of their measures, weighted by a hash of the key, agree. That saves grouping by key.
        """

        def weighted(minute: str, batch: str, *measures: str) -> str:
            weight = f"(hash({batch}, {minute}, {', '.join(METRIC_KEYS)}) >> 24)::hugeint"
            return ", ".join(f"sum({weight} * ({measure}))" for measure in measures)

        expected = weighted(_MINUTE, "query_id, batch_id", *_OF_RECORD.values())
        found = weighted("epoch_us(event_minute)", "_query_id, _batch_id", *(f"coalesce({name}, 0)" for name in METRIC_MEASURES))
        return hour_in(
            differing_hours(
                self._sums(f"select hour, 0, {expected} from expected where outcome = 'accepted' group by hour"),
                self._sums(f"select hour, count(*) - count(distinct record_uuid), {found} from found_metrics group by hour"),
            )
        )

    def _missing_raw(self) -> list[Difference]:
        if not self._recount.inputs.gone and not self._recount.inputs.lacking:
            return []
        return self._findings(
            EVENTS.name,
            f"""
            select hour, 'raw_missing' as cause, campaign_id, 1 as expected, 1 as found, spend_nanos as expected_nanos,
                spend_nanos as found_nanos, if(source = 'kafka', '{self._raw_table} lacks records of ' || name,
                    name || ' is gone or has changed since it was read') as example
            from expected where is_trusted and outcome = 'accepted'
            """,
        )


def _days(column: str, hours: Collection[int], with_hour: str | None = None) -> str:
    """Return a condition on partition columns that is true for all ``hours``."""
    known = [hour for hour in hours if hour != NO_HOUR]
    if not known:
        return "false"
    first, last = min(known) // 24, max(known) // 24
    bounds = f"{column} >= date '1970-01-01' + {first} and {column} <= date '1970-01-01' + {last}"
    if with_hour and len(known) == 1:
        return f"{bounds} and {with_hour} = {known[0] % 24}"
    return bounds
