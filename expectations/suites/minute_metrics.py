"""Table `minute_metrics`: increments. Those of a batch are never negative; those of a correction may be, but no sum of a key."""

from __future__ import annotations

from great_expectations.expectations.row_conditions import Column

from expectations._gx import gxe
from expectations.suites.common import (
    BATCH_COLUMNS,
    against_ledger,
    baseline,
    column_types,
    currency_form,
    no_result,
    no_row,
    not_negative,
    not_null,
    region_form,
    schema,
    unique,
    without_ledger,
)
from expectations.suites.suite import Suite, check

_PLACE = ("record_uuid", "event_minute", "_batch_id", "_run_id")
_COUNTS = ("impressions", "clicks", "invalid_impressions", "invalid_clicks")
_MEASURES = (*_COUNTS, "spend_nanos")
_LATER = ("invalid_spend_nanos",)  # null in rows that are older than the column
_KEY = "event_minute, region, campaign_id, ad_id, store_id, placement, currency"
_EVENTS = f"sum({' + '.join(_COUNTS)})"
_INVALID = "sum(invalid_impressions + invalid_clicks)"
_SHARES = {name: f"select {name} as value, {_EVENTS} as weight from {{batch}} group by all" for name in ("region", "campaign_id")}
_NEGATIVE_SUMS = f"""
    select {_KEY}, {", ".join(f"sum({name}) as {name}" for name in (*_MEASURES, *_LATER))} from {{batch}} group by {_KEY}
    having {" or ".join(f"sum({name}) < 0" for name in (*_MEASURES, *_LATER))}
"""

MINUTE_METRICS = Suite(
    table="minute_metrics",
    columns=column_types(f"""
        record_uuid VARCHAR, event_minute TIMESTAMPTZ, region VARCHAR, campaign_id VARCHAR, ad_id VARCHAR, store_id VARCHAR,
        placement VARCHAR, currency VARCHAR, {", ".join(f"{name} BIGINT" for name in _COUNTS)}, spend_nanos DECIMAL(38,0),
        invalid_spend_nanos DECIMAL(38,0), event_date DATE, {BATCH_COLUMNS}
    """),
    in_hour="event_date = {date} and event_minute >= {start} and event_minute < {end}",
    place=_PLACE,
    expectations=(
        *schema(),
        *not_null("record_uuid", "event_minute", "region", "campaign_id", "ad_id", "store_id", "currency", *_MEASURES),
        *not_null("_query_id", "_batch_id"),
        unique("record_uuid"),
        gxe.ExpectColumnValueLengthsToEqual(
            column="record_uuid", value=36, **check("record_uuid.form", "record_uuid is written as a UUID")
        ),
        no_row(_PLACE, "event_minute.whole", "epoch_us(event_minute) % 60000000 <> 0", "event_minute is a whole minute"),
        region_form(_PLACE),
        currency_form(_PLACE),
        *not_negative(*_MEASURES, *_LATER, of=" of a batch's own increment", row_condition=Column("_run_id").is_null()),
        no_result("table.sums_not_negative", _NEGATIVE_SUMS, "no key of a minute has a negative sum"),
        no_row(
            _PLACE,
            "spend_nanos.of_events",
            "spend_nanos > 0 and impressions = 0 and clicks = 0 and _run_id is null",
            "a batch's own increment with a cost counts an event that may be billed",
        ),
        against_ledger("accepted", _EVENTS, "accepted", "the events counted by increments are as many as accepted"),
        against_ledger("spend_nanos", "sum(spend_nanos)", "spend_nanos", "the increments' cost is the spend_nanos"),
        against_ledger("invalid_clicks", _INVALID, "invalid_traffic", "invalid events are as many as invalid_traffic"),
        without_ledger(),
        *baseline("minute_metrics", f"select {_EVENTS} from {{batch}}", _SHARES),
    ),
)
