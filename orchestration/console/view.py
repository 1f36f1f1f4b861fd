"""What a page reads: one build of the marts, the live figures, and its filters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlencode

from orchestration.console.filters import Filters
from orchestration.console.live import LiveFigures, LiveState
from orchestration.console.marts import OpenBuild
from orchestration.console.tables import DataTable, Row
from spark_jobs.config import Settings
from spark_jobs.operate.watermark import Closing, read_closing

DAY = timedelta(days=1)


@dataclass(frozen=True)
class View:
    """One request's look at the data. ``now`` is UTC without a zone."""

    settings: Settings
    marts: OpenBuild
    live: LiveFigures
    live_state: LiveState
    filters: Filters
    path: str
    now: datetime
    arguments: Mapping[str, str] = field(default_factory=dict)
    """All parameters: of the path and of the query."""
    extras: Mapping[str, str] = field(default_factory=dict)
    """The parameters of the query that are no filters."""

    def rows(self, sql: str, **parameters: Any) -> list[Row]:
        """Rows of the marts. Values of the filters are there as ``$advertiser``, ``$first`` and so on."""
        return self.marts.rows(sql, {**self._values(sql), **parameters})

    def live_rows(self, sql: str, **parameters: Any) -> list[Row]:
        """Rows of table ``minutes`` of the live figures, with the filters' values likewise."""
        return self.live.rows(sql, {**self._values(sql), **parameters})

    def minute_rows(self, sql: str, first: date | None = None, last: date | None = None, **parameters: Any) -> list[Row]:
        """Rows of a statement over table ``minutes``: the live figures where they have all days, else fct_campaign_minute.

        ``minutes`` has event_minute, region, store_id, campaign_id, currency, impressions, clicks, invalid_impressions,
        invalid_clicks, spend_nanos, invalid_spend_nanos. The days are ``first`` to ``last``, by default those of the page.
        """
        days = {"first": first or self.first, "last": last or self.last}
        if self.has_live(days["first"], days["last"]):
            return self.live_rows(sql, **days, **parameters)
        return self.rows(f"with minutes as (from fct_campaign_minute) {sql}", **days, **parameters)

    def where(self, **columns: str) -> str:
        """SQL that keeps what the filters choose: ``where(day="event_date", advertiser="store_id")`` names the columns there are.

        ``day`` is compared with the range of days; the others by equality, where the filter is set.
        """
        tests = ["true"]
        for name, column in columns.items():
            if name == "day":
                tests.append(f"{column}::date between $first and $last")
            elif getattr(self.filters, name):
                tests.append(f"{column} = ${name}")
        return " and ".join(tests)

    def url(self, path: str = "", **changes: object) -> str:
        """The address of a page with this view's filters, but for ``changes``. This page's own keeps its other parameters too."""
        if path:
            return self.filters.url(path, **changes)
        return _with_query(self.filters.url(self.path, **changes), self.extras)

    def stamp(self, page: Page) -> str:
        """What an export of a page's table was chosen by: the filters, with the days that the page shows by default."""
        chosen = self.filters.parameters()
        if "day" in page.shows:
            chosen |= {"from": self.first.isoformat(), "to": self.last.isoformat()}
        return "&".join(f"{name}={value}" for name, value in {**chosen, **self.extras}.items())

    def export_url(self, page: Page, table: DataTable, form: str) -> str:
        """The address of a table of this page as a file."""
        names = {name: value for name, value in self.arguments.items() if name not in Filters.names()}
        return _with_query(self.filters.url(f"/export/{page.name}/{table.name}.{form}", rows=""), names)

    def campaign_url(self, campaign: str) -> str:
        """The address of a campaign's own page, with this view's other filters."""
        return self.url(f"/campaigns/{quote(campaign, safe='')}", campaign="", search="", sort="", rows="")

    @cached_property
    def closing(self) -> Closing:
        """Which hours are closed, read from the ledger once for all parts of a page."""
        return read_closing(self.settings)

    @cached_property
    def days(self) -> tuple[date, date]:
        """The first and the last day that the marts or the live figures have; today where they have none."""
        [found] = self.rows("select min(event_date) as first, max(event_date) as last from fct_campaign_day")
        known = [day for day in (found["first"], found["last"], *self.live_state.days) if day is not None]
        return (min(known), max(known)) if known else (self.now.date(), self.now.date())

    @cached_property
    def newest_day(self) -> date:
        """The newest day with data. A day that has just begun is left out until it has a hundredth of the day before's events."""
        counted = "sum(impressions + clicks + invalid_impressions + invalid_clicks)::hugeint as events"
        rows = self.rows(
            f"select event_date, {counted} from fct_campaign_day where event_date > $day group by 1", day=self.days[1] - 3 * DAY
        )
        events = {row["event_date"]: row["events"] for row in rows}
        live = self.live_rows(f"select event_minute::date as event_date, {counted} from minutes group by 1")
        events |= {row["event_date"]: row["events"] for row in live}
        *_, before, newest = [self.days[1], self.days[1], *sorted(events)]
        return before if before != newest and events[newest] * 100 < events.get(before, 0) else newest

    @cached_property
    def first(self) -> date:
        """The first day shown."""
        return self.filters.first or self.newest_day

    @cached_property
    def last(self) -> date:
        """The last day shown."""
        return self.filters.last or self.newest_day

    def has_live(self, first: date, last: date) -> bool:
        """Whether the live figures have all of these days."""
        return bool(self.live_state.days) and self.live_state.days[0] <= first and last <= self.live_state.days[-1]

    @property
    def is_live(self) -> bool:
        """Whether the live figures have all days shown."""
        return self.has_live(self.first, self.last)

    @property
    def choices(self) -> dict[str, list[tuple[str, str]]]:
        """What the filters offer: value and label, by filter."""
        found: dict[str, list[tuple[str, str]]] = self.marts.derived.get(("choices", self.filters.advertiser), self._choices)
        return found

    def _choices(self) -> dict[str, list[tuple[str, str]]]:
        stores = self.rows("select store_id, store_name from dim_store order by store_id")
        campaigns = self.rows(
            "select campaign_id, campaign_name from dim_campaign "
            f"where is_current and {self.where(advertiser='store_id')} order by campaign_id"
        )
        regions = self.rows("select distinct region from fct_event_accounting where region is not null order by 1")
        currencies = self.rows("select distinct currency from fct_campaign_day order by 1")
        windows = self.rows("select distinct window_days from fct_advertiser_attribution order by 1")
        return {
            "advertiser": [(row["store_id"], _label(row["store_id"], row["store_name"])) for row in stores],
            "campaign": [(row["campaign_id"], _label(row["campaign_id"], row["campaign_name"])) for row in campaigns],
            "region": [(row["region"], row["region"]) for row in regions],
            "currency": [(row["currency"], row["currency"]) for row in currencies],
            "window": [(str(row["window_days"]), f"{row['window_days']} days") for row in windows],
        }

    def names(self, kind: str) -> dict[str, str]:
        """Id -> name, of ``store``, ``campaign`` or ``ad``, where a name is known."""
        sql = f"select {kind}_id as id, any_value({kind}_name) as name from dim_{kind} group by 1"
        found: dict[str, str] = self.marts.derived.get(
            ("names", kind), lambda: {row["id"]: row["name"] for row in self.rows(sql) if row["name"]}
        )
        return found

    def add_names(self, rows: list[Row], kind: str = "campaign", column: str = "campaign") -> list[Row]:
        """Add a column with the name of each row's campaign, store or ad, or its id where no name is known; return the rows."""
        names = self.names(kind) if rows else {}
        for row in rows:
            row[column] = names.get(row[f"{kind}_id"], row[f"{kind}_id"])
        return rows

    def _values(self, sql: str) -> dict[str, Any]:
        values = {name: getattr(self.filters, name) for name in ("advertiser", "campaign", "region", "currency", "model", "window")}
        # what the days are is itself a question to the marts, asked only where a statement names them
        return values | {name: getattr(self, name) for name in ("first", "last") if re.search(rf"\${name}\b", sql)}


@dataclass(frozen=True)
class Page:
    """A page: its address, its template, what it shows, and its tables by name, which can be exported.

    ``shows`` names the filters that the page heeds. ``is_live``: it shows live figures. ``seconds``: it shows the state of the
    machine, and is made again after so many seconds although no data changed. A path may have parameters, as
    ``/campaigns/{campaign}``.
    """

    name: str
    path: str
    title: str
    build: Callable[[View], dict[str, Any]]
    tables: Mapping[str, Callable[[View], DataTable]] = field(default_factory=dict)
    shows: tuple[str, ...] = ("advertiser", "campaign", "day", "currency")
    in_menu: bool = True
    is_live: bool = False
    seconds: int = 0


def _with_query(url: str, parameters: Mapping[str, str]) -> str:
    return f"{url}{'&' if '?' in url else '?'}{urlencode(parameters)}" if parameters else url


def _label(identity: str, name: str | None) -> str:
    return f"{name} ({identity})" if name and name != identity else identity
