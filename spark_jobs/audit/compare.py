"""Compare the tables of a stream with a recount, for some hours: find the rows that differ, and the cause.

Accepted and rejected records are compared row by row. The ledger, whose corrections are further rows, is compared by sums per batch
and key. Batches that a running query has yet to finish, or whose raw records are yet to be copied, are left out on both sides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest

from spark_jobs.audit.checkpoints import PREFIX
from spark_jobs.audit.engine import Recount, within
from spark_jobs.audit.inputs import BatchState
from spark_jobs.lake.tables import BATCH_LEDGER, RAW_TABLES, Table
from spark_jobs.units import NO_HOUR, hour_moment, hour_number

_OUTCOMES = ("accepted", "duplicate", "conflict", "rejected")
LEDGER_MEASURES = ("offered", *_OUTCOMES, "late", "invalid_traffic", "unpriced", "spend_nanos")

Sums = dict[int, list[int]]
"""Sums of rows, by hour."""


@dataclass(frozen=True)
class Difference:
    """One kind of difference in one hour (None: records without a readable time), layer and campaign, and its ``cause``.

    Rows and nanos are the rows that differ and their spend: as the recount expects them, and as found. ``detail`` has an example.
    """

    event_hour: datetime | None
    layer: str
    cause: str
    campaign_id: str | None
    rows_different: int
    rows_expected: int
    rows_found: int
    nanos_expected: int
    nanos_found: int
    is_repaired: bool
    detail: str

    @property
    def hour(self) -> int:
        """The number of the hour; NO_HOUR if there is none."""
        return NO_HOUR if self.event_hour is None else hour_number(self.event_hour)


@dataclass(frozen=True)
class HourSums:
    """The accepted events of an hour and their spend, and the orders placed in it: by the recount, and in the tables."""

    hour: datetime
    events_expected: int = 0
    events_found: int = 0
    nanos_expected: int = 0
    nanos_found: int = 0
    orders_expected: int = 0
    orders_found: int = 0


class StreamComparison(ABC):
    """The comparison of ``recount`` with the tables, for some of its hours.

    Leaves tables for corrections: `rejects_lost` (records) and `rejects_over` (rows of the table); `ledger_over` (rows that occur
    twice or do not add up) and `ledger_delta` (what to add: expected less found).
    """

    rejected: Table
    ledger_layer: str
    # The number of duplicates is not known for a batch whose files are not all there.
    _compares_partial = True
    _same_reject = ""  # a further condition for a row k of the table to be the expected record e

    def __init__(self, recount: Recount) -> None:
        self._recount = recount
        self._database = recount.database
        inputs = recount.inputs
        missed = [plan for plan, state in zip(inputs.plans, inputs.states, strict=True) if state is BatchState.MISSED]
        self._raw_table = RAW_TABLES[inputs.stream].name
        self._missed = "'record_missed'" if any(plan.ranges and not plan.files for plan in missed) else "'file_missed'"

    def run(self, hours: Collection[int]) -> tuple[list[Difference], list[HourSums]]:
        """Count ``hours`` and compare them."""
        self._recount.count(hours)
        self._expect()
        findings, sums = self._compare_accepted(hours)
        findings += self._rejects(hours)
        findings += self._ledger()
        findings += self._missing_raw()
        return sorted(findings, key=lambda f: (f.hour, f.layer, f.cause, f.campaign_id or "")), sums

    @abstractmethod
    def _compare_accepted(self, hours: Collection[int]) -> tuple[list[Difference], list[HourSums]]:
        """Compare the table of accepted records, and what is derived from it."""

    @abstractmethod
    def _missing_raw(self) -> list[Difference]:
        """Find rows that cannot be recounted because their file, or raw record, is gone or has changed."""

    def _if_missing(self, otherwise: str, state: str = "state") -> str:
        """Return SQL for the cause of rows that the tables do not have."""
        return f"""
            case {state} when '{BatchState.MISSED}' then {self._missed}
                when '{BatchState.UNFINISHED}' then 'batch_unfinished_without_checkpoint' else '{otherwise}' end
        """

    def _expect(self) -> None:
        self._database.execute(
            f"""
            create or replace temp view expected as
            select outcomes.*, query_id, batch_id, ingested_us, state,
                if(starts_with(name, '{PREFIX}'), 'kafka', 'files') as source,
                if(starts_with(name, '{PREFIX}'), split_part(name, '/', 2), region) as source_region
            from outcomes join batches using (b) where not is_left_out
            """
        )

    def _found(self, table: Table, hour: str, where: str) -> str:
        """Return SQL for the rows of a table in the hours asked, except those of batches that are left out."""
        return f"""
            select t.*, {hour} as hour, coalesce(state, 'unknown') as state
            from {self._database.scan(table)} t left join batches on t._query_id = query_id and t._batch_id = batch_id
            where {where} and {hour} in (from hours) and is_left_out is not true
        """

    def _rejects(self, hours: Collection[int]) -> list[Difference]:
        moment = within("epoch_us(record_time)", hours)
        found = self._found(self.rejected, "hour_of(epoch_us(record_time))", moment)
        key = f"""
            k._query_id = e.query_id and k._batch_id = e.batch_id and k.source_file = e.name and k.source_line = e.line
            and k.outcome = e.outcome and k.hour = e.hour and coalesce(k.records, 1) = coalesce(e.records, 1){self._same_reject}
        """
        # Of many records with the same reasons and hour, the first have rows of their own; the next row stands for all others.
        self._database.execute(
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
        self._database.execute(
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
            select hour, {self._if_missing("rejected_lost")} as cause, campaign_id, 1 as expected, 0 as found,
                0 as expected_nanos, 0 as found_nanos,
                outcome || ' record of ' || name || ', line ' || line as example
            from rejects_lost
            union all
            select hour, if(is_copy, 'rejected_twice', 'rejected_unknown'), null, 0, 1, 0, 0,
                coalesce(outcome, 'no outcome') || ' record of ' || source_file || ', line ' || source_line
            from rejects_over
            """,
        )

    def _ledger(self) -> list[Difference]:
        found = self._found(BATCH_LEDGER, "hour_of(epoch_us(event_hour))", f"stream = '{self._recount.inputs.stream}'")
        keys = "query_id, batch_id, source, region, hour"
        sums = ", ".join(f"coalesce(sum({side}_{m}), 0)::hugeint as {side}_{m}" for m in LEDGER_MEASURES for side in "ef")
        comparable = "" if self._compares_partial else " and not coalesce(is_partial, false)"
        counts = {
            "offered": "sum(coalesce(records, 1))",
            **{name: f"coalesce(sum(coalesce(records, 1)) filter (outcome = '{name}'), 0)" for name in _OUTCOMES},
            "late": "count(*) filter (outcome = 'accepted' and is_late)",
            "invalid_traffic": "count(*) filter (outcome = 'accepted' and invalid_traffic_rule is not null)",
            "unpriced": "count(*) filter (outcome = 'accepted' and billing_model is null)",
            "spend_nanos": "coalesce(sum(spend_nanos) filter (outcome = 'accepted'), 0)",
        }
        self._database.execute(
            f"""
            create or replace temp table held_ledger as
            select *, row_number() over (partition by _query_id, _batch_id, _run_id, source, region, hour) > 1 as is_copy,
                offered is distinct from accepted + duplicate + conflict + rejected as is_broken
            from ({found});
            create or replace temp table ledger_over as select * from held_ledger where is_copy or is_broken;
            create or replace temp table ledger_delta as
            with cells as (
                select {keys}, any_value(state) as state, {sums}, count(e_rows) as expected_rows, count(f_rows) as found_rows
                from (
                    select {keys}, state, {", ".join(f"{sql} as e_{m}" for m, sql in counts.items())}, 1 as e_rows
                    from (select * exclude (region) rename (source_region as region) from expected) group by all
                    union all by name
                    select _query_id as query_id, _batch_id as batch_id, source, region, hour, state,
                        {", ".join(f"{m} as f_{m}" for m in LEDGER_MEASURES)}, 1 as f_rows
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
            select hour, case when found_rows = 0 then {self._if_missing("ledger_missing")}
                when expected_rows = 0 then 'ledger_unknown' else 'ledger_altered' end as cause,
                null as campaign_id, 1 as expected, found_rows as found,
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

    def _findings(self, layer: str, sql: str) -> list[Difference]:
        """Return findings from rows (hour, cause, campaign_id, expected, found, expected_nanos, found_nanos, example)."""
        found = self._database.rows(
            f"""
            select hour, cause, campaign_id, count(*), sum(expected)::bigint, sum(found)::bigint,
                coalesce(sum(expected_nanos), 0)::hugeint, coalesce(sum(found_nanos), 0)::hugeint, false, min(example)
            from ({sql}) group by hour, cause, campaign_id
            """
        )
        return [Difference(hour_moment(hour), layer, *rest) for hour, *rest in found]

    def _sums(self, sql: str) -> Sums:
        """Return the rows of a query (hour, sum, ...) by hour."""
        return {hour: sums for hour, *sums in self._database.rows(sql)}


def differing_hours(expected: Sums, found: Sums) -> list[int]:
    """Return the hours whose sums differ. An hour that is missing has sums of zero."""
    return [
        hour
        for hour in {*expected, *found}
        if any(ours != theirs for ours, theirs in zip_longest(expected.get(hour, ()), found.get(hour, ()), fillvalue=0))
    ]
