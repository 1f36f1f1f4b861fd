"""A home whose events can be counted by hand: Delta tables, landing files, and the marts that follow from them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb

from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, REJECTED_EVENTS
from tests.orchestration.marts.delta_files import commit, utc
from tests.orchestration.marts.lakes import ledger_row


@dataclass(frozen=True)
class Some:
    """``count`` events of a campaign at a time; ``again``: how many of them were sent a second time."""

    count: int
    kind: str
    at: str
    campaign: str = "c1"
    rule: str | None = None
    is_late: bool = False
    again: int = 0


def make_home(folder: Path, traffic: list[Some]) -> Settings:
    """A home with this traffic, ingested, its marts built. One more batch has rows in events and is not completed."""
    settings = load_settings(home=folder)
    lake = Path(settings.lakehouse_uri)
    events: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for number, some in enumerate(traffic):
        for index in range(some.count):
            event = {"event_id": f"e{number}-{index}", "event_type": some.kind, "campaign_id": some.campaign}
            moment = utc(some.at)
            row = {"event_time": moment, "is_late": some.is_late, "invalid_traffic_rule": some.rule, "event_date": moment.date()}
            events.append({**event, **row, "event_hour": moment.hour, "_query_id": "q", "_batch_id": 0})
            lines += [event] * (1 + (index < some.again))
    conflict = {**lines[0], "placement": "another"}
    landing = settings.landing_path / "events" / "eu"
    landing.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in [*lines, conflict]) + '{"event_id": "broken\nnot json\n'
    (landing / "one.jsonl").write_text(text)
    commit(lake, BATCH_LEDGER, [ledger_row(0, "2026-03-10T10:00", accepted=len(events))])
    stray = {**events[0], "event_id": "of a batch that is not completed", "is_late": True, "_batch_id": 1}
    commit(lake, EVENTS, [*events, stray])
    refused = {"outcome": "conflict", "record_id": conflict["event_id"], "ingested_date": utc("2026-03-10T12:00").date()}
    commit(lake, REJECTED_EVENTS, [refused])
    _marts(settings, events)
    return settings


def _marts(settings: Settings, events: list[dict[str, Any]]) -> None:
    counts: dict[tuple[Any, ...], Counter[str]] = {}
    for event in events:
        name = ("invalid_" if event["invalid_traffic_rule"] else "") + event["event_type"]
        counts.setdefault((event["campaign_id"], event["event_time"].replace(second=0)), Counter())[name] += 1
    settings.marts_path.parent.mkdir(parents=True)
    names = ("impression", "click", "invalid_impression", "invalid_click")
    with duckdb.connect(str(settings.marts_path)) as marts:
        columns = ", ".join(f"{name}s bigint" for name in names)
        marts.execute(f"create table fct_campaign_minute (campaign_id varchar, event_minute timestamp, {columns})")
        for (campaign, minute), found in counts.items():
            row = [campaign, minute.replace(tzinfo=None), *(found[name] for name in names)]
            marts.execute("insert into fct_campaign_minute values (?, ?, ?, ?, ?, ?)", row)
        sums = ", ".join(f"sum({name}s)::bigint as {name}s" for name in names)
        marts.execute(
            f"create table fct_campaign_day as select event_minute::date as event_date, campaign_id, {sums} "
            "from fct_campaign_minute group by all"
        )
        marts.execute(
            "create table mart_build as select 'near_real_time' as mart_group, 'b1' as build_id, "
            "timestamp '2026-03-13' as built_at, 'abc' as git_revision, "
            "unnest(['batch_ledger', 'events']) as table_name, 0::bigint as delta_version"
        )


def days_cut_at(traffic: list[Some], offset: timedelta) -> list[tuple[str, int, int]]:
    """(date, impressions, clicks) of the billable events when days are cut at an offset from UTC."""
    found: dict[str, Counter[str]] = {}
    for some in traffic:
        if some.rule is None:
            found.setdefault(f"{utc(some.at) + offset:%Y-%m-%d}", Counter())[some.kind] += some.count
    return [(day, counts["impression"], counts["click"]) for day, counts in sorted(found.items())]
