"""What a worker needs for small files that are hard to take: bounded, whatever they hold. Measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.spark_jobs.ingest.bombs import BOMBS, TINY_MEMBERS

ROOT = Path(__file__).resolve().parents[3]
MOST_MIB = 600  # of which 160 are what a worker imports; what one bomb leaves behind counts for the next
OFFERED = {
    "line feeds": 16 * 1024 * 1024,
    "empty objects": 300_000,
    "one line of 200 MiB": 1,
    "lines of a megabyte": 150,
    "nested arrays": 500,
    "nested objects": 500,
    "an object of many members": 150,
    "a field of its own in each line": 6_000,
    "an hour of its own in each line": 6_000,
    "one record over and over": 100_000,
    TINY_MEMBERS: 100_000,
}
ACCEPTED = {"a field of its own in each line", "one record over and over"}
ROWS = {"line feeds": 1001, "empty objects": 1001, TINY_MEMBERS: 1001}  # of others every reject is one of a few of its kind


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("bombs")
    command = [sys.executable, str(Path(__file__).with_name("bombs.py")), str(folder)]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    return {one["name"]: one for one in map(json.loads, found.stdout.splitlines())}


@pytest.mark.parametrize("name", [*BOMBS, TINY_MEMBERS])
def test_a_bomb_needs_little_memory_and_loses_no_record(told: dict[str, dict[str, int]], name: str) -> None:
    one = told[name]
    assert one["offered"] == OFFERED[name]
    rejected = 0 if name in ACCEPTED else OFFERED[name]
    assert (one["rejected"], one["rows"]) == (rejected, ROWS.get(name, rejected))
    assert one["stored"] < 4 * 1024 * 1024
    assert one["peak_mib"] < MOST_MIB
