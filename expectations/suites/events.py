"""Table `events`: an hour is one partition."""

from __future__ import annotations

from expectations.checks import Check, Kind, Severity, Suite, baseline, groups, not_null, rows, schema, unique
from expectations.suites.common import (
    BATCH_COLUMNS,
    BATCH_KEYS,
    CURRENCY,
    DATE,
    FLAG,
    ID_LENGTH,
    NUMBER,
    REGION,
    TEXT,
    TIME,
    against_ledger,
    without_ledger,
)

_UNPRICED_SHARE = 0.01
_PRICE = """
    case when billing_model = 'cpc' and event_type = 'click' then price_micros * 1000
        when billing_model = 'cpm' and event_type = 'impression' then price_micros else 0 end
"""
_UNKNOWN = "from grouped where campaign_id not in (select campaign_id from campaigns)"
_OTHER_CURRENCY = """
    from grouped where campaign_id in (select campaign_id from campaigns)
        and (campaign_id, currency) not in (select (campaign_id, currency) from campaigns)
"""

EVENTS = Suite(
    table="events",
    columns={
        **dict.fromkeys(("event_id", "event_type"), TEXT),
        **dict.fromkeys(("event_time", "received_at"), TIME),
        **dict.fromkeys(("region", "campaign_id", "ad_id", "store_id", "user_id", "impression_id", "placement"), TEXT),
        "price_micros": NUMBER,
        "currency": TEXT,
        "user_agent": TEXT,
        "billing_model": TEXT,
        "spend_nanos": NUMBER,
        "invalid_spend_nanos": NUMBER,
        "is_late": FLAG,
        "invalid_traffic_rule": TEXT,
        "invalid_traffic_rules": f"{TEXT}[]",
        "rule_set": TEXT,
        "fingerprint": NUMBER,
        "source_file": TEXT,
        "source_line": NUMBER,
        "ingested_at": TIME,
        "event_date": DATE,
        "event_hour": "INTEGER",
        **BATCH_COLUMNS,
    },
    in_hour="event_date = {date} and event_hour = {hour}",
    keys={
        **BATCH_KEYS,
        **{name: name for name in ("region", "campaign_id", "event_type", "billing_model", "currency")},
    },
    sums={
        "spend": "sum(spend_nanos)",
        "invalid": "count(*) filter (invalid_traffic_rule is not null)",
        "ids": "list(hash(event_id))",
    },
    shown=("event_id", "source_file", "source_line"),
    checks=(
        *schema(),
        *not_null("event_id", "event_type", "event_time", "received_at", "region", "campaign_id", "ad_id", "store_id", "user_id"),
        *not_null("price_micros", "currency", "spend_nanos", "is_late", "fingerprint", "source_file", "source_line"),
        *not_null("ingested_at", "_query_id", "_batch_id"),
        unique("event_id"),
        rows("length", "event_id", ID_LENGTH.format("event_id"), "event_id has 1 to 128 characters"),
        groups("known", "event_type", "event_type not in ('impression', 'click')", "event_type is impression or click"),
        rows(
            "in_its_partition",
            "event_time",
            "epoch_us(event_time) // 3600000000 <> epoch_us({start}) // 3600000000",
            "event_time lies in the hour of the partition",
        ),
        groups("form", "region", REGION, "region is 1 to 32 of a-z, 0-9 and -"),
        groups("form", "currency", CURRENCY, "currency is three capitals"),
        groups("known", "billing_model", "billing_model not in ('cpc', 'cpm')", "billing_model is cpc, cpm or null"),
        rows("range", "price_micros", "price_micros not between 0 and 1000000000000", "price_micros is 0 to 10^12"),
        rows(
            "price_of_the_event",
            "spend_nanos",
            f"spend_nanos + coalesce(invalid_spend_nanos, 0) <> {_PRICE}",
            "spend_nanos and invalid_spend_nanos together follow from price_micros, billing_model and event_type",
        ),
        rows(
            "not_billed",
            "invalid_traffic_rule",
            "case when invalid_traffic_rule is null then coalesce(invalid_spend_nanos, 0) <> 0 else spend_nanos <> 0 end",
            "an invalid event is not billed, a billable one has no invalid spend",
        ),
        rows(
            "of_the_rules",
            "invalid_traffic_rule",
            "invalid_traffic_rule is not null and not coalesce(list_contains(invalid_traffic_rules, invalid_traffic_rule), false)",
            "the rule that made an event invalid is one of those that hit it",
        ),
        rows(
            "with_a_rule_set",
            "rule_set",
            "rule_set is null and invalid_traffic_rules is not null",
            "a marked event names the rules that it was judged by",
        ),
        rows("after_the_hour", "is_late", "is_late and received_at < {end}", "what is late was received after its hour"),
        rows("positive", "source_line", "source_line < 1", "source_line counts from 1"),
        against_ledger("accepted", "sum(rows)", "accepted", "events are as many as accepted"),
        against_ledger("spend_nanos", "sum(spend)", "spend_nanos", "the events' cost is the spend_nanos"),
        against_ledger("invalid_traffic_rule", "sum(invalid)", "invalid_traffic", "invalid events are as many as invalid_traffic"),
        without_ledger(),
        Check(
            "campaign_id.is_a_campaign",
            "campaign_id",
            Kind.MEASURE,
            "the share of events whose campaign is not in campaigns",
            f"select coalesce((select sum(rows) {_UNKNOWN}) / (select sum(rows) from grouped), 0)",
            severity=Severity.WARN,
            at_most=_UNPRICED_SHARE,
            offenders=f"select campaign_id, sum(rows) as rows {_UNKNOWN} group by all order by rows desc, campaign_id",
            needs="campaigns",
        ),
        Check(
            "billing_model.of_a_campaign",
            "billing_model",
            Kind.MEASURE,
            "what has a billing model has a campaign in campaigns",
            f"select coalesce(sum(rows), 0) {_UNKNOWN} and billing_model is not null",
            severity=Severity.WARN,  # campaigns may have been replaced since
            offenders=f"select campaign_id, billing_model, sum(rows) as rows {_UNKNOWN} and billing_model is not null group by all "
            "order by rows desc, campaign_id",
            needs="campaigns",
        ),
        Check(
            "currency.of_the_campaign",
            "currency",
            Kind.MEASURE,
            "currency is that of the campaign",
            f"select coalesce(sum(rows), 0) {_OTHER_CURRENCY}",
            severity=Severity.WARN,
            offenders=f"select campaign_id, currency, sum(rows) as rows {_OTHER_CURRENCY} group by all "
            "order by rows desc, campaign_id",
            needs="campaigns",
        ),
        *baseline("events", ("region", "event_type", "campaign_id")),
    ),
    shares={name: f"select {name}, sum(rows) from grouped group by all" for name in ("region", "event_type", "campaign_id")},
    volume="select coalesce(sum(rows), 0) from grouped",
)
