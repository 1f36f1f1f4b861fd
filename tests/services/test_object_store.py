"""Tables on a real object store of this machine: killed in the middle of a batch and run again, each record counts once."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from terminal import PROGRAM, ROOT, environment
from topics import Topic, point_at
from truths import assert_copied_once, assert_truth

from services.launcher.kafka import Kafka
from services.launcher.s3 import BUCKET
from services.launcher.trial import throwaway_s3
from services.simulator import simulate
from services.simulator.kafka import Cluster, Sending, simulate_to_kafka
from spark_jobs.config import Settings, load_settings
from spark_jobs.steps import CRASH_VARIABLE, Step

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    """A store with an empty bucket: the environment by which it is reached."""
    with throwaway_s3() as made:
        yield made.environment()


def client(store: dict[str, str]):
    return boto3.client(
        "s3",
        endpoint_url=store["AWS_ENDPOINT_URL"],
        region_name=store["AWS_REGION"],
        aws_access_key_id=store["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=store["AWS_SECRET_ACCESS_KEY"],
    )


def copied(store: dict[str, str], home: Settings, name: str) -> Settings:
    """The tables below ``name`` in the bucket as they are now, in a folder, where DuckDB reads them."""
    folder = home.home_path / "copy"
    s3 = client(store)
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{name}/"):
        for key in (found["Key"] for found in page["Contents"] if not found["Key"].endswith("/")):  # that is a folder's mark
            target = folder / key
            target.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(BUCKET, key, str(target))
    return load_settings(home=home.home_path, lakehouse=str(folder / name))


def ingest(home: Settings, store: dict[str, str], name: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, "ingest", "--json"],
        cwd=ROOT,
        env=environment(ADTALLY_HOME=str(home.home_path), ADTALLY_LAKEHOUSE=f"s3a://{BUCKET}/{name}", **store, **env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_files_killed_between_two_commits(store: dict[str, str], tmp_path: Path) -> None:
    home = load_settings(home=tmp_path / "home")
    truth = json.loads(simulate(home.landing_path, 20_000, seed=81, lines_per_file=1_500).as_json())
    few = {"ADTALLY_MAX_FILES_PER_BATCH": "5"}
    for point in (f"after:{Step.EVENTS}:0", f"before:{Step.EVENTS_LEDGER}:1"):
        assert ingest(home, store, "files", **few, **{CRASH_VARIABLE: point}).returncode == -signal.SIGKILL, point
    done = ingest(home, store, "files", **few)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not settled: reviews, credits and bills read a lakehouse in a local path" in done.stderr
    assert "Traceback" not in done.stderr
    assert_truth(copied(store, home, "files"), truth)
    again = ingest(home, store, "files", **few)
    assert (again.returncode, json.loads(again.stdout)["batches"]) == (0, 0), again.stderr[-3000:]


def test_topics_and_their_raw_copy(store: dict[str, str], kafka: Kafka, tmp_path: Path) -> None:
    home = load_settings(home=tmp_path / "home")
    events, orders = Topic(kafka.bootstrap_servers, "events"), Topic(kafka.bootstrap_servers, "orders")
    region = Cluster("eu-west", {"bootstrap.servers": kafka.bootstrap_servers}, events.name, orders.name)
    truth = simulate_to_kafka(home.landing_path, 6_000, 82, [region], Sending(), click_rate=0.2, conversion=0.4)
    point_at(home, ("eu-west", events, orders), more="max_offsets_per_batch = 2500\n")
    killed = ingest(home, store, "topics", **{CRASH_VARIABLE: f"after:{Step.EVENTS}:1"})
    assert killed.returncode == -signal.SIGKILL
    done = ingest(home, store, "topics")
    assert done.returncode == 0, done.stderr[-3000:]
    local = copied(store, home, "topics")
    assert_truth(local, json.loads(truth.as_json()))
    assert_copied_once(local)
