"""Table `events`: an hour is one partition."""

from __future__ import annotations

from expectations._gx import gxe
from expectations.results import Severity
from expectations.suites.common import (
    BATCH_COLUMNS,
    against_ledger,
    baseline,
    column_types,
    currency_form,
    id_length,
    known,
    no_result,
    no_row,
    no_rows,
    not_null,
    region_form,
    schema,
    unique,
    without_ledger,
)
from expectations.suites.suite import Suite, check

_PLACE = ("event_id", "source_file", "source_line")
_UNPRICED_SHARE = 0.01
_PRICE = """
    case when billing_model = 'cpc' and event_type = 'click' then price_micros * 1000
        when billing_model = 'cpm' and event_type = 'impression' then price_micros else 0 end
"""
_INVALID = "count(invalid_traffic_rule)"
_SHARES = {
    name: f"select {name} as value, count(*) as weight from {{batch}} group by all"
    for name in ("region", "event_type", "campaign_id")
}
_UNKNOWN = "from {batch} where campaign_id not in (select campaign_id from campaigns)"
_OTHER_CURRENCY = """
    select campaign_id, currency, rows from (select campaign_id, currency, count(*) as rows from {batch} group by all) as groups
    where campaign_id in (select campaign_id from campaigns)
        and (campaign_id, currency) not in (select (campaign_id, currency) from campaigns)
"""

EVENTS = Suite(
    table="events",
    columns=column_types(f"""
        event_id VARCHAR, event_type VARCHAR, event_time TIMESTAMPTZ, received_at TIMESTAMPTZ, region VARCHAR, campaign_id VARCHAR,
        ad_id VARCHAR, store_id VARCHAR, user_id VARCHAR, impression_id VARCHAR, placement VARCHAR, price_micros BIGINT,
        currency VARCHAR, user_agent VARCHAR, billing_model VARCHAR, spend_nanos BIGINT, invalid_spend_nanos BIGINT,
        is_late BOOLEAN, invalid_traffic_rule VARCHAR, invalid_traffic_rules VARCHAR[], rule_set VARCHAR, fingerprint BIGINT,
        source_file VARCHAR, source_line BIGINT, ingested_at TIMESTAMPTZ, event_date DATE, event_hour INTEGER, {BATCH_COLUMNS}
    """),
    in_hour="event_date = {date} and event_hour = {hour}",
    place=_PLACE,
    expectations=(
        *schema(),
        *not_null("event_id", "event_type", "event_time", "received_at", "region", "campaign_id", "ad_id", "store_id", "user_id"),
        *not_null("price_micros", "currency", "spend_nanos", "is_late", "fingerprint", "source_file", "source_line"),
        *not_null("ingested_at", "_query_id", "_batch_id"),
        unique("event_id"),
        id_length("event_id"),
        known("event_type", ["impression", "click"], "event_type is impression or click"),
        no_row(
            _PLACE,
            "event_time.in_its_partition",
            "event_time < (select starts_at from this_hour) or event_time >= (select ends_at from this_hour)",
            "event_time lies in the hour of the partition",
        ),
        region_form(_PLACE),
        currency_form(_PLACE),
        known("billing_model", ["cpc", "cpm"], "billing_model is cpc, cpm or null"),
        gxe.ExpectColumnValuesToBeBetween(
            column="price_micros", min_value=0, max_value=10**12, **check("price_micros.range", "price_micros is 0 to 10^12")
        ),
        *no_rows(
            _PLACE,
            {
                "spend_nanos.price_of_the_event": (
                    f"spend_nanos + coalesce(invalid_spend_nanos, 0) <> {_PRICE}",
                    "spend_nanos and invalid_spend_nanos together follow from price_micros, billing_model and event_type",
                ),
                "invalid_traffic_rule.not_billed": (
                    "case when invalid_traffic_rule is null then coalesce(invalid_spend_nanos, 0) <> 0 else spend_nanos <> 0 end",
                    "an invalid event is not billed, a billable one has no invalid spend",
                ),
                "invalid_traffic_rule.of_the_rules": (
                    "invalid_traffic_rule is not null "
                    "and not coalesce(list_contains(invalid_traffic_rules, invalid_traffic_rule), false)",
                    "the rule that made an event invalid is one of those that hit it",
                ),
                "rule_set.with_a_rule_set": (
                    "rule_set is null and invalid_traffic_rules is not null",
                    "a marked event names the rules that it was judged by",
                ),
                "is_late.after_the_hour": (
                    "is_late and received_at < (select ends_at from this_hour)",
                    "what is late was received after its hour",
                ),
            },
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="source_line", min_value=1, **check("source_line.positive", "source_line counts from 1")
        ),
        against_ledger("accepted", "count(*)", "accepted", "events are as many as accepted"),
        against_ledger("spend_nanos", "sum(spend_nanos)", "spend_nanos", "the events' cost is the spend_nanos"),
        against_ledger("invalid_traffic_rule", _INVALID, "invalid_traffic", "invalid events are as many as invalid_traffic"),
        without_ledger(),
        no_result(
            "campaign_id.is_a_campaign",
            f"select campaign_id, count(*) as rows {_UNKNOWN} group by campaign_id "
            f"qualify sum(count(*)) over () > {_UNPRICED_SHARE} * (select count(*) from {{batch}})",
            f"the share of events whose campaign is not in campaigns is at most {_UNPRICED_SHARE:g}; else they are named",
            Severity.WARN,
            needs="campaigns",
        ),
        no_result(
            "billing_model.of_a_campaign",
            f"select campaign_id, billing_model, count(*) as rows {_UNKNOWN} and billing_model is not null group by all",
            "what has a billing model has a campaign in campaigns",
            Severity.WARN,  # campaigns may have been replaced since
            needs="campaigns",
        ),
        no_result(
            "currency.of_the_campaign", _OTHER_CURRENCY, "currency is that of the campaign", Severity.WARN, needs="campaigns"
        ),
        *baseline("events", "select count(*) from {batch}", _SHARES),
    ),
)
