"""The compaction benchmark from end to end at a small size, and how it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from benchmarks import compaction, run
from spark_jobs.config import load_settings
from spark_jobs.ingest.runner import run_ingest

SMALL = ["--day-events", "900", "--hour-events", "600", "--batches", "3", "--rounds", "2", "--mart-rounds", "1"]


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_same_rows_in_fewer_files(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ingest(_: object, env: dict[str, str], *__: object) -> None:  # in this process: the session is there
        run_ingest(load_settings(home=Path(env["ADTALLY_HOME"]), max_files_per_batch=1), spark=spark)

    monkeypatch.setattr(compaction, "run_measured", ingest)
    status = compaction.main([*SMALL, "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")])
    assert status == 0, capsys.readouterr().err
    document = json.loads((tmp_path / "results" / "compaction.json").read_text())
    ways, day = document["summary"]["strategies"], document["summary"]["day"]
    assert list(ways) == list(compaction.STRATEGIES)
    assert ways["as ingested"]["files"] >= 3
    assert all(figures["files"] == 1 for name, figures in ways.items() if name != "as ingested")
    assert all(set(figures["scans"]) == set(compaction.SCANS) for figures in ways.values())
    assert day["compaction"]["files_after"] < day["compaction"]["files_before"]
    assert set(day["mart_build"]) == {"before", "after"}
    assert not (tmp_path / "work" / "compaction" / "copies").exists()
    shown = run.report(tmp_path / "results")
    assert "mart build, after / before" in shown


def test_another_answer_is_said_and_the_turns_shift() -> None:
    asked: list[str] = []

    def measure(name: str, answer: str) -> Any:
        def measured() -> dict[str, compaction.Taken]:
            asked.append(name)
            return {"scan": compaction.Taken(float(len(asked)), 2.0 * len(asked), answer)}

        return measured

    medians, wrong = compaction.in_turn(2, {"a": measure("a", "1"), "b": measure("b", "2"), "c": measure("c", "1")})
    assert asked == ["a", "b", "c", "b", "c", "a"]
    assert {name: tasks["scan"]["wall_seconds"] for name, tasks in medians.items()} == {"a": 3.5, "b": 3.0, "c": 4.0}
    assert medians["b"]["scan"]["cpu_seconds"] == 6.0
    assert wrong == ["b: another answer to scan"]
