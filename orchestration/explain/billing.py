"""Explains a line of `fct_billing_ledger`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import itemgetter

from orchestration.explain.campaign_day import SAMPLE, walk_back
from orchestration.explain.node import Node
from orchestration.explain.view import MEASURES, BuildView, DayKey, Row, corrections, grouped, increments, open_build, sums
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.duck import literal
from spark_jobs.lake.tables import BILLING_LINES

_AMOUNTS = ("line_type", "amount_micros", "billed_micros", "spend_nanos", "reason")
_SOURCE = ("run_id", "rule_set", "metrics_version", "billed_at")


def explain_billing_line(settings: Settings, line: str, *, sample: int = SAMPLE) -> Node:
    """Explain a line: what its day was billed before and by it, from which increments, and the day in the marts.

    Raises AdtallyError if there are no marts, or they have no such line.
    """
    with open_build(settings, "fct_billing_ledger") as view:
        rows = view.marts(f"select * from fct_billing_ledger where line_id = {literal(line)}")
        if not rows:
            raise AdtallyError(
                f"fct_billing_ledger has no line {line!r}",
                hint='`adtally query "select line_id from fct_billing_ledger"` lists them',
            )
        row = rows[0]
        key = DayKey(*(row[name] for name in DayKey._fields))
        names = ("event_date", "campaign_id", "store_id", "currency", *_AMOUNTS, *_SOURCE)
        top = Node(f"fct_billing_ledger line {line}", _facts(row, names))
        lines = _in_order(view.marts(f"select * from fct_billing_ledger where {key.condition()}"))
        top.add(view.build.node(), _ledger(lines, row))
        if row["is_posted"]:
            top.add(_posting(view, line, row, key))
            if row["rule_set"]:
                top.add(view.rule_set(row["rule_set"]))
        for day in view.marts(f"select * from fct_campaign_day where {key.condition()}"):
            node = Node("fct_campaign_day, at the marts' build", _facts(day, (*MEASURES, "spend_micros")))
            billed = sum(found["amount_micros"] for found in lines)
            node.checks.append("the ledger's lines of the day")
            if billed != day["spend_micros"]:
                node.problems.append(f"its spend is {day['spend_micros']} micros and the ledger's lines come to {billed}")
            top.add(node)
            walk_back(view, node, key, sample=sample)
        return top


def _facts(row: Row, names: Sequence[str]) -> Row:
    return {name: row[name] for name in names if row.get(name) is not None}


def _in_order(rows: list[Row]) -> list[Row]:
    """Sort lines by posting, unposted ones last. In a posting each line continues the billed total of the previous one."""
    ordered: list[Row] = []
    billed = 0
    rest = sorted(rows, key=lambda row: (not row["is_posted"], row["posting"] or 0, row["line_id"]))
    while rest:
        same = [row for row in rest if (row["is_posted"], row["posting"]) == (rest[0]["is_posted"], rest[0]["posting"])]
        found = next((row for row in same if row["billed_micros"] - row["amount_micros"] == billed), same[0])
        rest.remove(found)
        billed = found["billed_micros"]
        ordered.append(found)
    return ordered


def _ledger(lines: list[Row], row: Row) -> Node:
    node = Node("lines of the day", {"number": len(lines)})
    billed = 0
    for found in lines:
        billed += found["amount_micros"]
        mark = " (this one)" if found["line_id"] == row["line_id"] else ""
        part = Node(f"{found['line_type']}{mark}", _facts(found, ("line_id", *_AMOUNTS, *_SOURCE)), checks=["the lines up to it"])
        if billed != found["billed_micros"]:
            part.problems.append(f"billed_micros is {found['billed_micros']} and the lines up to it come to {billed}")
        if found["billed_micros"] != _micros(found["spend_nanos"]):
            part.problems.append(f"billed_micros is not the rounding of its spend of {found['spend_nanos']} nanos")
        node.add(part)
    return node


def _micros(nanos: int) -> int:
    """Round half away from zero, as the rule of the ledger says."""
    return (abs(nanos) + 500) // 1000 * (1 if nanos >= 0 else -1)


def _posting(view: BuildView, line: str, row: Row, key: DayKey) -> Node:
    """Return the increments that the posting read, by run, and compare them with the parts in the line."""
    lines = view.rows(f"select spend_parts, posting from {view.scan(BILLING_LINES)} where line_id = ?", [line])
    node = Node("posting", _facts(row, ("run_id", "billed_at", "metrics_version")))
    if not lines:
        node.problems.append("the line is not in table billing_lines")
        return node
    commit = view.lake.log(BILLING_LINES).commit(int(lines[0]["posting"]))
    place = commit.metadata.get("billing", {}).get("place") if commit is not None else None
    ledger = place["ledger_version"] if place and place["metrics_version"] == row["metrics_version"] else None
    try:
        found = increments(view, key, metrics=row["metrics_version"], ledger=ledger)
    except AdtallyError:
        because = f"version {row['metrics_version']} of minute_metrics was vacuumed since"
        node.add(Node("its increments", {"because": because}))
        return node
    posted = sum(json.loads(lines[0]["spend_parts"]).values())
    total = sum(int(increment["spend_nanos"]) for increment in found)
    node.checks.append("the increments that it read")
    if total != posted:
        node.problems.append(f"the increments come to {total} nanos and the posting to {posted}")
    by_run = grouped(found, itemgetter("_run_id"))
    reasons = corrections(view, by_run)
    for run, rows in by_run.items():
        facts = {"batches": len(rows), **sums(rows)}
        if run is not None:
            facts |= {name: value for name, value in reasons.get(run, {}).items() if name != "run_id"}
        node.add(Node("increments as ingested" if run is None else f"increments of correction run {run}", facts))
    return node
