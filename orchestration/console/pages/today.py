"""Today: money and delivery by currency, the curve of the day, and whether the books balance."""

from __future__ import annotations

from datetime import datetime, time, timedelta
from typing import Any

from orchestration.console.live import MEASURES, SUMS
from orchestration.console.pages.accounting import law_by_region
from orchestration.console.tables import Column, DataTable, Row, units_of_nanos
from orchestration.console.view import Page, View

MINUTE_COLUMNS = {
    "day": "event_minute",
    "advertiser": "store_id",
    "campaign": "campaign_id",
    "region": "region",
    "currency": "currency",
}
"""Filter -> the column of table ``minutes`` that it chooses by."""
_BUCKETS = ((1, 5), (4, 15), (15, 60))
"""Up to so many days: so many minutes a point of the curve. Beyond: a day."""
_LAST_MINUTES = 15
TOP = 10


def build(view: View) -> dict[str, Any]:
    """The figures of the page."""
    minutes, until = bucket_minutes(view), _until(view)
    return {
        "money": _money(view, until),
        "delivery": _delivery(view),
        "curves": curves(view, minutes),
        "bucket": bucket_name(minutes),
        "law": law_by_region(view),
        "until": until,
    }


def bucket_minutes(view: View) -> int:
    """The minutes of a point of a curve over the page's days."""
    days = (view.last - view.first).days + 1
    return next((minutes for most, minutes in _BUCKETS if days <= most), 1440)


def bucket_name(minutes: int) -> str:
    """How a person calls a point of a curve."""
    return {1440: "a day", 60: "an hour"}.get(minutes, f"per {minutes} minutes")


def curves(view: View, minutes: int) -> list[dict[str, Any]]:
    """Net spend in steps of ``minutes``, a curve for each currency: ``times`` in seconds since 1970, ``series`` for a chart."""
    bucket = f"time_bucket(interval ({minutes}) minute, event_minute)"
    found = view.minute_rows(
        f"""
        select currency, epoch({bucket})::bigint as since, sum(spend_nanos)::hugeint as nanos
        from minutes where {view.where(**MINUTE_COLUMNS)} group by all order by since
        """
    )
    if not found:
        return []
    step = minutes * 60
    times = list(range(found[0]["since"], found[-1]["since"] + step, step))
    made = []
    for currency in sorted({row["currency"] for row in found}):
        points = {row["since"]: float(units_of_nanos(row["nanos"], currency)) for row in found if row["currency"] == currency}
        made.append({"times": times, "series": [{"label": currency, "values": [points.get(since, 0.0) for since in times]}]})
    return made


def _until(view: View) -> datetime | None:
    """Up to when the newest day has data, where the page shows that day alone: then yesterday is compared up to the same time."""
    if view.first != view.last or view.last != view.newest_day:
        return None
    [row] = view.minute_rows("select max(event_minute) as newest from minutes where event_minute::date = $last")
    newest: datetime | None = row["newest"]
    return newest


def _money(view: View, newest: datetime | None) -> list[Row]:
    """Per currency the net and invalid spend, the net spend of the days before up to the same time, and of a recent minute."""
    by_currency = f"select currency, {SUMS} from minutes where {view.where(**MINUTE_COLUMNS)}"
    now = view.minute_rows(f"{by_currency} group by currency order by sum(impressions + clicks) desc, currency")
    length = (view.last - view.first) + timedelta(days=1)
    until = newest or datetime.combine(view.last, time.max)
    before = {
        row["currency"]: row["spend_nanos"]
        for row in view.minute_rows(
            f"{by_currency} and event_minute <= $until group by currency",
            view.first - length,
            view.last - length,
            until=until - length,
        )
    }
    recent = {
        row["currency"]: row["spend_nanos"]
        for row in view.minute_rows(
            f"{by_currency} and event_minute > $since group by currency", since=until - timedelta(minutes=_LAST_MINUTES)
        )
    }
    for row in now:
        earlier, currency = before.get(row["currency"]), row["currency"]
        row["spend"] = units_of_nanos(row["spend_nanos"], currency)
        row["invalid_spend"] = units_of_nanos(row["invalid_spend_nanos"], currency)
        row["before"] = None if earlier is None else units_of_nanos(earlier, currency)
        row["change"] = row["spend_nanos"] / earlier - 1 if earlier else None
        row["a_minute"] = units_of_nanos(recent.get(currency, 0) // _LAST_MINUTES, currency)
    return now


def _delivery(view: View) -> Row:
    [row] = view.minute_rows(
        f"select {', '.join(f'coalesce(sum({name}), 0)::hugeint as {name}' for name in MEASURES[:4])} from minutes "
        f"where {view.where(**MINUTE_COLUMNS)}"
    )
    return row | {"ctr": row["clicks"] / row["impressions"] if row["impressions"] else None}


def campaigns(view: View) -> DataTable:
    """The campaigns with most net spend in each currency."""
    rows = view.minute_rows(
        f"""
        select campaign_id, store_id, currency, {SUMS} from minutes where {view.where(**MINUTE_COLUMNS)}
        group by campaign_id, store_id, currency
        qualify row_number() over (partition by currency order by sum(spend_nanos) desc, campaign_id) <= {TOP}
        order by currency, sum(spend_nanos) desc, campaign_id
        """
    )
    for row in view.add_names(rows):
        row["ctr"] = row["clicks"] / row["impressions"] if row["impressions"] else None
        row["spend"] = units_of_nanos(row["spend_nanos"], row["currency"])
        gross = row["clicks"] + row["invalid_clicks"]
        row["invalid_share"] = row["invalid_clicks"] / gross if gross else None
    return DataTable(
        "campaigns",
        f"Top campaigns by net spend, {TOP} a currency",
        (
            Column("campaign", "campaign", link=lambda row: view.campaign_url(row["campaign_id"])),
            Column("campaign_id", "id", "id"),
            Column("currency", "currency"),
            Column("impressions", "impressions", "count"),
            Column("clicks", "clicks", "count"),
            Column("ctr", "CTR", "percent", help="clicks / impressions, both net of invalid traffic"),
            Column("spend", "net spend", "money", why=lambda row: why_campaign(view, row)),
            Column("invalid_share", "invalid clicks", "percent", help="share of all clicks that a rule marked as invalid"),
        ),
        rows,
        empty="No spend for these filters.",
    )


def why_campaign(view: View, row: Row) -> str:
    """The address that explains a campaign's spend in a currency over the page's days."""
    return view.url("/why/campaign", campaign=row["campaign_id"], currency=row["currency"], first=view.first, last=view.last)


def changes(view: View) -> DataTable:
    """What late events, reviews, repairs and backfills changed in the days shown, by cause."""
    rows = view.rows(
        f"""
        select cause, currency, count(*)::bigint as changes, sum(clicks)::bigint as clicks, sum(spend_nanos)::hugeint as nanos
        from fct_restatements where {view.where(day="event_date", campaign="campaign_id", currency="currency")}
        group by all order by cause, currency
        """
    )
    for row in rows:
        row["spend"] = units_of_nanos(row["nanos"], row["currency"])
    return DataTable(
        "changes",
        "What changed after the fact",
        (
            Column("cause", "cause"),
            Column("currency", "currency"),
            Column("changes", "changes", "count"),
            Column("clicks", "clicks", "change"),
            Column("spend", "net spend", "money"),
        ),
        rows,
        empty="Nothing changed after it was first counted.",
    )


PAGE = Page(
    "today",
    "/",
    "Today",
    build,
    {"campaigns": campaigns, "changes": changes},
    ("advertiser", "campaign", "day", "region", "currency"),
    is_live=True,
)
