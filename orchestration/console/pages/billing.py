"""Billing: the ledger by advertiser and day, and a statement for each advertiser and month."""

from __future__ import annotations

import re
from datetime import date
from typing import Any
from urllib.parse import quote

from orchestration.console.tables import Column, DataTable, Row, units_of_micros
from orchestration.console.view import DAY, Page, View
from spark_jobs.errors import UsageError

_ROWS = 2_000
_TYPES = ("charge", "credit", "adjustment", "accrual")
_SUMS = ", ".join(f"coalesce(sum(amount_micros) filter (line_type = '{name}'), 0)::hugeint as {name}" for name in _TYPES)
_DIMENSIONS = {"day": "event_date", "advertiser": "store_id", "campaign": "campaign_id", "currency": "currency"}
_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")


def build(view: View) -> dict[str, Any]:
    """The totals by currency, and the months that have statements."""
    months = view.rows(
        f"select distinct strftime(event_date, '%Y-%m') as month, store_id from fct_billing_ledger "
        f"where {view.where(advertiser='store_id')} and event_date between $first and $last order by all limit {_ROWS}"
    )
    return {"totals": _summed(view, ""), "statements": months, "stores": view.names("store"), "types": _TYPES}


def by_advertiser(view: View) -> DataTable:
    """The ledger by advertiser and currency."""
    rows = _summed(view, "store_id,")
    view.add_names(rows, "store", "advertiser")
    columns = (
        Column("advertiser", "advertiser", link=lambda row: view.url("/billing", advertiser=row["store_id"])),
        Column("store_id", "id", "id"),
        Column("currency", "currency"),
        *_TYPE_COLUMNS,
    )
    return DataTable("advertisers", "By advertiser", columns, rows, empty=_EMPTY)


def by_day(view: View) -> DataTable:
    """The ledger by day and currency."""
    columns = (Column("event_date", "day (UTC)", "date"), Column("currency", "currency"), *_TYPE_COLUMNS)
    return DataTable("days", "By day", columns, _summed(view, "event_date,"), empty=_EMPTY)


def lines(view: View) -> DataTable:
    """The lines of the ledger, each with its reason and its explanation."""
    return _lines(view, view.where(**_DIMENSIONS), "Lines of the ledger")


def build_statement(view: View) -> dict[str, Any]:
    """What an advertiser owes for a month. Raises UsageError where the advertiser or the month is missing."""
    advertiser, first, last = _statement_of(view)
    totals = _summed(view, "", _STATEMENT_TEST, advertiser=advertiser, start=first, end=last)
    name = view.names("store").get(advertiser, advertiser)
    return {"advertiser": advertiser, "name": name, "month": f"{first:%Y-%m}", "start": first, "end": last, "totals": totals}


def statement_campaigns(view: View) -> DataTable:
    """A statement's amounts by campaign."""
    advertiser, first, last = _statement_of(view)
    rows = _summed(view, "campaign_id,", _STATEMENT_TEST, advertiser=advertiser, start=first, end=last)
    view.add_names(rows)
    columns = (Column("campaign", "campaign"), Column("campaign_id", "id", "id"), Column("currency", "currency"), *_TYPE_COLUMNS)
    return DataTable("campaigns", "By campaign", columns, rows, empty="Nothing was billed in this month.")


def statement_lines(view: View) -> DataTable:
    """All lines of a statement."""
    advertiser, first, last = _statement_of(view)
    return _lines(view, _STATEMENT_TEST, "Lines", advertiser=advertiser, start=first, end=last)


_STATEMENT_TEST = "store_id = $advertiser and event_date between $start and $end"


def _statement_of(view: View) -> tuple[str, date, date]:
    month = view.arguments.get("month", "")
    if not view.filters.advertiser or not _MONTH.fullmatch(month):
        raise UsageError("a statement needs advertiser=... and month=..., as 2025-06", hint="choose one on the page Billing")
    first = date.fromisoformat(f"{month}-01")
    following = date(first.year + first.month // 12, first.month % 12 + 1, 1)
    return view.filters.advertiser, first, following - DAY


def _summed(view: View, grain: str, test: str = "", **parameters: Any) -> list[Row]:
    rows = view.rows(
        f"select {grain} currency, {_SUMS}, sum(amount_micros)::hugeint as total from fct_billing_ledger "
        f"where {test or view.where(**_DIMENSIONS)} group by all order by all limit {_ROWS}",
        **parameters,
    )
    for row in rows:
        row["billed"] = row["charge"] + row["credit"] + row["adjustment"]
        for name in (*_TYPES, "billed", "total"):
            row[name] = units_of_micros(row[name], row["currency"])
    return rows


def _lines(view: View, test: str, title: str, **parameters: Any) -> DataTable:
    rows = view.rows(
        f"""
        select line_id, line_type, event_date, campaign_id, currency, amount_micros, reason, billed_at, run_id
        from fct_billing_ledger where {test} order by event_date, campaign_id, currency, billed_at nulls last, line_id limit {_ROWS}
        """,
        **parameters,
    )
    for row in rows:
        row["amount"] = units_of_micros(row["amount_micros"], row["currency"])
        row["reason"] = (row["reason"] or "").replace("_", " ")
    columns = (
        Column("event_date", "day (UTC)", "date"),
        Column("campaign_id", "campaign", "id"),
        Column("line_type", "type"),
        Column("currency", "currency"),
        Column("amount", "amount", "money", why=lambda row: f"/why/billing/{quote(row['line_id'], safe='')}"),
        Column("reason", "reason"),
        Column("billed_at", "billed (UTC)", "time"),
        Column("line_id", "line", "id"),
        Column("run_id", "run", "id"),
    )
    return DataTable("lines", title, columns, rows, empty=_EMPTY)


_EMPTY = "Nothing for these filters. Closed days are billed by `adtally bill`, which the ingest runs."
_TYPE_COLUMNS = (
    Column("charge", "charges", "money", help="the spend of closed days"),
    Column("credit", "credits", "money", help="given back after a review, a repair or a cancelled click"),
    Column("adjustment", "adjustments", "money", help="later changes, by backfills and late records"),
    Column("billed", "billed", "money", help="charges + credits + adjustments"),
    Column("accrual", "accruals", "money", help="spend that is not billed yet"),
    Column("total", "total", "money", help="billed + accruals: equal to the net spend"),
)

PAGE = Page(
    "billing",
    "/billing",
    "Billing",
    build,
    {"advertisers": by_advertiser, "days": by_day, "lines": lines},
    ("advertiser", "campaign", "day", "currency"),
)
STATEMENT = Page(
    "statement",
    "/billing/statement",
    "Statement",
    build_statement,
    {"campaigns": statement_campaigns, "lines": statement_lines},
    (),
    in_menu=False,
)
