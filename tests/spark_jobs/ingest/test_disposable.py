"""Machines that are lost with their disks: each run is on another machine, which has only the lakehouse and the landing folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import lake
import pytest
from crash_points import CRASH_POINTS
from pyspark.sql import SparkSession
from topics import Topic, point_at
from truths import assert_copied_once, assert_truth

from services.launcher.kafka import Kafka
from services.simulator import simulate
from services.simulator.kafka import Cluster, Sending, simulate_to_kafka
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.ingest.files.backlog import read_landing, unaccounted_files
from spark_jobs.ingest.kafka.gaps import known_topic_id
from spark_jobs.ingest.kafka.topics import read_topic_sources
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read
from spark_jobs.lake.tables import STREAMS
from spark_jobs.operate.settle import settle
from spark_jobs.operate.status import read_status
from spark_jobs.steps import Step
from tests.spark_jobs.ingest.test_crash import kill_at_each, run

COUNTS = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")
ROOT = Path(__file__).resolve().parents[3]
QUICK = [("after", Step.EVENTS)]


@pytest.fixture
def machine(prefix: str, tmp_path: Path) -> Callable[[], Settings]:
    """Each call returns the settings of a new machine, on one lakehouse and one landing folder."""
    numbers = count()
    return lambda: load_settings(
        home=tmp_path / f"machine-{next(numbers)}", lakehouse=prefix, landing=tmp_path / "landing", lease_seconds=2
    )


def landed_in_rounds(landing: Path, rounds: int) -> Iterator[int]:
    """Take the landed events and orders away, and land them again in so many rounds. Yields the files of each."""
    files = sorted((path for stream in STREAMS for path in landing.glob(f"{stream}/*/*")), key=lambda path: path.stat().st_mtime_ns)
    kept = [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    for path in files:
        path.unlink()
    for number in range(rounds):
        part = kept[number * len(kept) // rounds : (number + 1) * len(kept) // rounds]
        for path, data, modified in part:
            hidden = path.with_name(f".{path.name}")
            hidden.write_bytes(data)
            os.utime(hidden, ns=(modified, modified))
            hidden.rename(path)
        yield len(part)


def pieces() -> list[str]:
    """What docs/architecture.md says is in ADTALLY_HOME and may be lost: all but what its user puts there."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = text.partition("## Where state lives")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `") and "your input" not in line]
    return [name.rstrip("/") for row in rows for name in re.findall("`([^`]+)`", row)]


@pytest.mark.services
@pytest.mark.trial
@pytest.mark.timeout(1800)
def test_each_piece_of_a_home_may_be_lost(machine: Callable[[], Settings], spark: SparkSession) -> None:
    settings = machine()
    truth = json.loads(simulate(settings.landing_path, 12_000, seed=7, lines_per_file=300, conversion=0.1).as_json())
    lost = [*pieces(), "*"]
    assert {"checkpoints", "key_index", "corrections", "*.lock"} <= set(lost)
    written: set[str] = set()
    rounds = landed_in_rounds(settings.landing_path, len(lost) + 1)
    next(rounds)
    run_ingest(settings, spark=spark)
    settle(settings)
    for piece, files in zip(lost, rounds, strict=True):
        written |= {path.name for path in settings.home_path.iterdir()}
        for path in settings.home_path.glob(piece):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        report = run_ingest(settings, spark=spark)
        assert report.batches or not files, piece
        settle(settings)
        assert read_status(settings).problems == [], piece
    assert reconcile(settings, None).differences == []
    assert_truth(settings, truth)
    assert {"checkpoints", "checkpoints_view", "key_index", "attempts", "attribution_index", "scratch"} <= written


def lose_disk(settings: Settings) -> None:
    """Delete a home. A Java that is about to end may still delete files of its own in it."""
    gone = settings.home_path.with_name(f"gone-{settings.home_path.name}")
    settings.home_path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def kill_and_lose(machine: Callable[[], Settings], tmp_path: Path, spark: SparkSession, points: list[tuple[str, Step]]) -> None:
    def lose(killed: Settings) -> Settings:
        lose_disk(killed)
        return machine()

    kill_at_each(load_settings(home=tmp_path / "calm"), machine(), spark, points, next_machine=lose)


@pytest.mark.services
def test_a_machine_lost_in_the_middle_of_a_batch(machine: Callable[[], Settings], tmp_path: Path, spark: SparkSession) -> None:
    kill_and_lose(machine, tmp_path, spark, QUICK)


@pytest.mark.crash
@pytest.mark.services
@pytest.mark.trial
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("half", [0, 1])
def test_a_machine_lost_at_every_durable_step(
    half: int, machine: Callable[[], Settings], tmp_path: Path, spark: SparkSession
) -> None:
    kill_and_lose(machine, tmp_path, spark, list(CRASH_POINTS[half::2]))


def test_the_next_machine_reads_nothing_again_and_fetches_the_index(
    machine: Callable[[], Settings], spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machine()
    truth = json.loads(simulate(first.landing_path, 3_000, seed=5, lines_per_file=400, conversion=0.1).as_json())
    rounds = landed_in_rounds(first.landing_path, 2)
    next(rounds)
    run_ingest(first, spark=spark)
    reader = machine()
    assert read_landing(reader).waiting == []
    assert read_status(reader).problems == []
    lose_disk(first)
    landed = next(rounds)
    assert sum(one.files for one in read_landing(reader).waiting) == landed

    def refuse(*_: object) -> None:
        raise AssertionError("the key index is rebuilt")

    monkeypatch.setattr("spark_jobs.ingest.events.keys_of_version", refuse)
    second = machine()
    report = run_ingest(second, spark=spark)
    assert report.batches == 2  # of events and of orders
    counted = lake.ledger(spark, second)
    assert {name: counted[name] for name in COUNTS} == {name: truth["totals"][name] for name in COUNTS}
    assert run_ingest(machine(), spark=spark).batches == 0
    assert read_landing(reader).waiting == []
    assert unaccounted_files(reader, "events") == []
    ids = {json.loads((checkpoints_to_read(home) / "events" / "metadata").read_text("utf-8"))["id"] for home in (reader, machine())}
    assert len(ids) == 1


@pytest.mark.services
def test_the_next_machine_goes_on_with_topics(
    machine: Callable[[], Settings], kafka: Kafka, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADTALLY_KAFKA", str(tmp_path / "kafka.toml"))
    first, reader = machine(), machine()
    events, orders = Topic(kafka.bootstrap_servers, "events"), Topic(kafka.bootstrap_servers, "orders")
    region = Cluster("eu-west", {"bootstrap.servers": kafka.bootstrap_servers}, events.name, orders.name)
    truth = simulate_to_kafka(first.landing_path, 6_000, 82, [region], Sending(), click_rate=0.2, conversion=0.4)
    point_at(first, ("eu-west", events, orders), more="max_offsets_per_batch = 2500\n")
    assert run(first, f"after:{Step.EVENTS}:1") == -signal.SIGKILL
    lose_disk(first)
    second = machine()
    assert run_ingest(second, spark=spark).batches > 0
    assert_truth(second, json.loads(truth.as_json()))
    assert_copied_once(second)
    (source,) = [one for one in read_topic_sources(reader) if one.stream == "events"]
    assert (source.lag, source.copy_lag, source.problem) == (0, 0, None)
    lose_disk(second)
    third = machine()
    assert run_ingest(third, spark=spark).offered == 0
    ids = [
        {path.parent.name: path.read_text("utf-8") for path in folder.glob("*/metadata")}
        for folder in (checkpoints_to_read(reader), third.checkpoints_path)
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 6
    assert known_topic_id(third.checkpoints_path / "events-eu-west") is not None
