"""The recount: what the raw input comes to, told by code that shares nothing with the ingest.

Every line of every planned file (an occurrence: a file that two batches took counts twice) is judged by the limits of its batch,
or by the rules that a backfill has set for its hour. Then, of the valid records with one id, in whatever hour, the first is
accepted (order of the batches, then of the files, then of the lines); the others are duplicates if all their fields but
received_at and region agree, else conflicts. All of it is SQL over the parsed files, restricted to the hours asked: of the rest of
the history only the hashes of the ids are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from xxhash import xxh3_64_intdigest

from spark_jobs.config import Settings
from spark_jobs.delta_log import DeltaLog
from spark_jobs.duck import connect_delta
from spark_jobs.recount.landing import LandedFile, landed_files, missed_files, read_query
from spark_jobs.recount.plans import BatchPlan, PlannedFile, read_plans
from spark_jobs.recount.store import ParsedFile, RawFile, ensure_parsed
from spark_jobs.recount.traffic import TrafficJudge
from spark_jobs.tables import (
    BATCH_LEDGER,
    CAMPAIGNS,
    EVENTS,
    HOUR_RULES,
    MINUTE_METRICS,
    REJECTED_EVENTS,
    RULE_SETS,
    TRAFFIC_REVIEWS,
    Table,
)

HOUR_US = 3_600_000_000
NO_HOUR = -(2**31)
"""The hour of a record without a readable time."""

FILES_VERSION = -1
"""Stands for a version of `campaigns`: the price list as its files say it now."""

# The ledger first: a batch that stands in it is whole in what is pinned behind it.
PINNED: tuple[Table, ...] = (
    *(BATCH_LEDGER, EVENTS, REJECTED_EVENTS, MINUTE_METRICS, CAMPAIGNS, HOUR_RULES, TRAFFIC_REVIEWS, RULE_SETS),
)
_MEMORY = "1200MB"
_PAYLOAD = (
    *("event_type", "time_us", "campaign_id", "ad_id", "store_id", "user_id", "impression_id", "placement"),
    *("price_micros", "currency", "user_agent"),
)
_RECORD = ("line", "is_valid", "record_id", "id_hash", "received_us", *_PAYLOAD)


@dataclass(frozen=True)
class Rules:
    """By what records are judged in place of the rules of their batches: microseconds, and a version of `campaigns`.

    Holds for batches up to version ``events_version`` of `events`.
    """

    campaigns_version: int
    earliest_us: int
    future_skew_us: int
    hour_grace_us: int
    events_version: int


@dataclass(frozen=True)
class Inputs:
    """What a recount is made of, at one moment: versions of the tables, plans of the batches, parsed files.

    ``gone`` names planned files (batch number, name) that are not there any more as they were planned.
    """

    versions: dict[str, int]
    plans: list[BatchPlan]
    states: list[str]  # of each plan: booked, pending, unfinished, unbooked or missed
    lost: frozenset[int]  # plans made anew from rows, by number
    parsed: dict[tuple[int, str], ParsedFile]
    gone: list[tuple[int, str]] = field(default_factory=list)


def read_inputs(
    settings: Settings,
    *,
    missed_as: str,
    now_us: int,
    progress: Callable[[int, int], None] | None = None,
) -> Inputs:
    """Pin the tables, read the plans, and parse what the store does not have.

    Files that were missed are taken for a batch of their own behind all others, with query id ``missed_as`` and today's rules.
    ``progress(done, total)`` is told of bytes.
    """
    versions = {table.name: DeltaLog(settings.table_uri(table.name)).latest_version() or 0 for table in PINNED}
    query = read_query(settings)
    plans = list(read_plans(settings, versions[EVENTS.name]).batches)
    booked = _booked(settings, versions[BATCH_LEDGER.name])
    landed = landed_files(settings)
    known = {(plan.query_id, plan.batch_id) for plan in plans}
    without = sorted(booked - known)
    made = _plans_of_rows(settings, versions, without, landed) if without else []
    lost = frozenset(range(len(made)))
    plans = made + plans
    missing = [] if lost else missed_files(landed, {file.name for plan in plans for file in plan.files}, query)
    states = []
    last = {plan.query_id: plan.batch_id for plan in plans}
    later = _booked(settings, None) if any((plan.query_id, plan.batch_id) not in booked for plan in plans) else booked
    for plan in plans:
        identity = (plan.query_id, plan.batch_id)
        if identity in booked:
            states.append("booked")
        elif identity in later:  # ended while the versions were pinned
            states.append("pending")
        elif plan.batch_id < last[plan.query_id] or (plan.query_id == query.query_id and plan.batch_id in query.done):
            states.append("unbooked")
        else:
            states.append("pending" if plan.query_id == query.query_id else "unfinished")
    if missing:
        files = tuple(sorted(PlannedFile(file.raw.mtime_ms, file.name, file.raw.size) for file in missing))
        rules = rules_of(settings, versions)
        limits = (now_us, rules.earliest_us, rules.future_skew_us, rules.hour_grace_us, rules.campaigns_version)
        plans.append(BatchPlan(missed_as, 0, versions[EVENTS.name] + 1, *limits, files))
        states.append("missed")
    there: dict[RawFile, list[tuple[int, str]]] = {}
    gone = []
    for number, plan in enumerate(plans):
        for file in plan.files:
            found = landed.get(file.name)
            if found is not None and (number in lost or (found.raw.mtime_ms, found.raw.size) == (file.modified_ms, file.size)):
                there.setdefault(found.raw, []).append((number, file.name))
            else:
                gone.append((number, file.name))
    parsed = {}
    for entry in ensure_parsed(settings, "events", list(there), progress):
        for place in there.pop(entry.raw):
            parsed[place] = entry
    gone += [place for places in there.values() for place in places]  # changed or vanished while it was to be parsed
    return Inputs(versions, plans, states, lost, parsed, sorted(gone))


def quoted(path: Path | str) -> str:
    """A path within quotes of SQL."""
    return str(path).replace("'", "''")


def listed(paths: Iterable[str]) -> str:
    """Paths as a list of SQL, in order."""
    return "[" + ", ".join(f"'{quoted(path)}'" for path in sorted(paths)) + "]"


def scan(settings: Settings, name: str, version: int | None) -> str:
    """SQL that reads a table at a version, None: at its newest."""
    pinned = "" if version is None else f", version = {version}"
    return f"delta_scan('{quoted(settings.table_uri(name))}'{pinned})"


def keep_table(lake: duckdb.DuckDBPyConnection, name: str, table: pa.Table, spill: Path) -> None:
    """Hold an Arrow table as a table of a DuckDB, by way of a file in ``spill``."""
    path = spill / f"{name}.parquet"  # to register the table would import pandas, which takes longer than all else
    pq.write_table(table, path)
    lake.execute(f"create or replace temp table {name} as select * from read_parquet('{quoted(path)}')")
    path.unlink()


def _booked(settings: Settings, version: int | None) -> set[tuple[str, int]]:
    """The batches of events that the ledger holds."""
    held = DeltaTable(settings.table_uri(BATCH_LEDGER.name), version=version)
    rows = held.to_pyarrow_table(columns=["stream", "_query_id", "_batch_id"])
    names = (rows[name].to_pylist() for name in ("stream", "_query_id", "_batch_id"))
    return {(query, batch) for stream, query, batch in zip(*names, strict=True) if stream == "events"}


def _plans_of_rows(
    settings: Settings, versions: dict[str, int], batches: list[tuple[str, int]], landed: dict[str, LandedFile]
) -> list[BatchPlan]:
    """Plans of batches whose own are gone: the files that their rows name, today's limits, the newest prices."""
    with connect_delta() as lake:
        lake.register("wanted", pa.table({"_query_id": [q for q, _ in batches], "_batch_id": [b for _, b in batches]}))
        found = lake.execute(
            f"""
            select _query_id, _batch_id, epoch_us(min(ingested_at)), list(distinct source_file) filter (source_file is not null),
                mode(rule_set)
            from (
                select _query_id, _batch_id, ingested_at, source_file, rule_set
                from {scan(settings, EVENTS.name, versions["events"])}
                union all
                select _query_id, _batch_id, ingested_at, source_file, null
                from {scan(settings, REJECTED_EVENTS.name, versions["rejected_events"])}
                union all
                select _query_id, _batch_id, ingested_at, null, null
                from {scan(settings, BATCH_LEDGER.name, versions["batch_ledger"])} where stream = 'events'
            ) semi join wanted using (_query_id, _batch_id)
            group by all order by 3, 1, 2
            """
        ).fetchall()
    rules = rules_of(settings, versions)
    made = []
    for number, (query_id, batch_id, ingested_us, names, rule_set) in enumerate(found):
        raws = {name: landed[name].raw for name in names or () if name in landed}
        gone = [PlannedFile(0, name, 0) for name in names or () if name not in landed]
        planned = sorted([*gone, *(PlannedFile(raw.mtime_ms, name, raw.size) for name, raw in raws.items())])
        limits = (ingested_us, rules.earliest_us, rules.future_skew_us, rules.hour_grace_us, rules.campaigns_version)
        made.append(BatchPlan(query_id, batch_id, number - len(found), *limits, tuple(planned), rule_set))
    return made


def rules_of(settings: Settings, versions: dict[str, int]) -> Rules:
    """Today's rules: the limits of the settings and the newest prices."""
    micros = settings.earliest_event_time.timestamp() * 1_000_000
    return Rules(
        campaigns_version=versions[CAMPAIGNS.name],
        earliest_us=round(micros),
        future_skew_us=round(settings.future_skew.total_seconds() * 1_000_000),
        hour_grace_us=round(settings.hour_grace.total_seconds() * 1_000_000),
        events_version=versions[EVENTS.name],
    )


class Recount:
    """The recount of ``inputs`` in a DuckDB of its own. ``count`` makes table `outcomes` of the hours that it is asked for.

    Tables: `batches` (b, identity, limits, state), `occurrences` (o, in the order of reading), `outcomes` (a row a record).
    ``rules`` override those of the hours (numbers since the epoch) that they name; ``prices`` (campaign_id, billing_model, from_us,
    to_us) are those of version FILES_VERSION, which table `campaigns` does not hold.
    """

    def __init__(
        self,
        settings: Settings,
        inputs: Inputs,
        spill: Path,
        rules: dict[int, Rules] | None = None,
        prices: pa.Table | None = None,
    ) -> None:
        self.settings = settings
        self.inputs = inputs
        self._spill = spill
        self.lake: duckdb.DuckDBPyConnection = connect_delta({"temp_directory": str(spill), "memory_limit": _MEMORY})
        self.lake.execute("set timezone = 'UTC'")
        self.lake.execute("set preserve_insertion_order = false")
        self.lake.execute(
            f"create macro hour_of(us) as coalesce((us - ((us % {HOUR_US}) + {HOUR_US}) % {HOUR_US}) // {HOUR_US}, {NO_HOUR})"
        )
        self._load_batches()
        self._load_rules(rules or {})
        self._load_prices(prices)
        self._load_trusted()
        self._traffic = TrafficJudge(self)

    def close(self) -> None:
        """Give the memory back."""
        self.lake.close()

    def scan(self, name: str) -> str:
        """SQL that reads a table at its pinned version."""
        return scan(self.settings, name, self.inputs.versions[name])

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        return self.lake.execute(sql).fetchall()

    # --- what is asked once

    def _load_batches(self) -> None:
        plans, inputs = self.inputs.plans, self.inputs
        partial = {number for number, _ in inputs.gone} | set(inputs.lost)
        batches = pa.table(
            {
                "b": pa.array(range(len(plans)), pa.int64()),
                "query_id": pa.array([plan.query_id for plan in plans], pa.string()),
                **{
                    name: pa.array([getattr(plan, name) for plan in plans], pa.int64())
                    for name in (
                        *("batch_id", "version", "ingested_us", "earliest_us", "future_skew_us", "hour_grace_us"),
                        "campaigns_version",
                    )
                },
                "rule_set": pa.array([plan.rule_set for plan in plans], pa.string()),
                "state": pa.array(inputs.states, pa.string()),
                "is_partial": pa.array([number in partial for number in range(len(plans))], pa.bool_()),
            }
        )
        places = [(number, file.name) for number, plan in enumerate(plans) for file in plan.files]
        order = {place: at for at, place in enumerate(places)}
        here = [(order[place], place[0], entry) for place, entry in inputs.parsed.items()]
        occurrences = pa.table(
            {
                "o": pa.array([o for o, _, _ in here], pa.int64()),
                "b": pa.array([b for _, b, _ in here], pa.int64()),
                "name": pa.array([entry.name for _, _, entry in here], pa.string()),
                "region": pa.array([entry.region for _, _, entry in here], pa.string()),
                "parquet": pa.array([str(entry.parquet) for _, _, entry in here], pa.string()),
                "min_us": pa.array([entry.min_us for _, _, entry in here], pa.int64()),
                "max_us": pa.array([entry.max_us for _, _, entry in here], pa.int64()),
                "has_unknown_time": pa.array([entry.has_unknown_time for _, _, entry in here], pa.bool_()),
                "records": pa.array([entry.records for _, _, entry in here], pa.int64()),
            }
        )
        gone = pa.table(
            {
                "o": pa.array([order[place] for place in inputs.gone], pa.int64()),
                "b": pa.array([place[0] for place in inputs.gone], pa.int64()),
                "name": pa.array([place[1] for place in inputs.gone], pa.string()),
            }
        )
        for name, table in (("batches", batches), ("occurrences", occurrences), ("gone", gone)):
            self.keep(name, table)

    def keep(self, name: str, table: pa.Table) -> None:
        """Hold an Arrow table as a table of this DuckDB."""
        keep_table(self.lake, name, table, self._spill)

    def _load_rules(self, rules: dict[int, Rules]) -> None:
        self.lake.execute(
            f"""
            create temp table hour_rules as
            select hour_of(epoch_us(event_hour)) as hour, arg_max(campaigns_version, set_at) as campaigns_version,
                arg_max(earliest_us, set_at) as earliest_us, arg_max(future_skew_us, set_at) as future_skew_us,
                arg_max(hour_grace_us, set_at) as hour_grace_us, arg_max(events_version, set_at) as events_version
            from {self.scan(HOUR_RULES.name)} group by all
            """
        )
        for hour, rule in rules.items():
            self.lake.execute(f"delete from hour_rules where hour = {hour}")
            self.lake.execute(
                "insert into hour_rules values (?, ?, ?, ?, ?, ?)",
                [hour, rule.campaigns_version, rule.earliest_us, rule.future_skew_us, rule.hour_grace_us, rule.events_version],
            )

    def _load_prices(self, prices: pa.Table | None) -> None:
        self.lake.execute(
            "create temp table prices (version bigint, campaign_id varchar, billing_model varchar, from_us bigint, to_us bigint)"
        )
        if prices is not None:
            self.keep("given_prices", prices)
            self.lake.execute(
                f"insert into prices select {FILES_VERSION}, campaign_id, billing_model, from_us, to_us from given_prices"
            )
        used = "select campaigns_version from batches union select campaigns_version from hour_rules"
        for (version,) in self.rows(f"select * from ({used}) where campaigns_version != {FILES_VERSION}"):
            self.lake.execute(
                f"""
                insert into prices select {version}, campaign_id, billing_model, epoch_us(valid_from),
                    coalesce(epoch_us(valid_to), {2**62}) from {scan(self.settings, CAMPAIGNS.name, version)}
                """
            )

    def _load_trusted(self) -> None:
        """Rows of files that are gone stand for what they say themselves: nothing is taken back because the raw input is gone."""
        batch = """
            join batches on _query_id = query_id and _batch_id = batch_id join gone on gone.b = batches.b and name = source_file
        """
        limit = "" if self.inputs.gone else " limit 0"
        events, rejects = (f"(from {self.scan(table.name)}{limit})" for table in (EVENTS, REJECTED_EVENTS))
        self.lake.execute(
            f"""
            create temp table trusted as
            select o, gone.b as b, name, region, source_line as line, true as is_valid, event_id as record_id,
                null::ubigint as id_hash, epoch_us(received_at) as received_us, event_type, epoch_us(event_time) as time_us,
                campaign_id, ad_id, store_id, user_id, impression_id, placement, price_micros, currency, user_agent,
                'accepted' as outcome, billing_model, is_late,
                coalesce(spend_nanos, 0) + coalesce(invalid_spend_nanos, 0) as spend_nanos,
                invalid_traffic_rule, invalid_traffic_rules, e.rule_set
            from {events} e {batch}
            union all by name
            select o, gone.b as b, name, region, source_line as line, false as is_valid, record_id,
                epoch_us(record_time) as time_us, outcome
            from {rejects} {batch}
            """
        )
        ids = [name for (name,) in self.rows("select distinct record_id from trusted where is_valid")]
        hashes = [xxh3_64_intdigest(name.encode()) for name in ids]
        self.keep("trusted_ids", pa.table({"record_id": pa.array(ids, pa.string()), "id_hash": pa.array(hashes, pa.uint64())}))
        self.lake.execute("update trusted set id_hash = i.id_hash from trusted_ids i where i.record_id = trusted.record_id")

    def all_files(self) -> list[str]:
        """What the store has of all planned files."""
        return sorted({str(entry.parquet) for entry in self.inputs.parsed.values()})

    def records_by_hour(self, hours: Collection[int] | None = None) -> dict[int, int]:
        """How many records each hour (of ``hours``, None: of all) has in the parsed files, however often they were taken."""
        files = self.all_files() if hours is None else self._files_of(hours)
        if not files:
            return {}
        where = "true" if hours is None else self.within("time_us", hours)
        found = self.rows(
            f"select hour_of(time_us) as hour, count(*) from read_parquet({listed(files)}) where {where} group by hour"
        )
        return {hour: records for hour, records in found if hours is None or hour in hours}

    def hours_of_batch(self, number: int) -> set[int]:
        """The hours that the records of a batch lie in."""
        files = {str(entry.parquet) for (b, _), entry in self.inputs.parsed.items() if b == number}
        if not files:
            return set()
        return {hour for (hour,) in self.rows(f"select distinct hour_of(time_us) from read_parquet({listed(files)})")}

    # --- what is asked for hours

    def _files_of(self, hours: Collection[int]) -> list[str]:
        known = [hour for hour in hours if hour != NO_HOUR]
        low, high = (min(known) * HOUR_US, (max(known) + 1) * HOUR_US) if known else (0, 0)
        return sorted(
            {
                str(entry.parquet)
                for entry in self.inputs.parsed.values()
                if (entry.min_us is not None and entry.max_us is not None and entry.min_us < high and entry.max_us >= low)
                or (NO_HOUR in hours and entry.has_unknown_time)
            }
        )

    def count(self, hours: Collection[int]) -> None:
        """Make table `outcomes`: each record of ``hours`` with its outcome, its price and whether it is late.

        Columns: o, b, name, region, line, hour, record_id, received_us (never null of a valid record), the payload, outcome
        (accepted, duplicate, conflict, rejected), holder_o and holder_line (the record that holds the id), billing_model,
        spend_nanos, invalid_spend_nanos, is_late, invalid_traffic_rule, invalid_traffic_rules, rule_set.
        """
        asked, hours = hours, self._traffic.wide(hours)
        self.keep("hours", pa.table({"hour": pa.array(sorted(hours), pa.int64())}))
        self._judge("judged", self._files_of(hours), self.within("time_us", hours), "r.hour in (from hours)")
        self.lake.execute("create or replace temp table ids as select distinct id_hash from judged where is_ok")
        files = self.all_files()
        elsewhere = "hour_of(time_us) not in (from hours) and id_hash in (from ids)"
        raw = f"union all select id_hash from read_parquet({listed(files)}, filename = true) join occurrences on parquet = filename"
        self.lake.execute(
            f"""
            create or replace temp table suspects as select id_hash from (
                select id_hash from judged where is_ok
                {f"{raw} where is_valid and {elsewhere}" if files else ""}
                union all select id_hash from trusted where {elsewhere}
            ) group by id_hash having count(*) > 1
            """
        )
        self._judge("others", files, "r.id_hash in (from suspects)", "r.hour not in (from hours) and r.id_hash in (from suspects)")
        self._decide()
        self._traffic.judge(asked)
        self._mark()
        self.keep("hours", pa.table({"hour": pa.array(sorted(asked), pa.int64())}))
        self.lake.execute("insert into others by name select * from judged where hour not in (from hours)")

    @staticmethod
    def within(column: str, hours: Collection[int]) -> str:
        """A condition that bounds a column of microseconds, for statistics to prune by; exact only with the hour beside it."""
        known = [hour for hour in hours if hour != NO_HOUR]
        bounds = f"{column} >= {min(known) * HOUR_US} and {column} < {(max(known) + 1) * HOUR_US}" if known else "false"
        return f"(({bounds}) or {column} is null)" if NO_HOUR in hours else f"({bounds})"

    def _judge(self, target: str, files: list[str], pushed: str, where: str) -> None:
        """Records by the limits that hold for them, with the rules that they are priced by."""
        columns = ", ".join(f"r.{name}" for name in _RECORD)
        if files:
            source = f"""
                select o, b, name, region, {columns}, null as outcome, hour_of(r.time_us) as hour, null as billing_model,
                    null::bigint as spend_nanos, null::boolean as is_late, null as invalid_traffic_rule,
                    null::varchar[] as invalid_traffic_rules, null as rule_set
                from read_parquet({listed(files)}, filename = true) r join occurrences on parquet = filename where {pushed}
                union all by name
            """
        else:
            source = ""
        self.lake.execute(
            f"""
            create or replace temp table {target} as
            select r.* exclude (received_us), coalesce(r.received_us, ingested_us) as received_us,
                outcome is not null as is_trusted,
                case when outcome is not null then outcome = 'accepted'
                    else is_valid and time_us >= coalesce(h.earliest_us, batches.earliest_us)
                        and time_us <= coalesce(r.received_us, ingested_us) + coalesce(h.future_skew_us, batches.future_skew_us)
                end as is_ok,
                coalesce(h.hour_grace_us, batches.hour_grace_us) as grace_us,
                coalesce(h.campaigns_version, batches.campaigns_version) as price_version
            from (
                {source} select *, hour_of(time_us) as hour from trusted
            ) r join batches using (b) left join hour_rules h on h.hour = r.hour and batches.version <= h.events_version
            where {where}
            """
        )

    def _decide(self) -> None:
        same = " and ".join(f"r.{name} is not distinct from first.{name}" for name in _PAYLOAD)
        ranked = ", ".join(("o", "line", "record_id", "is_trusted", "outcome", *_PAYLOAD))
        self.lake.execute(
            f"""
            create or replace temp table ranked as
            select {ranked} from judged where is_ok and id_hash in (from suspects)
            union all select {ranked} from others where is_ok
            """
        )
        self.lake.execute(
            f"""
            create or replace temp table settled as
            select r.o, r.line, first.o as holder_o, first.line as holder_line, case
                when r.o = first.o and r.line = first.line then 'accepted' when {same} then 'duplicate' else 'conflict' end as told
            from ranked r join (
                select * from ranked qualify row_number() over (partition by record_id order by o, line) = 1
            ) first using (record_id)
            """
        )
        self.lake.execute(
            f"""
            create or replace temp table counted as
            select r.o, r.b, r.name, r.region, r.line, r.hour, r.record_id, r.received_us, {", ".join(f"r.{n}" for n in _PAYLOAD)},
                case when is_trusted then outcome when not is_ok then 'rejected' else coalesce(told, 'accepted') end as outcome,
                is_trusted, is_valid, holder_o, holder_line, r.invalid_traffic_rule, r.invalid_traffic_rules, r.rule_set,
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
        """Table `outcomes`: what was counted of the hours asked, with the marks of invalid traffic and what is billed."""
        rule = "if(c.is_trusted, c.invalid_traffic_rule, marks.rule)"
        self.lake.execute(
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
