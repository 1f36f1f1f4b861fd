"""The benchmark of the store: one real round at a small size, what it counts, and what that costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.store import DISK, STEPS, STORE, count_requests, main, usd_a_day


@pytest.mark.e2e
def test_a_round_and_what_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "put back at the end")
    small = ["--events", "1600", "--batch", "400", "--files-per-batch", "4", "--rounds", "1", "--json"]
    small += ["--adtally-env", "ADTALLY_LEASE_SECONDS=3"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--name", "it"]
    assert main([*small, *places]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "results" / "it.json").read_text())
    assert [(run["place"], run["step"]) for run in document["runs"]] == [
        *((place, step) for place in (DISK, STORE) for step in STEPS),
        (STORE, "take-over"),
    ]
    summary = document["summary"]
    requests = summary["requests"]["steady batch"]
    assert requests["PUT"] >= 5  # a data file of events, and the commits of three tables and of the plan
    assert requests["LIST"] > 0 and requests["GET"] > 0
    assert 0 < summary["usd_a_day"]["steady batch"] < 100
    assert [run["requests"]["PUT"] for run in document["runs"] if run["place"] == DISK] == [0] * len(STEPS)
    assert not any("secret" in name.lower() for name in document["parameters"])


def test_requests_are_counted_by_kind() -> None:
    metrics = """
# TYPE SeaweedFS_s3_request_total counter
SeaweedFS_s3_request_total{bucket="",code="200",type="LIST"} 4
SeaweedFS_s3_request_total{bucket="lake",code="200",type="GET"} 5
SeaweedFS_s3_request_total{bucket="lake",code="206",type="GET"} 1e+06
SeaweedFS_s3_request_seconds_count{bucket="lake",type="GET"} 8
"""
    assert count_requests(metrics) == {"LIST": 4, "GET": 1_000_005}


def test_a_days_requests_cost_what_the_price_list_says() -> None:
    none = {step: {"GET": 0} for step in STEPS}
    cost = usd_a_day({**none, "steady batch": {"PUT": 10, "LIST": 10, "GET": 100, "DELETE": 1_000}})
    assert cost["steady batch"] == round(8_640 * (20 * 0.005 + 100 * 0.0004) / 1000, 2) == 1.21
    assert cost["mart build"] == 0
