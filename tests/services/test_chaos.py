"""Everything is killed with kill -9, in turn and under load: exact at the end, in Delta, the marts, Pinot and the budget service.

A real Kafka, a real Pinot, the command as a person types it. The traffic goes on while a part is away. The seed decides the order
of the kills and how long each waits; another can be named by CHAOS_SEED.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lake
import pytest
from store import Location, variables
from terminal import PROGRAM, ROOT, environment

from orchestration.cli.app import run
from orchestration.demo import (
    ACCOUNTING,
    BILLS,
    CAMPAIGN_HOURS,
    CREDITS,
    HOURS,
    MEASURES,
    difference,
    mart_cells,
    truth_cells,
)
from orchestration.marts import query_marts
from services.budget.store import Store
from services.launcher.errors import ServiceError
from services.launcher.kafka import Kafka
from services.launcher.pinot import Pinot
from services.launcher.trial import throwaway_kafka, throwaway_pinot
from services.serving.named import named_query
from services.serving.setup import ensure_tables, examine
from services.serving.tables import MODELS, WINDOW_DAYS, Source, table_specs
from services.simulator.errors import DeliveryError
from services.simulator.kafka import Cluster, Sending, simulate_to_kafka
from spark_jobs.config import Settings
from spark_jobs.java import require_java
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER
from spark_jobs.operate.watermark import read_closing
from spark_jobs.units import floor_hour

pytestmark = [pytest.mark.services, pytest.mark.trial, pytest.mark.timeout(1200)]

SEED = int(os.environ.get("CHAOS_SEED", "47"))
START = datetime(2025, 6, 2, tzinfo=UTC)
EVENTS = 24_000
RATE = 250.0
CHUNK = 25
FLUSH_ROWS = 2_000
PARTS = ("ingest", "broker", "zookeeper", "pinot", "budget")


class Program:
    """A command that goes on until it is killed, and is then started again."""

    def __init__(self, settings: Settings, *arguments: str) -> None:
        self._settings, self._arguments = settings, arguments
        self._log = (settings.home_path / f"{arguments[0]}.log").open("ab")
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, *self._arguments],
            cwd=ROOT,
            env=environment(**variables(self._settings)),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def kill(self) -> None:
        """It and all that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(120)

    def said(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text("utf-8")[-3000:]

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._log.close()


@pytest.fixture
def settings(place: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Those of the home, which commands of this process find, too."""
    made = place.settings(tmp_path / "home")
    made.home_path.mkdir()
    for name, value in variables(made).items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def kafka(tmp_path: Path, settings: Settings) -> Iterator[Kafka]:
    jars = settings.jar_cache_path
    with throwaway_kafka(jar_cache=jars, java=lambda: require_java().executable, heap="384m", parent=tmp_path) as made:
        made.up()
        (settings.home_path / "kafka.toml").write_text(
            f'[[clusters]]\nname = "eu-west"\nbootstrap_servers = "{made.bootstrap_servers}"\n[publish]\ncluster = "eu-west"\n'
        )
        yield made


@pytest.fixture
def pinot(tmp_path: Path, settings: Settings, kafka: Kafka) -> Iterator[Pinot]:
    jars = settings.jar_cache_path
    with throwaway_pinot(jar_cache=jars, java=lambda: require_java().executable, heap="1g", parent=tmp_path) as made:
        specs = table_specs(examine(Source(kafka.bootstrap_servers)), flush_rows=FLUSH_ROWS)
        ensure_tables(made.client, specs, lambda _line: None)
        yield made


@contextmanager
def programs(settings: Settings) -> Iterator[dict[str, Program]]:
    running = {
        "ingest": Program(settings, "ingest", "--continuous", "--trigger", "1s"),
        "budget": Program(settings, "budget", "--keep-days", "0"),
    }
    try:
        yield running
    finally:
        for program in running.values():
            program.close()


class Traffic:
    """Simulated traffic into Kafka, RATE a second; till ``may_end`` is set its second half comes ever slower."""

    def __init__(self, settings: Settings, kafka: Kafka) -> None:
        self._out, self._cluster = settings.landing_path, Cluster("eu-west", {"bootstrap.servers": kafka.bootstrap_servers})
        self.may_end = threading.Event()

    def send(self) -> tuple[dict[str, Any], int]:
        """Send it, again if a part of it was not taken. Its truth, and how often it was sent."""
        for times in range(1, 4):
            try:
                sending, progress = Sending(chunk=CHUNK), self._pace
                made = simulate_to_kafka(
                    self._out, EVENTS, SEED, [self._cluster], sending, progress=progress, start=START, days=0.5
                )
                return json.loads(made.as_json()), times
            except DeliveryError:
                continue
        raise AssertionError("the traffic could not be sent")

    def _pace(self, sent: int, _all: int) -> None:
        self.may_end.wait(CHUNK / RATE if sent < 0.5 * EVENTS else 1.0 if sent < 0.8 * EVENTS else 5.0)


def offered(settings: Settings) -> int:
    """Event records that stand in the ledger of complete batches."""
    if not Lake(settings).exists(BATCH_LEDGER):
        return 0
    return sum(row[0] for row in lake.rows(None, settings, "batch_ledger", "offered", "stream = 'events'"))


def wait_until(reached: Callable[[], bool], what: Callable[[], str], *, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, what()
        time.sleep(0.3)


def command(*arguments: str) -> None:
    assert run(list(arguments)) == 0, arguments


def pids(service: Kafka | Pinot, role: str) -> int:
    return service.status().processes[role]


def test_all_is_exact_after_everything_was_killed_under_load(settings: Settings, kafka: Kafka, pinot: Pinot) -> None:
    draw = random.Random(SEED)
    order = draw.sample(PARTS, len(PARTS))
    killed: list[str] = []
    began = time.monotonic()
    # processes of a service end with the thread that started them: one thread of each to start them in, until the end
    with ThreadPoolExecutor(1) as sender, ThreadPoolExecutor(1) as starter, programs(settings) as running, ExitStack() as stack:
        load = Traffic(settings, kafka)
        traffic = sender.submit(load.send)
        stack.callback(load.may_end.set)
        pinot_is_up: Future[Any] | None = None
        for part in order:
            seen = offered(settings)
            wait_until(lambda seen=seen: offered(settings) > seen, running["ingest"].said)  # type: ignore[misc]
            time.sleep(draw.uniform(0.5, 3))
            if part in ("zookeeper", "pinot") and pinot_is_up is not None:
                pinot_is_up.result()
            assert not traffic.done(), f"the traffic had ended before {part} was killed"
            print(f"{time.monotonic() - began:.0f} s: {offered(settings)} records counted, killing {part}")
            killed.append(part)
            if part == "broker":
                os.kill(pids(kafka, "kafka"), signal.SIGKILL)
                time.sleep(draw.uniform(1, 4))
                kafka.up()
            elif part in ("zookeeper", "pinot"):
                os.kill(pids(pinot, part), signal.SIGKILL)
                pinot_is_up = starter.submit(pinot.up)
            else:
                running[part].kill()
                time.sleep(draw.uniform(0, 2))
                running[part].start()
        load.may_end.set()
        truth, times = traffic.result()
        wait_until(lambda: offered(settings) >= truth["totals"]["offered"], running["ingest"].said)
        assert pinot_is_up is not None
        pinot_is_up.result()
        assert running["ingest"].end() == 0, running["ingest"].said()
        running["budget"].kill()
        assert sorted(killed) == sorted(PARTS)

        closing = read_closing(settings)
        end = floor_hour(max(source.progress_at for source in closing.sources if source.progress_at)) + timedelta(hours=1)
        if closing.closed_through is None or closing.closed_through < end:
            command("hours", "close", "--through", f"{end:%Y-%m-%dT%H:%M:%SZ}", "--reason", "the traffic has ended")
        command("ingest")  # what came last; the review of the hours, credit and bills; and all of it published
        command("marts", "build")
        command("budget", "--once", "--keep-days", "0")
        assert_marts_are_exact(settings, truth, is_resent=times > 1)
        assert_budget_is_exact(settings, truth)
        assert_pinot_is_exact(settings, pinot, truth)


def assert_marts_are_exact(settings: Settings, truth: dict[str, Any], *, is_resent: bool) -> None:
    """Against the truth. What was sent twice was offered twice: then that and the duplicates are not the truth's."""
    names = tuple(name for name in ACCOUNTING if not (is_resent and name in ("offered", "duplicate", "conflict", "rejected")))
    found = {
        **difference(truth_cells([truth], HOURS), mart_cells(settings, HOURS), names),
        **difference(truth_cells([truth], CAMPAIGN_HOURS), mart_cells(settings, CAMPAIGN_HOURS), MEASURES),
        **difference(truth_cells([truth["attribution"]], CREDITS), mart_cells(settings, CREDITS), CREDITS.measures),
    }
    billed = difference(truth_cells([truth], BILLS), mart_cells(settings, BILLS), BILLS.measures)
    found["billed_micros"] = billed["spend_micros"]
    assert not {name: figures for name, figures in found.items() if figures[2]}
    assert found["accepted"][0] > EVENTS / 2 and found["credit_micros"][0] > 0  # there was something to compare


def assert_budget_is_exact(settings: Settings, truth: dict[str, Any]) -> None:
    expected: Counter[tuple[str, str, str, str]] = Counter()
    for row in truth["campaign_hours"]:
        for name in ("impressions", "clicks", "spend_nanos"):
            expected[row["event_hour"][:10], row["campaign_id"], row["currency"], name] += row[name]
    found: Counter[tuple[str, str, str, str]] = Counter()
    with Store(settings.home_path / "budget" / "budget.sqlite", read_only=True) as store:
        for day, campaign, _store, currency, *measures in store.sums():
            for name, value in zip(("impressions", "clicks", "spend_nanos"), measures, strict=True):
                found[day, campaign, currency, name] += value
        assert store.asides() == Counter()
    assert {key: value for key, value in found.items() if value} == {key: value for key, value in expected.items() if value}


def assert_pinot_is_exact(settings: Settings, pinot: Pinot, truth: dict[str, Any]) -> None:
    """Every named query that both know gives the marts' rows, and the money is the truth's."""
    client = pinot.client
    _, [(first, last)] = query_marts(settings, "select min(event_date)::varchar, max(event_date)::varchar from fct_campaign_day")
    days = {"from_day": first, "to_day": last}
    asked: list[tuple[str, dict[str, str]]] = [("totals", {}), ("campaign_day", days), ("spend_by_hour", days)]
    asked += [("budget_pacing", {"day": first, "daily_budget_micros": "1440000000"})]
    asked += [
        ("attributed_revenue", days | {"model": model, "window_days": str(window)}) for model in MODELS for window in WINDOW_DAYS
    ]

    def of_pinot(name: str, given: dict[str, str]) -> list[list[Any]]:
        return named_query(name).ask_pinot(client, given, now=datetime.now(UTC))[1]

    def of_marts(name: str, given: dict[str, str]) -> list[list[Any]]:
        query = named_query(name)
        return [list(row) for row in query_marts(settings, query.text("duckdb"), query.values(given))[1]]

    def is_equal() -> bool:
        try:
            return all(of_pinot(name, given) == of_marts(name, given) for name, given in asked)
        except ServiceError:
            return False

    end = time.monotonic() + 180
    while not is_equal() and time.monotonic() < end:  # what was published last is on its way
        if problem := pinot.status().problem:  # then its operator does what it says
            print(problem)
            pinot.up()
        time.sleep(1)
    print({table: (client.segments(table), client.consumed(table)) for table in client.tables()})
    for name, given in asked:
        assert of_pinot(name, given) == of_marts(name, given), (name, given)
    spend = {row[0]: row[5] for row in of_pinot("totals", {})}
    assert spend == truth["totals"]["spend_nanos_by_currency"]
    assert list(client.segments("ads_metrics").values()).count("DONE") >= 2
