"""The benchmark of a cluster's workers: one real call at a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from terminal import ROOT, environment

from benchmarks.workers import history, split_keys


@pytest.mark.services
@pytest.mark.skipif(sys.platform != "linux", reason="workers have loopback addresses that only Linux has")
def test_a_round_and_what_it_prints(tmp_path: Path) -> None:
    small = ["--history", "20000", "--batch", "4000", "--batches", "1", "--rounds", "1", "--json"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--name", "it"]
    # in its own process, because the benchmark sets credentials and stops Spark
    command = [sys.executable, "-m", "benchmarks.workers", *small, *places]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # each batch has as many known keys as its input
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "results" / "it.json").read_text())["summary"]
    assert summary["limit"] == 0.588
    assert summary["ratio"] > 0


def test_keys_that_a_batch_resends_are_those_of_the_history() -> None:
    known = np.concatenate([keys.high for keys in history(20_000)])
    splits = [split_keys(batch, split, 500).high for batch in range(2) for split in range(8)]
    assert [int(np.isin(split, known).sum()) for split in splits] == [20] * 16
    assert len(np.unique(np.concatenate(splits))) == 16 * 500
