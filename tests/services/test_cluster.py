"""The job on a real Spark standalone cluster: machines that die in the middle of a batch, tasks that run twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable
from store import fresh_prefix, upload, variables
from terminal import ROOT, environment
from topics import Topic, point_at
from truths import assert_copied_once, assert_truth

from benchmarks.spark_cluster import SPARK_HOME, Cluster, can_hide, standalone_cluster
from services.launcher.kafka import Kafka
from services.simulator import simulate
from services.simulator.kafka import Cluster as Region
from services.simulator.kafka import Sending, simulate_to_kafka
from spark_jobs.config import Settings, load_settings
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.dedupe.shards import ShardedIndex
from spark_jobs.jars import ensure_jars
from spark_jobs.java import require_java
from spark_jobs.lake.places import state_copies
from spark_jobs.lake.store import delta_options

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(sys.platform != "linux", reason="workers are told apart by loopback addresses, which only Linux has"),
]

DATA = ".snappy.parquet"
SHARD = ".lock"  # of a shard of the key index, while a task classifies its keys


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with standalone_cluster(require_java().executable, tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="module")
def apart(store: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Path]]:
    """A cluster whose workers share nothing with the driver but the store: a folder of the driver that they do not see."""
    if not can_hide():
        pytest.skip("hiding the driver's folder from the workers needs root")
    driver = tmp_path_factory.mktemp("driver")
    with standalone_cluster(require_java().executable, tmp_path_factory.mktemp("apart"), hidden=driver) as made:
        yield made, driver


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


class Job:
    """A submitted ingest; ``events`` are Spark's own records of what happened to its tasks."""

    def __init__(self, home: Settings, folder: Path, command: list[str], conf: dict[str, str], **env: str | None) -> None:
        self._log = folder / "events"
        for made in (self._log, folder / "conf"):
            made.mkdir(parents=True)
        conf = {"spark.eventLog.enabled": "true", "spark.eventLog.dir": f"file://{self._log}", **conf}
        conf |= {"spark.eventLog.compress": "false", "spark.eventLog.rolling.enabled": "false"}
        (folder / "conf" / "spark-defaults.conf").write_text("".join(f"{key} {value}\n" for key, value in conf.items()))
        self._error = folder / "job.err"
        with self._error.open("wb") as error:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(
                    **variables(home),
                    ADTALLY_MAX_FILES_PER_BATCH="6",
                    PYTHONUNBUFFERED="1",
                    SPARK_CONF_DIR=str(folder / "conf"),
                    **env,
                ),
                stdout=subprocess.PIPE,
                stderr=error,
                text=True,
            )

    def runs(self) -> bool:
        return self._process.poll() is None

    def wait_batch(self) -> dict[str, Any]:
        """The next batch of events that is complete."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{") and json.loads(line)["stream"].startswith("events"):
                return dict(json.loads(line))
        raise AssertionError(self._error.read_text()[-3000:])

    def wait(self) -> None:
        self._process.communicate(timeout=240)
        assert self._process.returncode == 0, self._error.read_text()[-3000:]

    def task_ends(self) -> Counter[str]:
        """How its tasks ended, by Spark's name of the reason."""
        (log,) = self._log.iterdir()
        events = (json.loads(line) for line in log.read_text("utf-8").splitlines())
        return Counter(event["Task End Reason"]["Reason"] for event in events if event["Event"] == "SparkListenerTaskEnd")


@pytest.mark.trial
def test_two_machines_die_in_the_middle_of_their_tasks(home: Settings, cluster: Cluster, tmp_path: Path) -> None:
    truth = json.loads(simulate(home.landing_path, 30_000, seed=71).as_json())
    submit = [str(SPARK_HOME / "bin" / "spark-submit"), "--master", cluster.url, "--jars", ",".join(map(str, ensure_jars(home)))]
    command = [*submit, str(ROOT / "spark_jobs" / "__main__.py"), "ingest", "--json"]
    env = {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1", "PYTHONPATH": None}
    job = Job(home, tmp_path / "job", command, {}, **env)
    kill_machines(cluster, job)
    assert_truth(home, truth)


def test_two_machines_that_share_nothing_but_a_store_die(apart: tuple[Cluster, Path], tmp_path: Path) -> None:
    """Landing files and tables are in the store. No folder is shared: each worker has its own, and none sees the driver's."""
    cluster, driver = apart
    truth = json.loads(simulate(tmp_path / "traffic", 90_000, seed=74, lines_per_file=3_000).as_json())
    location = fresh_prefix()
    upload(tmp_path / "traffic", f"{location}/landing")
    home = load_settings(home=driver / "home", lakehouse=f"{location}/lakehouse", landing=f"{location}/landing")
    command = [sys.executable, "-m", "spark_jobs", "ingest", "--json"]
    job = Job(home, driver / "job", command, {}, ADTALLY_SPARK_MASTER=cluster.url)
    kill_machines(cluster, job, (".tmp", SHARD, DATA))
    assert_truth(home, truth)
    place = state_copies(home, "key_index")
    assert place is not None
    index = ShardedIndex(place)
    table = DeltaTable(home.table_uri("events"), storage_options=delta_options(home.lakehouse_uri))
    assert (index.table_id, index.version) == (str(table.metadata().id), table.version())
    keys = Keys.concatenate(list(index.parts(tmp_path)))
    assert len(keys) == len(np.unique(np.column_stack((keys.low, keys.high)), axis=0)) == truth["totals"]["accepted"]
    assert not home.key_index_path.exists()  # the driver has no key


def kill_machines(cluster: Cluster, job: Job, endings: tuple[str, ...] = (".tmp", DATA)) -> None:
    """Kill a machine while it writes a file of parsed rows, then others: each while it has a file open whose path ends so."""
    for ending in endings:
        job.wait_batch()
        worker, _ = cluster.catch(ending, job.runs)
        cluster.kill(worker)
        cluster.add_worker()
    job.wait()
    assert job.task_ends()["ExecutorLostFailure"] >= len(endings)


def test_two_machines_die_while_they_read_topics(home: Settings, cluster: Cluster, kafka: Kafka, tmp_path: Path) -> None:
    cluster.wait()
    events, orders = Topic(kafka.bootstrap_servers, "events", partitions=3), Topic(kafka.bootstrap_servers, "orders")
    region = Region("eu-west", {"bootstrap.servers": kafka.bootstrap_servers}, events.name, orders.name)
    sending = Sending(transactional=True, abort_some=0.2, chunk=2_000)
    truth = simulate_to_kafka(home.landing_path, 30_000, 73, [region], sending)
    point_at(home, ("eu-west", events, orders), more="max_offsets_per_batch = 6000\n")
    command = [sys.executable, "-m", "spark_jobs", "ingest", "--json"]
    job = Job(home, tmp_path / "job", command, {}, ADTALLY_SPARK_MASTER=cluster.url)
    kill_machines(cluster, job)
    assert_truth(home, json.loads(truth.as_json()))
    # the copy of the raw records is made by the same machines: each record once, none lacks that was offered
    assert_copied_once(home)


def test_a_task_that_runs_twice_leaves_its_rows_once(home: Settings, cluster: Cluster, tmp_path: Path) -> None:
    cluster.wait()
    truth = json.loads(simulate(home.landing_path, 20_000, seed=72).as_json())
    conf = {
        "spark.speculation": "true",
        "spark.speculation.task.duration.threshold": "1s",
        "spark.python.task.killTimeout": "600s",  # the one that lost goes on to its end
    }
    command = [sys.executable, "-m", "spark_jobs", "ingest", "--json"]
    job = Job(home, tmp_path / "job", command, conf, ADTALLY_SPARK_MASTER=cluster.url)
    job.wait_batch()
    _, task = cluster.catch(DATA, job.runs)
    before = job.wait_batch()  # another machine has done the same meanwhile, and it is committed
    task.resume()
    job.wait()
    assert before["batch_id"] == 1
    assert job.task_ends()["TaskKilled"] >= 1
    assert_truth(home, truth)
    table = DeltaTable(home.table_uri("events"))
    known = {os.path.basename(path) for path in table.file_uris()}
    written = {path.name for path in Path(home.table_uri("events")).rglob("*.parquet")}
    assert written > known  # what the other one wrote lies there, and counts for nothing
