"""Why a number is what it is: the tree of `orchestration.explain` as a page that opens level by level.

A question names the number. Its tree is made once for each build and question. A browser fetches the parts of a level when a
person opens it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from urllib.parse import quote, urlencode

from orchestration.console.filters import URL_NAMES
from orchestration.console.marts import OpenBuild
from orchestration.console.recent import Recent
from orchestration.console.tables import Row, money, units_of_micros, units_of_nanos
from orchestration.console.view import Page, View
from orchestration.explain import Node, explain_batch_events, explain_billing_line, explain_campaign_day, explain_credit
from orchestration.explain.view import MEASURES, DayKey
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError

PARTS_SHOWN = 100
_TREES_KEPT = 32
_BUILD = "mart build"
_SUMS = ", ".join(f"sum({name})::hugeint as {name}" for name in MEASURES)
_PLAIN_NUMBERS = re.compile(r".*(_line|offset|version|revision|posting|batch_id)")


@dataclass(frozen=True)
class Question:
    """A number that is explained. ``kind`` is one of KINDS; empty fields choose nothing. The days are inclusive."""

    kind: str
    campaign: str = ""
    currency: str = ""
    advertiser: str = ""
    region: str = ""
    first: date | None = None
    last: date | None = None
    order: str = ""
    model: str = ""
    window: str = ""
    line: str = ""
    store: str = ""
    query: str = ""
    batch: int = -1
    start: int = 0

    @classmethod
    def of(cls, kind: str, view: View) -> Question:
        """Read the question of an address. Raises UsageError for one that does not exist, or lacks what it is about."""
        if kind not in _MAKERS:
            raise UsageError(f"there is no question {kind!r}", hint=f"one of {', '.join(_KINDS)}")
        given: dict[str, Any] = {name: view.arguments.get(name, "") for name in _TEXTS}
        if missing := next((name for name in _REQUIRED[kind] if not given[name]), None):
            raise UsageError(f"which {missing}?", hint=f"the address needs {missing}=..., as the links of the other pages have it")
        if kind == "order" and given["window"] and not re.fullmatch(r"[1-9]\d{0,3}", given["window"]):
            raise UsageError(f"window={given['window']!r} is not a number of days")
        days: dict[str, Any] = {"first": view.first, "last": view.last} if kind in ("total", "campaign", "day", "events") else {}
        if kind == "day" and days["first"] != days["last"]:
            raise UsageError("a day is explained by itself", hint="leave out to=, or ask /why/campaign for several days")
        return cls(kind, **given, **days, batch=_number(view, "batch"), start=_number(view, "start"))

    def parameters(self) -> dict[str, str]:
        """The question as parameters of an address."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) != each.default}
        return {URL_NAMES.get(name, name): str(value) for name, value in values.items() if name != "kind"}

    @property
    def url(self) -> str:
        """The address of its page."""
        if self.kind == "billing":
            return f"/why/billing/{quote(self.line, safe='')}"
        return f"/why/{self.kind}?{urlencode(self.parameters())}"

    def part_url(self, at: Sequence[int], start: int = 0) -> str:
        """The address of the parts of a node of its tree."""
        where = {"kind": self.kind, **self.parameters(), "at": ".".join(map(str, at)), "from_part": str(start)}
        return f"/why/part?{urlencode(where)}"


@dataclass
class Step(Node):
    """A node whose parts are the tree of another question."""

    leads_to: Question | None = None


# --- the trees


_TREES = Recent[Node](_TREES_KEPT)


def _tree(view: View, question: Question) -> Node:
    """Return the tree of a question. Raises AdtallyError where there is no such number."""
    key = (view.settings.marts_path, view.marts.signature, question)
    return _TREES.get(key, lambda: _MAKERS[question.kind](view.settings, view.marts, question))


def _rows(marts: OpenBuild, question: Question, sql: str) -> list[Row]:
    names = ("campaign", "currency", "advertiser", "region", "first", "last")
    return marts.rows(sql, {name: getattr(question, name) for name in names})


def _tests(question: Question, *, with_region: bool = True) -> str:
    columns = {"campaign": "campaign_id", "currency": "currency", "advertiser": "store_id"}
    if with_region:
        columns["region"] = "region"
    chosen = [f"{column} = ${name}" for name, column in columns.items() if getattr(question, name)]
    return " and ".join(["event_date between $first and $last", *chosen])


def _by(marts: OpenBuild, question: Question, column: str, order: str) -> list[Row]:
    """The measures by a column and currency: of the days' mart, or of the minutes' where a region is chosen."""
    source = "fct_campaign_minute" if question.region else "fct_campaign_day"
    return _rows(
        marts,
        question,
        f"select {column}, currency, {_SUMS} from {source} where {_tests(question, with_region=bool(question.region))} "
        f"group by {column}, currency order by {order}",
    )


def _top(marts: OpenBuild, question: Question, what: str) -> Node:
    """A total, counted from the minutes."""
    [found] = _rows(marts, question, f"select {_SUMS} from fct_campaign_minute where {_tests(question)}")
    if found["impressions"] is None:
        days = _rows(marts, question, "select min(event_date) as first, max(event_date) as last from fct_campaign_day")
        hint = f"the marts have days from {days[0]['first']} to {days[0]['last']}; page Campaigns lists the campaigns"
        raise UsageError(f"the marts have no traffic of {what}", hint=hint)
    return Node(what, {"currency": question.currency, **found})


def _days(question: Question) -> str:
    return f"{question.first}" if question.first == question.last else f"{question.first} to {question.last}"


def _in_region(question: Question) -> str:
    return f" in region {question.region}" if question.region else ""


def _by_currency(marts: OpenBuild, question: Question, what: str) -> Node:
    """A node for each currency: they are never added up."""
    rows = _rows(
        marts,
        question,
        f"select currency, {_SUMS} from fct_campaign_minute where {_tests(question)} group by currency order by 2 desc, 1",
    )
    if not rows:
        _top(marts, question, what)
    steps = [Step(f"in {row['currency']}", dict(row), leads_to=replace(question, currency=row["currency"])) for row in rows]
    return Node(f"{what}, by currency", {}, [*steps])


def _total(_: Settings, marts: OpenBuild, question: Question) -> Node:
    what = f"all campaigns{_of_advertiser(question)}{_in_region(question)}, {_days(question)}"
    if not question.currency:
        return _by_currency(marts, question, what)
    top = _top(marts, question, f"{question.currency} of {what}")
    rows = _by(marts, question, "campaign_id", "sum(spend_nanos) desc, sum(impressions) desc, campaign_id")
    for row in rows:
        leads_to = replace(question, kind="campaign", campaign=row["campaign_id"], advertiser="")
        top.add(Step(f"campaign {row['campaign_id']}", dict(row), leads_to=leads_to))
    top.must_equal("its campaigns", {name: top.facts[name] for name in MEASURES}, _sums(top.parts))
    return top


def _of_advertiser(question: Question) -> str:
    return f" of advertiser {question.advertiser}" if question.advertiser else ""


def _campaign(_: Settings, marts: OpenBuild, question: Question) -> Node:
    what = f"campaign {question.campaign}{_in_region(question)}, {_days(question)}"
    if not question.currency:
        return _by_currency(marts, question, what)
    top = _top(marts, question, f"{question.currency} of {what}")
    for row in _by(marts, question, "event_date", "event_date"):
        day = row["event_date"]
        facts = {name: value for name, value in row.items() if name != "event_date"}
        top.add(Step(f"day {day}", facts, leads_to=replace(question, kind="day", first=day, last=day)))
    top.must_equal("its days", {name: top.facts[name] for name in MEASURES}, _sums(top.parts))
    return top


def _day(settings: Settings, _: OpenBuild, question: Question) -> Node:
    assert question.first is not None
    found = explain_campaign_day(settings, question.campaign, question.first, sample=0)
    rows = [part for part in found.parts if part.what == "row"]
    if question.currency:
        others = [row for row in rows if row.facts["currency"] != question.currency]
        if len(others) == len(rows):
            known = ", ".join(sorted({row.facts["currency"] for row in rows}))
            raise UsageError(
                f"campaign {question.campaign!r} has no {question.currency} on {question.first}", hint=f"it has {known}"
            )
        found.parts = [part for part in found.parts if all(part is not other for other in others)]
    for row in rows:
        _lead_to_events(row, replace(question, currency=row.facts["currency"], store=row.facts["store_id"]))
    return found


def _order(settings: Settings, _: OpenBuild, question: Question) -> Node:
    window = int(question.window) if question.window else None
    return explain_credit(settings, question.order, model=question.model or None, window=window)


def _billing(settings: Settings, _: OpenBuild, question: Question) -> Node:
    found = explain_billing_line(settings, question.line, sample=0)
    of = found.facts
    day = Question("day", of["campaign_id"], of["currency"], first=of["event_date"], last=of["event_date"], store=of["store_id"])
    _lead_to_events(found, day)
    return found


def _lead_to_events(node: Node, day: Question) -> None:
    """Put below each batch a node that leads to its events."""
    for part in node.parts:
        batch = re.fullmatch(r"batch (\d+)", part.what)
        if batch and "query_id" in part.facts:
            leads_to = replace(day, kind="events", query=part.facts["query_id"], batch=int(batch[1]), region="", advertiser="")
            count = sum(part.facts[name] for name in ("impressions", "clicks", "invalid_impressions", "invalid_clicks"))
            part.add(Step("its events, with file and line", {"events": count}, leads_to=leads_to))
        else:
            _lead_to_events(part, day)


def _events(settings: Settings, _: OpenBuild, question: Question) -> Node:
    assert question.first is not None
    key = DayKey(question.first, question.campaign, question.store, question.currency)
    return explain_batch_events(settings, key, question.query, question.batch, count=PARTS_SHOWN, offset=question.start)


def _sums(nodes: Sequence[Node]) -> dict[str, int]:
    return {name: sum(node.facts[name] for node in nodes) for name in MEASURES}


_MAKERS: Mapping[str, Callable[[Settings, OpenBuild, Question], Node]] = {
    "total": _total,
    "campaign": _campaign,
    "day": _day,
    "order": _order,
    "billing": _billing,
    "events": _events,
}
_KINDS = tuple(kind for kind in _MAKERS if kind != "events")
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "total": (),
    "campaign": ("campaign",),
    "day": ("campaign",),
    "order": ("order",),
    "billing": ("line",),
    "events": ("campaign", "store", "currency", "query"),
}
_TEXTS = ("campaign", "currency", "advertiser", "region", "order", "model", "window", "line", "store", "query")


# --- what a page shows of a tree


@dataclass(frozen=True)
class Fact:
    """A fact as a person reads it. ``exact`` is an amount of money in units of its currency, with all of its decimals."""

    name: str
    text: str
    unit: str = ""
    exact: str = ""
    is_number: bool = False


@dataclass(frozen=True)
class Level:
    """A node as the page shows it. ``url`` is the address of its parts, ``page`` that of a page that explains it alone."""

    what: str
    figure: str
    facts: list[Fact]
    problems: list[str]
    checks: list[str]
    is_wrong_below: bool
    url: str | None = None
    page: str | None = None
    parts: Parts | None = None


@dataclass(frozen=True)
class Parts:
    """Some parts of a node; ``more`` is the address of the next ones.

    ``problems`` and ``checks`` are those with the level above.
    """

    levels: list[Level] = field(default_factory=list)
    count: int = 0
    shown: int = 0
    more: str | None = None
    problems: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)


def build(view: View) -> dict[str, Any]:
    """The page of a question."""
    question = Question.of(
        "billing" if view.arguments.get("line") and "kind" not in view.arguments else view.arguments["kind"], view
    )
    if question.kind == "events":
        raise UsageError("events are shown below their batch", hint="ask /why/day")
    root = _tree(view, question)
    build_node = next((part for part in root.parts if part.what == _BUILD), None)
    currency = _currency(root, (), question)
    return {
        "question": question,
        "root": _level(root, currency),
        "parts": _parts_of(question, root, (), 0, currency, is_top=True),
        "problems": list(root.all_problems()),
        "is_whole": question.kind not in ("total", "campaign"),
        "build_id": build_node.facts["id"] if build_node else view.marts.build_id,
        "build_facts": _facts(build_node, "") if build_node else [],
        "above": _above(question),
    }


def part(view: View) -> dict[str, Any]:
    """The parts of one node, which the page puts below it. What cannot be answered becomes its text."""
    try:
        return {"parts": parts(view), "problem": ""}
    except AdtallyError as error:
        return {"parts": Parts(), "problem": f"{error.message}{f': {error.hint}' if error.hint else ''}"}


def parts(view: View) -> Parts:
    """The parts that an address asks for. Raises UsageError where the tree has no such node."""
    question = Question.of(view.arguments.get("kind", ""), view)
    at, start = _path(view.arguments.get("at", "")), _number(view, "from_part")
    root = _tree(view, question)
    node = _find(root, at)
    if not isinstance(node, Step) or node.leads_to is None:
        return _parts_of(question, node, at, start, _currency(root, at, question))
    if node.leads_to.kind == "events":
        return _events_of(view, question, node, at, start)
    below = _tree(view, node.leads_to)
    found = _parts_of(node.leads_to, below, (), start, _currency(below, (), node.leads_to))
    if start:
        return found
    problems, checks = _compared(node, below, node.leads_to)
    return replace(found, problems=[*problems, *below.problems], checks=[*checks, *below.checks])


def _events_of(view: View, question: Question, node: Step, at: tuple[int, ...], start: int) -> Parts:
    """A page of a batch's events."""
    assert node.leads_to is not None
    found = [part for part in _tree(view, replace(node.leads_to, start=start)).parts if part.what != _BUILD]
    count, shown = node.facts["events"], start + len(found)
    more = question.part_url(at, shown) if found and shown < count else None
    return Parts([_level(event, node.leads_to.currency) for event in found], count, shown, more)


def _compared(step: Node, below: Node, question: Question) -> tuple[list[str], list[str]]:
    """Check a level against the tree that it leads to: its own figures, or the sum of its rows."""
    if question.region and question.kind == "day":
        return [], []  # the levels below a day are of all regions
    rows = [part for part in below.parts if part.what == "row"]
    check = Node(step.what)
    check.must_equal("what it is made of", {name: step.facts[name] for name in MEASURES}, _sums(rows) if rows else below.facts)
    return check.problems, check.checks


def _path(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,9})*)?", text):
        raise UsageError(f"at={text!r} is no place in a tree")
    return tuple(int(each) for each in text.split(".")) if text else ()


def _number(view: View, name: str) -> int:
    text = view.arguments.get(name, "")
    if text and not re.fullmatch(r"\d{1,18}", text):
        raise UsageError(f"{name}={text!r} is not a number")
    return int(text) if text else (-1 if name == "batch" else 0)


def _walk(root: Node, at: Sequence[int]) -> Iterator[Node]:
    yield root
    for index in at:
        if index >= len(root.parts):
            raise UsageError("the tree has no such part any more", hint="the marts were built again: load the page anew")
        root = root.parts[index]
        yield root


def _find(root: Node, at: Sequence[int]) -> Node:
    return list(_walk(root, at))[-1]


def _currency(root: Node, at: Sequence[int], question: Question) -> str:
    """The currency of a node's money: the nearest above it that says one, else the only one below the root."""
    for node in reversed(list(_walk(root, at))):
        if node.facts.get("currency"):
            return str(node.facts["currency"])
    below = {node.facts["currency"] for node in root.parts if node.facts.get("currency")}
    return question.currency or (below.pop() if len(below) == 1 else "")


def _parts_of(question: Question, node: Node, at: tuple[int, ...], start: int, currency: str, *, is_top: bool = False) -> Parts:
    shown = node.parts[start : start + PARTS_SHOWN]
    levels = []
    for index, each in enumerate(shown, start):
        if each.what == _BUILD:
            continue
        is_open = is_top and each.what == "row" and sum(other.what == "row" for other in node.parts) == 1
        levels.append(_level(each, currency, question, (*at, index), is_open=is_open))
    end = start + len(shown)
    more = question.part_url(at, end) if end < len(node.parts) else None
    return Parts(levels, len(node.parts), end, more)


def _level(
    node: Node, currency: str, question: Question | None = None, at: tuple[int, ...] = (), *, is_open: bool = False
) -> Level:
    currency = str(node.facts.get("currency") or currency)
    leads_to = node.leads_to if isinstance(node, Step) else None
    has_parts = question is not None and (bool(node.parts) or leads_to is not None)
    opened = _parts_of(question, node, at, 0, currency) if is_open and question is not None else None
    return Level(
        node.what,
        _figure(node.facts, currency),
        _facts(node, currency),
        node.problems,
        node.checks,
        any(problem for part in node.parts for problem in part.all_problems()),
        question.part_url(at) if has_parts and question is not None and opened is None else None,
        leads_to.url if leads_to is not None and leads_to.kind != "events" else None,
        opened,
    )


def _figure(facts: Mapping[str, Any], currency: str) -> str:
    """What a level says in short, beside its name."""
    said = []
    if facts.get("spend_nanos") is not None:
        said.append(money(units_of_nanos(facts["spend_nanos"], currency), currency))
    for name in ("amount_micros", "credit_micros"):
        amount = units_of_micros(facts.get(name), currency)
        if amount is not None:
            said = [money(amount, currency)]
    counted = ("impressions", "clicks", "events", "batches", "runs", "number")
    said += [f"{facts[name]:,} {'' if name == 'number' else name}".rstrip() for name in counted if facts.get(name)]
    if "source_file" in facts:
        where = f"offset {facts['offset']}" if "offset" in facts else f"line {facts.get('source_line')}"
        said.append(f"{facts['source_file']}, {where}")
    return " · ".join(said)


def _facts(node: Node, currency: str) -> list[Fact]:
    return [_fact(name, value, currency) for name, value in node.facts.items() if value is not None and value != ""]


def _fact(name: str, value: Any, currency: str) -> Fact:
    words = name.replace("_", " ")
    for unit, digits in (("nanos", 9), ("micros", 6)):
        if name.endswith(f"_{unit}") and isinstance(value, int):
            exact = f"{Decimal(value).scaleb(-digits).normalize():f} {currency}".rstrip()
            return Fact(words.removesuffix(f" {unit}"), f"{value:,}", unit, exact, is_number=True)
    if isinstance(value, datetime):
        return Fact(words, f"{value.isoformat(' ')} UTC")
    if isinstance(value, bool | date | str):
        return Fact(words, ("yes" if value else "no") if isinstance(value, bool) else str(value))
    if isinstance(value, int):
        return Fact(words, str(value) if _PLAIN_NUMBERS.fullmatch(name) else f"{value:,}", is_number=True)
    return Fact(words, _text(value), is_number=isinstance(value, float))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _above(question: Question) -> list[tuple[str, str]]:
    """Links to the levels above: label and address."""
    found = []
    if question.kind in ("campaign", "day", "billing") and question.first is not None:
        total = replace(question, kind="total", campaign="", store="")
        found.append((f"all campaigns, {_days(question)}", total.url))
    if question.kind == "day":
        found.append((f"campaign {question.campaign}", replace(question, kind="campaign", store="").url))
    return found


PART = Page("why_part", "/why/part", "Why?", part, shows=(), in_menu=False)
LINE = Page("why", "/why/billing/{line:path}", "Why?", build, shows=(), in_menu=False)
PAGE = Page("why", "/why/{kind}", "Why?", build, shows=(), in_menu=False)
