"""Tables on a real object store of this machine: killed in the middle of a batch and run again, each record counts once."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from store import variables
from terminal import PROGRAM, ROOT, environment
from topics import Topic, point_at
from truths import assert_copied_once, assert_truth

from services.launcher.kafka import Kafka
from services.simulator import simulate
from services.simulator.kafka import Cluster, Sending, simulate_to_kafka
from spark_jobs.config import Settings, load_settings
from spark_jobs.steps import CRASH_VARIABLE, Step

pytestmark = pytest.mark.services


def ingest(home: Settings, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, "ingest", "--json"],
        cwd=ROOT,
        env=environment(**variables(home), **env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_files_killed_between_two_commits(prefix: str, tmp_path: Path) -> None:
    home = load_settings(home=tmp_path / "home", lakehouse=prefix.replace("s3://", "s3a://"))
    truth = json.loads(simulate(home.landing_path, 20_000, seed=81, lines_per_file=1_500).as_json())
    few = {"ADTALLY_MAX_FILES_PER_BATCH": "5"}
    for point in (f"after:{Step.EVENTS}:0", f"before:{Step.EVENTS_LEDGER}:1"):
        assert ingest(home, **few, **{CRASH_VARIABLE: point}).returncode == -signal.SIGKILL, point
    done = ingest(home, **few)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "billing lines of" in done.stderr, "it reviews, credits and bills"
    assert "Traceback" not in done.stderr
    assert_truth(home, truth)
    again = ingest(home, **few)
    assert (again.returncode, json.loads(again.stdout)["batches"]) == (0, 0), again.stderr[-3000:]


def test_topics_and_their_raw_copy(prefix: str, kafka: Kafka, tmp_path: Path) -> None:
    home = load_settings(home=tmp_path / "home", lakehouse=prefix)
    events, orders = Topic(kafka.bootstrap_servers, "events"), Topic(kafka.bootstrap_servers, "orders")
    region = Cluster("eu-west", {"bootstrap.servers": kafka.bootstrap_servers}, events.name, orders.name)
    truth = simulate_to_kafka(home.landing_path, 6_000, 82, [region], Sending(), click_rate=0.2, conversion=0.4)
    point_at(home, ("eu-west", events, orders), more="max_offsets_per_batch = 2500\n")
    killed = ingest(home, **{CRASH_VARIABLE: f"after:{Step.EVENTS}:1"})
    assert killed.returncode == -signal.SIGKILL
    done = ingest(home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_truth(home, json.loads(truth.as_json()))
    assert_copied_once(home)
