"""Invalid traffic: what the rules marked, the money that was not billed, and the rule set in force with its history."""

from __future__ import annotations

import json
from typing import Any

from orchestration.console.tables import Column, DataTable, Row, units_of_nanos
from orchestration.console.view import Page, View
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import RULE_SETS

_DIMENSIONS = {
    "day": "event_date",
    "advertiser": "store_id",
    "campaign": "campaign_id",
    "region": "region",
    "currency": "currency",
}
_COUNTS = (
    "sum(gross_impressions + gross_clicks)::bigint as gross, sum(invalid_impressions)::bigint as invalid_impressions, "
    "sum(invalid_clicks)::bigint as invalid_clicks, sum(spend_nanos)::hugeint as net_nanos, "
    "sum(invalid_spend_nanos)::hugeint as invalid_nanos"
)
_MOST = 1_000
"""Rows of a table at most: those with most money not billed."""


def build(view: View) -> dict[str, Any]:
    """The totals by currency, and the rule set in force."""
    sets = _rule_sets(view)
    return {
        "totals": _measured(view, ""),
        "in_force": sets[0] if sets else None,
        "entries": _entries(sets[0]) if sets else [],
    }


def by_rule(view: View) -> DataTable:
    """Invalid traffic by rule and currency."""
    rows = [row for row in _measured(view, "rule,") if row["rule"] != "none"]
    return _table("rules", "By rule", (Column("rule", "rule"),), rows, is_rule=True)


def by_campaign(view: View) -> DataTable:
    """Gross, invalid and net by campaign."""
    rows = view.add_names(_measured(view, "campaign_id, store_id,"))
    first = (
        Column("campaign", "campaign", link=lambda row: view.campaign_url(row["campaign_id"])),
        Column("campaign_id", "id", "id"),
    )
    return _table("campaigns", "By campaign", first, rows)


def by_placement(view: View) -> DataTable:
    """Gross, invalid and net by placement."""
    rows = _measured(view, "coalesce(placement, 'not given') as placement,")
    return _table("placements", "By placement", (Column("placement", "placement"),), rows)


def by_day(view: View) -> DataTable:
    """Gross, invalid and net by day."""
    return _table("days", "By day", (Column("event_date", "day (UTC)", "date"),), _measured(view, "event_date,"))


def history(view: View) -> DataTable:
    """All rule sets that were ever used, the newest first."""
    return DataTable(
        "rule_sets",
        "Rule sets, the newest first",
        (
            Column("rule_set", "rule set", "id"),
            Column("set_at", "first used (UTC)", "time"),
            Column("rules_on", "rules in force"),
        ),
        _rule_sets(view),
        empty="No rule set was used yet: run `adtally ingest`.",
    )


def _measured(view: View, grain: str) -> list[Row]:
    rows = view.rows(
        f"select {grain} currency, {_COUNTS} from fct_invalid_traffic_day where {view.where(**_DIMENSIONS)} group by all "
        f"order by invalid_nanos desc, 1, currency limit {_MOST}"
    )
    for row in rows:
        invalid = row["invalid_impressions"] + row["invalid_clicks"]
        row["share"] = invalid / row["gross"] if row["gross"] else None
        row["net_spend"] = units_of_nanos(row["net_nanos"], row["currency"])
        row["invalid_spend"] = units_of_nanos(row["invalid_nanos"], row["currency"])
        row["gross_spend"] = units_of_nanos(row["net_nanos"] + row["invalid_nanos"], row["currency"])
    return rows


def _table(name: str, title: str, first: tuple[Column, ...], rows: list[Row], *, is_rule: bool = False) -> DataTable:
    """A table of gross, invalid and net. The table of rules has no net: a rule says nothing of the events that it did not mark."""
    invalid = (
        Column("invalid_impressions", "invalid impressions", "count"),
        Column("invalid_clicks", "invalid clicks", "count"),
        Column("invalid_spend", "not billed", "money", help="what the invalid clicks and impressions would have cost"),
    )
    all_traffic = (
        Column("gross", "events", "count", help="impressions and clicks, the invalid ones too"),
        *invalid[:2],
        Column("share", "invalid share", "percent", help="invalid events / all events"),
        Column("gross_spend", "gross spend", "money"),
        invalid[2],
        Column("net_spend", "net spend", "money"),
    )
    columns = (*first, Column("currency", "currency"), *(invalid if is_rule else all_traffic))
    return DataTable(name, title, columns, rows, empty="No rule marked an event, for these filters.")


def _rule_sets(view: View) -> list[Row]:
    """The rule sets of invalid traffic, the newest first."""
    found = Lake(view.settings).rows(RULE_SETS, "rule_set", "kind", "content", "set_at").to_pylist()
    rows = sorted((row for row in found if row["kind"] == "invalid_traffic"), key=lambda row: row["set_at"], reverse=True)
    for row in rows:
        row["content"] = json.loads(row["content"])
        row["rules_on"] = ", ".join(entry["name"] for entry in _entries(row) if entry["mode"] != "off") or "none"
    return rows


def _entries(rule_set: Row) -> list[Row]:
    """The rules of a rule set: name, mode, and settings as text; lists by their length."""
    entries = []
    for name, value in rule_set["content"].items():
        if isinstance(value, dict):
            settings = ", ".join(f"{key} {_short(item)}" for key, item in value.items() if key != "mode")
            entries.append({"name": name, "mode": str(value.get("mode", "on")), "settings": settings})
        else:
            entries.append({"name": name, "mode": "on" if value else "off", "settings": _short(value)})
    return entries


def _short(value: object) -> str:
    return f"{len(value):,} entries" if isinstance(value, list) else str(value)


PAGE = Page(
    "invalid",
    "/invalid-traffic",
    "Invalid traffic",
    build,
    {"rules": by_rule, "campaigns": by_campaign, "placements": by_placement, "days": by_day, "rule_sets": history},
    ("advertiser", "campaign", "day", "region", "currency"),
)
