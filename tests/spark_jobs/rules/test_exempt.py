"""Users that are nobody: Python, Arrow, SQL and the auditor say the same of an id."""

from __future__ import annotations

import duckdb
import pyarrow as pa
import pytest
from pydantic import ValidationError

from spark_jobs.attribution.rules import AttributionRules
from spark_jobs.audit.traffic import _folded
from spark_jobs.rules.exempt import PLACEHOLDERS, are_exempt, is_exempt_sql, plain
from spark_jobs.rules.store import _parse_rules, canonical

EXEMPT = ["UNKNOWN", " (Not Set) ", "  ", "-", "0", "NaN", "00000000-0000-0000-0000-000000000000", "0" * 32]
KNOWN = ["u", "0'0", "unknown-1", "null\u00a0", "\tnull", "NULL\u0130", "É-", "00000000-0000-0000-0000-000000000001"]


def test_all_ways_to_ask_agree() -> None:
    users = EXEMPT + KNOWN
    told = [True] * len(EXEMPT) + [False] * len(KNOWN)
    assert [plain(user) in PLACEHOLDERS for user in users] == told
    assert [_folded(user) in PLACEHOLDERS for user in users] == told
    assert are_exempt(pa.chunked_array([users]), PLACEHOLDERS).to_pylist() == told
    with duckdb.connect() as lake:
        lake.register("input", pa.table({"n": range(len(users)), "user_id": users}))
        found = lake.execute(f"select {is_exempt_sql(PLACEHOLDERS)} from input order by n").fetchall()
        assert [each for (each,) in found] == told
        obrien = is_exempt_sql(["o'brien"])
        quoted = lake.execute(f"select {obrien} from (select 'O''Brien' as user_id)").fetchall()
        assert quoted == [(True,)]
    assert not any(are_exempt(pa.chunked_array([users]), ()).to_pylist())
    assert is_exempt_sql(()) == "false"


def test_a_stored_rule_set_from_before_exempts_nobody_and_keeps_its_text() -> None:
    old = '{"window_days":[1,7],"half_life_days":7.0,"view_through":false,"view_through_hours":24}'
    rules = _parse_rules(old, AttributionRules)
    assert rules.exempt_users == ()
    assert canonical(rules) == old
    new = AttributionRules(window_days=(1, 7))
    assert _parse_rules(canonical(new), AttributionRules) == new
    assert new.exempt_users == PLACEHOLDERS
    assert AttributionRules(exempt_users=PLACEHOLDERS[::-1], window_days=(1, 7)) == new  # the same rules, the same text


def test_the_list_is_plain_and_has_each_once() -> None:
    assert AttributionRules(exempt_users=(" B", "b", "A")).exempt_users == ("a", "b")
    with pytest.raises(ValidationError, match="at most 128 characters"):
        AttributionRules(exempt_users=("x" * 129,))
