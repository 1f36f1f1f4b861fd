"""Trust: the law of the books by region and hour, lateness, recounts, checks, restatements, and alerts with their runbooks."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from orchestration.alerts.notifier import AlertFile
from orchestration.console.pages.accounting import OUTCOMES, law_by_region
from orchestration.console.tables import Column, DataTable, Row, units_of_nanos
from orchestration.console.view import Page, View

_HOURS = "event_hour::date between $first and $last"
_ALERTS = 50
_ROWS = 1_000
_STRIP_HOURS = 14 * 24
"""The newest hours of a heat strip, at most."""


def build(view: View) -> dict[str, Any]:
    """The law, the strips of lateness, the matrix of checks, and the alerts."""
    return {"law": law_by_region(view), "strips": _lateness(view), "checks": _checks(view), "alerts": _alerts(view)}


def law(view: View) -> DataTable:
    """The law by region and hour."""
    rows = view.rows(
        f"""
        select event_hour, coalesce(region, 'unknown') as region, offered, {", ".join(OUTCOMES)},
            offered - accepted - duplicate - conflict - rejected as rest, late, unpriced
        from fct_event_accounting where {_HOURS} and {view.where(region="region")} order by event_hour desc, region limit {_ROWS}
        """
    )
    columns = (
        Column("event_hour", "hour (UTC)", "time"),
        Column("region", "region"),
        *(Column(name, name, "count") for name in ("offered", *OUTCOMES)),
        Column("rest", "rest", "count", help="offered records in none of the outcomes: always 0"),
        Column("late", "late", "count", help="accepted, received after the hour had closed"),
        Column("unpriced", "unpriced", "count", help="accepted, without a price at their time"),
    )
    title = "offered = accepted + duplicate + conflict + rejected, by region and hour"
    return DataTable("law", title, columns, rows, empty="No record was offered in these days.")


def recounts(view: View) -> DataTable:
    """What recounts found different, and whether it was repaired."""
    rows = view.rows(
        f"""
        select run_at, event_hour, layer, cause, campaign_id, rows_different, micros_difference, is_repaired, is_latest, detail
        from fct_reconciliation where {_HOURS} order by run_at desc, columns(*) limit {_ROWS}
        """
    )
    columns = (
        Column("run_at", "recounted (UTC)", "time"),
        Column("event_hour", "hour (UTC)", "time"),
        Column("layer", "layer"),
        Column("cause", "cause"),
        Column("campaign_id", "campaign", "id"),
        Column("rows_different", "rows", "count", unit="different"),
        Column("micros_difference", "difference", "count", unit="micros"),
        Column("is_repaired", "repaired", "flag"),
        Column("is_latest", "newest recount of its hour", "flag"),
        Column("detail", "detail"),
    )
    empty = "No recount found a difference in these days. `adtally reconcile` recounts the closed hours."
    return DataTable("recounts", "Recounts with a difference, and repairs", columns, rows, empty=empty)


def restatements(view: View) -> DataTable:
    """Money that changed after it was first counted, with the reason."""
    rows = view.rows(
        f"""
        select event_date, kind, cause, reason, currency, count(distinct campaign_id)::bigint as campaigns, sum(impressions)::bigint
            as impressions, sum(clicks)::bigint as clicks, sum(spend_nanos)::hugeint as nanos, max(restated_at) as restated_at,
            bool_or(is_after_billing) as is_after_billing
        from fct_restatements where {view.where(day="event_date", campaign="campaign_id", currency="currency")}
        group by event_date, kind, cause, reason, currency order by event_date desc, kind, cause, reason, currency limit {_ROWS}
        """
    )
    for row in rows:
        row["spend"] = units_of_nanos(row["nanos"], row["currency"])
    columns = (
        Column("event_date", "day (UTC)", "date"),
        Column("kind", "kind"),
        Column("cause", "cause"),
        Column("reason", "reason"),
        Column("campaigns", "campaigns", "count"),
        Column("impressions", "impressions", "change"),
        Column("clicks", "clicks", "change"),
        Column("currency", "currency"),
        Column("spend", "net spend", "money"),
        Column("restated_at", "last change (UTC)", "time"),
        Column("is_after_billing", "after billing", "flag"),
    )
    return DataTable("restatements", "Restatements", columns, rows, empty="Nothing changed after it was first counted.")


def _lateness(view: View) -> list[Row]:
    """Per region the share of events that was missing five minutes after the end of each hour, for a heat strip."""
    rows = view.rows(
        f"""
        select event_hour, region, events, late, p95_seconds, 1 - completeness_5_min as missing
        from fct_late_arrivals where {_HOURS} and {view.where(region="region")} and events > 0
        order by region, event_hour desc
        """
    )
    strips: dict[str, list[Row]] = {}
    for row in rows:
        strips.setdefault(row["region"], []).append(row)
    found = []
    for region, hours in strips.items():
        kept = hours[:_STRIP_HOURS][::-1]
        for row in kept:  # five steps: 0, up to 1 %, 2 %, 5 %, and more
            row["level"] = sum(row["missing"] > limit for limit in (0.0, 0.01, 0.02, 0.05))
        found.append({"region": region, "hours": kept, "worst": max(row["missing"] for row in kept)})
    return found


def _checks(view: View) -> dict[str, Any]:
    """The newest validation of each table and hour: hours as columns, tables as rows."""
    try:  # the list of the data docs, read without an import of Great Expectations, which takes seconds
        entries = json.loads((view.settings.quality_path / "validations.json").read_text("utf-8"))
    except (OSError, ValueError):
        entries = []
    newest: dict[tuple[str, str], Row] = {}
    for entry in entries:
        day = entry["hour"][:10]
        if not day or view.first.isoformat() <= day <= view.last.isoformat():
            newest.setdefault((entry["table"], entry["hour"]), entry)
    hours = sorted({hour for _, hour in newest if hour})[-72:]
    tables = sorted({table for table, _ in newest})
    cells = {table: [newest.get((table, hour)) for hour in ("", *hours)] for table in tables}
    return {"hours": hours, "tables": cells, "has_whole": any(hour == "" for _, hour in newest)}


def _alerts(view: View) -> list[Row]:
    """The newest alerts, with links to their runbooks."""
    found = [alert.to_json() for alert in AlertFile(view.settings).newest(_ALERTS)]
    for alert in found:
        alert["at"] = datetime.fromisoformat(alert["at"]).replace(tzinfo=None)
    return found


PAGE = Page(
    "trust",
    "/trust",
    "Trust",
    build,
    {"law": law, "recounts": recounts, "restatements": restatements},
    ("campaign", "day", "region", "currency"),
)
