"""The review: judges all events of an hour by all rules of invalid traffic, and restates what differs, with its money.

The ingest judges a record by its own fields. Repeats, unmatched clicks and click rates need the events around it, in whatever order
they arrived, so the review judges whole hours and the hours that the rules look back to. It reviews an hour again if more events
arrive. An hour keeps the rules of its first review; only a backfill changes them (docs/decisions/0007). The review needs no Spark.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.config import Settings
from spark_jobs.corrections.run import Run, correcting, groups_of_hours, increment_rows, restate, writing
from spark_jobs.corrections.write_ahead import Correction, TableChange, carry_out, has_unfinished, write_ahead
from spark_jobs.ingest.event_columns import METRIC_KEYS, METRIC_MEASURES
from spark_jobs.ingest.kafka.ranges import PREFIX
from spark_jobs.lake.duck import keep_table, literal, translate_duckdb_errors
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.scratch import scratch_folder
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, MINUTE_METRICS, TRAFFIC_REVIEWS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.rules.exempt import is_exempt_sql
from spark_jobs.traffic.rules import BITS, InvalidTrafficRules, Mode, judge_of, keep_rules, marks, rules_of
from spark_jobs.units import EPOCH, HOUR, HOUR_US, MINUTE_US, SECOND_US, HourRange, hour_number

_EVENTS_AT_ONCE = 750_000  # judged at a time, because an ingest waits meanwhile
_GAP_HOURS = 7 * 24  # hours with a larger gap between them are read separately
_MEMORY = "1200MB"
_BATCH = ("_query_id", "_batch_id")  # a batch's identity


@dataclass(frozen=True)
class ReviewedHour:
    """An hour that was reviewed: its events, how many are invalid now, and how many have other marks than before.

    ``rewritten``: how many events got other marks, another rule set or another price. ``spend_nanos_change`` is the change of its
    billable spend; a credit is negative.
    """

    event_hour: datetime
    events: int
    invalid: int
    changed: int
    rewritten: int
    spend_nanos_change: int
    rule_set: str


@dataclass(frozen=True)
class ReviewReport:
    """A review. It does not list the hours that were up to date."""

    run_id: str
    hours: list[ReviewedHour]
    seconds: float


class _Review(NamedTuple):
    """The last review of an hour. There is one for each hour of the history, so it is cheap to make."""

    rule_set: str
    inputs: int
    reviewed_us: int


@dataclass(frozen=True)
class _State:
    """The state of the tables at one moment. Hours are numbers since the epoch.

    ``versions``: those of the tables that it was read from, or older ones. ``judged_version``: all batches in `events` up to this
    version have ended. ``accepted``: their accepted events, by hour; ``batches``: their identities, as columns ``_query_id`` and
    ``_batch_id``.
    """

    versions: tuple[int | None, ...]
    events_version: int
    judged_version: int
    accepted: Counter[int]
    batches: pa.Table
    reviews: dict[int, _Review]

    def inputs(self, hour: int, rules: InvalidTrafficRules) -> int:
        """The number of accepted events that a review of the hour reads."""
        return sum(self.accepted[at] for at in range(hour - rules.look_back_hours, hour + 1))


def review(
    settings: Settings,
    hours: HourRange | None = None,
    *,
    run_id: str | None = None,
    now: datetime | None = None,
    progress: Callable[[str], None] | None = None,
) -> ReviewReport:
    """Review the hours (of ``hours``, None: all) whose review is missing or out of date.

    An ingest may run meanwhile: it waits while a group of hours is corrected. A second run changes nothing; the next run finishes a
    killed one. Raises RuleFileError for invalid rules, TableCorruptionError
    if a table cannot be read.
    """
    started = time.monotonic()
    run_id = run_id or uuid.uuid4().hex
    wanted = None if hours is None else {hour_number(hour) for hour in hours}
    done: list[ReviewedHour] = []
    lake = Lake(settings)
    with translate_duckdb_errors(settings.home_path):
        state = _read_state(lake)
        if has_unfinished(settings) or _outdated(settings, state, wanted):
            ensure_tables(settings)
            with correcting(settings):
                run = Run(run_id, "review", "invalid traffic", now or datetime.now(UTC))
                state = _read_state(lake, state)
                outdated = _outdated(settings, state, wanted)
                fresh = keep_rules(settings, run.now) if any(hour not in state.reviews for hour in outdated) else ""
                sets = {hour: state.reviews[hour].rule_set if hour in state.reviews else fresh for hour in outdated}
                done = _review_groups(lake, state, sets, run, progress or (lambda _: None))
    return ReviewReport(run_id, done, time.monotonic() - started)


def review_anew(settings: Settings, hours: Collection[int], run: Run, say: Callable[[str], None]) -> list[ReviewedHour]:
    """Judge ``hours`` by today's rules, whatever rules reviewed them, and again the later hours that look back to them.

    The caller holds the corrections lock.
    """
    with translate_duckdb_errors(settings.home_path):
        lake = Lake(settings)
        state = _read_state(lake)
        rule_set = keep_rules(settings, run.now)
        sets = {hour: rule_set for hour in hours if state.accepted[hour] or hour in state.reviews}
        for hour, last in state.reviews.items():
            reach = rules_of(settings, last.rule_set).look_back_hours if hour not in sets else 0
            if any(before in hours for before in range(hour - reach, hour)):
                sets[hour] = last.rule_set
        return _review_groups(lake, state, sets, run, say)


# --- the state of the tables


def _read_state(lake: Lake, known: _State | None = None) -> _State:
    """Read the state of the tables, unless ``known`` was read from the versions that are the newest."""
    versions = tuple(lake.version(table) for table in (BATCH_LEDGER, EVENTS, TRAFFIC_REVIEWS))
    if known is not None and known.versions == versions:
        return known
    # The ledger first: the versions that are read after it have every batch that it has.
    ledger = lake.rows(BATCH_LEDGER, "stream", *_BATCH, "event_hour", "accepted")
    ledger = ledger.filter(pc.equal(ledger["stream"], "events"))
    log = lake.log(EVENTS)
    version = log.latest_version() or 0
    reviewed = lake.rows(TRAFFIC_REVIEWS, "event_hour", "rule_set", "inputs", "reviewed_at", "events_version")
    # Every batch up to the last review's version was in the ledger at that time, so only later commits are read.
    seen = pc.max(reviewed.filter(pc.less_equal(reviewed["events_version"], version))["events_version"]).as_py()
    later = _batches(log, range((-1 if seen is None else seen) + 1, version + 1)) if ledger.num_rows else {}
    among = ledger.filter(pc.is_in(ledger["_batch_id"], value_set=pa.array([batch for _, batch in later], pa.int64())))
    booked = set(zip(*(among[name].to_pylist() for name in _BATCH), strict=True))
    judged = min((at for batch, at in later.items() if batch not in booked), default=version + 1) - 1
    for query, batch in (batch for batch, at in later.items() if at > judged):
        ledger = ledger.filter(pc.invert(pc.and_(pc.equal(ledger["_query_id"], query), pc.equal(ledger["_batch_id"], batch))))
    counted = ledger.filter(pc.and_(ledger["event_hour"].is_valid(), pc.not_equal(ledger["accepted"], 0)))
    sums = (
        pa.table({"hour": _hour_numbers(counted), "accepted": counted["accepted"]})
        .group_by("hour")
        .aggregate([("accepted", "sum")])
    )
    accepted = Counter(dict(zip(sums["hour"].to_pylist(), sums["accepted_sum"].to_pylist(), strict=True)))
    newest = reviewed.take(pc.sort_indices(reviewed["reviewed_at"]))  # the last one of an hour wins
    times = newest["reviewed_at"].cast(pa.int64())
    of_hours, *columns = (column.to_pylist() for column in (_hour_numbers(newest), newest["rule_set"], newest["inputs"], times))
    reviews = dict(zip(of_hours, map(_Review, *columns), strict=True))
    return _State(versions, version, judged, accepted, ledger.group_by(list(_BATCH)).aggregate([]), reviews)


def _hour_numbers(rows: pa.Table) -> pa.ChunkedArray:
    """Return the hours of ``event_hour`` as numbers since the epoch."""
    return pa.chunked_array([np.floor_divide(rows["event_hour"].cast(pa.int64()).to_numpy(), HOUR_US)])


def _batches(log: DeltaLog, versions: range) -> dict[tuple[str, int], int]:
    """The batches that the ``versions`` committed, and the first version of each. Only a batch's commit has limits."""
    found: dict[tuple[str, int], int] = {}
    for version in versions:
        commit = log.commit(version)
        if commit is not None and "limits" in commit.metadata:
            found.setdefault((str(commit.metadata["query_id"]), int(commit.metadata["batch_id"])), version)
    return found


def _outdated(settings: Settings, state: _State, wanted: Collection[int] | None) -> list[int]:
    """Return the hours (of ``wanted``, None: all) whose review is missing or has not seen all events that it reads."""
    look_back = {name: rules_of(settings, name).look_back_hours for name in {last.rule_set for last in state.reviews.values()}}
    hours = np.array(sorted(state.accepted.keys() | state.reviews.keys()), dtype=np.int64)
    before = np.concatenate([[0], np.cumsum([state.accepted[hour] for hour in hours.tolist()], dtype=np.int64)])  # each hour
    chosen = hours if wanted is None else hours[np.isin(hours, list(wanted))]
    lasts = [state.reviews.get(hour) for hour in chosen.tolist()]
    reach = np.array([0 if last is None else look_back[last.rule_set] for last in lasts], dtype=np.int64)
    inputs = before[np.searchsorted(hours, chosen, "right")] - before[np.searchsorted(hours, chosen - reach)]  # as `inputs` says
    found = zip(chosen.tolist(), lasts, inputs.tolist(), strict=True)
    return [hour for hour, last, events in found if last is None or events != last.inputs]


# --- judging


def _review_groups(lake: Lake, state: _State, sets: dict[int, str], run: Run, say: Callable[[str], None]) -> list[ReviewedHour]:
    """Review hours by their rule sets, ``sets``, a group of hours at a time."""
    settings = lake.settings
    done: list[ReviewedHour] = []
    for rule_set in sorted(set(sets.values())):
        rules = rules_of(settings, rule_set)
        own = [hour for hour, name in sets.items() if name == rule_set]
        for hours in groups_of_hours(own, state.accepted, _EVENTS_AT_ONCE, gap_hours=_GAP_HOURS):
            say(f"reviewing hours: {len(done)} of {len(sets)}")
            with writing(settings):
                one = replace(run, token=uuid.uuid4().hex, rule_set=rule_set)
                state = _read_state(lake, state)
                correction, reviewed = _decide(lake, state, rule_set, rules, hours, one)
                if correction.changes:
                    write_ahead(settings, correction)
                    carry_out(settings, correction)
            done += reviewed
    return sorted(done, key=lambda hour: hour.event_hour)


def _decide(
    lake: Lake, state: _State, rule_set: str, rules: InvalidTrafficRules, hours: list[int], run: Run
) -> tuple[Correction, list[ReviewedHour]]:
    with scratch_folder(lake.settings, "review-") as spill, lake.database(memory=_MEMORY) as database:
        database.execute("set preserve_insertion_order = false")
        _judge(database, lake.scan(EVENTS, state.events_version), state, rule_set, rules, hours, spill)
        sums = {hour: rest for hour, *rest in database.execute(_SUMS).fetchall()}
        reviewed = [ReviewedHour(EPOCH + hour * HOUR, *(*sums.get(hour, [0] * 5), rule_set)) for hour in hours]
        changes = [
            _events_change(database, run),
            _metrics_change(database, run),
            _ledger_change(lake, database, run),
            _restatements_change(database, run),
            _reviews_change(state, rules, run, reviewed),
        ]
    changes = [one for one in changes if not one.is_empty]
    return Correction(run.token, run.run_id, state.events_version, changes, act=run.act(changes)), reviewed


_SUMS = """
    select hour, count(*), count(*) filter (new_rule is not null),
        count(*) filter (old_rule is distinct from new_rule or old_rules is distinct from new_rules), count(*) filter (is_changed),
        coalesce(sum(new_spend - old_spend), 0)
    from judged group by hour
"""


def _judge(
    database: duckdb.DuckDBPyConnection,
    events: str,
    state: _State,
    rule_set: str,
    rules: InvalidTrafficRules,
    hours: list[int],
    spill: Path,
) -> None:
    """Make the tables `judged` and `changed` from ``events`` (SQL).

    `judged` has each event of the hours with the rules that hit it and its old and new marks. `changed` has the rows of `events`
    whose marks change.
    """
    wide = {at for hour in hours for at in range(hour - rules.look_back_hours, hour + 1)}
    keep_table(database, "hours", pa.table({"hour": pa.array(hours, pa.int64())}), spill)
    keep_table(database, "wide", pa.table({"hour": pa.array(sorted(wide), pa.int64())}), spill)
    keep_table(database, "batches", state.batches, spill)
    first, last = min(wide) // 24, max(wide) // 24
    database.execute(
        f"""
        create temp view table_rows as
        select *, (epoch(event_date)::bigint // 3600 + event_hour) as hour
        from {events} semi join batches using (_query_id, _batch_id)
        where event_date between date '1970-01-01' + {first} and date '1970-01-01' + {last};
        create temp table seen as
        select event_id, event_type, epoch_us(event_time) as time_us, user_id, ad_id, impression_id, hour,
            if(hour in (from hours), user_agent, null) as user_agent, hour in (from hours) as is_asked,
            {is_exempt_sql(rules.exempt_users)} as is_exempt,
            invalid_traffic_rule as old_rule, invalid_traffic_rules as old_rules, rule_set as old_rule_set,
            coalesce(spend_nanos, 0) as old_spend, coalesce(invalid_spend_nanos, 0) as old_invalid_spend
        from table_rows where hour in (from wide)
        """
    )
    code = " | ".join([_record_code(database, rules, spill), *_activity_codes(database, rules)])
    database.execute(f"create temp table coded as select * from (select *, {code} as code from seen) where is_asked")
    codes = database.execute("select distinct code from coded").to_arrow_table()["code"].combine_chunks().cast(pa.int64())
    rule, hits = marks(codes.to_numpy(zero_copy_only=False), rules)
    keep_table(database, "verdicts", pa.table({"code": codes, "new_rule": rule, "new_rules": hits}), spill)
    database.execute(
        """
        create temp table judged as
        select *, old_rule is distinct from new_rule or old_rules is distinct from new_rules or old_rule_set is distinct from ?
            or old_spend != new_spend or old_invalid_spend != new_invalid_spend as is_changed
        from (
            select *, if(new_rule is null, old_spend + old_invalid_spend, 0) as new_spend,
                if(new_rule is null, 0, old_spend + old_invalid_spend) as new_invalid_spend
            from coded join verdicts using (code)
        )
        """,
        [rule_set],
    )
    database.execute(
        """
        create temp table changed as
        select r.*, new_rule, new_rules, new_spend, new_invalid_spend, old_spend, old_invalid_spend, old_rule
        from table_rows r join (
            select distinct on (event_id) event_id, new_rule, new_rules, new_spend, new_invalid_spend, old_spend,
                old_invalid_spend, old_rule
            from judged semi join (select event_id from judged where is_changed) using (event_id) order by event_id, code
        ) using (event_id) where hour in (from hours)
        """
    )


def _record_code(database: duckdb.DuckDBPyConnection, rules: InvalidTrafficRules, spill: Path) -> str:
    """Return SQL for the rules that need no other record. The judge looks once at each distinct user agent and user."""
    judge = judge_of(rules)
    kinds = []
    for column in ("user_agent", "user_id") if judge.looks_at_users else ("user_agent",):
        found = database.execute(f"select distinct {column} from seen where is_asked and {column} is not null").to_arrow_table()
        nulls = pa.nulls(found.num_rows, pa.string())
        values = pa.table({"user_agent": nulls, "user_id": nulls, column: found[column].cast(pa.string())})
        keep_table(database, f"of_{column}", pa.table({"value": values[column], "code": pa.array(judge.codes(values))}), spill)
        database.execute(f"delete from of_{column} where code = 0")
        kinds.append(f"coalesce((select code from of_{column} o where o.value = seen.{column}), 0)")
    return " | ".join(kinds)


def _activity_codes(database: duckdb.DuckDBPyConnection, rules: InvalidTrafficRules) -> Iterator[str]:
    """Yield SQL for each rule that looks at other events. Events are ordered by (event_time, event_id)."""
    for kind in ("click", "impression"):
        name = f"repeat_{kind}"
        if rules.mode(name) is not Mode.OFF:
            window_us = getattr(rules, name).window_seconds * SECOND_US
            before = "lag(time_us) over (partition by user_id, ad_id, event_type order by time_us, event_id)"
            is_repeat = f"coalesce(time_us - {before} < {window_us}, false)"
            yield f"if(event_type = '{kind}' and not is_exempt and {is_repeat}, {BITS[name]}, 0)"
    if rules.unmatched_click.mode is not Mode.OFF:
        window_us = rules.unmatched_click.window_seconds * SECOND_US
        database.execute(
            f"""
            create temp table matched as
            select distinct c.event_id from seen c join seen i on i.event_id = c.impression_id
                and i.user_id = c.user_id and i.ad_id = c.ad_id
            where c.is_asked and c.event_type = 'click' and i.event_type = 'impression'
                and c.time_us - i.time_us between 0 and {window_us}
            """
        )
        yield f"if(event_type = 'click' and event_id not in (from matched), {BITS['unmatched_click']}, 0)"
    if rules.click_rate.mode is not Mode.OFF:
        clicks = "count(*) filter (event_type = 'click') over (partition by user_id, hour)"
        yield f"if(event_type = 'click' and not is_exempt and {clicks} > {rules.click_rate.clicks}, {BITS['click_rate']}, 0)"


# --- the changes of the tables


def _events_change(database: duckdb.DuckDBPyConnection, run: Run) -> TableChange:
    new = {
        "spend_nanos": "new_spend",
        "invalid_spend_nanos": "new_invalid_spend",
        "invalid_traffic_rule": "new_rule",
        "invalid_traffic_rules": "new_rules",
        "rule_set": literal(run.rule_set),
        "_run_id": literal(run.run_id),
    }
    columns = ", ".join(f"{new.get(name, name)} as {name}" for name in EVENTS.schema.names)
    add = database.execute(f"select {columns} from changed").to_arrow_table().cast(EVENTS.schema)
    metadata = {"correction": {"run_id": run.run_id, "kind": run.kind}, "keys": "kept"}
    return TableChange(EVENTS, add.select([*EVENTS.key, *EVENTS.partition_by]), add, metadata, by_key=True)


def _difference(measure: str) -> str:
    """Return SQL for the change of a measure, summed over rows of `changed`."""
    if measure == "spend_nanos":
        return "sum(new_spend - old_spend) as spend_nanos"
    if measure == "invalid_spend_nanos":
        return "sum(new_invalid_spend - old_invalid_spend) as invalid_spend_nanos"
    side = "" if measure.startswith("invalid_") else "-"
    kind = measure.removeprefix("invalid_").removesuffix("s")
    flip = "(new_rule is not null)::int - (old_rule is not null)::int"
    return f"coalesce(sum({side}({flip})) filter (event_type = '{kind}'), 0)::bigint as {measure}"


_DIFFERENCES = ", ".join(_difference(name) for name in METRIC_MEASURES)
_FLIPPED = "(new_rule is null) != (old_rule is null) or new_spend != old_spend or new_invalid_spend != old_invalid_spend"


def _metrics_change(database: duckdb.DuckDBPyConnection, run: Run) -> TableChange:
    sums = database.execute(
        f"""
        select _query_id, _batch_id, epoch_us(event_time) // {MINUTE_US} * {MINUTE_US} as event_minute_us,
            {", ".join(METRIC_KEYS[1:])}, {_DIFFERENCES}
        from changed where {_FLIPPED} group by all
        having {" or ".join(f"{name} != 0" for name in METRIC_MEASURES)}
        """
    ).to_arrow_table()
    return TableChange.append(MINUTE_METRICS, increment_rows(sums, run))


def _ledger_change(lake: Lake, database: duckdb.DuckDBPyConnection, run: Run) -> TableChange:
    """Add the changes per batch and hour. A run has one row per cell: the sum replaces a row that it wrote before.

    The region of a topic's batch is its cluster.
    """
    rows = database.execute(
        f"""
        select _query_id, _batch_id, if(starts_with(source_file, '{PREFIX}/'), 'kafka', 'files') as source,
            if(starts_with(source_file, '{PREFIX}/'), split_part(source_file, '/', 2), region) as booked_in, hour,
            sum((new_rule is not null)::int - (old_rule is not null)::int)::bigint as invalid,
            sum(new_spend - old_spend) as spend, any_value(ingested_at) as ingested_at
        from changed where {_FLIPPED} group by all having invalid != 0 or spend != 0
        """
    ).fetchall()
    written: dict[tuple[object, ...], dict[str, Any]] = {}
    if rows:
        of_run = lake.pin(BATCH_LEDGER).rows(BATCH_LEDGER, where_in=("_run_id", pa.array([run.run_id])))
        written = {tuple(row[name] for name in BATCH_LEDGER.key): row for row in of_run.to_pylist()}
    counts = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced")
    remove, add = [], []
    for query_id, batch_id, source, region, hour, invalid, spend, ingested_at in rows:
        row: dict[str, Any] = {
            "stream": "events",
            "source": source,
            "region": region,
            "event_hour": EPOCH + hour * HOUR,
            **dict.fromkeys(counts, 0),
            "invalid_traffic": invalid,
            "spend_nanos": spend,
            "ingested_at": ingested_at,
            "_query_id": query_id,
            "_batch_id": batch_id,
            "_run_id": run.run_id,
        }
        before = written.get(tuple(row[name] for name in BATCH_LEDGER.key))
        if before is not None:
            remove.append(before)
            row |= {name: before[name] for name in counts}
            row |= {name: int(before[name] or 0) + int(row[name]) for name in ("invalid_traffic", "spend_nanos")}
        add.append(row)
    return TableChange(BATCH_LEDGER, *(pa.Table.from_pylist(part, BATCH_LEDGER.schema) for part in (remove, add)))


def _restatements_change(database: duckdb.DuckDBPyConnection, run: Run) -> TableChange:
    """Explain the changes of the increments, per hour, region, campaign, currency and the rule that hits now, or hit before."""
    rows = database.execute(
        f"""
        select hour * {HOUR_US} as event_hour, region, campaign_id, currency, coalesce(new_rule, old_rule) as cause, {_DIFFERENCES}
        from changed where {_FLIPPED} group by all
        """
    )
    return restate(rows.to_arrow_table(), run)


def _reviews_change(state: _State, rules: InvalidTrafficRules, run: Run, hours: list[ReviewedHour]) -> TableChange:
    """Add a row per hour, except for hours whose last row says the same."""
    rows = []
    for done in hours:
        last = state.reviews.get(hour_number(done.event_hour))
        inputs = state.inputs(hour_number(done.event_hour), rules)
        if last is not None and not done.rewritten and (last.rule_set, last.inputs) == (done.rule_set, inputs):
            continue
        rows.append(
            {
                "run_id": run.run_id,
                "event_hour": done.event_hour,
                "rule_set": done.rule_set,
                "events_version": state.judged_version,
                "inputs": inputs,
                "events": done.events,
                "invalid": done.invalid,
                "changed": done.changed,
                # the newest one wins, whatever the clock says
                "reviewed_at": run.now if last is None else max(run.now, EPOCH + timedelta(microseconds=last.reviewed_us + 1)),
            }
        )
    return TableChange.append(TRAFFIC_REVIEWS, rows)
