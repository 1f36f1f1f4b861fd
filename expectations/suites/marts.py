"""The marts, as published: what people rely on, held once more on the finished file."""

from __future__ import annotations

import re
from itertools import pairwise

from expectations.checks import Check, Kind, Suite, groups, not_null, rows, schema
from expectations.suites.common import CURRENCY, DATE, FLAG, NUMBER, REGION, TEXT

_TIME = "TIMESTAMP"
_MONEY = "HUGEINT"  # but for what one record or one campaign says, which is a NUMBER
_DECIMAL = "DECIMAL(38,4)"  # money in units of its currency, for people to read
_COUNTS = ("impressions", "clicks", "invalid_impressions", "invalid_clicks")
_GROSS = ("gross_impressions", "gross_clicks", "invalid_spend_nanos", "invalid_spend_micros", "gross_spend_micros")
_MEASURES = (*_COUNTS, "spend_nanos", "spend_micros", *_GROSS)
_ADDED = (*_COUNTS, "spend_nanos", "invalid_spend_nanos")
_OUTCOMES = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "invalid_traffic", "unpriced")
_ROUNDED = "abs(spend_micros * 1000 - spend_nanos) > 500"
_RATIO = "DOUBLE"
_NOT_GROSS = "gross_impressions <> impressions + invalid_impressions or gross_clicks <> clicks + invalid_clicks"
_REVENUE = ("orders_by_touch_date", "revenue_by_touch_date_micros", "orders_by_order_date", "revenue_by_order_date_micros")
_COMPLETENESS = tuple(f"completeness_{after}" for after in ("0_min", "1_min", "5_min", "15_min", "60_min", "24_h"))
_CREDIT = ("order_id", "model", "window_days", "campaign_id", "ad_id", "store_id", "user_id", "touch_event_id", "touch_type")


def _types(*names: str) -> dict[str, str]:
    """The types of counts and of sums of money, told apart by their names."""
    return {name: _MONEY if re.search("nanos|micros", name) else NUMBER for name in names}


def _one_row(key: str) -> Check:
    """The grain: one row a key."""
    repeated = f"select {key}, count(*) as rows from data group by {key} having count(*) > 1"
    return Check(
        "table.grain",
        "table",
        Kind.MEASURE,
        f"one row a ({key})",
        f"select count(*) from ({repeated})",
        offenders=f"{repeated} order by rows desc, {key}",
    )


def _not_negative(*names: str) -> tuple[Check, ...]:
    return tuple(rows("not_negative", name, f"{name} < 0", f"{name} is not negative") for name in names)


def _weights_sum_to_one() -> Check:
    """An order is credited whole in each model and window."""
    wrong = """
        select order_id, model, window_days, sum(credit_weight) as weight from data
        group by order_id, model, window_days having abs(sum(credit_weight) - 1) > 1e-9
    """
    return Check(
        "credit_weight.sums_to_one",
        "credit_weight",
        Kind.MEASURE,
        "the weights of an order, model and window sum to 1",
        f"select count(*) from ({wrong})",
        offenders=f"{wrong} order by all",
    )


def _sums_to_the_spend() -> Check:
    """What is billed, with what is about to be, is what was spent."""
    key = "event_date, campaign_id, store_id, currency"
    differs = f"""
        select {key}, sum(amount_micros) as billed_micros, any_value(spend_micros) as spend_micros
        from data left join (select {key}, spend_micros from fct_campaign_day) as days using ({key})
        group by {key} having sum(amount_micros) <> coalesce(any_value(spend_micros), 0)
    """
    return Check(
        "amount_micros.sums_to_the_spend",
        "amount_micros",
        Kind.MEASURE,
        "lines and accruals of a key come to its spend_micros in fct_campaign_day",
        f"select count(*) from ({differs})",
        offenders=f"{differs} order by all",
        needs="fct_campaign_day",
    )


def _same_at_both_grains() -> Check:
    """The day is the sum of its minutes."""
    sums = ", ".join(f"sum({name}) as {name}" for name in _ADDED)
    differs = f"""
        select event_date, campaign_id, store_id, currency from data
        full join (
            select event_date, campaign_id, store_id, currency, {sums}
            from fct_campaign_minute where {{minutes}} group by all
        ) as minutes using (event_date, campaign_id, store_id, currency)
        where {" or ".join(f"data.{name} is distinct from minutes.{name}" for name in _ADDED)}
    """
    return Check(
        "table.sum_of_its_minutes",
        "table",
        Kind.MEASURE,
        "a campaign's day is the sum of its minutes in fct_campaign_minute",
        f"select count(*) from ({differs})",
        offenders=f"{differs} order by all",
        needs="fct_campaign_minute",
    )


def _each_type_has_all() -> Check:
    """Each invalid event has a source of every type, if only an empty one."""
    differs = """
        select event_date, list(events) as events_by_type
        from (select event_date, source_type, sum(invalid_impressions + invalid_clicks) as events from data group by all)
        group by event_date having count(*) <> 5 or min(events) <> max(events)
    """
    return Check(
        "source_type.has_every_event",
        "source_type",
        Kind.MEASURE,
        "each source_type of a day has as many events",
        f"select count(*) from ({differs})",
        offenders=f"{differs} order by event_date",
    )


MART_SUITES = (
    Suite(
        table="fct_campaign_day",
        columns={
            "event_date": DATE,
            "campaign_id": TEXT,
            "store_id": TEXT,
            "currency": TEXT,
            **_types(*_MEASURES),
            "spend": _DECIMAL,
        },
        in_hour="event_date = {date}",
        keys={"currency": "currency"},
        shown=("event_date", "campaign_id", "store_id", "currency"),
        checks=(
            *schema(),
            *not_null("event_date", "campaign_id", "store_id", "currency", *_MEASURES),
            *_not_negative(*_MEASURES),
            groups("form", "currency", CURRENCY, "currency is three capitals"),
            rows("rounded", "spend_micros", _ROUNDED, "spend_micros is spend_nanos, rounded once"),
            rows("net_and_invalid", "gross_clicks", _NOT_GROSS, "gross is net and invalid"),
            _one_row("event_date, campaign_id, store_id, currency"),
            _same_at_both_grains(),
        ),
    ),
    Suite(
        table="fct_campaign_minute",
        columns={
            "event_minute": _TIME,
            "event_date": DATE,
            "region": TEXT,
            "campaign_id": TEXT,
            "ad_id": TEXT,
            "store_id": TEXT,
            "currency": TEXT,
            **_types(*_MEASURES),
            "spend": _DECIMAL,
        },
        in_hour="event_minute >= {utc_start} and event_minute < {utc_end}",
        keys={"region": "region", "currency": "currency"},
        shown=("event_minute", "region", "campaign_id", "ad_id"),
        checks=(
            *schema(),
            *not_null("event_minute", "event_date", "region", "campaign_id", "ad_id", "store_id", "currency", *_MEASURES),
            *_not_negative(*_MEASURES),
            groups("form", "region", REGION, "region is 1 to 32 of a-z, 0-9 and -"),
            rows("of_the_minute", "event_date", "event_date <> event_minute::date", "event_date is the day of event_minute"),
            rows("rounded", "spend_micros", _ROUNDED, "spend_micros is spend_nanos, rounded once"),
            rows("net_and_invalid", "gross_clicks", _NOT_GROSS, "gross is net and invalid"),
            _one_row("event_minute, region, campaign_id, ad_id, store_id, currency"),
        ),
    ),
    Suite(
        table="fct_event_accounting",
        columns={"event_hour": _TIME, "region": TEXT, **dict.fromkeys(_OUTCOMES, NUMBER)},
        in_hour="event_hour = {utc_start}",
        keys={"region": "region"},
        shown=("event_hour", "region"),
        checks=(
            *schema(),
            *not_null("region", *_OUTCOMES),
            *_not_negative(*_OUTCOMES),
            rows(
                "adds_up",
                "offered",
                "offered <> accepted + duplicate + conflict + rejected",
                "offered = accepted + duplicate + conflict + rejected",
            ),
            *(
                rows("part_of_accepted", name, f"{name} > accepted", f"{name} is a part of accepted")
                for name in ("late", "invalid_traffic", "unpriced")
            ),
            _one_row("event_hour, region"),
        ),
    ),
    Suite(
        table="fct_reconciliation",
        columns={
            "run_id": TEXT,
            "run_at": _TIME,
            "event_hour": _TIME,
            "layer": TEXT,
            "cause": TEXT,
            "campaign_id": TEXT,
            **_types("rows_different", "rows_expected", "rows_found", "nanos_expected", "nanos_found", "micros_difference"),
            "is_repaired": FLAG,
            "is_latest": FLAG,
            "detail": TEXT,
        },
        in_hour="event_hour = {utc_start}",
        keys={"cause": "cause"},
        shown=("run_id", "event_hour", "layer", "cause", "campaign_id"),
        checks=(
            *schema(),
            *not_null("run_id", "run_at", "cause", "rows_different", "is_repaired", "is_latest"),
            rows(
                "null_where_nothing_differs",
                "layer",
                "(layer is null) <> (cause = 'none')",
                "layer names where it differs, and is null in an hour without a difference",
            ),
            rows("not_negative", "rows_different", "rows_different < 0", "rows_different is not negative"),
            rows(
                "none_is_none",
                "cause",
                "cause = 'none' and (rows_different <> 0 or rows_expected <> rows_found or nanos_expected <> nanos_found)",
                "an hour without a difference has none",
            ),
        ),
    ),
    Suite(
        table="fct_billing_ledger",
        columns={
            "line_id": TEXT,
            "line_type": TEXT,
            "event_date": DATE,
            "campaign_id": TEXT,
            "store_id": TEXT,
            "currency": TEXT,
            "amount_micros": _MONEY,
            "billed_micros": _MONEY,
            "spend_nanos": _MONEY,
            "is_posted": FLAG,
            "reason": TEXT,
            "run_id": TEXT,
            "rule_set": TEXT,
            "metrics_version": NUMBER,
            "posting": NUMBER,
            "billed_at": _TIME,
        },
        in_hour="event_date = {date}",
        keys={"line_type": "line_type", "currency": "currency"},
        shown=("line_id", "event_date", "campaign_id", "store_id"),
        checks=(
            *schema(),
            *not_null("line_id", "event_date", "campaign_id", "store_id", "currency", "amount_micros", "is_posted", "reason"),
            groups("form", "currency", CURRENCY, "currency is three capitals"),
            rows(
                "has_its_sign",
                "amount_micros",
                "line_type = 'credit' and amount_micros >= 0 or line_type = 'adjustment' and amount_micros <= 0",
                "a credit takes, an adjustment adds",
            ),
            rows(
                "posted_by_a_run",
                "line_type",
                "is_posted <> (line_type <> 'accrual') or is_posted and (run_id is null or billed_at is null)",
                "a line that is posted names its run and time; accruals are not posted",
            ),
            _one_row("line_id"),
            _sums_to_the_spend(),
        ),
    ),
    Suite(
        table="fct_budget_pacing",
        columns={
            "event_date": DATE,
            "event_minute": _TIME,
            "campaign_id": TEXT,
            "currency": TEXT,
            "daily_budget_micros": NUMBER,
            "spent_micros": _MONEY,
            "day_share": _RATIO,
            "history_days": NUMBER,
            "expected_share": _RATIO,
            **_types("expected_micros", "projected_micros", "overspend_micros", "overspend_from_lag_micros"),
            "budget_known_at": _TIME,
            "is_alert": FLAG,
        },
        in_hour="event_minute >= {utc_start} and event_minute < {utc_end}",
        keys={"currency": "currency"},
        shown=("event_minute", "campaign_id"),
        checks=(
            *schema(),
            *not_null("event_date", "event_minute", "campaign_id", "currency", "spent_micros", "day_share", "is_alert"),
            rows("is_a_share", "day_share", "not (day_share > 0 and day_share <= 1)", "day_share is above 0, up to 1"),
            rows(
                "part_of_it",
                "overspend_from_lag_micros",
                "not (overspend_from_lag_micros between 0 and overspend_micros)",
                "overspend from lag is a part of the overspend",
            ),
            rows("early", "is_alert", "is_alert and (day_share >= 0.8 or daily_budget_micros is null)", "alerts are early ones"),
            _one_row("event_minute, campaign_id, currency"),
        ),
    ),
    Suite(
        table="fct_attribution_credits",
        columns={
            **dict.fromkeys(_CREDIT, TEXT),
            "window_days": NUMBER,
            "touch_time": _TIME,
            "touch_date": DATE,
            "order_time": _TIME,
            "order_date": DATE,
            "credit_weight": _RATIO,
            "credit_micros": NUMBER,
            "currency": TEXT,
            "revision": NUMBER,
            "rule_set": TEXT,
        },
        in_hour="order_time >= {utc_start} and order_time < {utc_end}",
        keys={"model": "model", "window_days": "window_days", "currency": "currency"},
        shown=("order_id", "model", "window_days", "touch_event_id"),
        checks=(
            *schema(),
            *not_null(*_CREDIT, "touch_time", "order_time", "credit_weight", "credit_micros", "currency", "revision"),
            groups("form", "currency", CURRENCY, "currency is three capitals"),
            *_not_negative("credit_micros"),
            rows("before_the_order", "touch_time", "touch_time >= order_time", "a touch is strictly before its order"),
            rows(
                "in_the_window",
                "window_days",
                "touch_type = 'click' and touch_time < order_time - to_days(window_days::integer)",
                "a click lies in the lookback window",
            ),
            _weights_sum_to_one(),
            _one_row("order_id, model, window_days, touch_event_id"),
        ),
    ),
    Suite(
        table="fct_advertiser_attribution",
        columns={
            "event_date": DATE,
            "store_id": TEXT,
            "campaign_id": TEXT,
            "currency": TEXT,
            "model": TEXT,
            "window_days": NUMBER,
            "orders_by_touch_date": _RATIO,
            "revenue_by_touch_date_micros": _MONEY,
            "revenue_by_touch_date": _DECIMAL,
            "orders_by_order_date": _RATIO,
            "revenue_by_order_date_micros": _MONEY,
            "revenue_by_order_date": _DECIMAL,
        },
        in_hour="event_date = {date}",
        keys={"model": "model", "currency": "currency"},
        shown=("event_date", "campaign_id", "model", "window_days"),
        checks=(
            *schema(),
            *not_null("event_date", "store_id", "campaign_id", "currency", "model", "window_days", *_REVENUE),
            *_not_negative(*_REVENUE),
            _one_row("event_date, store_id, campaign_id, currency, model, window_days"),
        ),
    ),
    Suite(
        table="fct_advertiser_performance",
        columns={
            "event_date": DATE,
            "store_id": TEXT,
            "campaign_id": TEXT,
            "currency": TEXT,
            **_types(*_COUNTS, "gross_impressions", "gross_clicks", "spend_nanos", "spend_micros"),
            "spend": _DECIMAL,
            "invalid_spend_micros": _MONEY,
            "gross_spend_micros": _MONEY,
            "ctr": _RATIO,
            "cpc_micros": _MONEY,
            "cpm_micros": _MONEY,
            "orders_by_touch_date": _RATIO,
            "revenue_by_touch_date_micros": _MONEY,
            "revenue_by_touch_date": _DECIMAL,
            "orders_by_order_date": _RATIO,
            "revenue_by_order_date_micros": _MONEY,
            "revenue_by_order_date": _DECIMAL,
            "roas": _RATIO,
            "roas_by_order_date": _RATIO,
        },
        in_hour="event_date = {date}",
        keys={"currency": "currency"},
        shown=("event_date", "store_id", "campaign_id", "currency"),
        checks=(
            *schema(),
            *not_null("event_date", "store_id", "campaign_id", "currency", *_COUNTS, "spend_micros", *_REVENUE),
            *_not_negative("spend_micros", *_COUNTS, *_REVENUE),
            groups("form", "currency", CURRENCY, "currency is three capitals"),
            rows("rounded", "spend_micros", _ROUNDED, "spend_micros is spend_nanos, rounded once"),
            rows("net_and_invalid", "gross_clicks", _NOT_GROSS, "gross is net and invalid"),
            _one_row("event_date, store_id, campaign_id, currency"),
        ),
    ),
    Suite(
        table="fct_late_arrivals",
        columns={
            "event_hour": _TIME,
            "region": TEXT,
            **dict.fromkeys(("events", "late", "p50_seconds", "p95_seconds", "p99_seconds", "p100_seconds"), NUMBER),
            **dict.fromkeys(_COMPLETENESS, _RATIO),
        },
        in_hour="event_hour = {utc_start}",
        keys={"region": "region"},
        shown=("event_hour", "region"),
        checks=(
            *schema(),
            *not_null("event_hour", "region", "events", "late", "p50_seconds", *_COMPLETENESS),
            *_not_negative("late", "p50_seconds"),
            rows("part_of_it", "late", "late > events", "late is a part of events"),
            rows(
                "in_order",
                "p50_seconds",
                "not (p50_seconds <= p95_seconds and p95_seconds <= p99_seconds and p99_seconds <= p100_seconds)",
                "more of an hour takes no less time",
            ),
            rows(
                "grows",
                "completeness_0_min",
                f"not (0 <= completeness_0_min and {' and '.join(f'{a} <= {b}' for a, b in pairwise(_COMPLETENESS))} "
                "and completeness_24_h <= 1)",
                "an hour fills up, to 1 at most",
            ),
            _one_row("event_hour, region"),
        ),
    ),
    Suite(
        table="fct_restatements",
        columns={
            "event_date": DATE,
            "campaign_id": TEXT,
            "currency": TEXT,
            "kind": TEXT,
            "cause": TEXT,
            "run_id": TEXT,
            "reason": TEXT,
            "rule_set": TEXT,
            "restated_at": _TIME,
            "is_after_billing": FLAG,
            **_types(*_COUNTS, "spend_nanos", "invalid_spend_nanos"),
            **_types(*(f"{name}_{when}" for name in ("impressions", "clicks", "spend_micros") for when in ("before", "after"))),
        },
        in_hour="event_date = {date}",
        keys={"kind": "kind", "cause": "cause"},
        shown=("event_date", "campaign_id", "kind", "run_id"),
        checks=(
            *schema(),
            *not_null("event_date", "kind", "cause", "run_id", "restated_at", "is_after_billing", *_COUNTS, "spend_nanos"),
            rows(
                "is_the_difference",
                "clicks",
                "clicks_after - clicks_before <> clicks or impressions_after - impressions_before <> impressions",
                "after less before is the change",
            ),
            groups("known", "kind", "kind not in ('late', 'review', 'repair', 'backfill')", "kind is one of the four"),
            _one_row("event_date, campaign_id, currency, kind, cause, run_id"),
        ),
    ),
    Suite(
        table="fct_placement_day",
        columns={
            "event_date": DATE,
            "placement": TEXT,
            "campaign_id": TEXT,
            "store_id": TEXT,
            "currency": TEXT,
            **_types(*_COUNTS, "spend_nanos", "spend_micros"),
            "spend": _DECIMAL,
            "ctr": _RATIO,
        },
        in_hour="event_date = {date}",
        keys={"placement": "placement", "currency": "currency"},
        shown=("event_date", "placement", "campaign_id", "currency"),
        checks=(
            *schema(),
            *not_null("event_date", "campaign_id", "store_id", "currency", *_COUNTS, "spend_nanos", "spend_micros"),
            *_not_negative(*_COUNTS, "spend_nanos", "spend_micros"),
            groups("form", "currency", CURRENCY, "currency is three capitals"),
            rows("rounded", "spend_micros", _ROUNDED, "spend_micros is spend_nanos, rounded once"),
            rows("of_its_impressions", "ctr", "(ctr is null) <> (impressions = 0)", "there is a ctr where there is an impression"),
            _one_row("event_date, placement, campaign_id, store_id, currency"),
        ),
    ),
    Suite(
        table="fct_user_frequency",
        columns={
            "period": TEXT,
            "period_start": DATE,
            "campaign_id": TEXT,
            **_types("impressions_per_user", "users", "impressions", "clicks"),
        },
        in_hour="period = 'day' and period_start = {date}",
        keys={"period": "period"},
        shown=("period", "period_start", "campaign_id", "impressions_per_user"),
        checks=(
            *schema(),
            *not_null("period", "period_start", "campaign_id", "impressions_per_user", "users", "impressions", "clicks"),
            *_not_negative("impressions_per_user", "clicks"),
            rows("at_least_one", "users", "users < 1", "a row has a user"),
            rows(
                "of_its_users",
                "impressions",
                "impressions <> users * impressions_per_user",
                "impressions are those of the users of the row",
            ),
            groups("known", "period", "period not in ('day', 'week')", "period is day or week"),
            rows("on_a_monday", "period_start", "period = 'week' and isodow(period_start) <> 1", "a week begins on a Monday"),
            _one_row("period, period_start, campaign_id, impressions_per_user"),
        ),
    ),
    Suite(
        table="fct_invalid_traffic_sources",
        columns={
            "event_date": DATE,
            "source_type": TEXT,
            "source": TEXT,
            "rule": TEXT,
            "currency": TEXT,
            **_types("campaigns", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos", "invalid_spend_micros"),
            "invalid_spend": _DECIMAL,
        },
        in_hour="event_date = {date}",
        keys={"source_type": "source_type", "rule": "rule", "currency": "currency"},
        shown=("event_date", "source_type", "source", "rule"),
        checks=(
            *schema(),
            *not_null("event_date", "source_type", "rule", "currency", "invalid_impressions", "invalid_clicks"),
            *_not_negative("invalid_impressions", "invalid_clicks", "invalid_spend_nanos"),
            groups("form", "currency", CURRENCY, "currency is three capitals"),
            groups(
                "known",
                "source_type",
                "source_type not in ('user', 'user_agent', 'ad', 'placement', 'region')",
                "source_type is one of the five",
            ),
            _each_type_has_all(),
            _one_row("event_date, source_type, source, rule, currency"),
        ),
    ),
    Suite(
        table="mart_build",
        columns={
            "mart_group": TEXT,
            "build_id": TEXT,
            "built_at": _TIME,
            "git_revision": TEXT,
            "table_name": TEXT,
            "delta_version": NUMBER,
            "dbt_version": TEXT,
            "duckdb_version": TEXT,
        },
        in_hour="true",
        keys={"mart_group": "mart_group"},
        shown=("mart_group", "build_id", "table_name"),
        checks=(
            *schema(),
            *not_null("mart_group", "build_id", "built_at", "table_name", "delta_version"),
            rows("not_negative", "delta_version", "delta_version < 0", "delta_version is not negative"),
            _one_row("mart_group, table_name"),
            Check(
                "build_id.one_a_group",
                "build_id",
                Kind.MEASURE,
                "a group of marts comes of one build",
                "select count(*) from (select mart_group from data group by mart_group having count(distinct build_id) > 1)",
                offenders="select mart_group, list(distinct build_id) as builds from data group by mart_group "
                "having count(distinct build_id) > 1 order by mart_group",
            ),
        ),
    ),
)
