"""Explains an order's credit in `fct_attribution_credits`."""

from __future__ import annotations

from operator import itemgetter

from orchestration.explain.campaign_day import event_nodes
from orchestration.explain.node import Node
from orchestration.explain.view import BuildView, Row, grouped, open_build, revisions_of
from spark_jobs.attribution.rules import MODELS
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.lake.duck import literal
from spark_jobs.lake.tables import EVENTS, ORDERS

_WEIGHT_TOLERANCE = 1e-9


def explain_credit(settings: Settings, order: str, *, model: str | None = None, window: int | None = None) -> Node:
    """Explain an order's credits, in one model and lookback window (None: in each), by its touches and its own record.

    Raises UsageError if the model does not exist, AdtallyError if there are no marts or no such order or window.
    """
    if model is not None and model not in MODELS:
        raise UsageError(f"there is no model {model!r}", hint=f"one of {', '.join(MODELS)}")
    with open_build(settings, "fct_attribution_credits") as view:
        revisions = revisions_of(view, order)
        if not revisions:
            raise _missing(view, order)
        latest = revisions[-1]
        credits = view.marts(
            f"select * from fct_attribution_credits where order_id = {literal(order)} "
            "order by model, window_days, touch_time, touch_event_id"
        )
        windows = sorted({row["window_days"] for row in credits})
        if window is not None and credits and window not in windows:
            listed = ", ".join(map(str, windows))
            raise AdtallyError(f"order {order!r} has no credit in a window of {window} days", hint=f"it has in those of {listed}")
        top = Node(f"fct_attribution_credits of order {order}")
        top.add(view.build.node(), _order(view, order, latest))
        shown = [row for row in credits if model in (None, row["model"]) and window in (None, row["window_days"])]
        top.add(*_models(shown, latest))
        if not credits:
            why = "a cancelled order has no credit" if latest["status"] != "placed" else "no touch is before it in any window"
            top.add(Node("no credit", {"because": why}))
        if credits and latest["touches"] == 0:
            top.problems.append("the newest revision has no touch and the mart has credits")
        top.add(_touches(view, order, latest, credits))
        node = Node("revisions", {"number": len(revisions)})
        for row in revisions:
            names = ("status", "reason", "touches", "total_micros", "attributed_at", "run_id", "rule_set")
            node.add(Node(f"revision {row['revision']}", {name: row[name] for name in names}))
        top.add(node)
        top.add(*(view.rule_set(name) for name in dict.fromkeys(row["rule_set"] for row in revisions[::-1]) if name))
        return top


def _missing(view: BuildView, order: str) -> AdtallyError:
    found = view.rows(f"select status from {view.scan(ORDERS)} where order_id = ?", [order])
    if found:
        return AdtallyError(
            f"order {order!r} is {found[0]['status']}, but the marts' build has no attribution of it",
            hint="run `adtally attribute`, then `adtally marts build`",
        )
    return AdtallyError(f"there is no order {order!r}")


def _order(view: BuildView, order: str, latest: Row) -> Node:
    """Return the order's present record, because the marts pin no version of orders."""
    names = ("order_time", "user_id", "store_id", "total_micros", "currency", "status", "cancelled_at", "is_late")
    places = ("source_file", "source_line", "_query_id", "_batch_id", "_run_id", "ingested_at")
    rows = view.rows(f"select {', '.join((*names, *places))} from {view.scan(ORDERS)} where order_id = ?", [order])
    if not rows:
        return Node("order", problems=["it is no longer in table orders"])
    node = Node("order", {name: value for name, value in rows[0].items() if value is not None})
    for name in ("total_micros", "currency", "user_id", "store_id", "order_time"):
        if rows[0][name] != latest[name]:
            node.problems.append(f"{name} is {rows[0][name]} here and {latest[name]} in the revision that the marts show")
    return node


def _models(credits: list[Row], latest: Row) -> list[Node]:
    nodes = []
    for (model, window), mine in grouped(credits, itemgetter("model", "window_days")).items():
        total, weight = sum(row["credit_micros"] for row in mine), sum(row["credit_weight"] for row in mine)
        node = Node(
            f"{model}, {window} days",
            {"credit_micros": total, "weight": weight, "touches": len(mine)},
            checks=["the order's total"],
        )
        if total != latest["total_micros"]:
            node.problems.append(f"the credits come to {total} micros and the order to {latest['total_micros']}")
        if abs(weight - 1) > _WEIGHT_TOLERANCE:
            node.problems.append(f"the weights come to {weight!r}, not 1")
        if any(row["revision"] != latest["revision"] for row in mine):
            node.problems.append(f"the credits are not of revision {latest['revision']}, the newest that the build saw")
        for row in mine:
            names = ("credit_micros", "credit_weight", "campaign_id", "ad_id", "touch_time")
            node.add(Node(f"{row['touch_type']} {row['touch_event_id']}", {name: row[name] for name in names}))
        nodes.append(node)
    return nodes


def _touches(view: BuildView, order: str, latest: Row, credits: list[Row]) -> Node:
    """Return the touches as events, and check each: billable, by the order's user and store, before the order."""
    ids = sorted({row["touch_event_id"] for row in credits})
    if not ids:
        return Node("touches", {"number": 0})
    times = [row["touch_time"] for row in credits]
    rows = view.rows(
        f"""
        select event_id, event_type, event_time, received_at, campaign_id, ad_id, user_id, store_id, spend_nanos,
            invalid_traffic_rule, rule_set, is_late, source_file, source_line, _query_id, _batch_id, _run_id
        from {view.scan(EVENTS)}
        where event_date between ?::date and ?::date and event_id in (select unnest(?)) order by event_time, event_id
        """,
        [min(times), max(times), ids],
    )
    node = Node("touches", {"number": len(ids)})
    for row, part in zip(rows, event_nodes(view, rows), strict=True):
        if row["invalid_traffic_rule"] is not None:
            part.problems.append("it is invalid traffic, and credited")
        if (row["user_id"], row["store_id"]) != (latest["user_id"], latest["store_id"]):
            part.problems.append("it is of another user or store than the order")
        if row["event_time"] >= latest["order_time"]:
            part.problems.append("it is not before the order")
        node.add(part)
    for missing in sorted(set(ids) - {row["event_id"] for row in rows}):
        node.problems.append(f"the touch {missing} of order {order} is not in events")
    return node
