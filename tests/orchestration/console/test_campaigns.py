"""Page Campaigns and a campaign's own page: each figure as SQL on the marts has it, filters, hostile ids."""

from __future__ import annotations

import io
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from asgi import Client
from starlette.requests import Request

from orchestration.console.app import ConsoleState
from orchestration.console.pages import campaigns
from tests.orchestration.console.twice_built import DAY, HOSTILE, TwiceBuilt

pytestmark = pytest.mark.homes


def exported(client: Client, page: str, table: str, query: str) -> list[dict[str, Any]]:
    """The rows of a table's export."""
    answer = client.get(f"/export/{page}/{table}.parquet?{query}")
    assert answer.status == 200, answer.text
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(answer.body)).to_pylist()
    return rows


def by_campaign(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return sorted(tuple(row[name] for name in ("campaign_id", "currency", *names)) for row in rows)


@pytest.mark.parametrize(
    ("query", "tests"),
    [
        ("from=2025-06-02", "event_date = '2025-06-02'"),
        ("from=2025-06-02&to=2025-06-03", "event_date between '2025-06-02' and '2025-06-03'"),
        ("from=2025-06-02&currency=EUR", "event_date = '2025-06-02' and currency = 'EUR'"),
        ("from=2025-06-02&campaign=c00002", "event_date = '2025-06-02' and campaign_id = 'c00002'"),
        ("from=2025-06-02&region=us-east", "event_date = '2025-06-02' and region = 'us-east'"),
    ],
)
def test_delivery_and_money_are_those_of_the_marts(client: Client, twice_built: TwiceBuilt, query: str, tests: str) -> None:
    found = by_campaign(exported(client, "campaigns", "campaigns", query), "impressions", "clicks", "spend", "invalid_share", "ctr")
    expected = twice_built.sql(
        f"""
        select campaign_id, currency, sum(impressions)::bigint, sum(clicks)::bigint,
            round(sum(spend_nanos) / 1000000000::decimal(38, 0), case currency when 'JPY' then 0 else 2 end)::double,
            sum(invalid_impressions + invalid_clicks) / sum(gross_impressions + gross_clicks),
            case when sum(impressions) > 0 then sum(clicks) / sum(impressions) end
        from fct_campaign_minute where {tests} group by 1, 2 order by 1, 2
        """
    )
    assert [row[:4] for row in found] == [row[:4] for row in expected] and found
    for row, wanted in zip(found, expected, strict=True):
        assert float(row[4]) == pytest.approx(wanted[4], abs=0.005)
        assert row[5:] == pytest.approx(wanted[5:])


def test_pacing_and_return_are_those_of_the_marts(client: Client, twice_built: TwiceBuilt) -> None:
    rows = exported(client, "campaigns", "campaigns", "from=2025-06-02&model=linear&window=14")
    pacing = twice_built.sql(
        "select campaign_id, currency, daily_budget, projected, spent_micros / expected_micros from fct_budget_pacing "
        "where event_date = '2025-06-02' "
        "qualify row_number() over (partition by campaign_id, currency order by event_minute desc) = 1"
    )
    assert pacing
    found = {(row["campaign_id"], row["currency"]): row for row in rows}
    for campaign, currency, budget, projected, share in pacing:
        row = found[campaign, currency]
        assert (row["budget"], row["projected"]) == (budget, projected)
        assert row["paced_share"] == pytest.approx(share, abs=0.02) if budget else row["paced_share"] is None
    revenue = twice_built.sql(
        "select a.campaign_id, a.currency, a.revenue_by_touch_date_micros * 1000 / d.spend_nanos from fct_advertiser_attribution a "
        "join (select campaign_id, currency, sum(spend_nanos) as spend_nanos from fct_campaign_day where event_date = '2025-06-02' "
        "group by 1, 2) d on (a.campaign_id, a.currency) = (d.campaign_id, d.currency) "
        "where a.event_date = '2025-06-02' and model = 'linear' and window_days = 14 and d.spend_nanos > 0"
    )
    assert revenue
    for campaign, currency, roas in revenue:
        assert found[campaign, currency]["roas"] == pytest.approx(float(roas))


def test_the_page_searches_sorts_and_links(client: Client, twice_built: TwiceBuilt) -> None:
    page = client.get("/campaigns?from=2025-06-02&sort=-campaigns.spend").page
    names = [each.attributes["href"] for each in page.all("a") if each.attributes.get("href", "").startswith("/campaigns/c0")]
    spends = [
        row[0]
        for row in twice_built.sql(
            "select campaign_id from fct_campaign_day where event_date = '2025-06-02' and campaign_id like 'c0%' "
            "order by spend desc, impressions + clicks desc"
        )
    ]
    assert [name.split("/")[2].split("?")[0] for name in names] == spends
    assert len(page.all("svg", **{"class": "spark"})) == len(spends) + 1 and page.all("svg", **{"class": "pacing"})
    assert any(each.attributes.get("href", "").startswith("/why/campaign?campaign=c0") for each in page.all("a"))
    only = client.get("/campaigns?from=2025-06-02&search=c00002").text
    assert "/campaigns/c00002?" in only and "/campaigns/c00001?" not in only
    empty = client.get("/campaigns?from=2025-06-02&search=nobody")
    assert "No campaign has traffic" in empty.text


def test_a_campaigns_own_page(client: Client, twice_built: TwiceBuilt) -> None:
    where = "campaign_id = 'c00002' and event_date = '2025-06-02'"
    answer = client.get("/campaigns/c00002?from=2025-06-02")
    assert answer.status == 200
    [(impressions, clicks)] = twice_built.sql(f"select sum(impressions), sum(clicks) from fct_campaign_day where {where}")
    assert f"{impressions:,}" in answer.text and f"{clicks:,} clicks" in answer.text
    query = "from=2025-06-02&campaign=c00002"
    for table in ("ads", "placements", "hours"):
        rows = exported(client, "campaign", table, query)
        assert (sum(row["impressions"] for row in rows), sum(row["clicks"] for row in rows)) == (impressions, clicks), table
    seen = exported(client, "campaign", "frequency", query)
    assert sum(row["impressions"] for row in seen) == impressions
    assert sum(row["share"] for row in seen) == pytest.approx(1)
    lines = twice_built.sql(f"select line_id, amount from fct_billing_ledger where {where} order by 1")
    assert sorted((row["line_id"], row["amount"]) for row in exported(client, "campaign", "billing", query)) == lines and lines
    assert f'href="/why/billing/{lines[0][0]}"' in answer.text
    changed = exported(client, "campaign", "restatements", query)
    assert [(len(changed), sum(row["clicks"] for row in changed))] == twice_built.sql(
        f"select count(*), coalesce(sum(clicks), 0) from fct_restatements where {where}"
    )


def test_an_unknown_campaign(client: Client) -> None:
    answer = client.get("/campaigns/nobody")
    assert answer.status == 400 and "There is no campaign &#39;nobody&#39;" in answer.text and "What to do" in answer.text


def test_hostile_ids_are_harmless(client: Client) -> None:
    listed = client.get("/campaigns?from=2025-06-02")
    [link] = [each.attributes["href"] for each in listed.page.all("a") if each.text == HOSTILE]
    assert link.startswith(f"/campaigns/{quote(HOSTILE, safe='')}?")
    own = client.get(link)
    assert own.status == 200 and HOSTILE in next(each.text for each in own.page.all("h1"))
    for page in (listed.page, own.page):
        assert (
            not page.all("img")
            and not page.all("b", **{"class": ""})
            and all("alert" not in each.text for each in page.all("script"))
        )
        assert not any(name.startswith("on") for each in page.elements for name in each.attributes)
        assert all(address.startswith(("/", "#", "http://")) for address in page.addresses())
    csv = client.get("/export/campaign/ads.csv?from=2025-06-02&campaign=" + quote(HOSTILE, safe=""))
    assert "'=1+1" in csv.text
    # the same letters, not encoded, are another address: nothing of the first one is shown for it
    assert client.get("/campaigns/%3Cimg?a=1").status == 400


def test_live_figures_are_shown_where_they_have_the_days(twice_built: TwiceBuilt) -> None:
    console = ConsoleState(twice_built.settings)
    try:
        newest = console.live.refresh().days[-1]
        scope = {
            "type": "http",
            "path": "/campaigns",
            "query_string": f"from={newest}".encode(),
            "headers": [],
            "server": ("x", 80),
        }
        request = Request({**scope, "scheme": "http", "method": "GET", "root_path": "", "path_params": {}})
        with console.marts.opened() as build:
            view = console.view(request, build)
            assert view.is_live
            found = by_campaign(list(campaigns.campaigns(view).rows), "impressions", "clicks", "spend_nanos")
        assert found == twice_built.sql(
            "select campaign_id, currency, sum(impressions)::bigint, sum(clicks)::bigint, sum(spend_nanos)::hugeint "
            f"from fct_campaign_day where event_date = '{newest}' group by 1, 2 order by 1, 2"
        )
        assert b"live from:body" in console.page(campaigns.PAGE, request)
    finally:
        console.close()


def test_the_day_of_the_home(twice_built: TwiceBuilt) -> None:
    assert twice_built.sql("select count(*) from fct_campaign_day where event_date = ?".replace("?", f"date '{DAY}'"))[0][0] > 3
