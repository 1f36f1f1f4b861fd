"""The published marts: rules that neither their contracts nor dbt's tests enforce before publishing.

dbt enforces columns, types, nulls, grains, accepted values and conservation of sums (dbt_project/models/marts, dbt_project/tests).
For marts by day an hour selects the rows of its day. Without an hour the days of `checked_days` are checked.
"""

from __future__ import annotations

from itertools import pairwise

from great_expectations.expectations.expectation import Expectation

from expectations.suites.common import currency_form, known, no_result, no_row, not_negative, not_null, region_form
from expectations.suites.suite import Suite

_COUNTS = ("impressions", "clicks", "invalid_impressions", "invalid_clicks")
_GROSS = ("gross_impressions", "gross_clicks", "invalid_spend_nanos", "invalid_spend_micros", "gross_spend_micros")
_MEASURES = (*_COUNTS, "spend_nanos", "spend_micros", *_GROSS)
_ADDED = (*_COUNTS, "spend_nanos", "invalid_spend_nanos")
_REVENUE = ("orders_by_touch_date", "revenue_by_touch_date_micros", "orders_by_order_date", "revenue_by_order_date_micros")
_COMPLETENESS = tuple(f"completeness_{after}" for after in ("0_min", "1_min", "5_min", "15_min", "60_min", "24_h"))

_DAY = ("event_date", "campaign_id", "store_id", "currency")

_OF_ITS_DATE = "event_date = {date}"
_OF_ITS_HOUR = "event_hour = {utc_start}"
_OF_ITS_MINUTES = "event_minute >= {utc_start} and event_minute < {utc_end}"


def _net_and_invalid(place: tuple[str, ...]) -> Expectation:
    """Expect gross counts to be the sum of billable and invalid ones."""
    differs = "gross_impressions <> impressions + invalid_impressions or gross_clicks <> clicks + invalid_clicks"
    return no_row(place, "gross_clicks.net_and_invalid", differs, "gross is net and invalid")


def _rounded(place: tuple[str, ...]) -> Expectation:
    """Expect micros within half a micro of the nanos."""
    wrong = "abs(spend_micros * 1000 - spend_nanos) > 500"
    return no_row(place, "spend_micros.rounded", wrong, "spend_micros is spend_nanos, rounded once")


def _sum_of_its_minutes() -> Expectation:
    """Expect each campaign's day to be the sum of its minutes."""
    key = ", ".join(_DAY)
    return no_result(
        "table.sum_of_its_minutes",
        f"""
            select {key} from {{batch}} as days
            full join (
                select {key}, {", ".join(f"sum({name}) as {name}" for name in _ADDED)} from marts.main.fct_campaign_minute
                where event_date in (select day from checked_days where model = 'fct_campaign_minute')
                group by {key}
            ) as minutes using ({key})
            where {" or ".join(f"days.{name} is distinct from minutes.{name}" for name in _ADDED)}
        """,
        "a campaign's day is the sum of its minutes in fct_campaign_minute",
    )


def _sums_to_the_spend() -> Expectation:
    """Expect billing lines and accruals to sum to the spend."""
    key = ", ".join(_DAY)
    return no_result(
        "amount_micros.sums_to_the_spend",
        f"""
            select {key}, sum(amount_micros) as billed_micros, any_value(spend_micros) as spend_micros
            from {{batch}} as lines
            left join (select {key}, spend_micros from marts.main.fct_campaign_day) as days using ({key})
            group by {key} having sum(amount_micros) <> coalesce(any_value(spend_micros), 0)
        """,
        "lines and accruals of a key come to its spend_micros in fct_campaign_day",
    )


_MINUTE = ("event_minute", "region", "campaign_id", "ad_id")
_RECONCILIATION = ("run_id", "event_hour", "layer", "cause", "campaign_id")
_LINE = ("line_id", "event_date", "campaign_id", "store_id")
_PACING = ("event_minute", "campaign_id")
_CREDIT = ("order_id", "model", "window_days", "touch_event_id")
_ARRIVALS = ("event_hour", "region")
_RESTATEMENT = ("event_date", "campaign_id", "kind", "run_id")
_PLACEMENT = ("event_date", "placement", "region", "campaign_id", "ad_id", "currency")
_FREQUENCY = ("period", "period_start", "campaign_id", "impressions_per_user")
_SOURCE = ("event_date", "source_type", "source", "rule")
_RULE = ("event_date", "rule", "campaign_id", "ad_id", "placement", "region")

MART_SUITES = (
    Suite(
        table="fct_campaign_day",
        in_hour=_OF_ITS_DATE,
        place=_DAY,
        expectations=(*not_negative(*_MEASURES), currency_form(_DAY), _net_and_invalid(_DAY), _sum_of_its_minutes()),
    ),
    Suite(
        table="fct_campaign_minute",
        in_hour=_OF_ITS_MINUTES,
        place=_MINUTE,
        expectations=(
            *not_negative(*_MEASURES),
            region_form(_MINUTE),
            no_row(
                _MINUTE,
                "event_date.of_the_minute",
                "event_date <> cast(event_minute as date)",
                "event_date is the day of event_minute",
            ),
            _net_and_invalid(_MINUTE),
        ),
    ),
    Suite(table="fct_event_accounting", in_hour=_OF_ITS_HOUR, place=("event_hour", "region"), expectations=not_null("region")),
    Suite(
        table="fct_reconciliation",
        in_hour=_OF_ITS_HOUR,
        place=_RECONCILIATION,
        expectations=(
            no_row(
                _RECONCILIATION,
                "layer.null_where_nothing_differs",
                "(layer is null) <> (cause = 'none')",
                "layer names where it differs, and is null in an hour without a difference",
            ),
            *not_negative("rows_different"),
            no_row(
                _RECONCILIATION,
                "cause.none_is_none",
                "cause = 'none' and (rows_different <> 0 or rows_expected <> rows_found or nanos_expected <> nanos_found)",
                "an hour without a difference has none",
            ),
        ),
    ),
    Suite(
        table="fct_billing_ledger",
        in_hour=_OF_ITS_DATE,
        place=_LINE,
        expectations=(
            currency_form(_LINE),
            no_row(
                _LINE,
                "line_type.posted_by_a_run",
                "is_posted <> (line_type <> 'accrual') or is_posted and (run_id is null or billed_at is null)",
                "a line that is posted names its run and time; accruals are not posted",
            ),
            _sums_to_the_spend(),
        ),
    ),
    Suite(
        table="fct_budget_pacing",
        in_hour=_OF_ITS_MINUTES,
        place=_PACING,
        expectations=(
            no_row(_PACING, "day_share.is_a_share", "not (day_share > 0 and day_share <= 1)", "day_share is above 0, up to 1"),
            no_row(
                _PACING,
                "overspend_from_lag_micros.part_of_it",
                "not (overspend_from_lag_micros between 0 and overspend_micros)",
                "overspend from lag is a part of the overspend",
            ),
            no_row(
                _PACING, "is_alert.early", "is_alert and (day_share >= 0.8 or daily_budget_micros is null)", "alerts are early ones"
            ),
        ),
    ),
    Suite(
        table="fct_attribution_credits",
        in_hour="order_time >= {utc_start} and order_time < {utc_end}",
        place=_CREDIT,
        expectations=(
            currency_form(_CREDIT),
            *not_negative("credit_micros"),
            no_row(_CREDIT, "touch_time.before_the_order", "touch_time >= order_time", "a touch is strictly before its order"),
            no_row(
                _CREDIT,
                "window_days.in_the_window",
                "touch_type = 'click' and touch_time < order_time - to_days(window_days::integer)",
                "a click lies in the lookback window",
            ),
            no_result(
                "table.grain",
                f"select {', '.join(_CREDIT)}, count(*) as rows from {{batch}} group by all having count(*) > 1",
                f"one row a ({', '.join(_CREDIT)})",
            ),
        ),
    ),
    Suite(
        table="fct_advertiser_attribution",
        in_hour=_OF_ITS_DATE,
        place=("event_date", "campaign_id", "model", "window_days"),
        expectations=not_negative(*_REVENUE),
    ),
    Suite(
        table="fct_advertiser_performance",
        in_hour=_OF_ITS_DATE,
        place=_DAY,
        expectations=(
            *not_negative("spend_micros", *_COUNTS, *_REVENUE),
            currency_form(_DAY),
            _rounded(_DAY),
            _net_and_invalid(_DAY),
        ),
    ),
    Suite(
        table="fct_late_arrivals",
        in_hour=_OF_ITS_HOUR,
        place=_ARRIVALS,
        expectations=(
            *not_negative("late", "p50_seconds"),
            no_row(_ARRIVALS, "late.part_of_it", "late > events", "late is a part of events"),
            no_row(
                _ARRIVALS,
                "p50_seconds.in_order",
                "not (p50_seconds <= p95_seconds and p95_seconds <= p99_seconds and p99_seconds <= p100_seconds)",
                "more of an hour takes no less time",
            ),
            no_row(
                _ARRIVALS,
                "completeness_0_min.grows",
                f"not (0 <= completeness_0_min and {' and '.join(f'{a} <= {b}' for a, b in pairwise(_COMPLETENESS))} "
                "and completeness_24_h <= 1)",
                "an hour fills up, to 1 at most",
            ),
        ),
    ),
    Suite(
        table="fct_restatements",
        in_hour=_OF_ITS_DATE,
        place=_RESTATEMENT,
        expectations=(
            no_row(
                _RESTATEMENT,
                "clicks.is_the_difference",
                "clicks_after - clicks_before <> clicks or impressions_after - impressions_before <> impressions",
                "after less before is the change",
            ),
            known("kind", ["late", "review", "repair", "backfill"], "kind is one of the four"),
        ),
    ),
    Suite(
        table="fct_placement_day",
        in_hour=_OF_ITS_DATE,
        place=_PLACEMENT,
        expectations=(
            *not_negative(*_COUNTS, "spend_nanos", "spend_micros"),
            currency_form(_PLACEMENT),
            _rounded(_PLACEMENT),
            no_row(
                _PLACEMENT,
                "ctr.of_its_impressions",
                "(ctr is null) <> (impressions = 0)",
                "there is a ctr where there is an impression",
            ),
        ),
    ),
    Suite(
        table="fct_user_frequency",
        in_hour="period = 'day' and period_start = {date}",
        place=_FREQUENCY,
        expectations=(
            *not_negative("impressions_per_user", "clicks"),
            no_row(_FREQUENCY, "users.at_least_one", "users < 1", "a row has a user"),
            no_row(
                _FREQUENCY,
                "impressions.of_its_users",
                "impressions <> users * impressions_per_user",
                "impressions are those of the users of the row",
            ),
            no_row(
                _FREQUENCY, "period_start.on_a_monday", "period = 'week' and isodow(period_start) <> 1", "a week begins on a Monday"
            ),
        ),
    ),
    Suite(
        table="fct_invalid_traffic_day",
        in_hour=_OF_ITS_DATE,
        place=_RULE,
        expectations=(
            *not_negative(*_ADDED),
            currency_form(_RULE),
            _net_and_invalid(_RULE),
            no_row(
                _RULE,
                "rule.none_is_billable",
                "(rule = 'none') <> (invalid_impressions + invalid_clicks = 0) or (rule <> 'none') <> (impressions + clicks = 0)",
                "rows with the rule none are billable, the others are not",
            ),
        ),
    ),
    Suite(
        table="fct_invalid_traffic_sources",
        in_hour=_OF_ITS_DATE,
        place=_SOURCE,
        expectations=(*not_negative("invalid_impressions", "invalid_clicks", "invalid_spend_nanos"), currency_form(_SOURCE)),
    ),
    Suite(
        table="mart_build",
        in_hour="true",
        place=("mart_group", "build_id", "table_name"),
        expectations=(
            *not_negative("delta_version"),
            no_result(
                "build_id.one_a_group",
                "select mart_group, list(distinct build_id order by build_id) as builds from {batch} group by mart_group "
                "having count(distinct build_id) > 1",
                "a group of marts comes of one build",
            ),
        ),
    ),
)
