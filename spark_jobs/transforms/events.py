"""Columns that a valid event or order gets, and the increments that accepted events make."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.contract.spec import Contract, Limits
from spark_jobs.contract.vectorised import connection
from spark_jobs.dedupe.keys import fingerprint_sql, id_hash_sql

HOUR_US = 3_600_000_000

CAMPAIGN_SCHEMA = pa.schema(
    [
        ("priced_campaign_id", pa.string()),
        ("billing_model", pa.string()),
        ("valid_from_us", pa.int64()),
        ("valid_to_us", pa.int64()),
    ]
)

METRIC_KEYS = ("event_minute_us", "region", "campaign_id", "ad_id", "store_id", "placement", "currency")
METRIC_MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos")


def enrich(valid: pa.Table, contract: Contract, limits: Limits, campaigns: pa.Table) -> pa.Table:
    """Adds to parsed rows: hour_us, is_late, key_low, key_high, fingerprint (uint64) and, for events, the price.

    received_at is filled with the time of ingestion. Late: received when the event's hour had ended at least the grace ago.
    """
    times = valid[contract.time_field].to_numpy()
    received = pc.fill_null(valid["received_at"], pa.scalar(limits.ingested_us, pa.int64()))
    hours = times - times % HOUR_US  # never negative: the earliest accepted time is behind the epoch
    late = received.to_numpy() >= hours + (HOUR_US + limits.hour_grace_us)
    made = valid.set_column(valid.schema.get_field_index("received_at"), "received_at", received)
    for name, column in (("hour_us", pa.array(hours)), ("is_late", pa.array(late))):
        made = made.append_column(name, column)
    keys = _keys(valid, contract)
    for name in keys.column_names:
        made = made.append_column(name, keys[name])
    if contract.stream == "events":
        billing_model, spend = price(valid, campaigns)
        made = made.append_column("billing_model", billing_model).append_column("spend_nanos", spend)
    return made.combine_chunks()


def _keys(valid: pa.Table, contract: Contract) -> pa.Table:
    database = connection()
    database.register("valid", valid)
    try:
        return database.execute(
            f"select {id_hash_sql(contract.id_field)}, md5_number_lower({fingerprint_sql(contract)}) as fingerprint from valid"
        ).to_arrow_table()
    finally:
        database.unregister("valid")


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
    """Sums of accepted events (staged columns) per METRIC_KEYS: METRIC_MEASURES as int64."""
    database = connection()
    database.register("accepted", events)
    try:
        return database.execute(
            """
            select event_time - event_time % 60000000 as event_minute_us, region, campaign_id, ad_id, store_id, placement,
                currency,
                count(*) filter (event_type = 'impression') as impressions,
                count(*) filter (event_type = 'click') as clicks,
                0::bigint as invalid_impressions, 0::bigint as invalid_clicks,
                sum(spend_nanos)::bigint as spend_nanos
            from accepted group by all
            """
        ).to_arrow_table()
    finally:
        database.unregister("accepted")


def as_timestamp(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Microseconds since the epoch as a timestamp in UTC."""
    return column.cast(pa.int64()).cast(pa.timestamp("us", "UTC"))


def event_columns(staged: pa.Table, source_file: str, first_line: int, ingested_us: int) -> pa.Table:
    """The columns of table `events` (but for the batch's own) of accepted staged rows; ``first_line`` is line n = 0's number."""
    rows = staged.num_rows
    event_time = as_timestamp(staged["event_time"])
    hour_of_day = pc.divide(pc.subtract(staged["hour_us"], pc.multiply(_day(staged), 24 * HOUR_US)), HOUR_US)
    return pa.table(
        {
            "event_id": staged["event_id"],
            "event_type": staged["event_type"],
            "event_time": event_time,
            "received_at": as_timestamp(staged["received_at"]),
            **{
                name: staged[name]
                for name in (
                    *("region", "campaign_id", "ad_id", "store_id", "user_id", "impression_id", "placement"),
                    *("price_micros", "currency", "user_agent", "billing_model", "spend_nanos", "is_late"),
                )
            },
            "invalid_traffic_rule": pa.nulls(rows, pa.string()),
            "fingerprint": pa.chunked_array([chunk.view(pa.int64()) for chunk in staged["fingerprint"].chunks], pa.int64()),
            "source_file": pa.repeat(pa.scalar(source_file), rows),
            "source_line": pc.add(staged["n"], first_line),
            "ingested_at": pa.repeat(pa.scalar(ingested_us, pa.int64()), rows).cast(pa.timestamp("us", "UTC")),
            "event_date": _day(staged).cast(pa.int32()).cast(pa.date32()),
            "event_hour": hour_of_day.cast(pa.int32()),
        }
    )


def _day(staged: pa.Table) -> pa.ChunkedArray:
    return pc.divide(staged["hour_us"], 24 * HOUR_US)
