"""Why a row of `fct_campaign_day` is what it is."""

from __future__ import annotations

from datetime import date
from typing import Any

from orchestration.explain.node import Node
from orchestration.explain.view import KAFKA, MEASURES, BuildView, corrections, increments, open_build, reviews_of, sums
from orchestration.marts import query_marts
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.duck import literal
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, RESTATEMENTS

SAMPLE = 5

_COUNTED = ("impressions", "clicks", "spend_nanos", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos")


def explain_campaign_day(settings: Settings, campaign: str, day: date, *, sample: int = SAMPLE) -> Node:
    """A campaign's day, down to ``sample`` events of each batch: one part for each store and currency of it.

    Raises AdtallyError where there are no marts, or no such campaign or day in them.
    """
    with open_build(settings, "fct_campaign_day") as view:
        rows = view.marts(
            f"select * from fct_campaign_day where campaign_id = {literal(campaign)} and event_date = date '{day}' "
            "order by store_id, currency"
        )
        if not rows:
            raise _missing(settings, campaign, day)
        top = Node(f"fct_campaign_day {campaign} {day}")
        top.add(view.build.node())
        for row in rows:
            names = ("store_id", "currency", *MEASURES, "spend_micros", "gross_impressions", "gross_clicks")
            node = Node("row", {name: row[name] for name in names if name in row})
            top.add(node)
            _check_gross(node, row)
            walk_back(view, node, day, campaign, row["store_id"], row["currency"], sample=sample)
        return top


def walk_back(view: BuildView, node: Node, day: date, campaign: str, store: str, currency: str, *, sample: int = SAMPLE) -> None:
    """Put below a node, whose facts have MEASURES, what its increments, files, rules and corrections are."""
    found = increments(view, day, campaign, store, currency)
    node.must_equal("its increments", {name: node.facts[name] for name in MEASURES}, sums(found))
    events = _events(view, day, campaign, store, currency)
    runs = corrections(view, sorted({row["_run_id"] for row in found if row["_run_id"]}))
    batches = Node("increments by batch", {"batches": len({(row["_query_id"], row["_batch_id"]) for row in found})})
    node.add(batches)
    for query, batch in sorted({(row["_query_id"], row["_batch_id"]) for row in found}):
        own = [row for row in found if (row["_query_id"], row["_batch_id"]) == (query, batch)]
        held = [row for row in events if (row["_query_id"], row["_batch_id"]) == (query, batch)]
        batches.add(_batch(view, own, held, runs, day, campaign, store, currency, sample))
    counted = {(row["_query_id"], row["_batch_id"]) for row in found}
    stray = [row for row in events if (row["_query_id"], row["_batch_id"]) not in counted]
    if stray:
        batches.problems.append(f"events has {sum(row['events'] for row in stray)} rows of batches without an increment")
    node.add(_rules(view, events))
    node.add(_changes(view, day, campaign, currency))
    node.add(_reviews(view, day))
    late = sums(events, ("events", "late", "late_spend_nanos"))
    node.add(Node("late", {"late_events": late["late"], "of_events": late["events"], "late_spend_nanos": late["late_spend_nanos"]}))


def _missing(settings: Settings, campaign: str, day: date) -> AdtallyError:
    sql = f"select min(event_date), max(event_date), count(*) from fct_campaign_day where campaign_id = {literal(campaign)}"
    _, [(first, last, count)] = query_marts(settings, sql)
    if not count:
        return AdtallyError(
            f"fct_campaign_day has no campaign {campaign!r}",
            hint='`adtally query "select distinct campaign_id from fct_campaign_day"` lists them',
        )
    return AdtallyError(f"fct_campaign_day has no row of {campaign!r} on {day}", hint=f"it has days from {first} to {last}")


def explain_batch_events(
    settings: Settings, campaign: str, day: date, store: str, currency: str, query: str, batch: int, *, count: int, offset: int = 0
) -> Node:
    """A batch's events of a campaign's day, ``count`` of them after the first ``offset``, each with its file and line.

    Invalid and late ones come first, then the dearest. Raises AdtallyError where there are no marts.
    """
    with open_build(settings, "fct_campaign_day") as view:
        events = _sample(view, query, batch, day, campaign, store, currency, count, offset)
        return Node(f"events of batch {batch}", parts=[view.build.node(), *events.parts])


def _check_gross(node: Node, row: dict[str, Any]) -> None:
    for name in ("impressions", "clicks"):
        if row[f"gross_{name}"] != row[name] + row[f"invalid_{name}"]:
            node.problems.append(f"gross_{name} is not {name} + invalid_{name}")


def _events(view: BuildView, day: date, campaign: str, store: str, currency: str) -> list[dict[str, Any]]:
    """Per batch, file, rule set and mark what the events of completed batches come to."""
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
        [day, campaign, store, currency],
    )


def _batch(
    view: BuildView,
    found: list[dict[str, Any]],
    events: list[dict[str, Any]],
    runs: dict[str, dict[str, Any]],
    day: date,
    campaign: str,
    store: str,
    currency: str,
    sample: int,
) -> Node:
    total = sums(found)
    query, batch = found[0]["_query_id"], found[0]["_batch_id"]
    node = Node(f"batch {batch}", {"query_id": query, "increments": sum(row["increments"] for row in found), **total})
    node.must_equal("its events", total, sums(events, _COUNTED))
    for row in found:
        measures = {name: row[name] for name in MEASURES}
        minutes = {"first_minute": row["first_minute"], "last_minute": row["last_minute"]}
        if row["_run_id"] is None:
            node.add(Node("as ingested", {"increments": row["increments"], **measures, **minutes}))
            continue
        why = runs.get(row["_run_id"])
        correction = Node(f"correction run {row['_run_id']}", {"increments": row["increments"], **measures})
        if why is None:
            correction.problems.append("restatements does not say why")
        else:
            correction.facts |= {name: why[name] for name in ("kinds", "reasons", "causes", "restated_at")}
        node.add(correction)
    node.add(*_files(events))
    if sample:
        node.add(_sample(view, query, batch, day, campaign, store, currency, sample))
    return node


def _files(events: list[dict[str, Any]]) -> list[Node]:
    """The files, or partitions of topics, of a batch, with the range of lines (offsets) and what lies in them."""
    nodes = []
    for name in dict.fromkeys(row["source_file"] for row in events):
        mine = [row for row in events if row["source_file"] == name]
        unit = "offset" if name.startswith(KAFKA) else "line"
        facts = {
            f"first_{unit}": min(row["first_line"] for row in mine),
            f"last_{unit}": max(row["last_line"] for row in mine),
        }
        kind = "partition" if name.startswith(KAFKA) else "file"
        nodes.append(Node(f"{kind} {name}", facts | sums(mine, ("events", *_COUNTED))))
    return nodes


def _sample(
    view: BuildView, query: str, batch: int, day: date, campaign: str, store: str, currency: str, count: int, offset: int = 0
) -> Node:
    """Some events of a batch: invalid and late ones first, then the dearest."""
    rows = view.rows(
        f"""
        select event_id, event_type, event_time, received_at, user_id, ad_id, spend_nanos, coalesce(invalid_spend_nanos, 0) as
            invalid_spend_nanos, invalid_traffic_rule, invalid_traffic_rules, is_late, source_file, source_line
        from {view.scan(EVENTS)}
        where event_date = ? and campaign_id = ? and store_id = ? and currency = ? and _query_id = ? and _batch_id = ?
        order by invalid_traffic_rule is null, not is_late, spend_nanos desc, event_id limit ? offset ?
        """,
        [day, campaign, store, currency, query, batch, count, offset],
    )
    return Node(f"{len(rows)} of its events", parts=event_nodes(view, rows))


def event_nodes(view: BuildView, rows: list[dict[str, Any]]) -> list[Node]:
    """Events with their places and marks; those of a topic with the message that they came as."""
    held = view.messages((row["source_file"], row["source_line"]) for row in rows)
    return [_event(row, held.get((row["source_file"], row["source_line"]))) for row in rows]


def _event(row: dict[str, Any], message: str | None) -> Node:
    of_kafka = row["source_file"].startswith(KAFKA)
    renamed = {"source_line": "offset"} if of_kafka else {}
    facts = {
        renamed.get(name, name): value
        for name, value in row.items()
        if name not in ("event_id", "event_type") and value is not None
    }
    if of_kafka:
        facts["message"] = message if message is not None else "raw_events does not have it"
    return Node(f"{row['event_type']} {row['event_id']}", facts)


def _rules(view: BuildView, events: list[dict[str, Any]]) -> Node:
    """The rule sets that judged the events, and how many events each rule took."""
    node = Node("rule sets")
    for name in dict.fromkeys(row["rule_set"] for row in events):
        mine = [row for row in events if row["rule_set"] == name]
        part = view.rule_set(name) if name else Node("no rule set", {"says": "the batch judged no traffic"})
        by_rule: dict[str, int] = {}
        for row in mine:
            if row["invalid_traffic_rule"]:
                by_rule[row["invalid_traffic_rule"]] = by_rule.get(row["invalid_traffic_rule"], 0) + row["events"]
        part.facts |= {"events": sum(row["events"] for row in mine), "invalid_by_rule": by_rule or "none"}
        node.add(part)
    return node


def _changes(view: BuildView, day: date, campaign: str, currency: str) -> Node:
    """What corrections changed, as `restatements` has it."""
    totals = ", ".join(
        f"sum({name})::hugeint as {name}" for name in ("impressions", "clicks", "spend_nanos", "invalid_spend_nanos")
    )
    rows = view.rows(
        f"""
        select run_id, kind, reason, cause, rule_set, max(restated_at) as restated_at, {totals}
        from {view.scan(RESTATEMENTS)}
        where event_hour::date = ? and campaign_id = ? and currency = ? group by all order by restated_at, run_id, cause
        """,
        [day, campaign, currency],
    )
    node = Node("restatements", {"number": len(rows), **sums(rows, ("impressions", "clicks", "spend_nanos"))})
    for row in rows:
        facts = {name: row[name] for name in ("run_id", "reason", "restated_at", "impressions", "clicks", "spend_nanos")}
        node.add(Node(f"{row['kind']}: {row['cause']}", facts))
    return node


def _reviews(view: BuildView, day: date) -> Node:
    rows = reviews_of(view, day)
    node = Node("reviews of the day's hours for invalid traffic", {"runs": len(rows)})
    node.add(*(Node(f"run {row['run_id']}", {name: value for name, value in row.items() if name != "run_id"}) for row in rows))
    return node
