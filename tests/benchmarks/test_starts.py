"""The benchmark of starts: one real round at a small size, and how it adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import starts
from benchmarks.starts import COMMANDS, summary_of


@pytest.mark.e2e
def test_a_round_and_an_idle_up(tmp_path: Path) -> None:
    """In a process of its own: it counts the processor time of its children, and collects them."""
    sizes = ["--events", "2000", "--rounds", "1", "--settle-seconds", "20", "--idle-seconds", "1"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    command = [sys.executable, "-m", "benchmarks.run", "starts", *sizes, *places, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["seconds"].keys() == {command.name for command in COMMANDS}
    assert all(seconds > 0 for seconds in printed["seconds"].values()) and printed["idle_share"] > 0
    document = json.loads((tmp_path / "results" / "starts.json").read_text("utf-8"))
    cpu = {made["command"]: made["cpu_seconds"] for made in document["runs"]}
    # the Java of one ingest counts, and the other starts none
    assert cpu["ingest, a thousand events"] > cpu["ingest, nothing new"] + 1
    assert document["summary"]["idle"]["shares"]  # on a busy machine not all programs of `up` have started yet
    assert len(document["targets"]) == len(COMMANDS) + 1


def test_the_median_of_the_rounds_is_compared_with_the_limit() -> None:
    runs = [
        {"round": number, "command": command.name, "wall_seconds": wall, "cpu_seconds": 0.1}
        for number, wall in enumerate((0.2, 9.0, 0.25))
        for command in COMMANDS
    ]
    assert [(row["wall_seconds"], row["met"]) for row in summary_of(runs)] == [(0.25, True)] * len(COMMANDS)
    runs = [made | {"wall_seconds": 0.31} for made in runs]
    assert [row["command"] for row in summary_of(runs) if not row["met"]] == ["help", "version"]


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["python", "-m", "orchestration.up.daemon", "run"], "daemon"),
        (["python", "-I", "guard.py", "log", "python", "-m", "orchestration.up.daemon"], "up"),
        (["java", "org.apache.spark.deploy.SparkSubmit"], "java"),
        (["python", "-m", "pyspark.daemon", "pyspark.worker"], "up"),
        (["python", "-c", "from multiprocessing.spawn import spawn_main"], "runs"),
    ],
)
def test_what_a_process_of_up_counts_as(command: list[str], role: str) -> None:
    assert starts._role(command) == role
