"""What the console exports: every table of every page and every mart, as CSV and Parquet, equal to each other and to the marts."""

from __future__ import annotations

import csv
import io
from datetime import date, datetime
from decimal import Decimal
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from console import RunningConsole, ask, ask_bytes

from orchestration.console.pages import PAGES
from orchestration.marts import query_marts
from spark_jobs.config import Settings
from tests.orchestration.console.small_home import DAY, FORMULA, HOSTILE

pytestmark = pytest.mark.e2e

TABLES = [(page.name, table) for page in PAGES for table in page.tables]
FILTERS = f"from=2025-06-02&to={DAY}"
Rows = list[dict[str, object]]


def exported(console: RunningConsole, page: str, table: str, query: str = FILTERS) -> tuple[Rows, Rows]:
    """A table as CSV and as Parquet."""
    files = {}
    for form in ("csv", "parquet"):
        status, headers, body = ask_bytes(console, f"/export/{page}/{table}.{form}?{query}")
        assert status == 200, (form, body[:500])
        assert headers["content-disposition"].startswith("attachment"), form
        files[form] = body
    rows = csv.DictReader(io.StringIO(files["csv"].decode("utf-8"), newline=""))
    return list(rows), pq.read_table(io.BytesIO(files["parquet"])).to_pylist()


def as_csv(value: object) -> str:
    """A value of Parquet as the CSV has it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    return str(value)


def equal(text: str | object, value: object) -> bool:
    """Whether a text of the CSV is this value of Parquet."""
    assert isinstance(text, str)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return text == (as_csv(value) if not isinstance(value, bool) else str(value).lower()) or text == str(value)
    if isinstance(value, (int, float, Decimal)):
        return Decimal(text) == Decimal(str(value))
    if isinstance(value, datetime):
        return datetime.fromisoformat(text).replace(tzinfo=None) == value.replace(tzinfo=None)
    if isinstance(value, date):
        return text == value.isoformat()
    return True  # lists and structures


@pytest.mark.parametrize(("page", "table"), TABLES)
def test_a_table_is_the_same_in_both_forms_and_names_build_and_filters(console: RunningConsole, page: str, table: str) -> None:
    arguments = f"{FILTERS}&campaign={quote(FORMULA, safe='')}" if page == "campaign" else FILTERS
    texts, values = exported(console, page, table, arguments)
    assert len(texts) == len(values)
    for text, value in zip(texts, values, strict=True):
        assert list(text) == list(value)
        assert [(name, text[name], value[name]) for name in text if not equal(text[name], value[name])] == []
        assert value["mart_build"] and "2025-06" in str(value["console_filters"])


@pytest.mark.parametrize("mart", ["fct_campaign_day", "fct_billing_ledger", "dim_campaign"])
def test_a_mart_is_exported_whole(console: RunningConsole, console_home: Settings, mart: str) -> None:
    texts, values = exported(console, "marts", mart)
    [(count,)] = query_marts(console_home, f"select count(*) from {mart}")[1]
    assert len(texts) == len(values) == count > 0
    assert {len(row) for row in values} == {len(query_marts(console_home, f"from {mart} limit 1")[0]) + 1}


def test_formulas_are_guarded_in_csv_and_unchanged_in_parquet(console: RunningConsole) -> None:
    texts, values = exported(console, "marts", "dim_campaign")
    assert set(HOSTILE) <= {row["campaign_id"] for row in values}
    assert f"'{FORMULA}" in {row["campaign_id"] for row in texts} and FORMULA not in {row["campaign_id"] for row in texts}


@pytest.mark.parametrize(
    "path",
    [
        "/export/marts/no_such_mart.csv",
        "/export/marts/fct_campaign_day.xlsx",
        "/export/today/no-such-table.csv",
        '/export/marts/x"%3b%20select%201%3b--.csv',
        "/export/marts/duckdb_settings().csv",
    ],
)
def test_what_is_not_there_is_said(console: RunningConsole, path: str) -> None:
    status, headers, body = ask(console, path)
    assert status in (400, 404) and headers.get_content_type() == "text/html"
    assert "Traceback" not in body


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("from=yesterday", "yesterday"),
        ("from=2025-06-03&to=2025-06-01", "2025-06-03"),
        ("from=2025-02-30", "2025-02-30"),
        ("model=none", "none"),
        ("window=x", "not a number of days"),
        ("from=%3Cscript%3E", "&lt;script&gt;"),
    ],
)
def test_a_wrong_filter_is_said(console: RunningConsole, query: str, said: str) -> None:
    status, headers, body = ask(console, f"/?{query}")
    assert (status, headers.get_content_type()) == (400, "text/html")
    assert said in body and "Traceback" not in body and "<script>" not in body
