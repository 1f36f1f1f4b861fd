"""What the tables hold against what the recount says, for some hours: the rows that differ, and why.

Row by row for `events` and `rejected_events`; by sums per batch and key for `minute_metrics` and `batch_ledger`, whose corrections
are further rows. Batches that a running query has yet to end, or whose raw records are yet to come, are left out on both sides.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from spark_jobs.audit.raw import PREFIX
from spark_jobs.audit.truth import Recount, listed
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, MINUTE_METRICS, RAW_TABLES, REJECTED_EVENTS, Table
from spark_jobs.units import NO_HOUR

METRIC_KEYS = ("region", "campaign_id", "ad_id", "store_id", "placement", "currency")
METRIC_MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")
LEDGER_MEASURES = (
    *("offered", "accepted", "duplicate", "conflict", "rejected", "late", "invalid_traffic", "unpriced", "spend_nanos"),
)
_PLAIN = (
    *("event_type", "campaign_id", "ad_id", "store_id", "user_id", "impression_id", "placement", "price_micros", "currency"),
    *("user_agent", "region", "billing_model", "is_late"),
)
# what a judgement of invalid traffic decides; a table of before it had these columns has nulls
_MARKS = ("invalid_traffic_rule", "invalid_traffic_rules", "rule_set", "spend_nanos", "coalesce(invalid_spend_nanos, 0)")
_PLACE = ("record_id", "time_us", "received_us", "name", "line", "query_id", "batch_id", "ingested_us", "hour")


@dataclass(frozen=True)
class Finding:
    """One kind of difference in one hour (NO_HOUR: records without a readable time), layer and campaign.

    Counts of the rows concerned, by the recount and as found, and their spend. ``detail`` has an example.
    """

    hour: int
    layer: str
    cause: str
    campaign_id: str | None
    rows_different: int
    rows_expected: int
    rows_found: int
    nanos_expected: int
    nanos_found: int
    detail: str


@dataclass(frozen=True)
class HourSums:
    """Accepted events of an hour and their spend, and orders placed in it, by the recount and in the tables."""

    hour: int
    events_expected: int = 0
    events_found: int = 0
    nanos_expected: int = 0
    nanos_found: int = 0
    orders_expected: int = 0
    orders_found: int = 0


def _counted(event_type: str, validity: str) -> str:
    return f"count(*) filter (event_type = '{event_type}' and invalid_traffic_rule is {validity})"


# the measures of an increment, from the records that are in it
_EXPECTED = {
    "impressions": _counted("impression", "null"),
    "clicks": _counted("click", "null"),
    "invalid_impressions": _counted("impression", "not null"),
    "invalid_clicks": _counted("click", "not null"),
    "spend_nanos": "sum(spend_nanos)",
    "invalid_spend_nanos": "sum(invalid_spend_nanos)",
}


class Comparison:
    """The comparison of ``recount`` for some of its hours.

    Leaves tables for who puts it right: `events_lost` (records), `events_over` (rows of the table), and so on for
    `rejects_lost`, `rejects_over`; `metrics_over`, `ledger_over` (rows that stand twice or contradict themselves) and
    `metrics_delta`, `ledger_delta` (what is to be added, expected less found).
    """

    rejected: Table = REJECTED_EVENTS
    ledger_layer = BATCH_LEDGER.name
    # of a batch whose files are not all there nobody can say how many duplicates it had
    _compares_partial = True
    _same_reject = ""  # a condition beside the place and the outcome, for a row k of the table to be the expected record e

    def __init__(self, recount: Recount, *, cause: str | None = None) -> None:
        """``cause``: that of all increments that differ, where it is known beforehand."""
        self._recount = recount
        self._lake = recount.lake
        self._cause = "null" if cause is None else f"'{cause}'"
        missed = [plan for plan, state in zip(recount.inputs.plans, recount.inputs.states, strict=True) if state == "missed"]
        self._raw_table = RAW_TABLES[recount.inputs.stream].name
        self._missed = "'record_missed'" if any(plan.ranges and not plan.files for plan in missed) else "'file_missed'"

    def run(self, hours: Collection[int]) -> tuple[list[Finding], list[HourSums]]:
        """Count ``hours`` and compare them."""
        self._recount.count(hours)
        self._expect()
        sums, wrong = self._find_events(hours)
        findings = self._events(wrong)
        findings += self._rejects(hours)
        findings += self._metrics(hours)
        findings += self._ledger()
        findings += self._gone()
        return sorted(findings, key=lambda f: (f.hour, f.layer, f.cause, f.campaign_id or "")), sums

    # --- both sides

    def _expect(self) -> None:
        self._lake.execute(
            f"""
            create or replace temp view expected as
            select outcomes.*, query_id, batch_id, ingested_us, state,
                if(starts_with(name, '{PREFIX}'), 'kafka', 'files') as source,
                if(starts_with(name, '{PREFIX}'), split_part(name, '/', 2), region) as source_region
            from outcomes join batches using (b) where not is_left_out
            """
        )

    @staticmethod
    def _hash(*names: str) -> str:
        return f"hash({', '.join((*names, *_PLAIN, *_MARKS))})"

    def _found(self, table: str, hour: str, where: str) -> str:
        """SQL for the rows of a table in the hours asked, but for batches that are left out."""
        return f"""
            select t.*, {hour} as hour, coalesce(state, 'unknown') as state
            from {self._recount.scan(table)} t left join batches on t._query_id = query_id and t._batch_id = batch_id
            where {where} and {hour} in (from hours) and is_left_out is not true
        """

    def _find_events(self, hours: Collection[int]) -> tuple[list[HourSums], list[int]]:
        """The hours' sums, and the hours in which a row differs: told by an order-free sum of hashes."""
        by_partition = "(epoch(event_date)::bigint // 3600 + event_hour)"
        self._lake.execute(
            f"""
            create or replace temp view expected_events as
            select *, {self._hash(*_PLACE)} as h from expected where outcome = 'accepted'
            """
        )
        names = ("event_id", "epoch_us(event_time)", "epoch_us(received_at)", "source_file", "source_line")
        hashed = self._hash(*names, "_query_id", "_batch_id", "epoch_us(ingested_at)", by_partition)
        found = self._found(EVENTS.name, by_partition, self._days("event_date", hours, with_hour="event_hour"))
        self._lake.execute(f"create or replace temp view found_events as select *, {hashed} as h from ({found})")
        sides = [
            {
                hour: rest
                for hour, *rest in self._recount.rows(
                    f"""
                    select hour, count(*), coalesce(sum(spend_nanos), 0)::hugeint, sum(h::hugeint), bit_xor(h)
                    from {side} group by hour
                    """
                )
            }
            for side in ("expected_events", "found_events")
        ]
        nothing = [0, 0, 0, 0]
        sums, wrong = [], []
        for hour in sorted({*sides[0], *sides[1], *hours}):
            expected, held = sides[0].get(hour, nothing), sides[1].get(hour, nothing)
            sums.append(HourSums(hour, expected[0], held[0], int(expected[1]), int(held[1])))
            if expected != held:
                wrong.append(hour)
        return sums, wrong

    @staticmethod
    def _days(column: str, hours: Collection[int], with_hour: str | None = None) -> str:
        """A condition on partition columns that holds for all ``hours``."""
        known = [hour for hour in hours if hour != NO_HOUR]
        if not known:
            return "false"
        first, last = min(known) // 24, max(known) // 24
        bounds = f"{column} >= date '1970-01-01' + {first} and {column} <= date '1970-01-01' + {last}"
        if with_hour and len(known) == 1:
            return f"{bounds} and {with_hour} = {known[0] % 24}"
        return bounds

    # --- layers

    def _events(self, wrong: list[int]) -> list[Finding]:
        chosen = f"hour in ({', '.join(map(str, wrong))})" if wrong else "false"
        self._lake.execute(
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
        raw = self._recount.all_files()
        cost = "{0}.spend_nanos + coalesce({0}.invalid_spend_nanos, 0)"
        pairs = [*((name, name) for name in _PLAIN), ("time_us", "epoch_us(event_time)"), ("received_us", "epoch_us(received_at)")]
        same = " and ".join(
            f"l.{ours} is not distinct from {theirs.replace('(', '(o.') if '(' in theirs else f'o.{theirs}'}"
            for ours, theirs in pairs
        )
        same += f" and {cost.format('l')} = {cost.format('o')}"
        known = (
            f"""
            union select record_id from read_parquet({listed(raw)})
            where is_valid and record_id in (select event_id from events_over)
            """
            if raw and wrong
            else ""
        )
        return self._findings(
            EVENTS.name,
            f"""
            with known as (
                select record_id from trusted where is_valid {known}
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
            select hour, if(state = 'missed', {self._missed}, 'event_lost'), campaign_id, 1, 0, spend_nanos, 0,
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

    def _rejects(self, hours: Collection[int]) -> list[Finding]:
        moment = self._recount.within("epoch_us(record_time)", hours)
        found = self._found(self.rejected.name, "hour_of(epoch_us(record_time))", moment)
        key = f"""
            k._query_id = e.query_id and k._batch_id = e.batch_id and k.source_file = e.name and k.source_line = e.line
            and k.outcome = e.outcome and k.hour = e.hour and coalesce(k.records, 1) = coalesce(e.records, 1){self._same_reject}
        """
        # of many records with the same reasons and hour the first have rows of their own, the next one stands for all the others
        self._lake.execute(
            """
            create or replace temp table expected_rejects as
            select * exclude (rank, of_kind, kept)
                replace (if(not is_trusted and rank = kept + 1, of_kind - kept, records) as records)
            from (
                select expected.*, rejects_kept as kept, row_number() over (kind order by o, line) as rank,
                    count(*) over kind as of_kind
                from expected join batches using (b) where outcome in ('rejected', 'conflict')
                window kind as (partition by b, name, outcome, if(outcome = 'rejected', reasons, null), hour, is_trusted)
            ) where is_trusted or kept is null or rank <= kept + 1
            """
        )
        self._lake.execute(
            f"""
            create or replace temp table held_rejects as
            select *, row_number() over (
                partition by _query_id, _batch_id, source_file, source_line, outcome order by _run_id nulls first) as copy
            from ({found});
            create or replace temp table rejects_lost as
            select * from expected_rejects e where not exists (from held_rejects k where {key});
            create or replace temp table rejects_over as
            select *, copy > 1 as is_copy from held_rejects k where copy > 1 or not exists (
                from expected_rejects e where {key})
            """
        )
        return self._findings(
            self.rejected.name,
            f"""
            select hour, case state when 'missed' then {self._missed} when 'unfinished' then 'batch_unfinished_without_checkpoint'
                else 'rejected_lost' end as cause, campaign_id, 1 as expected, 0 as found, 0 as expected_nanos, 0 as found_nanos,
                outcome || ' record of ' || name || ', line ' || line as example
            from rejects_lost
            union all
            select hour, if(is_copy, 'rejected_twice', 'rejected_unknown'), null, 0, 1, 0, 0,
                coalesce(outcome, 'no outcome') || ' record of ' || source_file || ', line ' || source_line
            from rejects_over
            """,
        )

    def _metrics(self, hours: Collection[int]) -> list[Finding]:
        found = self._found(MINUTE_METRICS.name, "hour_of(epoch_us(event_minute))", self._days("event_date", hours))
        self._lake.execute(f"create or replace temp view found_metrics as {found}")
        chosen = self._hours_of_increments()
        keys = ", ".join(("query_id", "batch_id", "minute_us", *METRIC_KEYS))
        self._lake.execute(
            f"""
            create or replace temp table held_metrics as
            select *, row_number() over (partition by record_uuid order by _run_id nulls first) as copy from found_metrics
            where {chosen};
            create or replace temp table metrics_over as select *, true as is_copy from held_metrics where copy > 1;
            create or replace temp table metrics_delta as
            select {keys}, any_value(hour) as hour, any_value(state) as state,
                {", ".join(f"sum(e_{m} - f_{m})::hugeint as {m}" for m in METRIC_MEASURES)},
                sum(e_spend_nanos)::hugeint as expected_nanos, sum(f_spend_nanos)::hugeint as found_nanos,
                sum(e_rows)::bigint as expected_rows, sum(f_rows)::bigint as found_rows,
                case when {self._cause} is not null then {self._cause}
                    when found_rows = 0 and any_value(state) = 'missed' then {self._missed}
                    when found_rows = 0 and any_value(state) = 'unfinished' then 'batch_unfinished_without_checkpoint'
                    when found_rows = 0 then 'increment_missing' when expected_rows = 0 then 'increment_unknown'
                    else 'increment_altered' end as cause
            from (
                select query_id, batch_id, time_us - time_us % 60000000 as minute_us, {", ".join(METRIC_KEYS)}, hour, state,
                    {", ".join(f"{sql} as e_{m}" for m, sql in _EXPECTED.items())}, 1 as e_rows,
                    {", ".join(f"0 as f_{m}" for m in METRIC_MEASURES)}, 0 as f_rows
                from expected where outcome = 'accepted' and {chosen} group by all
                union all by name
                select _query_id as query_id, _batch_id as batch_id, epoch_us(event_minute) as minute_us, {", ".join(METRIC_KEYS)},
                    hour, state, {", ".join(f"0 as e_{m}" for m in METRIC_MEASURES)}, 0 as e_rows,
                    {", ".join(f"coalesce({m}, 0) as f_{m}" for m in METRIC_MEASURES)}, 1 as f_rows
                from held_metrics where copy = 1
            ) group by {keys} having {" or ".join(f"sum(e_{m} - f_{m}) != 0" for m in METRIC_MEASURES)}
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
        """A condition for the hours in which an increment differs or stands twice.

        Sums of measures weighted by a hash of the key agree where the sums per key do, and cost no grouping by key.
        """

        def weighted(minute: str, batch: str, *measures: str) -> str:
            weight = f"(hash({batch}, {minute}, {', '.join(METRIC_KEYS)}) >> 24)::hugeint"
            return ", ".join(f"sum({weight} * ({measure}))" for measure in measures)

        is_valid = "invalid_traffic_rule is null"
        kinds = [f"(event_type = '{kind}' and {side}{is_valid})::int" for side in ("", "not ") for kind in ("impression", "click")]
        expected = weighted(
            "time_us - time_us % 60000000", "query_id, batch_id", *kinds, "spend_nanos", "coalesce(invalid_spend_nanos, 0)"
        )
        found = weighted("epoch_us(event_minute)", "_query_id, _batch_id", *(f"coalesce({name}, 0)" for name in METRIC_MEASURES))
        sides = [
            {hour: rest for hour, *rest in self._recount.rows(sql)}
            for sql in (
                f"select hour, 0, {expected} from expected where outcome = 'accepted' group by hour",
                f"select hour, count(*) - count(distinct record_uuid), {found} from found_metrics group by hour",
            )
        ]
        nothing = [0] * (1 + len(METRIC_MEASURES))
        wrong = [hour for hour in {*sides[0], *sides[1]} if sides[0].get(hour, nothing) != sides[1].get(hour, nothing)]
        return f"hour in ({', '.join(map(str, sorted(wrong)))})" if wrong else "false"

    def _ledger(self) -> list[Finding]:
        found = self._found(BATCH_LEDGER.name, "hour_of(epoch_us(event_hour))", f"stream = '{self._recount.inputs.stream}'")
        keys = "query_id, batch_id, source, region, hour"
        comparable = "" if self._compares_partial else " and not coalesce(is_partial, false)"
        counts = {
            "offered": "sum(coalesce(records, 1))",
            **{
                name: f"coalesce(sum(coalesce(records, 1)) filter (outcome = '{name}'), 0)"
                for name in ("accepted", "duplicate", "conflict", "rejected")
            },
            "late": "count(*) filter (outcome = 'accepted' and is_late)",
            "invalid_traffic": "count(*) filter (outcome = 'accepted' and invalid_traffic_rule is not null)",
            "unpriced": "count(*) filter (outcome = 'accepted' and billing_model is null)",
            "spend_nanos": "coalesce(sum(spend_nanos) filter (outcome = 'accepted'), 0)",
        }
        self._lake.execute(
            f"""
            create or replace temp table held_ledger as
            select *, row_number() over (partition by _query_id, _batch_id, _run_id, source, region, hour) > 1 as is_copy,
                offered is distinct from accepted + duplicate + conflict + rejected as is_broken
            from ({found});
            create or replace temp table ledger_over as select * from held_ledger where is_copy or is_broken;
            create or replace temp table ledger_delta as
            with cells as (
                select {keys}, any_value(state) as state,
                    {", ".join(f"sum(e_{m})::hugeint as e_{m}, sum(f_{m})::hugeint as f_{m}" for m in LEDGER_MEASURES)},
                    sum(e_rows)::bigint as expected_rows, sum(f_rows)::bigint as found_rows
                from (
                    select {keys}, state, {", ".join(f"{sql} as e_{m}" for m, sql in counts.items())}, 1 as e_rows,
                        {", ".join(f"0 as f_{m}" for m in LEDGER_MEASURES)}, 0 as f_rows
                    from (select * exclude (region) rename (source_region as region) from expected) group by all
                    union all by name
                    select _query_id as query_id, _batch_id as batch_id, source, region, hour, state,
                        {", ".join(f"0 as e_{m}" for m in LEDGER_MEASURES)}, 0 as e_rows,
                        {", ".join(f"coalesce({m}, 0) as f_{m}" for m in LEDGER_MEASURES)}, 1 as f_rows
                    from held_ledger where not (is_copy or is_broken)
                ) group by {keys}
            ), known as (
                select is_partial, cells.* replace (
                    if(coalesce(is_partial, false), f_duplicate, e_duplicate) as e_duplicate,
                    if(coalesce(is_partial, false), e_accepted + f_duplicate + e_conflict + e_rejected, e_offered) as e_offered
                ) from cells left join batches using (query_id, batch_id)
            )
            select {keys}, state, {", ".join(f"e_{m} - f_{m} as {m}" for m in LEDGER_MEASURES)},
                e_offered as expected_offered, f_offered as found_offered, e_spend_nanos as expected_nanos,
                f_spend_nanos as found_nanos, expected_rows, found_rows
            from known where ({" or ".join(f"e_{m} != f_{m}" for m in LEDGER_MEASURES)}){comparable}
            """
        )
        return self._findings(
            self.ledger_layer,
            f"""
            select hour, case when found_rows = 0 and state = 'missed' then {self._missed}
                when found_rows = 0 and state = 'unfinished' then 'batch_unfinished_without_checkpoint'
                when found_rows = 0 then 'ledger_missing' when expected_rows = 0 then 'ledger_unknown'
                else 'ledger_altered' end as cause, null as campaign_id, 1 as expected, found_rows as found,
                expected_nanos, found_nanos,
                'batch ' || batch_id || ', ' || coalesce(region, 'no region') || ': ' || found_offered || ' offered instead of '
                || expected_offered as example
            from ledger_delta
            union all
            select hour, if(is_copy, 'ledger_twice', 'ledger_altered'), null, 0, 1, 0, spend_nanos,
                'batch ' || _batch_id || ', ' || coalesce(region, 'no region')
                || if(is_copy, ': the row stands twice', ': the row does not add up')
            from ledger_over
            """,
        )

    def _gone(self) -> list[Finding]:
        """Rows that cannot be recounted because their file, or raw record, is gone or has changed."""
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

    def _findings(self, layer: str, sql: str) -> list[Finding]:
        """Findings from rows (hour, cause, campaign_id, expected, found, expected_nanos, found_nanos, example)."""
        found = self._recount.rows(
            f"""
            select hour, cause, campaign_id, count(*), sum(expected)::bigint, sum(found)::bigint,
                coalesce(sum(expected_nanos), 0)::hugeint, coalesce(sum(found_nanos), 0)::hugeint, min(example)
            from ({sql}) group by hour, cause, campaign_id
            """
        )
        return [Finding(hour, layer, *rest) for hour, *rest in found]
