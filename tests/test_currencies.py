"""No amounts of two currencies are added up: a lint over the SQL of the project, and over the Python that sums.

A select that sums nanos or micros names the currency among what it groups, splits or filters by, or a key that has one currency.
What is neither is listed below with its reason; an entry that is no longer needed fails too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_MONEY = r"\w*(?:micros|nanos|spend|revenue)\b"
_SUM = re.compile(rf"\bsum(?:_money|_bigint|precision|0)?\s*\(\s*(?:\{{\{{)?[^()]*{_MONEY}", re.IGNORECASE)
# a select is of one currency that names it, or a key of one currency
_ONE = re.compile(r"\bcurrency\b|\border_id\b", re.IGNORECASE)
_UNION = re.compile(r"\bunion\b", re.IGNORECASE)
PYTHON = ("orchestration", "services/serving", "services/budget", "expectations")

ALLOWED = {
    "dbt_project/tests/conservation/assert_increments_match_ledger.sql": "the ledger has no currency: a checksum, shown to nobody",
    "expectations/suites/marts.py": "its key, a name in Python, holds the currency",
    "orchestration/explain/billing.py": "lines of one day, campaign, store and currency",
    "orchestration/explain/credits.py": "credits of one order",
}


def selects(sql: str) -> Iterator[tuple[str, str]]:
    """Each sum of money with the select around it: what its own parentheses hold, without those inside that select themselves."""
    for found in _SUM.finditer(sql):
        depth, start = 0, found.start()
        while start > 0:  # back to the bracket that opens the select
            start -= 1
            depth += {")": 1, "(": -1}.get(sql[start], 0)
            if depth < 0 and re.match(r"\(\s*(?:--[^\n]*\n\s*)*(?:with|select|from)\b", sql[start:], re.IGNORECASE):
                break
            if depth < 0:
                depth = 0  # a function's: go on outwards
        depth, end = 0, found.start()
        while end < len(sql):
            depth += {"(": 1, ")": -1}.get(sql[end], 0)
            if depth < 0 and start > 0 and _closes(sql, start, end):
                break
            end += 1
        branches = [start, *(start + cut.start() for cut in _UNION.finditer(sql[start:end])), end]
        last = next(index for index, at in enumerate(branches) if at > found.start())
        yield found.group(), sql[branches[last - 1] : branches[last]]


def _closes(sql: str, start: int, end: int) -> bool:
    return sql[start : end + 1].count("(") == sql[start : end + 1].count(")")


def mixed(sql: str) -> list[str]:
    return [summed for summed, around in selects(re.sub(r"--[^\n]*", "", sql)) if not _ONE.search(around)]


def sql_files() -> list[Path]:
    return sorted([*ROOT.glob("dbt_project/**/*.sql"), *ROOT.glob("services/**/*.sql"), *ROOT.glob("spark_jobs/**/*.sql")])


def sources() -> list[Path]:
    return sorted(path for folder in PYTHON for path in (ROOT / folder).rglob("*.py"))


def python_sums(text: str) -> list[str]:
    """Calls of Python's own sum over an attribute or item that is an amount, and SQL in texts that mixes currencies."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sum":
            summed = node.args[0].elt if isinstance(node.args[0], ast.GeneratorExp) else node.args[0]
            names = [each.attr for each in ast.walk(summed) if isinstance(each, ast.Attribute)]
            names += [str(each.value) for each in ast.walk(summed) if isinstance(each, ast.Constant)]
            found += [ast.unparse(node)] if any(re.search("micros|nanos", name) for name in names) else []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\bselect\b", node.value, re.IGNORECASE):
            found += mixed(node.value)
        if isinstance(node, ast.JoinedStr):
            whole = "".join(str(part.value) if isinstance(part, ast.Constant) else " " for part in node.values)
            found += mixed(whole) if re.search(r"\bselect\b", whole, re.IGNORECASE) else []
    return found


def offences() -> dict[str, list[str]]:
    found = {str(path.relative_to(ROOT)): mixed(path.read_text("utf-8")) for path in sql_files() if path.parent.name != "macros"}
    found |= {str(path.relative_to(ROOT)): python_sums(path.read_text("utf-8")) for path in sources()}
    return {name: sums for name, sums in found.items() if sums}


def test_amounts_of_two_currencies_are_added_nowhere() -> None:
    assert {name: sums for name, sums in offences().items() if name not in ALLOWED} == {}


def test_every_exception_is_still_needed() -> None:
    assert ALLOWED.keys() <= offences().keys()


@pytest.mark.parametrize(
    ("sql", "is_wrong"),
    [
        ("select sum(spend_nanos) from t", True),
        ("select day, sum(t.spend_nanos) as s from t group by day", True),
        ("select currency, sum(spend_nanos) from t group by currency", False),
        ("with a as (select currency, x from t), b as (select sum(spend_micros) as s from a) select s from b", True),
        ("with a as (select currency, sum(cast(spend_micros as hugeint)) as s from t group by 1) select s from a", False),
        ("select {{ sum_money('spend_nanos') }} as s from t group by day", True),
        ("select sum(clicks) from t", False),
        ("select currency, 1 from t union all select day, sum(spend_nanos) from t", True),
        ("select sum(amount_micros) over (partition by day, currency) from t", False),
    ],
)
def test_this_lint_sees_what_it_is_for(sql: str, is_wrong: bool) -> None:
    assert bool(mixed(sql)) is is_wrong


def test_this_lint_sees_sums_in_python() -> None:
    assert python_sums("total = sum(found.nanos_found - found.nanos_expected for found in own)")
    assert python_sums("total = sum(line.amount_micros for line in lines)")
    assert python_sums("total = sum(row['spend_nanos'] for row in rows)")
    assert python_sums("text = 'select sum(spend_nanos) from t'")
    assert not python_sums("text = 'select currency, sum(spend_nanos) from t group by 1'")
