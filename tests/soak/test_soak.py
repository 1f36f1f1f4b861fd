"""Everything at once for minutes under load: ingest, compaction, vacuum, reconciliation, backfills, mart builds; exact at the end.

Each part is the command that a person types, as a process of its own, again and again. Meanwhile the campaigns change to other
billing models and back, so that the backfills have something to restate and, at last, to take back.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from store import Location, variables
from terminal import PROGRAM, ROOT, environment

from orchestration.demo import ACCOUNTING, CAMPAIGN_HOURS, HOURS, MEASURES, difference, mart_cells, truth_cells
from orchestration.reconciliation import run_reconciliation
from services.simulator import simulate
from spark_jobs.config import Settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER
from spark_jobs.operate.status import read_status
from spark_jobs.operate.watermark import read_closing
from spark_jobs.units import HourRange, floor_hour

MINUTES = 3.0
EVENTS = 400_000
START = datetime(2025, 6, 2, tzinfo=UTC)
TRAFFIC_HOURS = 10


@dataclass
class Loop:
    """One command, run again and again until told to stop; what failed is kept."""

    name: str
    settings: Settings
    pause_seconds: float
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    def arguments(self, rng: random.Random) -> list[str] | None:
        """The command's words; None where there is nothing to do yet."""
        if self.name != "backfill":
            return self.name.split()
        closing = read_closing(self.settings)
        if closing.closed_through is None or closing.closed_through <= START:
            return None
        hours = list(HourRange(START, closing.closed_through))
        first = rng.randrange(len(hours))
        last = rng.randrange(first, len(hours))
        chosen = ["--from", f"{hours[first]:%Y-%m-%dT%H:%M:%SZ}", "--to", f"{hours[last] + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"]
        return [*self.name.split(), *chosen]

    def run(self, stop: threading.Event, seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            arguments = self.arguments(rng)
            if arguments is not None:
                done = command(self.settings, *arguments)
                self.runs += 1
                if done.returncode:
                    self.failures.append(
                        f"{' '.join(arguments)}: status {done.returncode}: {done.stderr[-1500:]}{done.stdout[-1500:]}"
                    )
            stop.wait(self.pause_seconds)


def command(settings: Settings, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=ROOT,
        env=environment(**variables(settings)),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def tables_exist(settings: Settings) -> bool:
    lake = Lake(settings)
    return (lake.version(BATCH_LEDGER) or 0) > 0


def flipped(text: str) -> str:
    """The campaigns with the billing models exchanged."""
    return text.replace(",cpc,", ",?,").replace(",cpm,", ",cpc,").replace(",?,", ",cpm,")


def put(path: Path, text: str) -> None:
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(text, "utf-8")
    hidden.rename(path)


def land(source: Path, settings: Settings, prices: str, stop_at: float) -> None:
    """Land the files evenly until ``stop_at`` in the order of their times, changing the prices there and back."""
    waiting = sorted(
        (path for stream in ("events", "orders") for path in (source / stream).glob("*/*")),
        key=lambda path: (path.stat().st_mtime_ns, str(path)),
    )
    campaigns = settings.landing_path / "campaigns" / "campaigns.csv"
    began = time.monotonic()
    for number, path in enumerate(waiting):
        if number % 10 == 5:
            put(campaigns, flipped(prices) if number % 20 == 5 else prices)
        target = settings.landing_path / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target.with_name(f".{target.name}"))
        target.with_name(f".{target.name}").rename(target)
        time.sleep(max(0.0, began + (stop_at - began) * (number + 1) / len(waiting) - time.monotonic()))


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_all_at_once_and_exact_at_the_end(place: Location, tmp_path: Path) -> None:
    """On a disk one home does it all. In a store one machine ingests, a second does the rest, and a third ends it."""
    ingesting, settings, last = place.machines(tmp_path, 3)
    source = tmp_path / "traffic"
    truth = json.loads(simulate(source, EVENTS, seed=41, start=START, days=TRAFFIC_HOURS / 24, lines_per_file=4_000).as_json())
    campaigns = settings.landing_path / "campaigns" / "campaigns.csv"
    campaigns.parent.mkdir(parents=True)
    shutil.copy2(source / "campaigns" / "campaigns.csv", campaigns)
    prices = campaigns.read_text("utf-8")
    loops = [
        Loop("compact", settings, 3),
        Loop("marts build", settings, 5),
        Loop("reconcile", settings, 5),
        Loop("backfill", settings, 3),
        Loop("backfill", settings, 4),
        Loop("vacuum", settings, 20),
        Loop("review", settings, 10),
        Loop("attribute", settings, 10),
        Loop("bill", settings, 10),
    ]
    stop = threading.Event()
    log = (tmp_path / "ingest.log").open("wb")
    ingest = subprocess.Popen(
        [sys.executable, "-m", "spark_jobs", "ingest", "--continuous", "--trigger", "2"],
        cwd=ROOT,
        env={**environment(**variables(ingesting)), "PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=log,
    )
    threads: list[threading.Thread] = []
    try:
        lander = threading.Thread(target=land, args=(source, settings, prices, time.monotonic() + 60 * MINUTES))
        lander.start()
        while not tables_exist(settings):
            assert ingest.poll() is None, (tmp_path / "ingest.log").read_text()[-3000:]
            time.sleep(0.2)
        threads = [threading.Thread(target=loop.run, args=(stop, number)) for number, loop in enumerate(loops)]
        for thread in threads:
            thread.start()
        lander.join()
        put(campaigns, prices)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        ingest.terminate()
        status = ingest.wait(120)
        log.close()
    print({f"{loop.name} {number}": loop.runs for number, loop in enumerate(loops)})
    assert status == 0, (tmp_path / "ingest.log").read_text()[-3000:]
    failures = [failure for loop in loops for failure in loop.failures]
    assert not failures, "\n".join(failures)
    assert all(loop.runs for loop in loops), [(loop.name, loop.runs) for loop in loops]

    # what landed last, then every hour closed by an operator and judged by the prices as they are now
    settings = last
    assert command(settings, "ingest").returncode == 0
    newest = max(source.progress_at for source in read_closing(settings).sources if source.progress_at)
    end = floor_hour(newest) + timedelta(hours=1)
    closed = command(settings, "hours", "close", "--through", f"{end:%Y-%m-%dT%H:%M:%SZ}", "--reason", "the traffic has ended")
    assert closed.returncode == 0, closed.stderr
    done = command(
        settings, "backfill", "--from", f"{first_hour(settings):%Y-%m-%dT%H:%M:%SZ}", "--to", f"{end:%Y-%m-%dT%H:%M:%SZ}"
    )
    assert done.returncode == 0, done.stderr
    assert command(settings, "compact").returncode == 0
    assert command(settings, "marts", "build").returncode == 0
    differences = {
        **difference(truth_cells([truth], HOURS), mart_cells(settings, HOURS), ACCOUNTING),
        **difference(truth_cells([truth], CAMPAIGN_HOURS), mart_cells(settings, CAMPAIGN_HOURS), MEASURES),
    }
    assert not {name: found for name, found in differences.items() if found[2]}
    assert run_reconciliation(settings, None).differences == []
    assert read_status(settings).problems == []


def first_hour(settings: Settings) -> Any:
    hour = read_closing(settings).first_hour
    assert hour is not None
    return hour
