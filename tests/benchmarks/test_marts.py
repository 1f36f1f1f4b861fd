"""The benchmark of the marts, run small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import run

pytestmark = pytest.mark.homes


def test_the_history_is_compared_with_two_days(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--days", "4", "--rows", "800", "--batch", "50", "--ads", "20", "--rounds", "1"]
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    assert run.main(["marts", *options, "--json", *folders]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ratio"] == max(figures["cpu_ratio"], figures["wall_ratio"]) > 0
    assert figures["increments"] == 800
    document = json.loads((tmp_path / "results" / "marts-4.json").read_text())
    assert [each["days"] for each in document["runs"]] == [3, 3], "the two days of the batch, and records without a time"
