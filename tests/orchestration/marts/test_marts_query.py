"""Asking the marts, and printing what they answer."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from orchestration.marts import query, query_marts
from orchestration.marts.render import render
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
        ("select * from read_text('/etc/hostname')", "read_text is not available"),
        ("select * from '/etc/hostname.csv'", "disabled by configuration"),
        ("select * from settings", "Table with name settings does not exist"),  # a variable of the caller
        ("explain analyze select * from fct", "only EXPLAIN SELECT"),
        ("/* a */ EXPLAIN -- b\n (ANALYZE, format json) select 1", "only EXPLAIN SELECT"),
        ("explain insert into fct values (2, null, null)", "only EXPLAIN SELECT"),
        ("explain analyze create table memory.main.t as select 1", "only EXPLAIN SELECT"),
        ("explain analyze copy (select 'evil') to '{marts}'", "only EXPLAIN SELECT"),
        ("explain analyze copy (select 'evil') to '{marts}.wal' (use_tmp_file false)", "only EXPLAIN SELECT"),
        ("copy (select 'evil') to '{marts}'", "read-only: no COPY"),
        ("pragma database_list", "a query is a SELECT"),
        ("call checkpoint()", "read-only: no CALL"),
        ("prepare p as insert into fct values (2, null, null)", "read-only: no PREPARE"),
        ("execute p", "read-only: no EXECUTE"),
        ("with a as (insert into fct values (2, null, null) returning *) from a", "A CTE needs a SELECT"),
        ("select * from system.main.enable_logging(storage = 'file', storage_path = '{marts}.wal')", "enable_logging is not"),
        ("from (summarize (from force_checkpoint()))", "force_checkpoint is not"),
        ("select * from query('from enable_logging()')", "query is not available"),
        ("explain select * from enable_logging()", "only EXPLAIN SELECT"),
        ("select n, write_log('x') from fct", "write_log is not available"),
    ],
)
def test_refused_on_one_line(settings: Settings, sql: str, message: str) -> None:
    before = files_below(settings.home_path)
    with pytest.raises(UsageError, match=message) as caught:
        query_marts(settings, sql.replace("{marts}", str(settings.marts_path).replace("'", "''")))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert files_below(settings.home_path) == before


def test_what_reads_and_looks_like_more(settings: Settings) -> None:
    assert query_marts(settings, "/* explain analyze */ select 'copy', unnest([n]) from fct, range(2)")[1] == [("copy", 1)] * 2
    assert ("fct",) in query_marts(settings, "select table_name from duckdb_tables()")[1]
    assert query_marts(settings, "-- plan\nexplain (select n from fct)")[1]


def test_no_path_may_be_written_even_if_a_statement_came_through(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "_reading_statement", query._only)
    before = files_below(settings.home_path)
    marts = str(settings.marts_path).replace("'", "''")
    for path in (marts, f"{marts}.wal", str(settings.home_path / "new").replace("'", "''")):
        for option in ("", " (use_tmp_file false)"):
            with pytest.raises(UsageError, match="disabled by configuration"):
                query_marts(settings, f"explain analyze copy (select 'evil') to '{path}'{option}")
    assert files_below(settings.home_path) == before


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LONG = "select count(*) from range(10_000_000) a, range(10_000_000) b where hash(a.range, b.range) = 0"


def test_limits(settings: Settings) -> None:
    with pytest.raises(AdtallyError, match=r"longer than 0\.3 s.*ADTALLY_QUERY_TIMEOUT"):
        query_marts(settings.model_copy(update={"query_timeout": timedelta(seconds=0.3)}), LONG)
    little = settings.model_copy(update={"query_memory": "32m", "query_spill": "8m"})
    with pytest.raises(AdtallyError, match=r"more than it may have.*ADTALLY_QUERY_MEMORY"):
        query_marts(little, "select list(r::varchar) from range(2_000_000) t(r)")
    assert query_marts(little, "select current_setting('max_temp_directory_size')")[1] == [("8.0 MiB",)]
    assert not list(settings.scratch_path.iterdir())


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


def test_a_query_loads_only_what_it_needs(settings: Settings) -> None:
    """Loading dbt, Arrow, numpy or pandas takes longer than the query."""
    program = (
        "import sys; from orchestration.cli.app import run; run(sys.argv[1:]);"
        "print(sorted({'dagster', 'dbt', 'numpy', 'pandas', 'pyarrow'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", program, "--home", str(settings.home_path), "query", "from fct", "--format=csv", "--no-build"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "2026-03-10T10:00:00" in done.stdout
