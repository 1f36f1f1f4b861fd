"""A campaign's own page: its figures, curve and pacing, ads, placements, hours, users, restatements and billing lines."""

from __future__ import annotations

from datetime import UTC
from typing import Any
from urllib.parse import quote

from orchestration.console.live import SUMS
from orchestration.console.pages.campaigns import add_rates, figures_of, pacing_of
from orchestration.console.pages.today import bucket_minutes, bucket_name, curves, why_campaign
from orchestration.console.tables import Column, DataTable, Row, units_of_micros, units_of_nanos
from orchestration.console.view import Page, View
from spark_jobs.errors import UsageError

_TESTS = {"day": "event_date", "campaign": "campaign_id", "currency": "currency"}
_MOST_ROWS = 5_000
_PACING_POINTS = 300


def build(view: View) -> dict[str, Any]:
    """The campaign's figures by currency, its curve, and its budget's day. Raises UsageError for an unknown campaign."""
    known = _known(view)
    minutes = bucket_minutes(view)
    return {
        "campaign": view.filters.campaign,
        "known": known,
        "money": _money(view),
        "curves": curves(view, minutes),
        "bucket": bucket_name(minutes),
        "pacing": _pacing(view),
    }


def _known(view: View) -> Row:
    """The campaign's name, store, price and budget as they are now."""
    found = view.rows(
        "from dim_campaign where campaign_id = $campaign order by is_current desc, valid_from desc nulls last limit 1"
    )
    if found:
        return found[0]
    if view.live_rows("select 1 as found from minutes where campaign_id = $campaign limit 1"):
        return {"campaign_name": None, "store_id": None, "billing_model": None}
    raise UsageError(
        f"there is no campaign {view.filters.campaign!r}",
        hint="page Campaigns lists them; a campaign that is new appears with its first event, or with the next mart build",
    )


def _money(view: View) -> list[Row]:
    """The figures of each currency, with the budget's day where the campaign has one."""
    rows = view.minute_rows(
        f"select campaign_id, currency, {SUMS} from minutes "
        f"where {view.where(day='event_minute', campaign='campaign_id', region='region', currency='currency')} "
        "group by all order by sum(impressions + clicks) desc, currency"
    )
    paced = pacing_of(view, [view.filters.campaign])
    for row in rows:
        add_rates(row)
        row["why"] = why_campaign(view, row)
        row["pacing"] = paced.get((row["campaign_id"], row["currency"]))
        row |= {"alert": None, "paced_share": None} | figures_of(row["pacing"])
    return rows


def _pacing(view: View) -> list[dict[str, Any]]:
    """Per currency a chart of the last day: what was spent, what the campaign's own curve expects, and the budget."""
    rows = view.rows(
        f"""
        select currency, event_minute, spent_micros, expected_micros, daily_budget_micros from fct_budget_pacing
        where event_date = $last and {view.where(campaign="campaign_id", currency="currency")}
        window part as (partition by currency order by event_minute)
        qualify (row_number() over part - 1) % greatest(1, count(*) over (partition by currency) // {_PACING_POINTS}) = 0
            or row_number() over part = count(*) over (partition by currency)
        order by currency, event_minute
        """
    )
    lines = {"spent": "spent_micros", "expected by its curve": "expected_micros", "budget": "daily_budget_micros"}
    charts = []
    for currency in sorted({row["currency"] for row in rows}):
        mine = [row for row in rows if row["currency"] == currency]
        times = [int(row["event_minute"].replace(tzinfo=UTC).timestamp()) for row in mine]
        series = [{"label": label, "values": [_number(row[name], currency) for row in mine]} for label, name in lines.items()]
        charts.append({"currency": currency, "times": times, "series": series})
    return charts


def _number(micros: int | None, currency: str) -> float | None:
    amount = units_of_micros(micros, currency)
    return None if amount is None else float(amount)


def _delivery_columns(first: Column) -> tuple[Column, ...]:
    return (
        first,
        Column("currency", "currency"),
        Column("impressions", "impressions", "count"),
        Column("clicks", "clicks", "count"),
        Column("ctr", "CTR", "percent"),
        Column("spend", "net spend", "money"),
        Column("invalid_share", "invalid", "percent", help="share of all impressions and clicks that a rule marked as invalid"),
    )


def ads(view: View) -> DataTable:
    """The campaign's ads."""
    tests = view.where(**_TESTS, region="region")
    rows = view.rows(
        f"select ad_id, currency, {SUMS} from fct_campaign_minute where {tests} group by ad_id, currency "
        f"order by sum(impressions + clicks) desc, ad_id, currency limit {_MOST_ROWS}"
    )
    names = {
        row["ad_id"]: row["ad_name"]
        for row in view.rows("select ad_id, any_value(ad_name) as ad_name from dim_ad where campaign_id = $campaign group by 1")
    }
    for row in rows:
        add_rates(row)
        row["ad"] = names.get(row["ad_id"]) or row["ad_id"]
    first, *others = _delivery_columns(Column("ad", "ad"))
    return DataTable("ads", "Ads", (first, Column("ad_id", "id", "id"), *others), rows)


def placements(view: View) -> DataTable:
    """The placements in which the campaign was shown."""
    rows = view.rows(
        f"select placement, currency, {SUMS} from fct_placement_day where {view.where(**_TESTS, region='region')} "
        f"group by placement, currency order by sum(impressions + clicks) desc, placement, currency limit {_MOST_ROWS}"
    )
    for row in rows:
        add_rates(row)
        row["placement"] = row["placement"] or "not given"
    return DataTable("placements", "Placements", _delivery_columns(Column("placement", "placement")), rows)


def hours(view: View) -> DataTable:
    """The hours of the day (UTC), summed over the page's days."""
    tests = view.where(day="event_minute", campaign="campaign_id", region="region", currency="currency")
    rows = view.minute_rows(
        f"select hour(event_minute) as of_day, currency, {SUMS} from minutes where {tests} group by all order by of_day, currency"
    )
    for row in rows:
        add_rates(row)
        row["hour"] = f"{row['of_day']:02}:00"
    return DataTable("hours", "Hours of the day", _delivery_columns(Column("hour", "hour", unit="UTC")), rows)


def frequency(view: View) -> DataTable:
    """How many impressions a user saw on a day."""
    rows = view.rows(
        """
        select impressions_per_user, sum(users)::bigint as users, sum(impressions)::bigint as impressions,
            sum(clicks)::bigint as clicks, sum(users) / sum(sum(users)) over () as share
        from fct_user_frequency
        where period = 'day' and period_start between $first and $last and campaign_id = $campaign group by 1 order by 1
        """
    )
    for row in rows:
        row["ctr"] = row["clicks"] / row["impressions"] if row["impressions"] else None
    return DataTable(
        "frequency",
        "Impressions that a user saw on a day",
        (
            Column("impressions_per_user", "impressions", "count", unit="per user and day"),
            Column("users", "users", "count", help="summed over the days: a user of two days counts twice"),
            Column("share", "share of users", "percent"),
            Column("impressions", "impressions", "count"),
            Column("clicks", "clicks", "count"),
            Column("ctr", "CTR", "percent"),
        ),
        rows,
        empty="No user saw this campaign in these days, or the hourly marts have not been built since.",
    )


def restatements(view: View) -> DataTable:
    """What changed after it was first counted, the newest change first."""
    rows = view.rows(f"from fct_restatements where {view.where(**_TESTS)} order by restated_at desc, columns(*) limit {_MOST_ROWS}")
    for row in rows:
        row["spend"] = units_of_nanos(row["spend_nanos"], row["currency"])
    return DataTable(
        "restatements",
        "What changed after the fact",
        (
            Column("restated_at", "changed at", "time", unit="UTC"),
            Column("event_date", "day", "date", unit="UTC"),
            Column("kind", "kind"),
            Column("cause", "cause"),
            Column("currency", "currency"),
            Column("impressions", "impressions", "change"),
            Column("clicks", "clicks", "change"),
            Column("spend", "net spend", "money"),
            Column("run_id", "run", "id"),
        ),
        rows,
        empty="Nothing changed after it was first counted.",
    )


def billing(view: View) -> DataTable:
    """The campaign's lines of the billing ledger."""
    rows = view.rows(
        f"from fct_billing_ledger where {view.where(**_TESTS)} "
        f"order by event_date desc, posting desc nulls first, line_id limit {_MOST_ROWS}"
    )
    for row in rows:
        row["amount"] = units_of_micros(row["amount_micros"], row["currency"])
        row["billed"] = units_of_micros(row["billed_micros"], row["currency"])
        row["reason_text"] = (row["reason"] or "").replace("_", " ")
    return DataTable(
        "billing",
        "Billing lines",
        (
            Column("event_date", "day", "date", unit="UTC"),
            Column("line_type", "line"),
            Column("reason_text", "reason"),
            Column("currency", "currency"),
            Column("amount", "amount", "money", why=lambda row: f"/why/billing/{quote(row['line_id'], safe='')}"),
            Column("billed", "billed so far", "money", help="what the day is billed in all, up to this line"),
            Column("billed_at", "posted at", "time", unit="UTC"),
            Column("line_id", "id", "id"),
        ),
        rows,
        empty="Nothing is billed for these days yet: a day is billed once all its hours are closed.",
    )


PAGE = Page(
    "campaign",
    "/campaigns/{campaign:path}",
    "Campaign",
    build,
    {
        "ads": ads,
        "placements": placements,
        "hours": hours,
        "frequency": frequency,
        "restatements": restatements,
        "billing": billing,
    },
    ("day", "region", "currency"),
    in_menu=False,
    is_live=True,
)
