"""Why a line of `fct_billing_ledger` is what it is."""

from __future__ import annotations

import json
from typing import Any

from orchestration.explain.campaign_day import SAMPLE, walk_back
from orchestration.explain.node import Node
from orchestration.explain.view import MEASURES, BuildView, corrections, increments, open_build, sums
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.duck import literal
from spark_jobs.lake.tables import BILLING_LINES

_LINE = (
    "line_type",
    "amount_micros",
    "billed_micros",
    "spend_nanos",
    "reason",
    "run_id",
    "rule_set",
    "metrics_version",
    "billed_at",
)


def explain_billing_line(settings: Settings, line: str, *, sample: int = SAMPLE) -> Node:
    """A line of the ledger: what its day was billed before and by it, from which increments, and the day as the marts have it.

    Raises AdtallyError where there are no marts, or no such line in them.
    """
    with open_build(settings, "fct_billing_ledger") as view:
        rows = view.marts(f"select * from fct_billing_ledger where line_id = {literal(line)}")
        if not rows:
            raise AdtallyError(
                f"fct_billing_ledger has no line {line!r}",
                hint='`adtally query "select line_id from fct_billing_ledger"` lists them',
            )
        row = rows[0]
        top = Node(f"fct_billing_ledger line {line}", _facts(row, ("event_date", "campaign_id", "store_id", "currency", *_LINE)))
        top.add(view.build.node())
        key = tuple(row[name] for name in ("event_date", "campaign_id", "store_id", "currency"))
        lines = _lines_of_day(view, row)
        top.add(_ledger(lines, row))
        if row["is_posted"]:
            top.add(_posting(view, line, row))
            if row["rule_set"]:
                top.add(view.rule_set(row["rule_set"]))
        days = view.marts(
            f"select * from fct_campaign_day where event_date = date '{row['event_date']}' and campaign_id = "
            f"{literal(row['campaign_id'])} and store_id = {literal(row['store_id'])} and currency = {literal(row['currency'])}"
        )
        for day in days:
            node = Node("fct_campaign_day, at the marts' build", _facts(day, (*MEASURES, "spend_micros")))
            in_ledger = sum(found["amount_micros"] for found in lines)
            node.checks.append("the ledger's lines of the day")
            if in_ledger != day["spend_micros"]:
                node.problems.append(f"its spend is {day['spend_micros']} micros and the ledger's lines come to {in_ledger}")
            top.add(node)
            walk_back(view, node, *key, sample=sample)
        return top


def _facts(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None}


def _lines_of_day(view: BuildView, row: dict[str, Any]) -> list[dict[str, Any]]:
    """All lines of the same day, campaign, store and currency: those posted as they came, then what is not billed yet."""
    rows = view.marts(
        f"select * from fct_billing_ledger where event_date = date '{row['event_date']}' and campaign_id = "
        f"{literal(row['campaign_id'])} and store_id = {literal(row['store_id'])} and currency = {literal(row['currency'])}"
    )
    return _in_order(rows)


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines by posting; those of one posting chained: each begins where the one before has ended."""
    ordered: list[dict[str, Any]] = []
    billed = 0
    rest = sorted(rows, key=lambda row: (not row["is_posted"], row["posting"] or 0, row["line_id"]))
    while rest:
        same = [row for row in rest if (row["is_posted"], row["posting"]) == (rest[0]["is_posted"], rest[0]["posting"])]
        found = next((row for row in same if row["billed_micros"] - row["amount_micros"] == billed), same[0])
        rest.remove(found)
        billed = found["billed_micros"]
        ordered.append(found)
    return ordered


def _ledger(lines: list[dict[str, Any]], row: dict[str, Any]) -> Node:
    node = Node("lines of the day", {"number": len(lines)})
    billed = 0
    for found in lines:
        billed += found["amount_micros"]
        mark = " (this one)" if found["line_id"] == row["line_id"] else ""
        part = Node(f"{found['line_type']}{mark}", _facts(found, ("line_id", *_LINE)), checks=["the lines up to it"])
        if billed != found["billed_micros"]:
            part.problems.append(f"billed_micros is {found['billed_micros']} and the lines up to it come to {billed}")
        if found["billed_micros"] != _micros(found["spend_nanos"]):
            part.problems.append(f"billed_micros is not the rounding of its spend of {found['spend_nanos']} nanos")
        node.add(part)
    return node


def _micros(nanos: int) -> int:
    """Rounded half away from zero, as the ledger's rule says."""
    return (abs(nanos) + 500) // 1000 * (1 if nanos >= 0 else -1)


def _posting(view: BuildView, line: str, row: dict[str, Any]) -> Node:
    """What the run that posted the line read: the increments of its version, by run, beside the parts that the line holds."""
    held = view.rows(f"select spend_parts, posting, spend_nanos from {view.scan(BILLING_LINES)} where line_id = ?", [line])
    node = Node("posting", _facts(row, ("run_id", "billed_at", "metrics_version")))
    if not held:
        node.problems.append("the line is not in table billing_lines")
        return node
    commit = view.lake.log(BILLING_LINES).commit(int(held[0]["posting"]))
    place = commit.metadata.get("billing", {}).get("place") if commit is not None else None
    ledger = place["ledger_version"] if place and place["metrics_version"] == row["metrics_version"] else None
    try:
        found = increments(
            view,
            *(row[name] for name in ("event_date", "campaign_id", "store_id", "currency")),
            metrics=row["metrics_version"],
            ledger=ledger,
        )
    except AdtallyError:
        node.add(Node("its increments", {"because": f"version {row['metrics_version']} of minute_metrics was vacuumed since"}))
        return node
    parts = json.loads(held[0]["spend_parts"])
    total = sums(found, ("spend_nanos",))["spend_nanos"]
    node.checks.append("the increments that it read")
    if total != sum(parts.values()):
        node.problems.append(f"the increments come to {total} nanos and the posting to {sum(parts.values())}")
    why = corrections(view, sorted({found_row["_run_id"] for found_row in found if found_row["_run_id"]}))
    for run in dict.fromkeys(found_row["_run_id"] for found_row in found):
        mine = [found_row for found_row in found if found_row["_run_id"] == run]
        facts: dict[str, Any] = {"batches": len(mine), **sums(mine)}
        if run is not None:
            facts |= {name: value for name, value in why.get(run, {}).items() if name != "run_id"}
        node.add(Node("increments as ingested" if run is None else f"increments of correction run {run}", facts))
    return node
