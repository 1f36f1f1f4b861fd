"""What a person reads in a table, how it is sorted and searched, and what the URL's filters mean."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pytest

from orchestration.console.filters import Filters
from orchestration.console.rendering import commands, sparkline
from orchestration.console.tables import Column, DataTable, shown, units_of_micros, units_of_nanos
from spark_jobs.errors import UsageError

TABLE = DataTable(
    "places",
    "Places",
    (Column("name", "name"), Column("clicks", "clicks", "count")),
    [{"name": "b", "clicks": 2}, {"name": "Áb", "clicks": None}, {"name": "c", "clicks": 10}],
)


@pytest.mark.parametrize(
    ("value", "kind", "currency", "text"),
    [
        (1234567, "count", None, "1,234,567"),
        (-3, "change", None, "−3"),
        (3, "change", None, "+3"),
        (Decimal("1234.5"), "money", "USD", "$1,234.50"),
        (Decimal("-0.5"), "money", "JPY", "−¥1"),
        (Decimal("12"), "money", "KWD", "12.000 KWD"),
        (0.02672, "percent", None, "2.67%"),
        (5.9149, "ratio", None, "5.91×"),
        (75, "seconds", None, "1 min 15 s"),
        (25_400_000, "bytes", None, "25.4 MB"),
        (datetime(2026, 3, 1, 9, 5), "time", None, "2026-03-01 09:05"),
        (date(2026, 3, 1), "date", None, "2026-03-01"),
        (True, "flag", None, "yes"),
        (None, "money", "USD", "–"),
    ],
)
def test_how_values_read(value: Any, kind: Any, currency: str | None, text: str) -> None:
    assert shown(value, kind, currency) == text


def test_money_is_rounded_half_away_from_zero_to_the_decimals_of_its_currency() -> None:
    assert units_of_nanos(1_005_000_000, "USD") == Decimal("1.01")
    assert units_of_nanos(-1_005_000_000, "USD") == Decimal("-1.01")
    assert units_of_nanos(10**27 + 5 * 10**8, "JPY") == Decimal(10**18 + 1)
    assert units_of_micros(1_004_999, "EUR") == Decimal("1.00")
    assert units_of_micros(None, "EUR") is None


def test_sorting_and_searching_are_in_the_address() -> None:
    by_clicks = Filters(sort="-places.clicks")
    assert [row["name"] for row in TABLE.arranged(by_clicks).rows] == ["c", "b", "Áb"]
    assert [row["name"] for row in TABLE.arranged(Filters(sort="places.clicks")).rows] == ["b", "c", "Áb"]
    assert TABLE.next_sort(TABLE.columns[1], Filters()) == "-places.clicks"
    assert TABLE.next_sort(TABLE.columns[1], by_clicks) == "places.clicks"
    assert (TABLE.is_sorted(TABLE.columns[1], by_clicks), TABLE.is_sorted(TABLE.columns[0], by_clicks)) == ("descending", "none")
    assert [row["name"] for row in TABLE.arranged(Filters(search="B")).rows] == ["b", "Áb"]
    cut = TABLE.arranged(Filters(), limit=2)
    assert (len(cut.rows), cut.count) == (2, 3)
    assert len(TABLE.arranged(Filters(rows="all"), limit=2).rows) == 3
    assert TABLE.arranged(Filters(sort="places.nothing")).rows == list(TABLE.rows)


def test_filters_come_back_from_their_own_address() -> None:
    filters = Filters("s 1&", "c/1", date(2026, 3, 1), date(2026, 3, 2), "eu", "USD", "linear", 30, "é", "-a.b", "all")
    assert Filters.of(filters.parameters()) == filters
    assert Filters().url("/trust") == "/trust"
    assert filters.url("/", advertiser="", campaign="", first=None, last=None, region="", search="", sort="", rows="") == (
        "/?currency=USD&model=linear&window=30"
    )
    assert Filters.of({"from": "2026-03-01"}).last == date(2026, 3, 1)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"from": "01.03.2026"}, "from="),
        ({"to": "2026-02-30"}, "to="),
        ({"from": "2026-03-02", "to": "2026-03-01"}, "is after"),
        ({"model": "best"}, "'best'"),
        ({"window": "-7"}, "window="),
    ],
)
def test_a_wrong_filter_is_named(parameters: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Filters.of(parameters)


def test_an_export_is_stamped_and_guarded() -> None:
    table = DataTable(
        "t",
        "T",
        (Column("name", "name"), Column("spend", "spend", "money")),
        [{"name": "=1+1", "spend": Decimal("1.5"), "currency": "USD"}],
    )
    assert table.export("csv", "build-1", "from=2026-03-01").decode().splitlines() == [
        "name,spend,currency,mart_build,console_filters",
        "'=1+1,1.5,USD,build-1,from=2026-03-01",
    ]
    with pytest.raises(UsageError, match="csv or parquet"):
        table.export("xlsx", "build-1", "")


def test_what_is_drawn_or_marked_is_escaped() -> None:
    assert commands("run `<b>` & more") == "run <code>&lt;b&gt;</code> &amp; more"
    assert 'points="0.0,20.0 90.0,2.0"' in sparkline([0, 5])
    assert "polyline" not in sparkline([0, 0, None])
