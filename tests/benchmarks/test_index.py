"""The benchmark of the key index: one real call at a small size, and the runs that it plants."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import run
from benchmarks.index import random_keys, random_runs, run_sizes, sizes_before_a_merge_of_all
from spark_jobs.ingest.dedupe.index import KeyIndex


@pytest.mark.e2e
def test_a_round_and_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--keys", "20000", "--few", "800", "--batch", "400", "--files-per-batch", "4", "--rounds", "1", "--batches", "2"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--name", "it"]
    assert run.main(["index", *small, "--json", *places]) == 0, "the counts of each home are those of its input"
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == json.loads((tmp_path / "results" / "it.json").read_text())["summary"]
    assert summary["limit"] == 1.2
    assert all(summary[name] > 0 for name in ("ratio", "peak_gib", "longest_over_median"))
    assert summary["parts"]["keys"] > 20_000, "the index that was measured has the random keys, and those of the batches"


def test_random_keys_are_a_run(tmp_path: Path) -> None:
    """They are sorted and spread over all 64 bits, so that a look-up meets them as it meets the hashes of ids."""
    rows = np.concatenate(list(random_keys(600_000, 1)))
    assert rows.shape == (600_000, 3)
    assert (np.diff(rows[:, 0].astype(np.float64)) >= 0).all()
    assert rows[0, 0] < 2**50 and rows[-1, 0] > 2**64 - 2**50
    assert abs(float(np.median(rows[:, 0])) / 2**63 - 1) < 0.01
    folder, runs = random_runs(tmp_path, [3000, 3000, 50])
    again = random_runs(tmp_path, [50, 3000, 3000])[1]
    assert sorted(one.name for one in runs) == sorted(one.name for one in again), "a later call uses them again"
    index = KeyIndex(folder)
    assert index.rows == 6050
    assert sum(len(keys) for keys in index.parts()) == 6050


def test_sizes_of_the_runs() -> None:
    million = 1_000_000
    assert run_sizes(2 * million, million) == [million, million]
    sizes = run_sizes(1_000 * million, million)
    assert [size // million for size in sizes] == [256] * 3 + [64] * 3 + [16] * 2 + [4] * 2
    merging = sizes_before_a_merge_of_all(sizes, million)
    assert [size // million for size in merging] == [256] * 3 + [64] * 3 + [16] * 3 + [4] * 3 + [1] * 3
