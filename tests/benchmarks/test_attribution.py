"""The benchmark of attribution at a small size, and that it says where numbers are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import attribution
from spark_jobs.attribution.job import AttributionReport

OPTIONS = ["--orders", "300", "--batches", "3", "--histories", "1500", "3000"]


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, list[dict[str, object]]]]:
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    status = attribution.main([*OPTIONS, *folders, *options])
    return status, json.loads((tmp_path / "attribution.json").read_text("utf-8"))


@pytest.mark.e2e
def test_it_measures_and_holds_the_credits_to_a_join(tmp_path: Path) -> None:
    status, document = run(tmp_path)
    assert status == 0
    assert [(found["clicks"], found["orders"], found["wrong"]) for found in document["summary"]] == [
        (1500, 300, []),
        (3000, 300, []),
    ]
    assert document["summary"][0]["touches"] == document["summary"][1]["touches"]
    assert document["targets"][0]["name"] == "orders/s per core against 3,000 clicks"


@pytest.mark.e2e
def test_it_says_where_credits_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "attribute", lambda home: AttributionReport("", 0, 0, 0, 0, 0, 0, 0.0))
    status, document = run(tmp_path, "--histories", "1500")
    assert status == 1
    assert document["summary"][0]["wrong"][0].startswith("(0, 0) orders and touches, not (300, ")  # type: ignore[index]
