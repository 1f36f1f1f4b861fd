"""What changed since an export: the sum of the changes is what the newest build has less what the export had."""

from __future__ import annotations

import io
from typing import Any

import pyarrow.parquet as pq
import pytest
from asgi import Client

from orchestration.console.app import create_app
from orchestration.console.pages import changes
from orchestration.console.recent import Recent
from tests.orchestration.console.twice_built import HOSTILE, TwiceBuilt

pytestmark = pytest.mark.homes

BY_DAY = "select event_date, campaign_id, currency, {} from fct_campaign_day group by 1, 2, 3"
SUMS = "sum(impressions)::bigint, sum(clicks)::bigint, sum(spend_nanos)::bigint"


def difference(home: TwiceBuilt) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """(day, campaign, currency) -> impressions, clicks and nanos of the newest build less those of the first; not those of zero."""
    old = {row[:3]: row[3:] for row in home.sql(BY_DAY.format(SUMS), old=True)}
    new = {row[:3]: row[3:] for row in home.sql(BY_DAY.format(SUMS))}
    found = {key: tuple(a - b for a, b in zip(new[key], old.get(key, (0, 0, 0)), strict=True)) for key in new}
    return {key: value for key, value in found.items() if any(value)}


def listed(client: Client, build: str, query: str = "") -> list[dict[str, Any]]:
    """The rows of the page's table, as its export has them."""
    answer = client.get(f"/export/changes/differences.parquet?build={build}{query}")
    assert answer.status == 200, answer.text
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(answer.body)).to_pylist()
    return rows


@pytest.mark.parametrize("known_by", ["commits", "times"])
def test_the_changes_are_the_new_figures_less_the_old_ones(
    twice_built: TwiceBuilt, known_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if known_by == "times":
        monkeypatch.setattr(changes, "_version_at", lambda *given: None)
    monkeypatch.setattr(changes, "_FOUND", Recent(8))
    client = Client(create_app(twice_built.settings))
    rows = listed(client, twice_built.old_build)
    found: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        sums = found.setdefault((row["event_date"], row["campaign_id"], row["currency"]), [0, 0])
        sums[0] += row["impressions"]
        sums[1] += row["clicks"]
    expected = difference(twice_built)
    assert {key: tuple(value) for key, value in found.items() if any(value)} == {
        key: value[:2] for key, value in expected.items() if any(value[:2])
    }
    assert expected and {row["cause"] for row in rows} >= {"new batches"}
    page = client.get(f"/changes?build={twice_built.old_build}")
    for currency in {key[2] for key in expected}:
        nanos = sum(value[2] for key, value in expected.items() if key[2] == currency)
        [figure] = page.page.all("p", data_measure=f"change-{currency}")
        said = float("".join(letter for letter in figure.text.replace("−", "-") if letter in "-.0123456789"))
        assert said == pytest.approx(nanos / 10**9, abs=0.006)


def test_the_totals_are_then_change_and_now(twice_built: TwiceBuilt, client: Client) -> None:
    page = client.get(f"/changes?build={twice_built.old_build}").text
    for currency, impressions in twice_built.sql("select currency, sum(impressions) from fct_campaign_day group by 1"):
        assert f"{impressions:,} now" in page, currency
    late = [row for row in listed(client, twice_built.old_build) if row["campaign_id"] == HOSTILE]
    assert [(row["clicks"], row["currency"], row["cause"]) for row in late] == [(1, "EUR", "new batches")]
    only = listed(client, twice_built.old_build, "&currency=JPY")
    assert all(row["currency"] == "JPY" for row in only)


def test_the_newest_build_has_not_changed(twice_built: TwiceBuilt, client: Client) -> None:
    [(newest,)] = twice_built.sql("select any_value(build_id) from mart_build")
    assert listed(client, newest) == []
    assert "Nothing changed" in client.get(f"/changes?build={newest}").text
    # an export of two groups of marts has both ids; the last one counts
    assert listed(client, f"{twice_built.old_build}+{newest}") == []


def test_a_build_before_everything(twice_built: TwiceBuilt, client: Client) -> None:
    rows = listed(client, "20200101T000000Z-00000000")
    [(impressions,)] = twice_built.sql("select sum(impressions) from fct_campaign_day")
    assert sum(row["impressions"] for row in rows) == impressions


@pytest.mark.parametrize(
    "build", ["nope", "20251301T000000Z-00000000", "%3Cimg%20src%3Dx%3E", "20200101T000000Z", "20200101T000000Z-0000000g"]
)
def test_what_is_no_build_id(client: Client, build: str) -> None:
    answer = client.get(f"/changes?build={build}")
    assert answer.status == 400 and "is not the id of a mart build" in answer.text and not answer.page.all("img")


def test_a_build_that_is_newer(client: Client) -> None:
    answer = client.get("/changes?build=29990101T000000Z-00000000")
    assert answer.status == 400 and "is newer than" in answer.text


def test_without_a_build_the_page_asks_for_one(client: Client) -> None:
    page = client.get("/changes")
    assert page.status == 200 and "mart_build" in page.text and page.page.all("input", name="build")


def test_links_keep_the_build(client: Client, twice_built: TwiceBuilt) -> None:
    page = client.get(f"/changes?build={twice_built.old_build}").page
    sorting = [each.attributes["href"] for each in page.all("a") if "sort=" in each.attributes.get("href", "")]
    assert sorting and all(f"build={twice_built.old_build}" in address for address in sorting)
    export = next(each.attributes["href"] for each in page.all("a") if each.text == "CSV")
    assert client.get(export).status == 200
