"""Columns that a valid event or order gets, and the increments that accepted events make."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.ingest.contract.spec import Contract, Limits
from spark_jobs.ingest.dedupe.keys import hash_keys
from spark_jobs.lake.duck import literal, query_arrow
from spark_jobs.lake.tables import MINUTE_METRICS
from spark_jobs.traffic.rules import InvalidTrafficRules, judge_of, marks
from spark_jobs.units import HOUR_US

CAMPAIGN_SCHEMA = pa.schema(
    [
        ("priced_campaign_id", pa.string()),
        ("billing_model", pa.string()),
        ("valid_from_us", pa.int64()),
        ("valid_to_us", pa.int64()),
    ]
)

METRIC_KEYS = ("event_minute_us", "region", "campaign_id", "ad_id", "store_id", "placement", "currency")
METRIC_MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")
INCREMENT_SCHEMA = pa.schema(
    [
        ("event_minute_us", pa.int64()),
        *((n, pa.string()) for n in METRIC_KEYS[1:]),
        *((n, MINUTE_METRICS.schema.field(n).type) for n in METRIC_MEASURES),
    ]
)


def enrich(valid: pa.Table, contract: Contract, limits: Limits, campaigns: pa.Table, rules: InvalidTrafficRules) -> pa.Table:
    """Adds to parsed rows: hour_us, is_late, key_low, key_high, fingerprint (uint64) and, for events, the price and
    the marks of invalid traffic: an invalid event costs nothing (spend_nanos), its price stands in invalid_spend_nanos.

    received_at is filled with the time of ingestion. Late: received when the event's hour had ended at least the grace ago.
    """
    times = valid[contract.time_field].to_numpy()
    received = pc.fill_null(valid["received_at"], pa.scalar(limits.ingested_us, pa.int64()))
    hours = times - times % HOUR_US  # never negative: the earliest accepted time is behind the epoch
    late = received.to_numpy() >= hours + (HOUR_US + limits.hour_grace_us)
    made = valid.set_column(valid.schema.get_field_index("received_at"), "received_at", received)
    for name, column in (("hour_us", pa.array(hours)), ("is_late", pa.array(late))):
        made = made.append_column(name, column)
    keys = hash_keys(valid, contract)
    for name in keys.column_names:
        made = made.append_column(name, keys[name])
    if contract.stream == "events":
        billing_model, cost = price(valid, campaigns)
        rule, hits = marks(judge_of(rules).codes(valid), rules)
        billable = rule.is_null()
        for name, column in (
            ("billing_model", billing_model),
            ("spend_nanos", pc.if_else(billable, cost, 0)),
            ("invalid_spend_nanos", pc.if_else(billable, 0, cost)),
            ("invalid_traffic_rule", rule),
            ("invalid_traffic_rules", hits),
        ):
            made = made.append_column(name, column)
    return made.combine_chunks()


def price(events: pa.Table, campaigns: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Billing model (null: no campaign row covers the event) and cost in nanos of each event.

    ``campaigns`` has CAMPAIGN_SCHEMA, valid_to_us null when open; the ranges of a campaign do not overlap. A cpc click costs
    price_micros * 1000 nanos, a cpm impression price_micros nanos (a thousandth of the price of a thousand), all else nothing.
    """
    rows = events.num_rows
    if not campaigns.num_rows:
        return pa.nulls(rows, pa.string()), pa.array(np.zeros(rows, dtype=np.int64))
    ranges = campaigns.sort_by([("priced_campaign_id", "ascending"), ("valid_from_us", "ascending")])
    starts_at = ranges["valid_from_us"].to_numpy()
    ends_at = pc.fill_null(ranges["valid_to_us"], np.iinfo(np.int64).max).to_numpy()
    names = ranges["priced_campaign_id"].combine_chunks()
    known = pc.unique(names)
    first = pc.index_in(known, value_set=names).to_numpy()
    counts = np.diff(np.append(first, len(names)))
    campaign = pc.fill_null(pc.index_in(events["campaign_id"], value_set=known), -1).to_numpy()
    times = events["event_time"].to_numpy()
    chosen = np.full(rows, -1, dtype=np.int64)
    for nth in range(int(counts.max())):
        candidate = first[campaign] + nth
        candidate[(campaign < 0) | (nth >= counts[campaign])] = 0
        fits = (campaign >= 0) & (nth < counts[campaign]) & (times >= starts_at[candidate]) & (times < ends_at[candidate])
        chosen[fits] = candidate[fits]
    billing_model = pc.take(ranges["billing_model"].combine_chunks(), pa.array(chosen, mask=chosen < 0))
    prices = events["price_micros"].to_numpy()
    click = pc.equal(events["event_type"], "click").to_numpy()
    cpc = pc.fill_null(pc.equal(billing_model, "cpc"), False).to_numpy(zero_copy_only=False)
    cpm = pc.fill_null(pc.equal(billing_model, "cpm"), False).to_numpy(zero_copy_only=False)
    spend = np.where(click & cpc, prices * 1000, np.where(~click & cpm, prices, 0)).astype(np.int64)
    return billing_model, pa.array(spend)


def increments(events: pa.Table) -> pa.Table:
    """Sums of accepted events (staged columns) per METRIC_KEYS, with INCREMENT_SCHEMA: DuckDB adds money up in 128 bits."""
    return query_arrow(
        f"""
        select event_time - event_time % 60000000 as event_minute_us, {", ".join(METRIC_KEYS[1:])},
            count(*) filter (event_type = 'impression' and invalid_traffic_rule is null) as impressions,
            count(*) filter (event_type = 'click' and invalid_traffic_rule is null) as clicks,
            count(*) filter (event_type = 'impression' and invalid_traffic_rule is not null) as invalid_impressions,
            count(*) filter (event_type = 'click' and invalid_traffic_rule is not null) as invalid_clicks,
            sum(spend_nanos) as spend_nanos, sum(invalid_spend_nanos) as invalid_spend_nanos
        from input group by all
        """,
        events,
    ).cast(INCREMENT_SCHEMA)


def sum_increments(parts: list[pa.Table]) -> pa.Table:
    """One table of increments from several: the sums per METRIC_KEYS."""
    if not parts:
        return INCREMENT_SCHEMA.empty_table()
    sums = ", ".join(f"sum({name}) as {name}" for name in METRIC_MEASURES)
    return query_arrow(f"select {', '.join(METRIC_KEYS)}, {sums} from input group by all", pa.concat_tables(parts)).cast(
        INCREMENT_SCHEMA
    )


def increment_columns(sums: pa.Table, query_id: str, batch_id: int) -> pa.Table:
    """The columns of table `minute_metrics` (but for the batch's own) of increments.

    record_uuid is the MD5 of the batch's identity and the row's key, written as a UUID: the parts (query id, batch id, minute in
    microseconds, then each text with its length in characters before it and a colon, or "-" for null) joined by 0x1F.
    """
    texts = ", ".join(f"coalesce(length({name})::varchar || ':' || {name}, '-')" for name in METRIC_KEYS[1:])
    pieces = ", ".join(f"substr(digest, {start}, {length})" for start, length in ((1, 8), (9, 4), (13, 4), (17, 4), (21, 12)))
    batch = f"{literal(query_id)}, '{batch_id}'"
    made = query_arrow(
        f"""
        select concat_ws('-', {pieces}) as record_uuid, * exclude (digest) from (
            select md5(concat_ws(chr(31), {batch}, event_minute_us::varchar, {texts})) as digest, * from input
        )
        """,
        sums,
    )
    minute = made["event_minute_us"]
    return made.append_column("event_minute", as_timestamp(minute)).append_column("event_date", _day(minute))


def as_timestamp(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Microseconds since the epoch as a timestamp in UTC."""
    return column.cast(pa.int64()).cast(pa.timestamp("us", "UTC"))


def event_columns(staged: pa.Table, source_file: pa.ChunkedArray, first_line: pa.ChunkedArray, rule_set: str | None) -> pa.Table:
    """The columns of table `events` (but for the batch's own) of accepted staged rows.

    ``source_file`` and ``first_line`` (the number of line n = 0) are those of each row's split. ``rule_set`` is the hash of the
    rules of invalid traffic that they were judged by.
    """
    hours = pc.divide(staged["hour_us"], HOUR_US)
    same = (
        *("event_id", "event_type", "region", "campaign_id", "ad_id", "store_id", "user_id", "impression_id", "placement"),
        *("price_micros", "currency", "user_agent", "billing_model", "spend_nanos", "invalid_spend_nanos", "is_late"),
        *("invalid_traffic_rule", "invalid_traffic_rules"),
    )
    return pa.table(
        {
            **{name: staged[name] for name in same},
            "event_time": as_timestamp(staged["event_time"]),
            "received_at": as_timestamp(staged["received_at"]),
            "fingerprint": pa.chunked_array([chunk.view(pa.int64()) for chunk in staged["fingerprint"].chunks], pa.int64()),
            "rule_set": pa.repeat(pa.scalar(rule_set, pa.string()), staged.num_rows),
            "source_file": source_file,
            "source_line": pc.add(staged["n"], first_line),
            "event_date": _day(staged["hour_us"]),
            "event_hour": pc.subtract(hours, pc.multiply(pc.divide(hours, 24), 24)).cast(pa.int32()),
        }
    )


def _day(micros: pa.ChunkedArray) -> pa.ChunkedArray:
    """The UTC date of microseconds since the epoch (never negative)."""
    return pc.divide(micros, 24 * HOUR_US).cast(pa.int32()).cast(pa.date32())
