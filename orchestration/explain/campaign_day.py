"""Explains a row of `fct_campaign_day`."""

from __future__ import annotations

from datetime import date
from operator import itemgetter
from typing import Any

from orchestration.explain.node import Node
from orchestration.explain.view import KAFKA, MEASURES, BuildView, DayKey, Row, corrections, grouped, increments, open_build, sums
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.duck import literal
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, RESTATEMENTS, TRAFFIC_REVIEWS

SAMPLE = 5

_batch_of = itemgetter("_query_id", "_batch_id")


def explain_campaign_day(settings: Settings, campaign: str, day: date, *, sample: int = SAMPLE) -> Node:
    """Explain a campaign's day, down to ``sample`` events of each batch: one part for each of its stores and currencies.

    Raises AdtallyError if there are no marts, or they have no such campaign or day.
    """
    with open_build(settings, "fct_campaign_day") as view:
        rows = view.marts(
            f"select * from fct_campaign_day where campaign_id = {literal(campaign)} and event_date = date '{day}' "
            "order by store_id, currency"
        )
        if not rows:
            raise _missing(view, campaign, day)
        top = Node(f"fct_campaign_day {campaign} {day}")
        top.add(view.build.node())
        for row in rows:
            names = ("store_id", "currency", *MEASURES, "spend_micros", "gross_impressions", "gross_clicks")
            node = Node("row", {name: row[name] for name in names if name in row})
            top.add(node)
            for name in ("impressions", "clicks"):
                if row[f"gross_{name}"] != row[name] + row[f"invalid_{name}"]:
                    node.problems.append(f"gross_{name} is not {name} + invalid_{name}")
            walk_back(view, node, DayKey(day, campaign, row["store_id"], row["currency"]), sample=sample)
        return top


def walk_back(view: BuildView, node: Node, key: DayKey, *, sample: int) -> None:
    """Add to a node, whose facts have MEASURES, its increments, files, rules and corrections."""
    found = increments(view, key)
    node.must_equal("its increments", {name: node.facts[name] for name in MEASURES}, sums(found))
    events = _events(view, key)
    runs = corrections(view, (row["_run_id"] for row in found))
    counted, judged = grouped(found, _batch_of), grouped(events, _batch_of)
    batches = Node("increments by batch", {"batches": len(counted)})
    node.add(batches)
    for batch in sorted(counted):
        batches.add(_batch(view, counted[batch], judged.get(batch, []), runs, key, sample))
    stray = [row for row in events if _batch_of(row) not in counted]
    if stray:
        batches.problems.append(f"events has {sum(row['events'] for row in stray)} rows of batches without an increment")
    node.add(_rules(view, events), _changes(view, key), _reviews(view, key.event_date))
    late = sums(events, ("events", "late", "late_spend_nanos"))
    node.add(Node("late", {"late_events": late["late"], "of_events": late["events"], "late_spend_nanos": late["late_spend_nanos"]}))


def _missing(view: BuildView, campaign: str, day: date) -> AdtallyError:
    sql = f"select min(event_date), max(event_date), count(*) from fct_campaign_day where campaign_id = {literal(campaign)}"
    first, last, count = view.marts(sql)[0].values()
    if not count:
        return AdtallyError(
            f"fct_campaign_day has no campaign {campaign!r}",
            hint='`adtally query "select distinct campaign_id from fct_campaign_day"` lists them',
        )
    return AdtallyError(f"fct_campaign_day has no row of {campaign!r} on {day}", hint=f"it has days from {first} to {last}")


def explain_batch_events(settings: Settings, key: DayKey, query: str, batch: int, *, count: int, offset: int = 0) -> Node:
    """Return ``count`` events of a batch after the first ``offset``, each with its file and line: the order is that of a sample.

    Raises AdtallyError if there are no marts.
    """
    with open_build(settings, "fct_campaign_day") as view:
        events = _sample(view, query, batch, key, count, offset)
        return Node(f"events of batch {batch}", parts=[view.build.node(), *events.parts])


def _events(view: BuildView, key: DayKey) -> list[Row]:
    """Sum the events of completed batches by batch, file, rule set and mark."""
    kinds = (("impressions", "impression"), ("clicks", "click"))
    counts = [
        f"count(*) filter (event_type = '{kind}' and invalid_traffic_rule is {'not ' if part else ''}null)::bigint as {part}{name}"
        for part in ("", "invalid_")
        for name, kind in kinds
    ]
    return view.rows(
        f"""
        select _query_id, _batch_id, source_file, rule_set, invalid_traffic_rule, {", ".join(counts)},
            min(source_line)::bigint as first_line, max(source_line)::bigint as last_line,
            count(*)::bigint as events, sum(coalesce(spend_nanos, 0)) as spend_nanos,
            sum(coalesce(invalid_spend_nanos, 0)) as invalid_spend_nanos,
            count(*) filter (is_late)::bigint as late, coalesce(sum(spend_nanos) filter (is_late), 0) as late_spend_nanos
        from {view.scan(EVENTS)}
        semi join (select distinct _query_id, _batch_id from {view.scan(BATCH_LEDGER)}) using (_query_id, _batch_id)
        where event_date = ? and campaign_id = ? and store_id = ? and currency = ?
        group by all order by source_file
        """,
        list(key),
    )


def _batch(view: BuildView, found: list[Row], events: list[Row], runs: dict[str, Row], key: DayKey, sample: int) -> Node:
    total = sums(found)
    query, batch = _batch_of(found[0])
    node = Node(f"batch {batch}", {"query_id": query, "increments": sum(row["increments"] for row in found), **total})
    node.must_equal("its events", total, sums(events))
    for row in found:
        facts = {name: row[name] for name in ("increments", *MEASURES)}
        if row["_run_id"] is None:
            node.add(Node("as ingested", facts | {name: row[name] for name in ("first_minute", "last_minute")}))
            continue
        correction = Node(f"correction run {row['_run_id']}", facts)
        run = runs.get(row["_run_id"])
        if run is None:
            correction.problems.append("restatements does not say why")
        else:
            correction.facts |= {name: run[name] for name in ("kinds", "reasons", "causes", "restated_at")}
        node.add(correction)
    for name, rows in grouped(events, itemgetter("source_file")).items():
        kind, unit = ("partition", "offset") if name.startswith(KAFKA) else ("file", "line")
        first, last = min(row["first_line"] for row in rows), max(row["last_line"] for row in rows)
        places: dict[str, Any] = {f"first_{unit}": first, f"last_{unit}": last}
        if (gone := view.retired(name, first)) is not None:
            places["raw_input"] = gone
        node.add(Node(f"{kind} {name}", places | sums(rows, ("events", *MEASURES))))
    if sample:
        node.add(_sample(view, query, batch, key, sample))
    return node


def _sample(view: BuildView, query: str, batch: int, key: DayKey, count: int, offset: int = 0) -> Node:
    """Return some events of a batch: first invalid ones, then late ones, then by falling spend."""
    rows = view.rows(
        f"""
        select event_id, event_type, event_time, received_at, user_id, ad_id, spend_nanos, coalesce(invalid_spend_nanos, 0) as
            invalid_spend_nanos, invalid_traffic_rule, invalid_traffic_rules, is_late, source_file, source_line
        from {view.scan(EVENTS)}
        where event_date = ? and campaign_id = ? and store_id = ? and currency = ? and _query_id = ? and _batch_id = ?
        order by invalid_traffic_rule is null, not is_late, spend_nanos desc, event_id limit ? offset ?
        """,
        [*key, query, batch, count, offset],
    )
    return Node(f"{len(rows)} of its events", parts=event_nodes(view, rows))


def event_nodes(view: BuildView, rows: list[Row]) -> list[Node]:
    """Return events as nodes with their places and marks; those from a topic also with their message."""
    messages = view.messages((row["source_file"], row["source_line"]) for row in rows)
    nodes = []
    for row in rows:
        facts = {name: value for name, value in row.items() if name not in ("event_id", "event_type") and value is not None}
        if row["source_file"].startswith(KAFKA):
            facts = {"offset" if name == "source_line" else name: value for name, value in facts.items()}
            facts["message"] = messages.get((row["source_file"], row["source_line"]), "raw_events does not have it")
        nodes.append(Node(f"{row['event_type']} {row['event_id']}", facts))
    return nodes


def _rules(view: BuildView, events: list[Row]) -> Node:
    """Return the rule sets that judged the events, and how many events each rule marked."""
    node = Node("rule sets")
    for name, rows in grouped(events, itemgetter("rule_set")).items():
        part = view.rule_set(name) if name else Node("no rule set", {"says": "the batch judged no traffic"})
        rules = grouped(rows, itemgetter("invalid_traffic_rule"))
        by_rule = {rule: sum(row["events"] for row in marked) for rule, marked in rules.items() if rule}
        part.facts |= {"events": sum(row["events"] for row in rows), "invalid_by_rule": by_rule or "none"}
        node.add(part)
    return node


def _changes(view: BuildView, key: DayKey) -> Node:
    """Return the changes by corrections, from table `restatements`, which has no stores."""
    measures = ("impressions", "clicks", "spend_nanos")
    totals = ", ".join(f"sum({name})::hugeint as {name}" for name in measures)
    rows = view.rows(
        f"""
        select run_id, kind, reason, cause, rule_set, max(restated_at) as restated_at, {totals}
        from {view.scan(RESTATEMENTS)}
        where event_hour::date = ? and campaign_id = ? and currency = ? group by all order by restated_at, run_id, cause
        """,
        [key.event_date, key.campaign_id, key.currency],
    )
    node = Node("restatements", {"number": len(rows), **sums(rows, measures)})
    for row in rows:
        node.add(
            Node(f"{row['kind']}: {row['cause']}", {name: row[name] for name in ("run_id", "reason", "restated_at", *measures)})
        )
    return node


def _reviews(view: BuildView, day: date) -> Node:
    """Return the reviews of the day's hours before the build, one part for each run."""
    rows = []
    if view.version(TRAFFIC_REVIEWS) is not None:
        rows = view.rows(
            f"""
            select run_id, rule_set, count(*)::bigint as hours, sum(events)::bigint as events, sum(invalid)::bigint as invalid,
                sum(changed)::bigint as changed, max(reviewed_at) as reviewed_at
            from {view.scan(TRAFFIC_REVIEWS)}
            where event_hour::date = ? and reviewed_at <= ?::timestamptz group by all order by reviewed_at, run_id
            """,
            [day, view.build.built_at],
        )
    node = Node("reviews of the day's hours for invalid traffic", {"runs": len(rows)})
    node.add(*(Node(f"run {row['run_id']}", {name: value for name, value in row.items() if name != "run_id"}) for row in rows))
    return node
