"""Add columns to valid events and orders, and sum the increments of accepted events."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.ingest.contract.spec import BatchLimits, Contract
from spark_jobs.ingest.dedupe.keys import hash_keys
from spark_jobs.lake.duck import query_arrow
from spark_jobs.lake.tables import EVENTS, MINUTE_METRICS
from spark_jobs.traffic.rules import InvalidTrafficRules, judge_of, marks
from spark_jobs.units import DAY_US, HOUR_US, MINUTE_US

CAMPAIGN_SCHEMA = pa.schema(
    {"priced_campaign_id": pa.string(), "billing_model": pa.string(), "valid_from_us": pa.int64(), "valid_to_us": pa.int64()}
)
METRIC_KEYS = ("event_minute_us", "region", "campaign_id", "ad_id", "store_id", "placement", "currency")
METRIC_MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")
INCREMENT_INPUT = (
    "event_time",
    *METRIC_KEYS[1:],
    *("event_type", "invalid_traffic_rule", "spend_nanos", "invalid_spend_nanos"),
)
"""The staged columns that `increments` reads."""
INCREMENT_SCHEMA = pa.schema(
    [
        ("event_minute_us", pa.int64()),
        *((n, pa.string()) for n in METRIC_KEYS[1:]),
        *((n, MINUTE_METRICS.schema.field(n).type) for n in METRIC_MEASURES),
    ]
)

_UUID_GROUPS = (8, 4, 4, 4, 12)  # hex digits


def enrich(valid: pa.Table, contract: Contract, limits: BatchLimits, campaigns: pa.Table, rules: InvalidTrafficRules) -> pa.Table:
    """Add hour_us, is_late, key_low, key_high, fingerprint (uint64) and, for events, price and marks of invalid traffic.

    An invalid event has spend_nanos 0; invalid_spend_nanos is what it would have cost. A missing received_at becomes the time of
    ingestion. A record is late if it was received when its hour, and the grace after it, had ended.
    """
    times = valid[contract.time_field].to_numpy()
    received = pc.fill_null(valid["received_at"], pa.scalar(limits.ingested_us, pa.int64()))
    hours = times - times % HOUR_US  # never negative: no time before the epoch is accepted
    late = received.to_numpy() >= hours + (HOUR_US + limits.hour_grace_us)
    keys = hash_keys(valid, contract)
    added = {"hour_us": pa.array(hours), "is_late": pa.array(late), **{name: keys[name] for name in keys.column_names}}
    if contract.stream == "events":
        billing_model, cost = price(valid, campaigns)
        rule, hits = marks(judge_of(rules).codes(valid), rules)
        added |= {
            "billing_model": billing_model,
            "spend_nanos": pc.if_else(rule.is_null(), cost, 0),
            "invalid_spend_nanos": pc.if_else(rule.is_null(), 0, cost),
            "invalid_traffic_rule": rule,
            "invalid_traffic_rules": hits,
        }
    made = valid.set_column(valid.schema.get_field_index("received_at"), "received_at", received)
    for name, column in added.items():
        made = made.append_column(name, column)
    return made.combine_chunks()


def price(events: pa.Table, campaigns: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Return the billing model (null: no campaign row covers the event) and the cost in nanos of each event.

    ``campaigns`` has CAMPAIGN_SCHEMA, valid_to_us null when open; the ranges of a campaign do not overlap. A cpc click costs
    price_micros * 1000 nanos, a cpm impression price_micros nanos (a thousandth of the price of a thousand), anything else nothing.
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
    """Sum accepted events (INCREMENT_INPUT) per METRIC_KEYS. Returns INCREMENT_SCHEMA: DuckDB sums money in 128 bits."""
    return query_arrow(
        f"""
        select event_time - event_time % {MINUTE_US} as event_minute_us, {", ".join(METRIC_KEYS[1:])},
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
    """Sum several tables of increments per METRIC_KEYS. No table has two rows of one key."""
    if len(parts) < 2:
        return parts[0] if parts else INCREMENT_SCHEMA.empty_table()
    rows = pa.concat_tables(parts)
    # Files follow each other in time, so that most minutes of a region are in one part only, whose rows are sums already.
    regions = pc.unique(rows["region"])
    cells = rows["event_minute_us"].to_numpy() // MINUTE_US * len(regions) + pc.index_in(rows["region"], regions).to_numpy()
    ends = np.cumsum([part.num_rows for part in parts])[:-1]
    found, in_parts = np.unique(np.concatenate([np.unique(of_part) for of_part in np.split(cells, ends)]), return_counts=True)
    is_shared = pa.array(np.isin(cells, found[in_parts > 1]))
    sums = ", ".join(f"sum({name}) as {name}" for name in METRIC_MEASURES)
    shared = query_arrow(f"select {', '.join(METRIC_KEYS)}, {sums} from input group by all", rows.filter(is_shared))
    return pa.concat_tables([rows.filter(pc.invert(is_shared)), shared.cast(INCREMENT_SCHEMA)])


def increment_columns(sums: pa.Table, query_id: str, batch_id: int) -> pa.Table:
    """Return the columns of table `minute_metrics`, without those of the batch, for increments.

    record_uuid is the MD5 of the batch's identity and the row's key, written as a UUID: the parts (query id, batch id, minute in
    microseconds, then each text with its length in characters before it and a colon, or "-" for null) joined by 0x1F.
    """
    texts = [pc.binary_join_element_wise(pc.utf8_length(sums[name]).cast(pa.string()), sums[name], ":") for name in METRIC_KEYS[1:]]
    minutes = sums["event_minute_us"].cast(pa.string())
    keys = pc.binary_join_element_wise(query_id, str(batch_id), minutes, *(pc.fill_null(text, "-") for text in texts), "\x1f")
    digests = query_arrow("select md5(key) as digest from input", pa.table({"key": keys}))["digest"]
    made = sums.add_column(0, "record_uuid", _dashed(digests))
    minute = made["event_minute_us"]
    return made.append_column("event_minute", as_timestamp(minute)).append_column("event_date", _day(minute))


def _dashed(digests: pa.ChunkedArray) -> pa.Array:
    """Write digests of 32 hex digits as UUIDs."""
    rows = len(digests)
    digits = np.frombuffer(digests.combine_chunks().cast(pa.binary()).cast(pa.binary(32)).buffers()[1], dtype=np.uint8)
    digits = digits.reshape(rows, 32)
    made = np.full((rows, 36), ord("-"), dtype=np.uint8)
    start = 0
    for number, size in enumerate(_UUID_GROUPS):
        made[:, start + number : start + number + size] = digits[:, start : start + size]
        start += size
    offsets = np.arange(rows + 1, dtype=np.int32) * 36
    return pa.Array.from_buffers(pa.string(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(made)])


def as_timestamp(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert microseconds since the epoch to timestamps in UTC."""
    return column.cast(pa.int64()).cast(pa.timestamp("us", "UTC"))


def event_columns(staged: pa.Table, source_file: pa.ChunkedArray, first_line: pa.ChunkedArray, rule_set: str | None) -> pa.Table:
    """Return the columns of table `events`, without those of the batch, for accepted staged rows.

    A staged column becomes the table's column of the same name, so a new field of the contract needs no change here. Each row has
    the ``source_file`` and ``first_line`` (the number of line n = 0) of its split. ``rule_set`` is the hash of the rules of invalid
    traffic that judged the rows.
    """
    hours = pc.divide(staged["hour_us"], HOUR_US)
    same = [field for field in EVENTS.schema if field.name in staged.column_names]
    return pa.table(
        {
            **{field.name: _stored(staged[field.name], field.type) for field in same},
            "rule_set": pa.repeat(pa.scalar(rule_set, pa.string()), staged.num_rows),
            "source_file": source_file,
            "source_line": pc.add(staged["n"], first_line),
            "event_date": _day(staged["hour_us"]),
            "event_hour": pc.subtract(hours, pc.multiply(pc.divide(hours, 24), 24)).cast(pa.int32()),
        }
    )


def _stored(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Convert a staged column to its type in a table: microseconds to timestamps, unsigned words to the same 64 bits signed."""
    if pa.types.is_timestamp(kind):
        return as_timestamp(column)
    if pa.types.is_uint64(column.type):
        return pa.chunked_array([chunk.view(kind) for chunk in column.chunks], kind)
    return column


def _day(micros: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the UTC dates of microseconds since the epoch (never negative)."""
    return pc.divide(micros, DAY_US).cast(pa.int32()).cast(pa.date32())
