"""Table `minute_metrics`: increments. A batch's own are never negative; a correction's may be, but no sum of a key is."""

from __future__ import annotations

from expectations.checks import Check, Kind, Suite, baseline, groups, not_null, rows, schema, unique
from expectations.suites.common import (
    BATCH_COLUMNS,
    BATCH_KEYS,
    CURRENCY,
    DATE,
    MONEY,
    NUMBER,
    REGION,
    TEXT,
    TIME,
    against_ledger,
    without_ledger,
)

_COUNTS = ("impressions", "clicks", "invalid_impressions", "invalid_clicks")
_MEASURES = (*_COUNTS, "spend_nanos")
_LATER = ("invalid_spend_nanos",)  # null in rows from before there was this column
_KEY = "event_minute, region, campaign_id, ad_id, store_id, placement, currency"
_NEGATIVE = " or ".join(f"{name} < 0" for name in (*_MEASURES, *_LATER))
_NEGATIVE_SUMS = f"""
    select {_KEY}, {", ".join(f"sum({name}) as {name}" for name in (*_MEASURES, *_LATER))} from data group by {_KEY}
    having {" or ".join(f"sum({name}) < 0" for name in (*_MEASURES, *_LATER))}
"""

MINUTE_METRICS = Suite(
    table="minute_metrics",
    columns={
        "record_uuid": TEXT,
        "event_minute": TIME,
        "region": TEXT,
        "campaign_id": TEXT,
        "ad_id": TEXT,
        "store_id": TEXT,
        "placement": TEXT,
        "currency": TEXT,
        **dict.fromkeys(_COUNTS, NUMBER),
        **dict.fromkeys(("spend_nanos", *_LATER), MONEY),
        "event_date": DATE,
        **BATCH_COLUMNS,
    },
    in_hour="event_date = {date} and event_minute >= {start} and event_minute < {end}",
    keys={**BATCH_KEYS, **{name: name for name in ("region", "campaign_id", "currency")}},
    sums={
        "events": f"sum({' + '.join(_COUNTS)})",
        "invalid": "sum(invalid_impressions + invalid_clicks)",
        "spend": "sum(spend_nanos)",
        "negative": f"count(*) filter ({_NEGATIVE})",
        "ids": "list(hash(record_uuid))",
    },
    shown=("record_uuid", "event_minute", "_batch_id", "_run_id"),
    checks=(
        *schema(),
        *not_null("record_uuid", "event_minute", "region", "campaign_id", "ad_id", "store_id", "currency", *_MEASURES),
        *not_null("_query_id", "_batch_id"),
        unique("record_uuid"),
        rows("form", "record_uuid", "length(record_uuid) <> 36", "record_uuid is written as a UUID"),
        rows("whole", "event_minute", "epoch_us(event_minute) % 60000000 <> 0", "event_minute is a whole minute"),
        groups("form", "region", REGION, "region is 1 to 32 of a-z, 0-9 and -"),
        groups("form", "currency", CURRENCY, "currency is three capitals"),
        *(
            rows("not_negative", name, f"{name} < 0 and _run_id is null", f"{name} of a batch's own increment is not negative")
            for name in (*_MEASURES, *_LATER)
        ),
        Check(
            "table.sums_not_negative",
            "table",
            Kind.MEASURE,
            "no key of a minute has a negative sum",
            "select coalesce(sum(negative), 0) from grouped",
            exact=f"select count(*) from ({_NEGATIVE_SUMS})",  # only where a row is negative can a sum be
            offenders=f"{_NEGATIVE_SUMS} order by {_KEY}",
        ),
        rows(
            "of_events",
            "spend_nanos",
            "spend_nanos > 0 and impressions = 0 and clicks = 0 and _run_id is null",
            "a batch's own increment with a cost counts an event that may be billed",
        ),
        against_ledger("accepted", "sum(events)", "accepted", "the events counted by increments are as many as accepted"),
        against_ledger("spend_nanos", "sum(spend)", "spend_nanos", "the increments' cost is the spend_nanos"),
        against_ledger("invalid_clicks", "sum(invalid)", "invalid_traffic", "invalid events are as many as invalid_traffic"),
        without_ledger(),
        *baseline("minute_metrics", ("region", "campaign_id")),
    ),
    shares={name: f"select {name}, sum(events) from grouped group by all" for name in ("region", "campaign_id")},
    volume="select coalesce(sum(events), 0) from grouped",
)
