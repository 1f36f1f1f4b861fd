"""A home for the console: simulated traffic of two days, and campaigns whose ids and names attack a page, a sheet or an address."""

from __future__ import annotations

import csv
from pathlib import Path

import lake
import sparkless

from orchestration.marts import build_marts
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.settle import settle

DAY = "2025-06-03"
"""The last of the two days of traffic, whose figures are live."""

MARKUP = "<img src=x onerror=alert(1)>"
FORMULA = '=HYPERLINK("http://evil.example","click")'
PATH = "../a/b?c=d&e#f%2F+ '\""
HOSTILE = (MARKUP, FORMULA, PATH)
"""Ids of campaigns. Each also is the name of its campaign, its ad and its store."""


def make_home(folder: Path) -> Settings:
    """A home with traffic, ingested without Spark, settled, its marts built."""
    settings = load_settings(home=folder)
    ensure_tables(settings)
    simulate(settings.landing_path, 3_000, 7, days=2, campaigns=6, ads=20, click_rate=0.2, conversion=0.3, lines_per_file=800)
    with (settings.landing_path / "campaigns" / "campaigns.csv").open("a", newline="") as file:
        csv.writer(file).writerows([each, each, "cpc", 10_000_000, "EUR", "2000-01-01T00:00:00Z", ""] for each in HOSTILE)
    with (settings.landing_path / "names" / "names.csv").open("a", newline="") as file:
        csv.writer(file).writerows([kind, each, each] for each in HOSTILE for kind in ("campaign", "ad", "store"))
    clicks = [
        hostile_event(each, f"hostile-{number}-{each_click}", event_type="click", placement=each)
        for number, each in enumerate(HOSTILE)
        for each_click in range(3)
    ]
    views = [hostile_event(each, f"hostile-view-{number}", user_id=f"u-{number}") for number, each in enumerate(HOSTILE)]
    lake.land(settings, "events/eu-west/zz-hostile.jsonl", [*views, *clicks])
    for stream in ("events", "orders"):
        sparkless.ingest(settings, stream)
    settle(settings)
    build_marts(settings)
    return settings


def hostile_event(campaign: str, event_id: str, **changes: object) -> dict[str, object]:
    """An event of a hostile campaign, dear enough that it is among the first of every table."""
    times = {"event_time": f"{DAY}T10:00:00Z", "received_at": f"{DAY}T10:00:02Z"}
    fields = {"campaign_id": campaign, "ad_id": campaign, "store_id": campaign, "user_id": event_id, "price_micros": 90_000_000}
    return lake.event(event_id, **{**times, **fields, **changes})
