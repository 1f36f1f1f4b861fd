"""The pages that explain a number: level by level down to a line, checked against the level above."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from asgi import Answer, Client, Element
from edited import edit_marts

from orchestration.console.app import create_app
from orchestration.console.marts import OpenBuild
from orchestration.console.pages import why
from orchestration.console.recent import Recent
from orchestration.explain import Node
from spark_jobs.config import Settings, load_settings
from tests.orchestration.console.twice_built import HOSTILE, TwiceBuilt

pytestmark = pytest.mark.homes


def levels(answer: Answer) -> list[Element]:
    assert answer.status == 200, answer.text
    return answer.page.all("details", **{"class": "level"})


def name_of(level: Element) -> str:
    """What a level is, with its figure."""
    return level.text.strip().split("\n")[0]


def opened(client: Client, answer: Answer, what: str) -> Answer:
    """The parts of the first level whose name begins so, as a browser fetches them when it is opened."""
    found = next(each for each in levels(answer) if name_of(each).startswith(what))
    return client.get(found.attributes["hx-get"])


def landed(settings: Settings, source_file: str, line: int) -> dict[str, Any]:
    content = (settings.landing_path / source_file).read_bytes()
    text = gzip.decompress(content) if source_file.endswith(".gz") else content
    record: dict[str, Any] = json.loads(text.split(b"\n")[line - 1])
    return record


def test_from_a_total_down_to_a_line(client: Client, twice_built: TwiceBuilt) -> None:
    [(campaign, currency)] = twice_built.sql(
        "select campaign_id, currency from fct_billing_ledger where reason = 'late' and campaign_id like 'c%'"
    )
    [(nanos, spend)] = twice_built.sql(
        "select sum(spend_nanos), round(sum(spend_nanos) / 1000000000::decimal(38, 0), 2) from fct_campaign_day "
        f"where event_date = '2025-06-02' and currency = '{currency}'"
    )
    page = client.get(f"/why/total?currency={currency}&from=2025-06-02")
    assert "adds up: equal to its campaigns" in page.text and f"{spend:,.2f}" in page.text and f"{nanos:,}" in page.text
    days = opened(client, page, f"campaign {campaign}")
    assert "adds up" in days.text
    rows = opened(client, days, "day 2025-06-02")
    assert "adds up: equal to what it is made of" in rows.text
    parts = opened(client, rows, "row")
    batches = opened(client, parts, "increments by batch")
    assert len(levels(batches)) == 2 and batches.text.count("✓ adds up") >= 2
    batch = opened(client, batches, name_of(levels(batches)[-1]))
    events = levels(opened(client, batch, "its events"))
    late = next(each for each in events if name_of(each).startswith("click late "))
    place = re.search(r"(events/\S+), line (\d+)", late.text)
    assert place and landed(twice_built.settings, place[1], int(place[2]))["event_id"] == "late"
    assert "5,000,000,000" in late.text and f"= 5 {currency}" in late.text


def test_a_total_of_all_currencies_is_never_added_up(client: Client, twice_built: TwiceBuilt) -> None:
    page = client.get("/why/total?from=2025-06-02")
    currencies = twice_built.sql("select distinct currency from fct_campaign_day where event_date = '2025-06-02'")
    assert sorted(each.text.split()[1] for each in levels(page)) == sorted(currency for (currency,) in currencies)
    assert "campaign c0" in opened(client, page, "in EUR").text


def test_a_region_is_explained_by_its_minutes(client: Client, twice_built: TwiceBuilt) -> None:
    [(campaign, currency, nanos)] = twice_built.sql(
        "select campaign_id, currency, sum(spend_nanos) from fct_campaign_minute "
        "where region = 'us-east' group by 1, 2 order by 3 desc limit 1"
    )
    query = urlencode({"campaign": campaign, "currency": currency, "region": "us-east", "from": "2025-06-02", "to": "2025-06-03"})
    page = client.get(f"/why/campaign?{query}")
    assert f"{nanos:,}" in page.text and "adds up: equal to its days" in page.text
    assert "does not add up" not in opened(client, page, "day 2025-06-0").text


def test_an_order_down_to_its_touches(client: Client, twice_built: TwiceBuilt) -> None:
    [(order,)] = twice_built.sql("select order_id from fct_attribution_credits group by 1 order by count(*) desc, 1 limit 1")
    page = client.get(f"/why/order?order={order}")
    assert "every level adds up to the one above" in page.text and "does not" not in page.text
    touch = levels(opened(client, page, "touches"))[0]
    place = re.search(r"(events/\S+), line (\d+)", touch.text)
    assert place and landed(twice_built.settings, place[1], int(place[2]))["event_id"] in touch.text
    only = client.get(f"/why/order?order={order}&model=linear&window=7")
    assert next(name_of(each) for each in levels(only) if "days" in name_of(each)).startswith("linear, 7 days")


def test_a_line_of_the_ledger(client: Client, twice_built: TwiceBuilt) -> None:
    [(line,)] = twice_built.sql("select line_id from fct_billing_ledger where reason = 'late' and campaign_id like 'c%'")
    page = client.get(f"/why/billing/{line}")
    assert "every level adds up to the one above" in page.text
    assert "adjustment (this one)" in opened(client, page, "lines of the day").text
    batches = opened(client, opened(client, page, "fct_campaign_day"), "increments by batch")
    batch = opened(client, batches, name_of(levels(batches)[-1]))
    assert "click late" in opened(client, batch, "its events").text


def test_long_lists_come_in_pages(twice_built: TwiceBuilt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(why, "PARTS_SHOWN", 3)
    monkeypatch.setattr(why, "_TREES", Recent(8))
    client = Client(create_app(twice_built.settings))
    page = client.get("/why/total?currency=EUR&from=2025-06-03&to=2025-06-03")
    seen: list[str] = []
    while True:
        seen += [name_of(each) for each in levels(page)]
        more = page.page.all("button", hx_target="closest .more")
        if not more:
            break
        assert len(levels(page)) == 3
        page = client.get(more[0].attributes["hx-get"])
    assert len(seen) == len(set(seen)) and seen
    answer = client.get("/why/day?from=2025-06-02&campaign=c00002")
    batches = opened(client, opened(client, answer, "row") if not opens_alone(answer) else answer, "increments by batch")
    batch = opened(client, batches, "batch")
    while not any(name_of(each).startswith("its events") for each in levels(batch)):
        batch = client.get(batch.page.all("button", hx_target="closest .more")[0].attributes["hx-get"])
    events = opened(client, batch, "its events")
    assert len(levels(events)) == 3 and events.page.all("button", hx_target="closest .more")


def opens_alone(answer: Answer) -> bool:
    """Whether the day's only row is open already."""
    return any("open" in each.attributes for each in levels(answer))


def test_a_tree_is_made_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[why.Question] = []
    makers = dict(why._MAKERS)

    def counted(settings: Settings, marts: OpenBuild, question: why.Question) -> Node:
        made.append(question)
        return makers[question.kind](settings, marts, question)

    monkeypatch.setattr(why, "_MAKERS", dict.fromkeys(makers, counted))
    page = client.get("/why/day?from=2025-06-02&campaign=c00003")
    batches = opened(client, page if opens_alone(page) else opened(client, page, "row"), "increments by batch")
    opened(client, batches, "batch")
    assert len(made) == 1


def test_what_does_not_add_up_is_said_with_both_figures(twice_built: TwiceBuilt, tmp_path: Path) -> None:
    real = twice_built.settings
    copy = load_settings(home=tmp_path / "copy", lakehouse=real.lakehouse_uri, landing=real.landing_path)
    copy.marts_path.parent.mkdir(parents=True)
    shutil.copyfile(real.marts_path, copy.marts_path)
    with edit_marts(copy.marts_path) as marts:
        [(currency, clicks)] = marts.execute(
            "select currency, clicks from fct_campaign_day where campaign_id = 'c00002' and event_date = '2025-06-02'"
        ).fetchall()
        marts.execute(
            "update fct_campaign_day set clicks = clicks + 1000 where campaign_id = 'c00002' and event_date = '2025-06-02'"
        )
    client = Client(create_app(copy))
    said = f"clicks is {clicks + 1000} here and {clicks} in its increments"
    page = client.get("/why/day?from=2025-06-02&campaign=c00002")
    assert said in page.text and "✗" in page.text and "every level adds up" not in page.text
    above = client.get(f"/why/campaign?from=2025-06-02&campaign=c00002&currency={currency}")
    assert f"clicks is {clicks} here and {clicks + 1000} in its days" in above.text


@pytest.mark.parametrize(
    ("address", "status", "said"),
    [
        ("/why/day?campaign=nobody&from=2025-06-02", 200, "has no campaign &#39;nobody&#39;"),
        ("/why/day?campaign=c00002&from=2020-01-01", 200, "it has days from 2025-06-02"),
        ("/why/day?campaign=c00002&from=2025-06-02&currency=XXX", 400, "has no XXX on 2025-06-02"),
        ("/why/day?campaign=c00002&from=2025-06-02&to=2025-06-03", 400, "a day is explained by itself"),
        ("/why/day?campaign=c00002&from=yesterday", 400, "is not a day"),
        ("/why/day", 400, "Which campaign?"),
        ("/why/campaign?campaign=nobody&currency=EUR", 400, "page Campaigns lists the campaigns"),
        ("/why/total?currency=XXX", 400, "the marts have days from 2025-06-02"),
        ("/why/order?order=none", 200, "There is no order &#39;none&#39;"),
        ("/why/order?order=none&model=best", 400, "there is no attribution model &#39;best&#39;"),
        ("/why/order?order=none&window=x", 400, "is not a number of days"),
        ("/why/billing/it's", 200, "has no line"),
        ("/why/nothing", 400, "There is no question &#39;nothing&#39;"),
        ("/why/events", 400, "Which campaign?"),
    ],
)
def test_what_is_not_there(client: Client, address: str, status: int, said: str) -> None:
    answer = client.get(address)
    assert (answer.status, "<h1" in answer.text) == (status, True) and said.casefold() in answer.text.casefold()


@pytest.mark.parametrize("at", ["9", "0.9", "x", "1..2", "0.0.0.0.0.0.0.0.0.0", "-1"])
def test_a_part_that_is_not_there_becomes_its_text(client: Client, at: str) -> None:
    answer = client.get(f"/why/part?kind=day&campaign=c00002&from=2025-06-02&to=2025-06-02&at={at}")
    assert answer.status == 200 and "<html" not in answer.text
    assert "no such part" in answer.text or "no place in a tree" in answer.text


def test_hostile_ids_are_harmless(client: Client) -> None:
    page = client.get(f"/why/campaign?campaign={quote(HOSTILE, safe='')}&currency=EUR&from=2025-06-02")
    day = opened(client, page, "day 2025-06-02")
    batches = opened(client, opened(client, day, "row"), "increments by batch")
    events = opened(client, opened(client, batches, "batch"), "its events")
    assert "hostile" in events.text
    for answer in (page, day, batches, events):
        parsed = answer.page
        assert not parsed.all("img") and all(each.attributes.get("src", "").startswith("/static/") for each in parsed.all("script"))
        assert not any(name.startswith("on") or name == "style" for each in parsed.elements for name in each.attributes)
