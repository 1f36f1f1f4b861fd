"""The marts, as published: what people rely on, held once more on the finished file."""

from __future__ import annotations

from expectations.checks import Check, Kind, Suite, groups, not_null, rows, schema
from expectations.suites.common import CURRENCY, DATE, FLAG, NUMBER, REGION, TEXT

_TIME = "TIMESTAMP"
_COUNTS = ("impressions", "clicks", "invalid_impressions", "invalid_clicks")
_MEASURES = (*_COUNTS, "spend_nanos", "spend_micros")
_ADDED = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos")
_OUTCOMES = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "invalid_traffic", "unpriced")
_ROUNDED = "abs(spend_micros * 1000 - spend_nanos) > 500"


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


MART_SUITES = (
    Suite(
        table="fct_campaign_day",
        columns={
            "event_date": DATE,
            "campaign_id": TEXT,
            "store_id": TEXT,
            "currency": TEXT,
            **dict.fromkeys(_MEASURES, NUMBER),
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
            **dict.fromkeys(_MEASURES, NUMBER),
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
            **dict.fromkeys(
                ("rows_different", "rows_expected", "rows_found", "nanos_expected", "nanos_found", "micros_difference"), NUMBER
            ),
            "is_repaired": FLAG,
            "is_latest": FLAG,
            "detail": TEXT,
        },
        in_hour="event_hour = {utc_start}",
        keys={"cause": "cause"},
        shown=("run_id", "event_hour", "layer", "cause", "campaign_id"),
        checks=(
            *schema(),
            *not_null("run_id", "run_at", "layer", "cause", "rows_different", "is_repaired", "is_latest"),
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
