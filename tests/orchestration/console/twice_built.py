"""A home whose marts were built twice, with a late click between; one campaign has hostile names."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import lake
import sparkless

from orchestration.marts import build_marts
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.settle import settle

HOSTILE = "<img src=x onerror=alert(1)>/?#%2F&=\"'"
"""A campaign's id that would be HTML, and would end a path, if it were not encoded."""

DAY = date(2025, 6, 2)


@dataclass(frozen=True)
class TwiceBuilt:
    """A home; ``old_build`` is the id of the first build, and ``old_marts`` a copy of its file."""

    settings: Settings
    old_build: str
    old_marts: Path

    def sql(self, sql: str, *, old: bool = False) -> list[tuple[Any, ...]]:
        """Rows of the newest marts, or of the first build."""
        with duckdb.connect(str(self.old_marts if old else self.settings.marts_path), read_only=True) as marts:
            return marts.execute(sql).fetchall()


def build_twice(folder: Path) -> TwiceBuilt:
    """A day and a half of traffic, settled and built; then a dear late click of a closed day, and all of it again."""
    settings = load_settings(home=folder / "home")
    ensure_tables(settings)
    simulate(settings.landing_path, 1_500, 7, days=1.5, campaigns=6, ads=20, click_rate=0.2, conversion=0.3, lines_per_file=400)
    hostile = {"campaign_id": HOSTILE, "ad_id": "=1+1", "store_id": "<b>", "placement": "<script>alert(2)</script>"}
    lake.land(
        settings, "events/eu-west/zz-hostile.jsonl", [lake.event(f"hostile-{n}", **hostile, currency="EUR") for n in range(3)]
    )
    first = _settled(settings)
    old = folder / "old.duckdb"
    shutil.copyfile(settings.marts_path, old)
    late = {"event_type": "click", "event_time": "2025-06-02T10:00:00Z", "received_at": "2025-06-05T10:00:00Z"}
    billed = next(
        event
        for path in sorted(settings.landing_path.glob("events/*/*.jsonl"))
        for event in map(json.loads, path.open())
        if event["event_type"] == "click" and event["event_time"].startswith("2025-06-02")
    )
    of = {name: billed[name] for name in ("campaign_id", "ad_id", "store_id", "currency")}
    lake.land(
        settings,
        "events/eu-west/zzz-late.jsonl",
        [
            lake.event("late", **late, **of, user_id="somebody", price_micros=5_000_000),
            lake.event("late-hostile", **late, **hostile),
        ],
    )
    _settled(settings)
    return TwiceBuilt(settings, first, old)


def _settled(settings: Settings) -> str:
    for stream in ("events", "orders"):
        sparkless.ingest(settings, stream)
    settle(settings)
    return build_marts(settings).build_id
