"""Recount events: by code that shares nothing with the ingest.

A record is judged by the limits of its batch, or by the rules that a backfill has set for its hour. Of the valid records with one
id, in whatever hour, the first is accepted (in the order of batches, then of files or ranges, then of lines or offsets). The others
are duplicates if all their fields except received_at and region agree with it, otherwise conflicts.
"""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa
from xxhash import xxh3_64_intdigest

from spark_jobs.audit.contract import PAYLOAD, record_schema
from spark_jobs.audit.database import Database
from spark_jobs.audit.engine import Recount, occurring, parsed_records, within
from spark_jobs.audit.inputs import Inputs, Rules
from spark_jobs.audit.traffic import TrafficJudge
from spark_jobs.lake.tables import BATCH_LEDGER, CAMPAIGNS, EVENTS, HOUR_RULES, MINUTE_METRICS, REJECTED_EVENTS
from spark_jobs.units import HOUR_US

FILES_VERSION = -1
"""Stands for a version of `campaigns`: the price list as its files are now."""

_PAYLOAD = ("time_us", *PAYLOAD["events"])
_RECORD = tuple(name for name in record_schema("events").names if name not in ("region", "reasons"))
_RULES = ("campaigns_version", "earliest_us", "future_skew_us", "hour_grace_us", "events_version")


class EventsRecount(Recount):
    """The recount of events; see Recount.

    ``rules`` replace the rules of the hours that they name. ``prices`` (campaign_id, billing_model, from_us, to_us) are those of
    version FILES_VERSION, which the table `campaigns` does not have.
    """

    def __init__(
        self, database: Database, inputs: Inputs, rules: dict[int, Rules] | None = None, prices: pa.Table | None = None
    ) -> None:
        super().__init__(database, inputs)
        self._load_rules(rules or {})
        self._load_prices(prices)
        self._load_trusted()
        self._traffic = TrafficJudge(database)

    def recorded_hours(self) -> set[int]:
        """Return all hours of which a table of events has a row."""
        hours = self.database.values(
            f"""
            select distinct hour_of(epoch_us(event_hour)) from {self.database.scan(BATCH_LEDGER)}
                where stream = 'events' and (offered != 0 or accepted != 0)
            union select distinct epoch(event_date)::bigint // 3600 + event_hour from {self.database.scan(EVENTS)}
            union select distinct hour_of(epoch_us(event_minute)) from {self.database.scan(MINUTE_METRICS)}
            union select distinct hour_of(epoch_us(record_time)) from {self.database.scan(REJECTED_EVENTS)}
            """
        )
        return set(hours)

    def count(self, hours: Collection[int]) -> None:
        """Make the table `outcomes`: each record of ``hours`` with its outcome, its price and whether it is late.

        Columns: o, b, name, region, line, hour, record_id, received_us (never null for a valid record), the payload, outcome
        (accepted, duplicate, conflict, rejected), reasons (if rejected), records (if it stands for several), holder_o and
        holder_line (the record that has the id), billing_model, spend_nanos, invalid_spend_nanos, is_late, and the marks.
        """
        asked, hours = hours, self._traffic.hours_to_count(hours)
        self.database.keep_hours("hours", hours)
        self._judge("judged", self._files_of(hours), within("time_us", hours), "r.hour in (from hours)")
        self.database.execute("create or replace temp table ids as select distinct id_hash from judged where is_ok")
        files = self._all_files()
        elsewhere = "hour_of(time_us) not in (from hours) and id_hash in (from ids)"
        self.database.execute(
            f"""
            create or replace temp table suspects as select id_hash from (
                select id_hash from judged where is_ok
                union all select id_hash from {occurring(files)} where is_valid and {elsewhere}
                union all select id_hash from trusted where {elsewhere}
            ) group by id_hash having count(*) > 1
            """
        )
        self._judge("others", files, "r.id_hash in (from suspects)", "r.hour not in (from hours) and r.id_hash in (from suspects)")
        self._decide()
        self._traffic.judge(asked)
        self._mark()
        self.database.keep_hours("hours", asked)
        self.database.execute("insert into others by name select * from judged where hour not in (from hours)")

    def _load_rules(self, rules: dict[int, Rules]) -> None:
        newest = ", ".join(f"arg_max({name}, set_at) as {name}" for name in _RULES)
        self.database.execute(
            f"""
            create temp table hour_rules as
            select hour_of(epoch_us(event_hour)) as hour, {newest} from {self.database.scan(HOUR_RULES)} group by all
            """
        )
        for hour, rule in rules.items():
            values = ", ".join(str(getattr(rule, name)) for name in _RULES)
            self.database.execute(f"delete from hour_rules where hour = {hour}; insert into hour_rules values ({hour}, {values})")

    def _load_prices(self, prices: pa.Table | None) -> None:
        self.database.execute(
            "create temp table prices (version bigint, campaign_id varchar, billing_model varchar, from_us bigint, to_us bigint)"
        )
        if prices is not None:
            self.database.keep("given_prices", prices)
            self.database.execute(f"insert into prices by name select *, {FILES_VERSION} as version from given_prices")
        used = "select campaigns_version from batches union select campaigns_version from hour_rules"
        for version in self.database.values(f"from ({used}) where campaigns_version != {FILES_VERSION}"):
            self.database.execute(
                f"""
                insert into prices select {version}, campaign_id, billing_model, epoch_us(valid_from),
                    coalesce(epoch_us(valid_to), {2**62})
                from {self.inputs.snapshot.lake.at({CAMPAIGNS.name: version}).scan(CAMPAIGNS)}
                """
            )

    def _load_trusted(self) -> None:
        """Make the table `trusted`: rows whose raw input is missing count as their own records, so that no row is removed."""
        place = """
            join batches on _query_id = query_id and _batch_id = batch_id
            join absent on absent.b = batches.b and name = source_file and source_line >= first_line and source_line < end_line
        """
        numbers = {found.batch for found in (*self.inputs.gone, *self.inputs.waiting)}
        self.database.execute(f"create temp table trusted as {self._rows_as_records('absent', place, numbers)}")
        self._trust_unbacked()
        self.database.execute(
            "insert into trusted by name select *, false as is_valid, 'rejected' as outcome, null::bigint as records from set_aside"
        )
        ids = self.database.values("select distinct record_id from trusted where is_valid")
        hashes = [(name, xxh3_64_intdigest(name.encode())) for name in ids]
        self.database.keep_rows("trusted_ids", hashes, record_id=pa.string(), id_hash=pa.uint64())
        self.database.execute("update trusted set id_hash = i.id_hash from trusted_ids i where i.record_id = trusted.record_id")

    def _rows_as_records(self, place: str, joins: str, numbers: Collection[int]) -> str:
        """Return SQL for rows of some batches, as records. ``joins`` finds their places in the table ``place``."""
        plans = [self.inputs.plans[number] for number in numbers]
        # With these bounds, Delta's statistics skip the files of other batches.
        low, high = (pick((plan.batch_id for plan in plans), default=-1) for pick in (min, max))
        events, rejects = (
            f"(from {self.database.scan(table)} where _batch_id >= {low} and _batch_id <= {high})"
            for table in (EVENTS, REJECTED_EVENTS)
        )
        return f"""
            select o, {place}.b as b, name, e.region, source_line as line, true as is_valid, event_id as record_id,
                null::ubigint as id_hash, epoch_us(received_at) as received_us, epoch_us(event_time) as time_us,
                {", ".join(PAYLOAD["events"])}, 'accepted' as outcome, billing_model, is_late,
                coalesce(spend_nanos, 0) + coalesce(invalid_spend_nanos, 0) as spend_nanos,
                invalid_traffic_rule, invalid_traffic_rules, e.rule_set, null::varchar[] as reasons, null::bigint as records
            from {events} e {joins}
            union all by name
            select o, {place}.b as b, name, e.region, source_line as line, false as is_valid, record_id,
                epoch_us(record_time) as time_us, outcome, reason_codes as reasons, records
            from {rejects} e {joins}
        """

    def _trust_unbacked(self) -> None:
        """Add to `trusted` the rows whose own raw record was removed from the raw copy."""
        lacking = [found for found in self.inputs.occurrences if found.batch in self.inputs.lacking and found.entry is not None]
        if not lacking:
            return
        files = {str(found.entry.parquet) for found in lacking if found.entry is not None}
        numbers = ", ".join(str(number) for number in sorted(self.inputs.lacking))
        place = f"""
            join batches on _query_id = query_id and _batch_id = batch_id and batches.b in ({numbers})
            join occurrences on occurrences.b = batches.b and name = source_file and source_line >= first_line
                and source_line < end_line
            anti join (select filename, line from {parsed_records(files)}) r
                on r.filename = parquet and r.line = source_line
        """
        self.database.execute(
            f"""
            insert into trusted by name {self._rows_as_records("occurrences", place, self.inputs.lacking)};
            update batches set is_partial = true where b in ({numbers}) and b in (select b from trusted)
            """
        )

    def _judge(self, target: str, files: list[str], pushed: str, where: str) -> None:
        """Make the table ``target``: records judged by their limits, with the version of the prices that apply to them."""
        columns = ", ".join(f"r.{name}" for name in _RECORD)
        source = f"""
            select o, b, name, coalesce(r.region, occurrences.region) as region, {columns}, r.reasons, hour_of(r.time_us) as hour
            from {occurring(files)} where {pushed}
        """
        self.database.execute(
            f"""
            create or replace temp table {target} as
            select r.* exclude (received_us) replace (if(outcome is not null, r.reasons, list_concat(
                    coalesce(r.reasons, []),
                    if(time_us < coalesce(h.earliest_us, batches.earliest_us), ['event_time_out_of_range'], []),
                    if(time_us > coalesce(r.received_us, ingested_us) + coalesce(h.future_skew_us, batches.future_skew_us),
                        ['event_time_in_future'], [])
                )) as reasons),
                coalesce(r.received_us, ingested_us) as received_us,
                outcome is not null as is_trusted,
                case when outcome is not null then outcome = 'accepted'
                    else is_valid and time_us >= coalesce(h.earliest_us, batches.earliest_us)
                        and time_us <= coalesce(r.received_us, ingested_us) + coalesce(h.future_skew_us, batches.future_skew_us)
                end as is_ok,
                coalesce(h.hour_grace_us, batches.hour_grace_us) as grace_us,
                coalesce(h.campaigns_version, batches.campaigns_version) as price_version
            from (
                {source} union all by name select *, hour_of(time_us) as hour from trusted
            ) r join batches using (b) left join hour_rules h on h.hour = r.hour and batches.version <= h.events_version
            where {where}
            """
        )

    def _decide(self) -> None:
        """Make the table `counted`: each record with its outcome, its price and whether it is late."""
        same = " and ".join(f"r.{name} is not distinct from first.{name}" for name in _PAYLOAD)
        ranked = ", ".join(("o", "line", "record_id", "is_trusted", "outcome", *_PAYLOAD))
        self.database.execute(
            f"""
            create or replace temp table ranked as
            select {ranked} from judged where is_ok and id_hash in (from suspects)
            union all select {ranked} from others where is_ok;
            create or replace temp table settled as
            select r.o, r.line, first.o as holder_o, first.line as holder_line, case
                when r.o = first.o and r.line = first.line then 'accepted'
                when {same} then 'duplicate' else 'conflict' end as verdict
            from ranked r join (
                from ranked qualify row_number() over (partition by record_id order by o, line) = 1
            ) first using (record_id);
            create or replace temp table counted as
            select r.o, r.b, r.name, r.region, r.line, r.hour, r.record_id, r.received_us, {", ".join(f"r.{n}" for n in _PAYLOAD)},
                case when is_trusted then outcome when not is_ok then 'rejected' else coalesce(verdict, 'accepted') end as outcome,
                is_trusted, is_valid, r.reasons, r.records, holder_o, holder_line,
                r.invalid_traffic_rule, r.invalid_traffic_rules, r.rule_set,
                case when is_trusted then r.billing_model else prices.billing_model end as billing_model,
                case when is_trusted then r.spend_nanos
                    when event_type = 'click' and prices.billing_model = 'cpc' then price_micros * 1000
                    when event_type = 'impression' and prices.billing_model = 'cpm' then price_micros else 0 end as spend_nanos,
                case when is_trusted then r.is_late else r.received_us >= (r.hour + 1) * {HOUR_US} + grace_us end as is_late
            from judged r left join settled using (o, line)
                left join prices on prices.version = price_version and prices.campaign_id = r.campaign_id
                    and r.time_us >= from_us and r.time_us < to_us
            """
        )

    def _mark(self) -> None:
        """Make the table `outcomes`: the counted records of the hours asked, with marks of invalid traffic and the billed spend."""
        rule = "if(c.is_trusted, c.invalid_traffic_rule, marks.rule)"
        self.database.execute(
            f"""
            create or replace temp table outcomes as
            select c.* replace (
                    {rule} as invalid_traffic_rule,
                    if(c.is_trusted, c.invalid_traffic_rules, marks.rules) as invalid_traffic_rules,
                    case when c.is_trusted then c.rule_set when outcome != 'accepted' then null
                        when batches.version <= h.events_version then h.rule_set else batches.rule_set end as rule_set,
                    if({rule} is null, spend_nanos, 0) as spend_nanos
                ), if({rule} is null, 0, spend_nanos) as invalid_spend_nanos
            from counted c join batches using (b) left join marks using (o, line) left join rule_of_hour h on h.hour = c.hour
            where c.hour in (from asked);
            drop view accepted;
            drop table counted
            """
        )
