"""A lakehouse of many days whose tables agree, and the changes that happen to it: batches, reviews, corrections, orders, bills."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from spark_jobs.lake.tables import (
    ATTRIBUTED_ORDERS,
    BATCH_LEDGER,
    BILLING_LINES,
    CAMPAIGNS,
    EVENTS,
    MINUTE_METRICS,
    RECONCILIATIONS,
    RESTATEMENTS,
)
from tests.orchestration.marts.delta_files import commit
from tests.orchestration.marts.lakes import increment, ledger_row, touched

FIRST = datetime(2026, 1, 20, tzinfo=UTC)
NANOS = 2_500_000
CAMPAIGN = {"store_id": "s1", "billing_model": "cpc", "currency": "EUR", "valid_to": None, "source_file": "c.csv"}


class History:
    """Writes the tables below ``lake``, with numbers from ``seed``."""

    def __init__(self, lake: Path, seed: int = 7) -> None:
        self.lake, self.random, self.batches, self.runs = lake, Random(seed), 0, 0
        commit(lake, RECONCILIATIONS, [])
        self.events: list[dict[str, Any]] = []

    def price(self, budget: int, *, valid_from: str = "2026-01-01T00:00:00+00:00", replace: bool = False) -> None:
        """Set the daily budget of campaign c1 from a time on; ``replace`` all rows of the table."""
        since = datetime.fromisoformat(valid_from)
        row = {**CAMPAIGN, "campaign_id": "c1", "daily_budget_micros": budget, "valid_from": since}
        if replace:
            uri = str(self.lake / CAMPAIGNS.name)
            write_deltalake(uri, pa.Table.from_pylist([row], schema=CAMPAIGNS.schema), mode="overwrite")
        else:
            commit(self.lake, CAMPAIGNS, [row])

    def batch(self, days: list[int], events: int = 40, *, is_late: bool = False, junk: int = 1) -> None:
        """Accept events of some days, counted from FIRST, and reject records without a time."""
        query, number = "q", self.batches
        self.batches += 1
        accepted = [self._event(self.random.choice(days), number, position, is_late=is_late) for position in range(events)]
        commit(self.lake, MINUTE_METRICS, self._increments(accepted, number))
        commit(self.lake, EVENTS, accepted)
        hours: dict[tuple[Any, ...], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for event in accepted:
            cell = hours[event["event_time"].replace(minute=0, second=0), event["region"]]
            cell["accepted"] += 1
            cell["late"] += event["is_late"]
            cell["spend_nanos"] += event["spend_nanos"]
        rows = [ledger_row(number, hour.isoformat()[:16], region=region, **cell) for (hour, region), cell in hours.items()]
        rows += [ledger_row(number, None, rejected=junk)] if junk else []
        ingested = FIRST + timedelta(days=200, minutes=number)
        commit(self.lake, BATCH_LEDGER, [{**row, "_query_id": query, "ingested_at": ingested} for row in rows])
        self.events += accepted

    def _event(self, day: int, batch: int, position: int, *, is_late: bool) -> dict[str, Any]:
        random = self.random
        at = FIRST + timedelta(days=day, seconds=random.randrange(86400))
        campaign, kind = random.choice(["c1", "c1", "c2", "c3"]), random.choice(["click", "impression"])
        return {
            "event_id": f"e-{batch}-{position}",
            "event_type": kind,
            "event_time": at,
            "received_at": at + timedelta(seconds=random.randrange(9000)),
            "region": random.choice(["eu", "us"]),
            "campaign_id": campaign,
            "ad_id": f"{campaign}-a{random.randrange(3)}",
            "store_id": "s1" if campaign == "c1" else "s2",
            "user_id": f"u{random.randrange(6)}",
            "placement": random.choice(["feed", None]),
            "currency": "EUR" if campaign != "c3" else "JPY",
            "user_agent": "a",
            "is_late": is_late,
            "invalid_traffic_rule": None,
            "spend_nanos": random.randrange(1, NANOS) if kind == "click" else 0,
            "invalid_spend_nanos": 0,
            "event_date": at.date(),
            "event_hour": at.hour,
            "_query_id": "q",
            "_batch_id": batch,
        }

    def _increments(self, events: list[dict[str, Any]], batch: int, **values: Any) -> list[dict[str, Any]]:
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        names = ("region", "campaign_id", "ad_id", "store_id", "placement", "currency")
        for event in events:
            minute = event["event_time"].replace(second=0, microsecond=0)
            key = (minute, *(event[name] for name in names))
            row = found.setdefault(
                key,
                increment(f"r-{batch}-{len(found)}", batch, minute.isoformat()[:16])
                | dict(zip(names, key[1:], strict=True))
                | {"spend_nanos": 0}
                | values,
            )
            row[f"{event['event_type']}s"] += 1
            row["spend_nanos"] += event["spend_nanos"]
        return list(found.values())

    def review(self, day: int) -> None:
        """Find the clicks of user u1 of a day invalid: their events are rewritten, and what they changed is added."""
        self.runs += 1
        run, start = f"review-{self.runs}", FIRST + timedelta(days=day)
        hit = [
            event
            for event in self.events
            if event["event_date"] == start.date() and event["user_id"] == "u1" and event["event_type"] == "click"
        ]
        assert hit
        table = DeltaTable(str(self.lake / EVENTS.name))
        table.update(
            predicate=f"event_date = '{start.date()}' and user_id = 'u1' and event_type = 'click'",
            updates={"invalid_traffic_rule": "'repeat_click'", "invalid_spend_nanos": "spend_nanos", "spend_nanos": "0"},
        )
        for number, event in enumerate(hit):
            changed = {"clicks": -1, "invalid_clicks": 1, "spend_nanos": -event["spend_nanos"]}
            changed |= {"invalid_spend_nanos": event["spend_nanos"]}
            self._correct(f"{run}-{number}", "review", "repeat_click", event, changed, {"invalid_traffic": 1})
            event |= {"event_type": "reviewed"}

    def repair(self, day: int) -> None:
        """Correct what a recount of a day found: an event that the tables lack, and one that the input does not have."""
        self.runs += 1
        run, date = f"repair-{self.runs}", (FIRST + timedelta(days=day)).date()
        over = next(event for event in self.events if event["event_date"] == date and event["event_type"] == "click")
        lost = self._event(day, over["_batch_id"], 1000 + self.runs, is_late=True) | {"_run_id": run}
        DeltaTable(str(self.lake / EVENTS.name)).delete(f"event_id = '{over['event_id']}'")
        commit(self.lake, EVENTS, [lost])
        for name, event, sign in (("over", over, -1), ("lost", lost, 1)):
            spend = sign * event["spend_nanos"]
            changed = {f"{event['event_type']}s": sign, "spend_nanos": spend}
            booked = {"accepted": sign, "late": sign * event["is_late"], "spend_nanos": spend}
            self._correct(f"{run}-{name}", "repair", "event_missing", event, changed, booked)
        self.events = [event for event in self.events if event is not over] + [lost]
        self._note_recount(day, cause="event_missing", rows_different=2, is_repaired=True)

    def _correct(
        self, run: str, kind: str, cause: str, event: dict[str, Any], changed: dict[str, int], booked: dict[str, int]
    ) -> None:
        """Add what a run changes of an event: to the increments, the ledger and the restatements."""
        batch, time = event["_batch_id"], event["event_time"]
        hour, minute = time.replace(minute=0, second=0, microsecond=0), time.isoformat()[:16]
        dims = {name: event[name] for name in ("region", "campaign_id", "ad_id", "store_id", "placement", "currency")}
        commit(self.lake, MINUTE_METRICS, [increment(run, batch, minute, **dims, **changed, _run_id=run)])
        row = ledger_row(batch, hour.isoformat()[:16], region=event["region"], _run_id=run)
        row |= {"spend_nanos": changed.get("spend_nanos", 0), "offered": booked.get("accepted", 0)} | booked
        commit(self.lake, BATCH_LEDGER, [row | {"ingested_at": FIRST + timedelta(days=200, minutes=batch)}])
        measures = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")
        restated = dict.fromkeys(measures, 0) | {"run_id": run, "kind": kind, "reason": kind, "cause": cause, "event_hour": hour}
        restated |= changed | {name: event[name] for name in ("region", "campaign_id", "currency")}
        commit(self.lake, RESTATEMENTS, [restated | {"restated_at": FIRST + timedelta(days=201, minutes=self.runs)}])

    def bill(self, day: int, micros: int) -> None:
        """Charge campaign c1 for a day."""
        self.runs += 1
        line = {"line_id": f"l{self.runs}", "line_type": "charge", "event_date": (FIRST + timedelta(days=day)).date()}
        line |= {"campaign_id": "c1", "store_id": "s1", "currency": "EUR", "amount_micros": micros, "billed_micros": micros}
        line |= {
            "spend_nanos": 1000 * micros,
            "reason": "day_closed",
            "run_id": f"b{self.runs}",
            "metrics_version": 0,
            "posting": self.runs,
        }
        commit(self.lake, BILLING_LINES, [{**line, "billed_at": FIRST + timedelta(days=199)}])

    def order(self, name: str, revision: int, day: int, touches: list[int], **values: Any) -> None:
        """Credit an order of a day to clicks of days before, in equal parts; without a touch it has none, as if cancelled."""
        time = FIRST + timedelta(days=day, hours=9)
        rows = []
        for number, touch in enumerate(touches):
            share = [34, 66] if len(touches) == 2 else [100]
            at = FIRST + timedelta(days=touch, hours=8, minutes=number)
            micros, weight = share[number], share[number] / 100
            rows.append(touched(name, revision, f"t{touch}", micros, weight, order_time=time, touch_time=at))
        commit(self.lake, ATTRIBUTED_ORDERS, rows or [touched(name, revision, None, order_time=time, status="cancelled", **values)])

    def recount(self, day: int) -> None:
        """Recount an hour of a day and find nothing."""
        self.runs += 1
        self._note_recount(day, cause="none", rows_different=0, is_repaired=False)

    def _note_recount(self, day: int, **values: Any) -> None:
        hour = FIRST + timedelta(days=day, hours=3)
        row = {"run_id": f"r{self.runs}", "event_hour": hour, "layer": "events"}
        row |= {"rows_expected": 1, "rows_found": 1, "nanos_expected": 0, "nanos_found": 0}
        commit(self.lake, RECONCILIATIONS, [row | values | {"run_at": FIRST + timedelta(days=201, minutes=self.runs)}])

    def compact(self) -> None:
        """Merge the small files of the tables."""
        for table in (MINUTE_METRICS, EVENTS, BATCH_LEDGER):
            DeltaTable(str(self.lake / table.name)).optimize.compact()
