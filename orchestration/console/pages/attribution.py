"""Attribution: the five models side by side, the windows, how long orders take, and revenue by click date and by order date."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from urllib.parse import quote

from orchestration.console.tables import Column, DataTable, Row, units_of_micros, units_of_nanos
from orchestration.console.view import Page, View

_ROWS = 1_000
_DIMENSIONS = {"day": "event_date", "advertiser": "store_id", "campaign": "campaign_id", "currency": "currency"}
_LAG_HOURS = (1, 6, 24, 72, 168, 336, 720)
"""The limits of the classes of the conversion lag, in hours."""


def build(view: View) -> dict[str, Any]:
    """The bars of the models, by currency, in the page's window."""
    rows = _revenue(view, "model,", "window_days = $window")
    bars: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["currency"], -row["by_touch_date"], row["model"])):
        bars.setdefault(row["currency"], []).append(row)
    for found in bars.values():
        most = max(row["by_touch_date"] for row in found) or Decimal(1)
        for row in found:
            row["width"] = float(100 * row["by_touch_date"] / most)
    return {"bars": bars}


def by_model(view: View) -> DataTable:
    """Orders, revenue and ROAS by model and window."""
    rows = _revenue(view, "model, window_days,")
    spend = {
        row["currency"]: units_of_nanos(row["nanos"], row["currency"])
        for row in view.rows(
            "select currency, sum(spend_nanos)::hugeint as nanos from fct_advertiser_performance "
            f"where {view.where(**_DIMENSIONS)} group by currency"
        )
    }
    for row in rows:
        cost = spend.get(row["currency"])
        row["roas"] = float(row["by_touch_date"] / cost) if cost else None
    columns = (
        Column("model", "model"),
        Column("window_days", "window", "count", unit="days"),
        *_REVENUE_COLUMNS,
        Column("roas", "ROAS", "ratio", help="revenue by click date / net spend of the same days"),
    )
    return DataTable("models", "Models and windows", columns, rows, empty=_EMPTY)


def by_day(view: View) -> DataTable:
    """Revenue by click date beside revenue by order date, in the page's model and window."""
    rows = _revenue(view, "event_date,", "model = $model and window_days = $window")
    columns = (Column("event_date", "day (UTC)", "date"), *_REVENUE_COLUMNS)
    return DataTable("days", f"By day: {_chosen(view)}", columns, rows, empty=_EMPTY)


def by_campaign(view: View) -> DataTable:
    """Orders and revenue by campaign, in the page's model and window."""
    rows = _revenue(view, "campaign_id,", "model = $model and window_days = $window")
    view.add_names(rows)
    columns = (Column("campaign", "campaign"), Column("campaign_id", "id", "id"), *_REVENUE_COLUMNS)
    return DataTable("campaigns", f"By campaign: {_chosen(view)}", columns, rows, empty=_EMPTY)


def conversion_lag(view: View) -> DataTable:
    """How long after the touch the orders came, in the page's model and window, by share of the credit."""
    edges = ", ".join(f"when hours <= {limit} then {limit}" for limit in _LAG_HOURS)
    rows = view.rows(
        f"""
        select case {edges.replace(", ", " ")} else {2 * _LAG_HOURS[-1]} end as hours_at_most, currency,
            sum(credit_weight) as orders, sum(credit_micros)::hugeint as micros
        from (
            select epoch(order_time - touch_time) / 3600 as hours, * from fct_attribution_credits
            where model = $model and window_days = $window and touch_date between $first and $last
                and {view.where(advertiser="store_id", campaign="campaign_id", currency="currency")}
        )
        group by all order by currency, hours_at_most
        """
    )
    totals: dict[str, float] = {}
    for row in rows:
        totals[row["currency"]] = totals.get(row["currency"], 0.0) + row["orders"]
    for row in rows:
        hours = row["hours_at_most"]
        row["lag"] = f"up to {hours} h" if hours < 48 else f"up to {hours // 24} days"
        row["share"] = row["orders"] / totals[row["currency"]]
        row["revenue"] = units_of_micros(row["micros"], row["currency"])
    columns = (
        Column("lag", "from touch to order"),
        Column("currency", "currency"),
        Column("orders", "orders", "count", help="orders, each shared out among its touches by the model"),
        Column("share", "share of the orders", "percent"),
        Column("revenue", "revenue", "money"),
    )
    return DataTable("lag", f"Conversion lag: {_chosen(view)}", columns, rows, empty=_EMPTY)


def orders(view: View) -> DataTable:
    """The newest credited orders, each with its explanation."""
    rows = view.rows(
        f"""
        select order_id, order_time, campaign_id, currency, touch_type, touch_time, credit_weight, credit_micros
        from fct_attribution_credits
        where model = $model and window_days = $window and order_date between $first and $last
            and {view.where(advertiser="store_id", campaign="campaign_id", currency="currency")}
        order by order_time desc, columns(*) limit {_ROWS}
        """
    )
    for row in rows:
        row["credit"] = units_of_micros(row["credit_micros"], row["currency"])
    columns = (
        Column("order_id", "order", "id"),
        Column("order_time", "ordered (UTC)", "time"),
        Column("campaign_id", "campaign", "id"),
        Column("touch_type", "touch"),
        Column("touch_time", "touched (UTC)", "time"),
        Column("credit_weight", "share of the order", "percent"),
        Column("credit", "credit", "money", why=lambda row: f"/why/order?order={quote(row['order_id'], safe='')}"),
    )
    return DataTable("orders", f"Newest credited orders: {_chosen(view)}", columns, rows, empty=_EMPTY)


def _revenue(view: View, grain: str, test: str = "true") -> list[Row]:
    rows = view.rows(
        f"""
        select {grain} currency,
            sum(orders_by_touch_date) as orders_by_touch_date, sum(orders_by_order_date) as orders_by_order_date,
            sum(revenue_by_touch_date_micros)::hugeint as touch_micros, sum(revenue_by_order_date_micros)::hugeint as order_micros
        from fct_advertiser_attribution where {view.where(**_DIMENSIONS)} and {test}
        group by all order by all limit {_ROWS}
        """
    )
    for row in rows:
        row["by_touch_date"] = units_of_micros(row["touch_micros"], row["currency"])
        row["by_order_date"] = units_of_micros(row["order_micros"], row["currency"])
    return rows


def _chosen(view: View) -> str:
    return f"{view.filters.model.replace('_', ' ')}, {view.filters.window} days"


_EMPTY = "No credited order for these filters. Credit comes with `adtally attribute`, which the ingest runs."
_REVENUE_COLUMNS = (
    Column("currency", "currency"),
    Column("orders_by_touch_date", "orders by click date", "count"),
    Column("by_touch_date", "revenue by click date", "money"),
    Column("orders_by_order_date", "orders by order date", "count"),
    Column("by_order_date", "revenue by order date", "money"),
)

PAGE = Page(
    "attribution",
    "/attribution",
    "Attribution",
    build,
    {"models": by_model, "days": by_day, "campaigns": by_campaign, "lag": conversion_lag, "orders": orders},
    ("advertiser", "campaign", "day", "currency", "model", "window"),
)
