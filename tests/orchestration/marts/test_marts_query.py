"""Asking the marts, and printing what they answer."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from orchestration.marts import query_marts, render
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError, UsageError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Published marts of one small table."""
    made = load_settings(home=tmp_path / "it's home")
    made.marts_path.parent.mkdir(parents=True)
    with duckdb.connect(str(made.marts_path)) as connection:
        connection.execute("create table fct as select 1::bigint as n, timestamp '2026-03-10 10:00:00' as at, null as gap")
    return made


def test_query(settings: Settings) -> None:
    assert query_marts(settings, "select * from fct;") == (["n", "at", "gap"], [(1, datetime(2026, 3, 10, 10), None)])
    assert query_marts(settings, "with a as (from main.fct) select n as k from a where false") == (["k"], [])


def test_explain_and_describe_read(settings: Settings) -> None:
    assert query_marts(settings, "describe fct")[1][0][:2] == ("n", "BIGINT")
    assert query_marts(settings, "explain select * from fct")[1]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("select nothing from fct", "nothing"),
        ("selec 1", "syntax error"),
        ("", "one SQL statement, not 0"),
        ("select 1; select 2", "one SQL statement, not 2"),
        ("insert into fct values (2, null, null)", "read-only: no INSERT"),
        ("create table memory.main.t as select 1", "read-only: no CREATE"),
        ("copy fct to 'out.csv'", "read-only: no COPY"),
        ("attach 'other.duckdb'", "read-only: no ATTACH"),
        ("set enable_external_access = true", "read-only: no SET"),
        ("select * from read_text('/etc/hostname')", "disabled by configuration"),
    ],
)
def test_refused_on_one_line(settings: Settings, sql: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        query_marts(settings, sql)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_no_marts_and_broken_marts(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    with pytest.raises(AdtallyError, match="run `adtally marts build` first"):
        query_marts(settings, "select 1")
    settings.marts_path.parent.mkdir()
    settings.marts_path.write_bytes(b"not a database" * 1000)
    with pytest.raises(AdtallyError, match="cannot be read"):
        query_marts(settings, "select 1")


COLUMNS = ["name", "n", "at", "day"]
ROWS = [('a, "b"\n', 9007199254740993, datetime(2026, 3, 10, 10), date(2026, 3, 10)), (None, -1, None, None)]


def test_table() -> None:
    assert render(COLUMNS, ROWS).splitlines() == [
        "name                     n  at                   day",
        "--------  ----------------  -------------------  ----------",
        'a, "b"\\n  9007199254740993  2026-03-10T10:00:00  2026-03-10',
        "NULL                    -1  NULL                 NULL",
        "(2 rows)",
    ]
    assert render(["n"], []) == "n\n-\n(0 rows)"
    assert "\x1b" not in render(["x"], [("\x1b[31mred",)])


def test_csv() -> None:
    assert render(COLUMNS, ROWS, "csv") == ('name,n,at,day\n"a, ""b""\n",9007199254740993,2026-03-10T10:00:00,2026-03-10\n,-1,,')


def test_json() -> None:
    assert json.loads(render(COLUMNS, ROWS, "json")) == [
        {"name": 'a, "b"\n', "n": 9007199254740993, "at": "2026-03-10T10:00:00", "day": "2026-03-10"},
        {"name": None, "n": -1, "at": None, "day": None},
    ]
    assert render(["n"], [], "json") == "[]"
    nested = json.loads(render(["v"], [({"d": Decimal("0.10"), "l": [float("nan"), b"\x00"]},)], "json"))
    assert nested == [{"v": {"d": "0.10", "l": ["nan", "AA=="]}}]


def test_wrong_formats() -> None:
    with pytest.raises(UsageError, match="table, csv, json"):
        render(["n"], [], "xml")
    with pytest.raises(UsageError, match="two columns"):
        render(["n", "n"], [(1, 2)], "json")
