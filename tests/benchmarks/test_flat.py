"""The benchmark of a long history at a small size: it makes both homes, runs every capability, and compares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.flat import capabilities, summary_of


@pytest.mark.e2e
def test_it_compares_every_capability(tmp_path: Path) -> None:
    """In a process of its own: it forks, which delta-rs does not survive once a table was opened."""
    sizes = ["--days", "3", "--short-days", "2", "--rounds", "1", "--batches-a-day", "2", "--events-a-day", "400"]
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.run", "flat", *sizes, *folders, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["ratios"].keys() == capabilities().keys()
    assert printed["ratio"] == max(printed["ratios"].values())
    document = json.loads((tmp_path / "flat-3.json").read_text("utf-8"))
    assert document["targets"][0]["value"] == printed["ratio"]
    assert all(run["cpu_seconds"] >= 0 for run in document["runs"])
    subprocess.run([*command, "--only", "billing"], stdout=subprocess.DEVNULL, check=True)  # from the homes that are there


def test_ratios_are_of_medians_and_not_of_noise() -> None:
    measured: dict[str, dict[int, tuple[float, ...]]] = {
        "review": {2: (0.1, 0.2, 9.0), 90: (0.3, 0.1, 0.3)},
        "a sensor": {2: (0.001,), 90: (0.009,)},
    }
    runs = [
        {"capability": name, "days": days, "cpu_seconds": seconds, "wall_seconds": seconds}
        for name, of_days in measured.items()
        for days, figures in of_days.items()
        for seconds in figures
    ]
    assert [(row["capability"], row["ratio"]) for row in summary_of(runs, 2, 90)] == [("review", 1.5), ("a sensor", 1.0)]
