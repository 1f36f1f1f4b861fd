"""The nodes of an explanation, as a tree for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

from rich.text import Text
from rich.tree import Tree

SHOWN = 12
"""The parts of a node that a person sees; a program gets all."""

QUIET = ("clicks", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos")
"""Measures that a person sees only if they are not zero."""


@dataclass
class Node:
    """A fact and its parts. ``facts`` are plain values; ``problems`` say where the parts do not add up.

    ``checks`` name what was compared with the fact. Without problems, they are equal.
    """

    what: str
    facts: dict[str, Any] = field(default_factory=dict)
    parts: list[Node] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    def add(self, *parts: Node) -> None:
        """Append parts."""
        self.parts += parts

    def must_equal(self, below: str, expected: dict[str, int], found: dict[str, int]) -> None:
        """Note the check, and a problem for each measure of ``expected`` that differs in ``found``, which ``below`` names."""
        self.checks.append(below)
        for name, value in expected.items():
            if found.get(name, 0) != value:
                self.problems.append(f"{name} is {value} here and {found.get(name, 0)} in {below}")

    def all_problems(self) -> Iterator[str]:
        """Yield the problems of this node and of all nodes below it."""
        for problem in self.problems:
            yield f"{self.what}: {problem}"
        for part in self.parts:
            yield from part.all_problems()


def as_json(node: Node) -> dict[str, Any]:
    """Return the node as plain values. ``adds_up`` says whether no node below has a problem."""
    return {"adds_up": not any(node.all_problems()), **_plain(node)}


def _plain(node: Node) -> dict[str, object]:
    result: dict[str, object] = {"what": node.what, **node.facts}
    if node.problems:
        result["problems"] = node.problems
    if node.parts:
        result["parts"] = [_plain(part) for part in node.parts]
    return result


def as_tree(node: Node) -> Tree:
    """Return the node as a tree for a person, with the first SHOWN parts of each node."""
    tree = Tree(_label(node, "bold"))
    _grow(tree, node)
    problems = list(node.all_problems())
    if problems:
        tree.add(Text(f"it does not add up in {len(problems)} place{'s' if len(problems) > 1 else ''}", "bold red"))
    else:
        tree.add(Text("every level adds up to the one above", "green"))
    return tree


def _grow(tree: Tree, node: Node) -> None:
    for problem in node.problems:
        tree.add(Text(problem, "red"))
    for part in node.parts[:SHOWN]:
        _grow(tree.add(_label(part)), part)
    if len(node.parts) > SHOWN:
        tree.add(f"and {len(node.parts) - SHOWN} more (--json has them)")


def _label(node: Node, style: str = "") -> Text:
    quiet = {name for name in QUIET if node.facts.get(name) == 0}
    facts = {name: value for name, value in node.facts.items() if value not in (None, "", []) and name not in quiet}
    known = ", ".join(f"{name} {_text(value)}" for name, value in facts.items())
    return Text.assemble((node.what, style), (f"  {known}" if known else "", "dim"))


def _text(value: object) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}" + (f".{value:%f}" if value.microsecond else "") + "Z"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "; ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)
