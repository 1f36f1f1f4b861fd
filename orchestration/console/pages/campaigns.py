"""Campaigns: delivery, money, budget and pacing, return and invalid share of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from orchestration.console.live import SUMS
from orchestration.console.pages.today import MINUTE_COLUMNS, why_campaign
from orchestration.console.tables import Column, DataTable, Row, units_of_micros, units_of_nanos
from orchestration.console.view import Page, View

_OF_PACING = ("budget", "paced_share", "projected", "alert")

_MONEY_OF_PACING = {"budget": "daily_budget_micros", "spent": "spent_micros", "expected": "expected_micros"} | {
    "projected": "projected_micros",
    "overspend": "overspend_micros",
}
_DAY_MINUTES = 1440


def build(view: View) -> dict[str, Any]:
    """What the page shows beside its table. Curves are read for the rows that are shown only."""
    return {"curves_of": _curves_of(view)}


def campaigns(view: View) -> DataTable:
    """Every campaign with traffic in the page's days, the one with most events first."""
    rows, revenue = view.add_names(_figures(view)), _revenue(view)
    for row in rows:
        currency, earned = row["currency"], revenue.get((row["campaign_id"], row["currency"]))
        add_rates(row)
        row["id_below"] = row["campaign_id"] if row["campaign"] != row["campaign_id"] else None
        row["revenue"] = units_of_micros(earned, currency)
        row["roas"] = earned * 1000 / row["spend_nanos"] if earned is not None and row["spend_nanos"] else None
    table = _table(view, rows)
    needed = rows if _needs_all_pacing(view) else table.arranged(view.filters).rows
    paced = pacing_of(view, [row["campaign_id"] for row in needed])
    for row in needed:
        row["pacing"] = paced.get((row["campaign_id"], row["currency"]))
        row |= dict.fromkeys(_OF_PACING) | figures_of(row["pacing"])
    return table


def _needs_all_pacing(view: View) -> bool:
    """Whether more rows need their pacing than the page shows: it reads every minute of their day."""
    filters = view.filters
    is_sorted_by_it = filters.sort.rpartition(".")[2] in _OF_PACING
    return is_sorted_by_it or bool(filters.search) or filters.rows == "all" or view.path.startswith("/export/")


def _table(view: View, rows: Sequence[Row]) -> DataTable:
    return DataTable(
        "campaigns",
        "Campaigns",
        _columns(view),
        rows,
        empty="No campaign has traffic for these filters. Choose other days, or Reset.",
        note=f"Budget, pacing and projection are those of {view.last}, of all regions, as of the newest minute of the mart build. "
        f"ROAS: {view.filters.model.replace('_', ' ')}, {view.filters.window} days, revenue of orders by the day of the touch.",
    )


def _columns(view: View) -> tuple[Column, ...]:
    return (
        Column("campaign", "campaign", link=lambda row: view.campaign_url(row["campaign_id"]), below="id_below"),
        Column("campaign_id", "id", "id", is_shown=False),
        Column("currency", "currency", is_shown=False),
        Column("impressions", "impressions", "count"),
        Column("clicks", "clicks", "count"),
        Column("ctr", "CTR", "percent", help="clicks / impressions, both net of invalid traffic"),
        Column("spend", "net spend", "money", why=lambda row: why_campaign(view, row)),
        Column("budget", "budget", "money", unit="a day"),
        Column("paced_share", "of plan", "percent", help="spent / what the campaign's own curve expects by that minute"),
        Column("projected", "projected", "money", help="spend at the end of the day if the rest follows the campaign's own curve"),
        Column("alert", "alert", is_shown=False),
        Column("roas", "ROAS", "ratio", help="revenue by the chosen model and window / net spend"),
        Column("invalid_share", "invalid", "percent", help="share of all impressions and clicks that a rule marked as invalid"),
    )


def add_rates(row: Row) -> None:
    """Add what follows from a row's measures: CTR, money in units of its currency, and the share of invalid events."""
    row["ctr"] = row["clicks"] / row["impressions"] if row["impressions"] else None
    row["spend"] = units_of_nanos(row["spend_nanos"], row["currency"])
    row["invalid_spend"] = units_of_nanos(row["invalid_spend_nanos"], row["currency"])
    invalid = row["invalid_impressions"] + row["invalid_clicks"]
    gross = row["impressions"] + row["clicks"] + invalid
    row["invalid_share"] = invalid / gross if gross else None


def figures_of(pacing: Row | None) -> Row:
    """The cells of a campaign's pacing; empty where it has none."""
    if pacing is None:
        return {}
    spent, expected = pacing["spent"], pacing["expected"]
    return {
        "budget": pacing["budget"],
        "projected": pacing["projected"],
        "paced_share": float(spent / expected) if expected and spent is not None else None,
        "alert": _alert(pacing),
    }


def _alert(pacing: Row) -> str | None:
    """What a person should know of a campaign's pacing, in words."""
    if pacing["overspend"]:
        return "over budget"
    if pacing["is_alert"]:
        return "spends too early"
    budget, projected = pacing["budget"], pacing["projected"]
    return "will pass its budget" if budget and projected is not None and projected > budget else None


def _figures(view: View) -> list[Row]:
    """The measures by campaign, store and currency: live where the live figures have the days, else from the marts."""
    select = f"select campaign_id, store_id, currency, {SUMS} from"
    last = "group by campaign_id, store_id, currency order by sum(impressions + clicks) desc, campaign_id, currency"
    if view.is_live or view.filters.region:
        return view.minute_rows(f"{select} minutes where {view.where(**MINUTE_COLUMNS)} {last}")
    tests = view.where(day="event_date", advertiser="store_id", campaign="campaign_id", currency="currency")
    return view.rows(f"{select} fct_campaign_day where {tests} {last}")


def pacing_of(view: View, campaigns: Sequence[str]) -> dict[tuple[str, str], Row]:
    """(campaign, currency) -> pacing at the newest minute of the page's last day, money in units of the currency."""
    if not campaigns:
        return {}
    found = view.rows(
        f"""
        with newest as (
            select campaign_id, currency, max(event_minute) as event_minute from fct_budget_pacing
            where event_date = $last and list_contains($wanted, campaign_id) and {view.where(currency="currency")} group by all
        )
        select campaign_id, currency, event_minute, is_alert, history_days, {", ".join(_MONEY_OF_PACING.values())}
        from fct_budget_pacing semi join newest using (campaign_id, currency, event_minute) where event_date = $last
        """,
        wanted=sorted(set(campaigns)),
    )
    for row in found:
        row |= {name: units_of_micros(row[column], row["currency"]) for name, column in _MONEY_OF_PACING.items()}
    return {(row["campaign_id"], row["currency"]): row for row in found}


def _revenue(view: View) -> dict[tuple[str, str], int]:
    """(campaign, currency) -> revenue in micros by the chosen model and window. Orders have no region of an ad."""
    if view.filters.region:
        return {}
    tests = view.where(day="event_date", advertiser="store_id", campaign="campaign_id", currency="currency")
    rows = view.rows(
        "select campaign_id, currency, sum(revenue_by_touch_date_micros)::hugeint as micros from fct_advertiser_attribution "
        f"where {tests} and model = $model and window_days = $window group by all"
    )
    return {(row["campaign_id"], row["currency"]): row["micros"] for row in rows}


def _curves_of(view: View) -> Callable[[Sequence[Row]], dict[tuple[str, str], list[int]]]:
    """Make what reads the curves of net spend of the rows that the table shows: by hour, or by day over several days."""

    def read(rows: Sequence[Row]) -> dict[tuple[str, str], list[int]]:
        wanted = sorted({row["campaign_id"] for row in rows})
        if not wanted:
            return {}
        minutes = 60 if view.first == view.last else _DAY_MINUTES
        bucket = f"time_bucket(interval ({minutes}) minute, event_minute)"
        found = view.minute_rows(
            f"select campaign_id, currency, {bucket} as since, sum(spend_nanos)::hugeint as nanos from minutes "
            f"where {view.where(**MINUTE_COLUMNS)} and list_contains($wanted, campaign_id) group by all",
            wanted=wanted,
        )
        steps = _steps(view, minutes, max((row["since"] for row in found), default=None))
        points: dict[tuple[str, str], dict[datetime, int]] = {}
        for row in found:
            points.setdefault((row["campaign_id"], row["currency"]), {})[row["since"]] = row["nanos"]
        return {key: [by_time.get(step, 0) for step in steps] for key, by_time in points.items()}

    return read


def _steps(view: View, minutes: int, newest: datetime | None) -> list[datetime]:
    """The beginnings of the steps of a curve, up to the newest one with data."""
    start = datetime.combine(view.first, datetime.min.time())
    count = ((view.last - view.first).days + 1) * _DAY_MINUTES // minutes
    steps = [start + timedelta(minutes=minutes * step) for step in range(count)]
    return [step for step in steps if newest is not None and step <= newest]


def bar(pacing: Row) -> dict[str, float]:
    """A campaign's pacing as parts of a bar of width 100: where the budget, the spend, the expectation and the projection end."""
    amounts = {name: pacing[name] or Decimal() for name in ("budget", "spent", "expected", "projected")}
    top = max(amounts["budget"], amounts["spent"], min(amounts["projected"], 2 * amounts["budget"])) or Decimal(1)
    return {name: min(100.0, round(float(100 * amount / top), 2)) for name, amount in amounts.items()}


PAGE = Page(
    "campaigns",
    "/campaigns",
    "Campaigns",
    build,
    {"campaigns": campaigns},
    ("advertiser", "campaign", "day", "region", "currency", "model", "window", "search"),
    is_live=True,
)
