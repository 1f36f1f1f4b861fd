"""A near-real-time build of the marts over a long history against one over two days, after the same batch.

    python -m benchmarks.run marts --days 90 --json

Makes two lakehouses: one of N days and one that has only the last two of them, with the same rows. Builds the marts of both once.
Then adds the same batch, of events of the last two days, to each in turn and measures the build that follows: a process of its
own, wall time and the CPU time that it and its children used. The last line of the output is a JSON object; ``ratio`` is N days
over two.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import BenchmarkError, note
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.reading import open_table
from spark_jobs.lake.rewrite import rearrange
from spark_jobs.lake.tables import BATCH_LEDGER, CAMPAIGNS, EVENTS, MINUTE_METRICS, Table
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step

LAST = date(2026, 6, 30)
PRICE_NANOS = 250_000_000
REGIONS = ("eu-west", "us-east")
PLACEMENTS = ("feed", "search", "banner")
_STEPS = {
    MINUTE_METRICS: Step.MINUTE_METRICS,
    EVENTS: Step.EVENTS,
    BATCH_LEDGER: Step.EVENTS_LEDGER,
    CAMPAIGNS: Step.CAMPAIGNS,
}
_QUERY = "benchmark"


@dataclass(frozen=True)
class Size:
    """``rows``: increments of all days together; ``batch``: those of a batch; ``ads``: ads, ten a campaign."""

    days: int
    rows: int
    batch: int
    ads: int

    @property
    def rows_a_day(self) -> int:
        """Return the increments of a day."""
        return max(1, self.rows // self.days)


@dataclass(frozen=True)
class BuildCost:
    """What a build cost. ``days``: the days that it made; ``rows``: increments that it read."""

    home: str
    wall_seconds: float
    cpu_seconds: float
    days: int
    full_because: str | None


class MartsLakehouse:
    """A lakehouse of generated increments and of an event for each."""

    def __init__(self, home: Path, size: Size, seed: int) -> None:
        self.size, self.seed, self.home = size, seed, home
        self.settings: Settings = load_settings(home=home, lakehouse=None)
        self._lake = Lake(self.settings)

    def make(self, days: int) -> None:
        """Write the last ``days`` days, a batch each."""
        ensure_tables(self.settings)
        self._append(CAMPAIGNS, self._campaigns())
        for number in range(self.size.days - days, self.size.days):
            day = LAST - timedelta(days=self.size.days - 1 - number)
            self._write(number, [(day, self.size.rows_a_day)])
        self._settle()

    def _settle(self) -> None:
        """Leave the tables as an installation does: hourly compaction merges the ledger's files, logs have checkpoints."""
        base = self._lake.pin(BATCH_LEDGER).version(BATCH_LEDGER)
        rearrange(self._lake, BATCH_LEDGER, base, (), self.settings.compacted_file_bytes, _QUERY)
        for table in _STEPS:
            open_table(self._lake.uri(table)).create_checkpoint()

    def add_batch(self) -> None:
        """Add a batch of events of the last two days: one in ten is of the day before. Both lakehouses get the same ones."""
        late, written = self.size.batch // 10, self._lake.version(BATCH_LEDGER) or 0
        self._write(self.size.days * 1000 + written, [(LAST - timedelta(days=1), late), (LAST, self.size.batch - late)])

    def _campaigns(self) -> pa.Table:
        count = -(-self.size.ads // 10)
        start = datetime(2025, 1, 1, tzinfo=UTC)
        rows = [
            {
                "campaign_id": f"c-{number:05d}",
                "store_id": f"s-{number // 5:05d}",
                "billing_model": "cpc",
                "daily_budget_micros": 5_000_000,
                "currency": "EUR",
                "valid_from": start,
                "source_file": "campaigns.csv",
            }
            for number in range(count)
        ]
        return pa.Table.from_pylist(rows, schema=CAMPAIGNS.schema)

    def _write(self, batch: int, days: list[tuple[date, int]]) -> None:
        parts = [self._rows(batch, day, rows) for day, rows in days]
        for table, position in ((EVENTS, 0), (MINUTE_METRICS, 1), (BATCH_LEDGER, 2)):
            self._append(table, pa.concat_tables([part[position] for part in parts]))

    def _append(self, table: Table, rows: pa.Table) -> None:
        self._lake.append(table, rows, _STEPS[table])

    def _rows(self, batch: int, day: date, rows: int) -> tuple[pa.Table, pa.Table, pa.Table]:
        """Return the events, increments and ledger rows of a batch's day: each increment is one event."""
        random = np.random.default_rng([self.seed, batch, day.toordinal()])
        start = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())
        # more cells than rows: each increment has a minute, an ad and a placement of its own
        cells = random.choice(1440 * self.size.ads * len(PLACEMENTS), rows, replace=False)
        minute, rest = np.divmod(np.sort(cells), self.size.ads * len(PLACEMENTS))
        ad, placement = np.divmod(rest, len(PLACEMENTS))
        is_click = random.random(rows) < 0.2
        spend = np.where(is_click, PRICE_NANOS, 0)
        seconds = (start + 60 * minute) * 1_000_000
        region = ad % len(REGIONS)
        keys = {
            "region": _texts(region, REGIONS),
            "campaign_id": _numbered("c", ad // 10, -(-self.size.ads // 10)),
            "ad_id": _numbered("a", ad, self.size.ads),
            "store_id": _numbered("s", ad // 50, -(-self.size.ads // 50)),
            "placement": _texts(placement, PLACEMENTS),
            "currency": _texts(np.zeros(rows, dtype=np.int64), ("EUR",)),
            "_query_id": _texts(np.zeros(rows, dtype=np.int64), (_QUERY,)),
            "_batch_id": pa.array(np.full(rows, batch)),
        }
        serial = np.arange(rows)
        ids = pa.array([f"{batch}-{day:%Y%m%d}-{number}" for number in serial])
        zeros = pa.array(np.zeros(rows, dtype=np.int64))
        money = pa.array(spend).cast(pa.decimal128(38, 0))
        increments = {
            **keys,
            "record_uuid": ids,
            "event_minute": _times(seconds),
            "event_date": pa.array([day]).take(zeros),
            "impressions": pa.array((~is_click).astype(np.int64)),
            "clicks": pa.array(is_click.astype(np.int64)),
            "invalid_impressions": zeros,
            "invalid_clicks": zeros,
            "spend_nanos": money,
            "invalid_spend_nanos": zeros.cast(pa.decimal128(38, 0)),
        }
        events = {
            **keys,
            "event_id": ids,
            "event_type": _texts(is_click.astype(np.int64), ("impression", "click")),
            "event_time": _times(seconds + random.integers(0, 60_000_000, rows)),
            "received_at": _times(seconds + random.integers(60_000_000, 90_000_000, rows)),
            "user_id": _numbered("u", random.integers(0, max(1, rows // 4), rows), max(1, rows // 4)),
            "is_late": pa.array(np.zeros(rows, dtype=bool)),
            "spend_nanos": pa.array(spend),
            "invalid_spend_nanos": zeros,
            "event_date": pa.array([day]).take(zeros),
            "event_hour": pa.array((minute // 60).astype(np.int32)),
        }
        ledger = list(self._ledger(batch, start, minute // 60, region, spend))
        return (
            _table(EVENTS, events, rows),
            _table(MINUTE_METRICS, increments, rows),
            pa.Table.from_pylist(ledger, schema=BATCH_LEDGER.schema),
        )

    def _ledger(self, batch: int, start: int, hour: Any, region: Any, spend: Any) -> Iterator[dict[str, Any]]:
        row = {"stream": "events", "source": "files", "_query_id": _QUERY, "_batch_id": batch}
        row |= dict.fromkeys(("duplicate", "conflict", "rejected", "late", "invalid_traffic", "unpriced"), 0)
        row["ingested_at"] = datetime(2026, 7, 1, tzinfo=UTC) + timedelta(seconds=5 * batch)
        for number, name in enumerate(REGIONS):
            counts = np.bincount(hour[region == number], minlength=24)
            sums = np.bincount(hour[region == number], weights=spend[region == number], minlength=24)
            for at in np.flatnonzero(counts):
                event_hour = datetime.fromtimestamp(start + 3600 * int(at), UTC)
                counted = {"offered": int(counts[at]), "accepted": int(counts[at]), "spend_nanos": int(sums[at])}
                yield {**row, **counted, "region": name, "event_hour": event_hour}
        # a record of the day that cannot be read, and so has no hour
        unread = {"event_hour": None, "offered": 1, "accepted": 0, "rejected": 1, "spend_nanos": 0}
        yield {**row, **unread, "region": REGIONS[0], "source": f"files-{start}"}


def _table(table: Table, columns: dict[str, Any], rows: int) -> pa.Table:
    arrays = [
        columns[field.name].cast(field.type) if field.name in columns else pa.nulls(rows, field.type) for field in table.schema
    ]
    return pa.Table.from_arrays(arrays, schema=table.schema)


def _texts(codes: Any, texts: tuple[str, ...]) -> pa.Array:
    return pa.array(texts).take(pa.array(codes))


def _numbered(prefix: str, numbers: Any, count: int) -> pa.Array:
    return pa.array([f"{prefix}-{number:05d}" for number in range(count)]).take(pa.array(numbers))


def _times(microseconds: Any) -> pa.Array:
    return pa.array(microseconds).cast(pa.timestamp("us", "UTC"))


def run_build(home: Path, work: Path, *, is_full: bool = False) -> BuildCost:
    """Build the near-real-time marts of a home, or all of them, in a process of its own; return its cost."""
    command = [sys.executable, "-m", "benchmarks.mart_builds", *(["--full"] if is_full else [])]
    log = work / "build.log"
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as errors:
        done = subprocess.run(
            command, env=os.environ | {"ADTALLY_HOME": str(home)}, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
        )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0 or not done.stdout.strip():
        raise BenchmarkError(f"a build failed: {log.read_text()[-500:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return BuildCost(home.name, wall, cpu, said["days"], said["full_because"])


def run_marts(work: Path, size: Size, *, rounds: int, seed: int) -> dict[str, Any]:
    """Run the benchmark in ``work``; return its figures. Raises BenchmarkError if a build fails or made other days."""
    folder = work / f"marts-{size.days}-{size.rows}-{size.ads}-{seed}"
    homes = {"history": size.days, "two-days": min(2, size.days)}
    lakehouses = {name: MartsLakehouse(folder / name, size, seed) for name in homes}
    first = {name: _made(lakehouses[name], days, folder) for name, days in homes.items()}
    runs: list[BuildCost] = []
    for number in range(rounds):
        for name in list(homes) if number % 2 else list(reversed(homes)):
            lakehouses[name].add_batch()
            cost = run_build(folder / name, folder)
            if cost.full_because is not None:
                raise BenchmarkError(f"the build of {name} made all days: {cost.full_because}")
            note(f"round {number + 1}, {name}: {cost.wall_seconds:.2f} s, CPU {cost.cpu_seconds:.2f} s, {cost.days} days")
            runs.append(cost)
    idle = [run_build(folder / "two-days", folder) for _ in range(min(rounds, 3))]
    median = {name: _medians([run for run in runs if run.home == name]) for name in homes}
    cpu = median["history"]["cpu_seconds"] / median["two-days"]["cpu_seconds"]
    wall = median["history"]["wall_seconds"] / median["two-days"]["wall_seconds"]
    return {
        "ratio": round(max(cpu, wall), 3),
        "cpu_ratio": round(cpu, 3),
        "wall_ratio": round(wall, 3),
        "fixed_cpu_seconds": round(_medians(idle)["cpu_seconds"], 2),
        "days": size.days,
        "increments": size.days * size.rows_a_day,
        "batch": size.batch,
        "builds": median,
        "full_builds": {name: asdict(cost) for name, cost in first.items()},
        "runs": [asdict(run) for run in runs],
    }


def _made(lakehouse: MartsLakehouse, days: int, folder: Path) -> BuildCost:
    """Make a lakehouse and build its marts, unless a run before has; return what that build cost."""
    done = folder / f"{lakehouse.home.name}.json"
    if not done.exists():
        shutil.rmtree(lakehouse.home, ignore_errors=True)
        note(f"making {days} days, {days * lakehouse.size.rows_a_day} increments")
        lakehouse.make(days)
        note(f"building {days} days")
        done.write_text(json.dumps(asdict(run_build(lakehouse.home, folder, is_full=True))))
    return BuildCost(**json.loads(done.read_text()))


def _medians(runs: list[BuildCost]) -> dict[str, float]:
    return {
        "wall_seconds": round(statistics.median(run.wall_seconds for run in runs), 3),
        "cpu_seconds": round(statistics.median(run.cpu_seconds for run in runs), 3),
    }
