"""Two ingests, a publisher and three readers at once, with kills: no reader ever sees a total that no prefix of the ledger gives.

An ingest works and publishes, and a second one waits for its place. The one that works is killed, and the other takes over.
Meanwhile the marts are built and queried, the status is read and the budget service consumes the topic. What each of them saw is
compared afterwards with the order in which the batches were committed to the ledger.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from store import variables
from terminal import PROGRAM, ROOT, environment
from topics import Topic

from services.launcher.kafka import Kafka
from services.simulator import simulate
from services.simulator.chaos.prefixes import Prefixes, Total
from services.simulator.chaos.world import Tables
from spark_jobs.config import Settings, load_settings

EVENTS = 3000
KILLS = 2
PATIENCE_SECONDS = 400
MARTS = """
select
    (select coalesce(sum(offered), 0) from fct_event_accounting)::bigint as offered,
    (select coalesce(sum(accepted), 0) from fct_event_accounting)::bigint as accepted,
    (select coalesce(sum(impressions + invalid_impressions), 0) from fct_campaign_day)::bigint as impressions,
    (select coalesce(sum(clicks + invalid_clicks), 0) from fct_campaign_day)::bigint as clicks,
    (select coalesce(sum(spend_nanos), 0) from fct_campaign_day)::bigint as spend_nanos
"""


class Reader(threading.Thread):
    """Looks again and again until told to stop; keeps what it saw, and what failed."""

    def __init__(self, look: Callable[[], Total | None]) -> None:
        super().__init__(daemon=True)
        self._look = look
        self.stopping = threading.Event()
        self.seen: list[Total] = []
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self.stopping.wait(0.3):
                total = self._look()
                if total is not None:
                    self.seen.append(total)
        except Exception as error:
            self.failure = error

    def end(self) -> list[Total]:
        self.stopping.set()
        self.join()
        if self.failure is not None:
            raise self.failure
        return self.seen


class Home:
    """The home, and its commands as processes of their own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._environment = environment(**variables(settings), ADTALLY_SPARK_MASTER="local[1]", ADTALLY_MAX_FILES_PER_BATCH="1")

    def start(self, *arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
        output = (log or Path(os.devnull)).open("a")
        with output:
            return subprocess.Popen(
                [*PROGRAM, *arguments],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*PROGRAM, *arguments], cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=600)

    def marts(self) -> Total | None:
        done = self.run("query", MARTS, "--format", "json")
        if "published" in done.stderr:  # nothing yet
            return None
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)
        return tuple(row[name] for name in ("offered", "accepted", "impressions", "clicks", "spend_nanos"))

    def status(self) -> Total | None:
        done = self.run("status", "--json")
        assert done.returncode in (0, 1), done.stderr  # 1: nothing is ingested yet
        found = json.loads(done.stdout)
        assert found["conservation_holds"], found["problems"]
        sources = [source for source in found["sources"] if source["stream"] == "events"]
        return tuple(sum(source[name] for source in sources) for name in ("offered", "accepted"))

    def budget(self, store: Path) -> Total | None:
        done = self.run("budget", "--once", "--keep-days", "0", "--store", str(store))
        assert done.returncode == 0, done.stderr
        with closing(sqlite3.connect(store)) as database:
            sums = "coalesce(sum(impressions), 0), coalesce(sum(clicks), 0), coalesce(sum(spend_nanos), 0)"
            return tuple(database.execute(f"select {sums} from keys").fetchone())


def batches(settings: Settings) -> list[dict[str, int]]:
    """The measures of each batch of events, in the order in which the ledger has them."""
    lakehouse = Path(settings.lakehouse_uri)
    tables = Tables(str(lakehouse))
    spends: dict[Any, list[int]] = {}
    measures = ("impressions", "clicks", "spend_nanos", "invalid_impressions", "invalid_clicks")
    for row in tables.dicts("minute_metrics", ", ".join(("_query_id", "_batch_id", *measures))):
        cell = spends.setdefault((row["_query_id"], row["_batch_id"]), [0] * len(measures))
        cell[:] = [old + row[name] for old, name in zip(cell, measures, strict=True)]
    order: dict[Any, dict[str, int]] = {}
    for version in range(DeltaTable(str(lakehouse / "batch_ledger")).version() + 1):
        rows = DeltaTable(str(lakehouse / "batch_ledger"), version=version).to_pyarrow_table(
            columns=["stream", "_query_id", "_batch_id", "offered", "accepted"]
        )
        for row in rows.to_pylist():
            key = (row["_query_id"], row["_batch_id"])
            if row["stream"] == "events" and (key not in order or order[key]["version"] == version):
                counts = order.setdefault(key, {"version": version, "offered": 0, "accepted": 0})
                counts["offered"] += row["offered"]
                counts["accepted"] += row["accepted"]
    nothing = [0] * len(measures)
    return [{**counts, **dict(zip(measures, spends.get(key, nothing), strict=True))} for key, counts in order.items()]


def wait_until(reached: Callable[[], bool], what: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_no_reader_sees_what_no_prefix_of_the_ledger_gives(tmp_path: Path, kafka: Kafka) -> None:
    settings = load_settings(home=tmp_path / "home")
    settings.home_path.mkdir()
    topic = Topic(kafka.bootstrap_servers, "seen", partitions=1)  # so that the end of the topic is the end of a version
    settings.kafka_path.write_text(
        f'[[clusters]]\nname = "here"\nbootstrap_servers = "{kafka.bootstrap_servers}"\nconsume = false\n'
        f'[publish]\ncluster = "here"\nmetrics_topic = "{topic.name}"\ncredits_topic = "{topic.name}-credits"\n'
    )
    source = tmp_path / "traffic"
    simulate(source, EVENTS, seed=11, lines_per_file=100)
    shutil.copytree(source / "campaigns", settings.landing_path / "campaigns")
    waiting = sorted((source / "events").glob("*/*"), key=lambda path: (path.stat().st_mtime_ns, str(path)))

    def land(count: int) -> None:
        for _ in range(min(count, len(waiting))):
            path = waiting.pop(0)
            target = settings.landing_path / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target.with_name(f".{path.name}"))
            target.with_name(f".{path.name}").rename(target)

    def ledger() -> int:
        return len(batches(settings)) if DeltaTable.is_deltatable(f"{settings.lakehouse_uri}/batch_ledger") else 0

    home, rng = Home(settings), random.Random(11)
    log = tmp_path / "ingest.log"
    ingests = [home.start("ingest", "--continuous", "--trigger", "500ms", "--wait", log=log) for _ in range(2)]
    readers: dict[str, Reader] = {}
    builds: list[int] = []

    def build() -> Total | None:
        """Build the marts, or kill the build of them, and look."""
        building = home.start("marts", "build")
        if rng.random() < 0.3:
            time.sleep(rng.random() * 3)
            os.killpg(building.pid, signal.SIGKILL)
        builds.append(building.wait())
        return home.marts()

    try:
        land(4)
        wait_until(lambda: ledger() >= 2, lambda: log.read_text()[-3000:])
        looks = {"marts": build, "status": home.status, "budget": lambda: home.budget(tmp_path / "budget.db")}
        wait_until(lambda: home.run("budget", "--once", "--store", str(tmp_path / "first.db")).returncode == 0, log.read_text)
        readers = {name: Reader(look) for name, look in looks.items()}
        for reader in readers.values():
            reader.start()
        for _ in range(KILLS):
            before = ledger()
            land(6)
            wait_until(lambda before=before: ledger() > before, lambda: log.read_text()[-3000:])  # type: ignore[misc]
            os.killpg(ingests[0].pid, signal.SIGKILL)  # the oldest one works: the other one waits for its end
            ingests[0].wait()
            ingests = [ingests[1], home.start("ingest", "--continuous", "--trigger", "500ms", "--wait", log=log)]
        land(len(waiting))
        events = len(list((source / "events").glob("*/*")))
        wait_until(lambda: ledger() >= events, lambda: f"{ledger()} of {events}: {log.read_text()[-3000:]}")
        wait_until(lambda: all(len(reader.seen) > 2 or reader.failure for reader in readers.values()), lambda: "no readings")
    finally:
        for reader in readers.values():
            reader.stopping.set()
        for ingest in ingests:
            if ingest.poll() is None:
                os.killpg(ingest.pid, signal.SIGKILL)
                ingest.wait()
    seen = {name: reader.end() for name, reader in readers.items()}
    assert 0 in builds
    found = batches(settings)

    def prefixes(*names: str) -> Prefixes:
        return Prefixes([tuple(sum(batch[one] for one in name.split("+")) for name in names) for batch in found])

    impressions, clicks = "impressions+invalid_impressions", "clicks+invalid_clicks"
    marts = prefixes("offered", "accepted", impressions, clicks, "spend_nanos").check("marts", seen["marts"])
    status = prefixes("offered", "accepted").check("status", seen["status"])
    budget = prefixes("impressions", "clicks", "spend_nanos").check("budget", seen["budget"])
    print({"batches": len(found), "marts": marts, "status": status, "budget": budget})
    for name, numbers in (("marts", marts), ("status", status), ("budget", budget)):
        assert len(set(numbers)) > 1, f"{name} saw one state only: {numbers}"
