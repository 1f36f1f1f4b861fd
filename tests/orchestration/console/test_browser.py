"""The console as a person sees it, in a real browser at three sizes: its figures, filters and explanations, and what moves."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from browser import SIZES, RecordedPage, recorded_page
from console import RunningConsole, ask, running_console
from local import LocalEvents
from playwright.sync_api import Browser

from orchestration.console.pages import PAGES
from orchestration.marts import build_marts, query_marts
from spark_jobs.config import Settings, load_settings
from tests.orchestration.console.small_home import DAY, FORMULA, HOSTILE, MARKUP, hostile_event

pytestmark = pytest.mark.e2e

FILTERS = f"from={DAY}&to={DAY}"
MOVES_WITHIN_SECONDS = 3.0


def addresses() -> dict[str, str]:
    """Each page with all that its address needs."""
    hostile = quote(MARKUP, safe="")
    found = {page.name: f"{page.path}?{FILTERS}" for page in PAGES if "{" not in page.path and page.name != "why_part"}
    found["statement"] = f"/billing/statement?advertiser={hostile}&month={DAY[:7]}"
    return found | {"campaign": f"/campaigns/{hostile}?{FILTERS}", "why": f"/why/day?campaign={hostile}&{FILTERS}"}


ADDRESSES = addresses()


@contextmanager
def opened(browser: Browser, console: RunningConsole, path: str, size: str = "desktop", **options: str) -> Iterator[RecordedPage]:
    """Open a page of the console. In the end nothing may have failed on it, nor may it have asked another place."""
    with recorded_page(browser, SIZES[size], **options) as recorded:
        recorded.open(console.address + path)
        yield recorded
        assert recorded.errors == []
        assert recorded.foreign_requests(console.address) == []


def figure(recorded: RecordedPage, measure: str) -> int:
    """A figure of the page Today, without its symbol and separators: cents, or whole yen."""
    return int(re.sub(r"\D", "", recorded.page.inner_text(f'[data-measure="{measure}"]')))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ADDRESSES)
def test_each_page_works_for_everybody_at_each_size(browser: Browser, console: RunningConsole, name: str, size: str) -> None:
    with opened(browser, console, ADDRESSES[name], size) as recorded:
        assert recorded.page.locator("h1").count() == 1
        assert recorded.axe_findings() == []
        width = recorded.page.evaluate("document.documentElement.scrollWidth")
        assert width <= SIZES[size][0], "the page scrolls sideways"


@pytest.mark.parametrize("name", ADDRESSES)
def test_each_page_can_be_read_in_the_dark(browser: Browser, console: RunningConsole, name: str) -> None:
    with opened(browser, console, ADDRESSES[name], color_scheme="dark") as recorded:
        assert recorded.axe_findings() == []


def test_the_keyboard_reaches_the_content_first(browser: Browser, console: RunningConsole) -> None:
    with opened(browser, console, ADDRESSES["today"]) as recorded:
        recorded.page.keyboard.press("Tab")
        recorded.page.keyboard.press("Enter")
        assert recorded.page.evaluate("document.activeElement.id") == "main"


def test_the_figures_of_today_are_those_of_the_marts(browser: Browser, console: RunningConsole, console_home: Settings) -> None:
    money = query_marts(
        console_home,
        f"select currency, (round(sum(spend_nanos) / 1e9, if(currency = 'JPY', 0, 2)) * if(currency = 'JPY', 1, 100))::bigint "
        f"from fct_campaign_day where event_date = '{DAY}' group by 1 order by 1",
    )[1]
    sums = "sum(impressions)::bigint, sum(clicks)::bigint"
    [(views, clicks)] = query_marts(console_home, f"select {sums} from fct_campaign_day where event_date = '{DAY}'")[1]
    assert len(money) > 1
    with opened(browser, console, ADDRESSES["today"]) as recorded:
        assert {currency: figure(recorded, f"spend-{currency}") for currency, _ in money} == dict(money)
        assert (figure(recorded, "impressions"), figure(recorded, "clicks")) == (views, clicks)


def test_the_figures_of_campaigns_are_those_of_the_marts(browser: Browser, console: RunningConsole, console_home: Settings) -> None:
    wanted = query_marts(
        console_home,
        "select coalesce(any_value(campaign_name), campaign_id), sum(impressions)::bigint, sum(clicks)::bigint, "
        "(round(sum(spend_nanos) / 1e9, if(currency = 'JPY', 0, 2)) * if(currency = 'JPY', 1, 100))::bigint "
        "from fct_campaign_day left join (select distinct campaign_id, campaign_name from dim_campaign) using (campaign_id) "
        f"where event_date = '{DAY}' group by campaign_id, currency",
    )[1]
    assert len(wanted) > len(HOSTILE)
    with opened(browser, console, ADDRESSES["campaigns"]) as recorded:
        table = recorded.page.locator("#table-campaigns table")
        heads = [" ".join(head.split()).lower() for head in table.locator("thead th").all_inner_texts()]
        columns = [heads.index(name) for name in ("campaign", "impressions", "clicks", "net spend")]
        rows = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
        shown = [(row[columns[0]].split("\n")[0], *(int(re.sub(r"\D", "", row[at])) for at in columns[1:])) for row in rows]
        assert sorted(shown) == sorted(wanted)


def test_a_filter_is_in_the_address_and_the_address_is_the_view(
    browser: Browser, console: RunningConsole, console_home: Settings
) -> None:
    [(views,)] = query_marts(
        console_home,
        f"select sum(impressions)::bigint from fct_campaign_day where event_date = '{DAY}' and currency = 'EUR'",
    )[1]
    with opened(browser, console, ADDRESSES["today"]) as recorded:
        recorded.page.select_option("select[name=currency]", "EUR")
        recorded.page.click("form.filters button")
        recorded.page.wait_for_url("**currency=EUR**")
        assert figure(recorded, "impressions") == views
        assert recorded.page.locator('[data-measure^="spend-"]').count() == 1
        address = urlsplit(recorded.page.url)
        assert {name: values[0] for name, values in parse_qs(address.query).items()}["from"] == DAY
    with opened(browser, console, f"{address.path}?{address.query}") as recorded:
        assert figure(recorded, "impressions") == views
        assert recorded.page.input_value("select[name=currency]") == "EUR"
        recorded.page.click(".reset")
        recorded.page.wait_for_load_state()
        assert "currency" not in recorded.page.url


def test_an_explanation_opens_level_by_level_down_to_a_line(browser: Browser, console: RunningConsole) -> None:
    with opened(browser, console, ADDRESSES["why"]) as recorded:
        for name in ("increments by batch", "batch ", "its events"):
            words = re.compile(rf"^\s*{name}")
            recorded.page.locator("details.level:not([open]) > summary").filter(has_text=words).first.press("Enter")
            recorded.page.locator("details.level[open] > summary").filter(has_text=words).first.wait_for()
        recorded.page.locator("summary").filter(has_text="zz-hostile.jsonl, line ").first.wait_for()
        assert recorded.page.locator("img").count() == 0


@pytest.mark.parametrize("campaign", HOSTILE)
def test_hostile_values_are_texts(browser: Browser, console: RunningConsole, campaign: str) -> None:
    with opened(browser, console, ADDRESSES["today"]) as recorded:
        link = recorded.page.locator("#table-campaigns a", has_text=campaign).first
        assert link.is_visible()
        assert recorded.page.locator("main img").count() == 0
        link.click()  # to the page of the campaign, whose id is a part of its address
        recorded.page.wait_for_url("**/campaigns/**")
        recorded.wait_for_text(campaign)
        assert recorded.page.locator("main img").count() == 0


@pytest.fixture
def own_home(console_home: Settings, tmp_path: Path) -> Settings:
    """A copy of the home, to write in."""
    shutil.copytree(console_home.home, tmp_path / "home")
    return load_settings(home=tmp_path / "home")


def test_figures_move_without_a_reload_soon_after_a_commit(browser: Browser, own_home: Settings) -> None:
    with running_console(own_home.home) as console, opened(browser, console, f"/?{FILTERS}") as recorded:
        recorded.wait_for_text("live, ")
        before = figure(recorded, "clicks")
        events = LocalEvents(own_home)
        for number in range(1, 4):
            events.take([hostile_event(FORMULA, f"moves-{number}", event_type="click")])
            committed = time.monotonic()
            recorded.page.wait_for_function(
                "wanted => document.querySelector('[data-measure=clicks]').textContent.replace(/\\D/g, '') === wanted",
                arg=str(before + number),
                timeout=30_000,
            )
            assert time.monotonic() - committed < MOVES_WITHIN_SECONDS
        build = query_marts(own_home, "select any_value(build_id) from mart_build")[1][0][0]
        assert build in recorded.text()  # no marts were built for it


def test_a_build_of_the_marts_disturbs_no_reader_and_shows_at_once(browser: Browser, own_home: Settings) -> None:
    with running_console(own_home.home) as console, opened(browser, console, f"/?{FILTERS}") as recorded:
        recorded.wait_for_text("live, ")
        LocalEvents(own_home).take([hostile_event(FORMULA, "built", event_type="click")])
        statuses: list[int] = []
        ended = threading.Event()

        def read() -> None:
            while not ended.wait(0.1):
                statuses.append(ask(console, f"/?{FILTERS}&region=eu-west")[0])

        reader = threading.Thread(target=read)
        reader.start()
        try:
            build_marts(own_home)
        finally:
            ended.set()
            reader.join()
        assert len(statuses) > 5 and set(statuses) == {200}
        build = query_marts(own_home, "select any_value(build_id) from mart_build")[1][0][0]
        recorded.wait_for_text(build, seconds=MOVES_WITHIN_SECONDS)
        recorded.page.reload()
        assert build in recorded.page.inner_text("footer")


_OPEN_DEEPEST = """() => {
  const depth = (level) => (level ? 1 + depth(level.parentElement.closest("details.level")) : 0);
  const closed = [...document.querySelectorAll("details.level:not([open])")].sort((one, other) => depth(other) - depth(one));
  closed[0]?.querySelector("summary").click();
  return closed.length > 0;
}"""
_LOADED = """() => !document.querySelector(".htmx-request, .htmx-swapping, .htmx-settling, .htmx-added")
  && ![...document.querySelectorAll("details.level[open] > .parts")].some((parts) => parts.textContent.trim() === "loading")"""


def test_a_number_is_explained_down_to_its_lines(browser: Browser, console: RunningConsole, console_home: Settings) -> None:
    with opened(browser, console, ADDRESSES["today"]) as recorded:
        spend = recorded.page.inner_text('[data-measure="spend-EUR"]')
        recorded.page.click('[data-measure="spend-EUR"]')
        recorded.page.wait_for_url("**/why/**")
        assert spend in recorded.text()
        for _ in range(12):
            if (found := re.search(r"(\S+\.jsonl(?:\.gz)?)", recorded.text())) is not None:
                break
            assert recorded.page.evaluate(_OPEN_DEEPEST), recorded.text()
            recorded.page.wait_for_function(_LOADED)
        assert found is not None, recorded.text()
        assert Path(found[1]).name in {path.name for path in (console_home.landing_path / "events").rglob("*.jsonl*")}
        assert "does not add up" not in recorded.text()
        assert recorded.axe_findings() == []
