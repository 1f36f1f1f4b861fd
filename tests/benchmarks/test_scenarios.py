"""Every scenario from end to end at a small size, with a stand-in for the project's own ingestion."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import benchmarks.console
import benchmarks.contestants
import benchmarks.followers
import benchmarks.freshness
from benchmarks import run

STAND_IN = Path(__file__).with_name("stand_in.py")
MARTS = Path(__file__).with_name("stand_in_marts.py")
CONSOLE = Path(__file__).with_name("stand_in_console.py")
SMALL = ["--batch", "400", "--files-per-batch", "4"]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(*options: str) -> list[str]:
        return [sys.executable, str(STAND_IN), "ingest", "--json", *options]

    monkeypatch.setattr(benchmarks.contestants, "adtally_command", command)
    monkeypatch.setattr(benchmarks.freshness, "adtally_command", command)


def result(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and result file of one call."""
    argv = ["ingest", *SMALL, *options, "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    status = run.main([*argv, "--name", "it"])
    return status, json.loads((tmp_path / "results" / "it.json").read_text())


def test_throughput_takes_turns_and_medians(tmp_path: Path) -> None:
    status, document = result(tmp_path, "--events", "1600", "--only", "c,e", "--rounds", "2")
    assert status == 0
    assert [(r["contestant"], r["round"]) for r in document["runs"]] == [("c", 1), ("e", 1), ("e", 2), ("c", 2)]
    assert [len(r["batch_seconds"]) for r in document["runs"]] == [4, 1, 1, 4]
    assert set(document["summary"]["ratios"]) == {"c/e wall", "c steady batch / e a batch", "c/e CPU"}
    assert "| c |" in run.report(tmp_path / "results")


@pytest.mark.e2e
def test_clickhouse_finds_the_expected_totals(tmp_path: Path) -> None:
    status, document = result(tmp_path, "--events", "1600", "--only", "f", "--rounds", "1")
    assert status == 0
    assert [(r["contestant"], len(r["batch_seconds"]), r["wrong"]) for r in document["runs"]] == [("f", 4, [])]


def test_history_compares_three_batches_with_three(tmp_path: Path) -> None:
    status, document = result(tmp_path, "--scenario", "history", "--low", "700", "--high", "2000")
    assert status == 0
    # 380 of a batch are new, so 700 are accepted after two batches and 2,000 after six.
    assert document["summary"]["accepted_before"] == {"low": 760, "high": 2280}
    assert len(document["runs"][0]["batch_seconds"]) == 9


def test_tenfold_batch_and_memory(tmp_path: Path) -> None:
    status, document = result(tmp_path, "--scenario", "batch10")
    assert status == 0
    assert [r["events"] for r in document["runs"]] == [1600, 4000]
    status, document = result(tmp_path, "--scenario", "memory", "--events", "400")
    assert status == 0
    assert set(document["summary"]["peak_pss_bytes"]) == {"400", "4000"}


def test_freshness_counts_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.followers, "marts_command", lambda: [sys.executable, str(MARTS)])
    options = ("--seconds", "3", "--warm-up", "1", "--lines", "50", "--rate", "500", "--to", "marts")
    status, document = result(tmp_path, "--scenario", "freshness", *options)
    assert status == 0
    summary = document["summary"]
    assert summary["unread_files"] == 0
    assert 25 <= summary["files"] <= 31
    assert 0 < summary["p50_seconds"] <= summary["p95_seconds"]
    marts = summary["marts"]
    assert marts["unread_files"] == 0 and marts["builds"] >= 3
    assert 0 < marts["p50_seconds"] <= marts["p95_seconds"]
    assert [target["name"] for target in document["targets"]][-1] == "freshness of the marts p95, s"
    assert set(summary["batch_seconds"]) == {"all", "first_third", "last_third"} and summary["cpu_seconds"] > 0


@pytest.mark.parametrize("broken", [(), ("--broken",)])
def test_viewers_of_the_console_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: tuple[str, ...]
) -> None:
    monkeypatch.setattr(benchmarks.console, "cli_command", lambda *given: [sys.executable, str(CONSOLE), *given, *broken])
    monkeypatch.setattr(benchmarks.console, "SETTLE_SECONDS", 0.5)
    options = ["--viewers", "3", "--think", "0.2", "--seconds", "3", "--warm-up", "1", "--lines", "50", "--rate", "500", "--json"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--name", "it"]
    status = run.main(["console", *options, *places])
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document == json.loads((tmp_path / "results" / "it.json").read_text())
    summary = document["summary"]
    assert summary["streams"] == 3 and summary["stream_events"] >= 9
    assert 20 <= summary["pages"] == sum(page["pages"] for page in summary["by_page"].values())
    assert 0 <= summary["page_seconds"]["p50"] <= summary["page_seconds"]["p99"]
    assert min(phase["files"] for phase in summary["freshness"].values()) >= 15
    assert [target["name"].split(" ")[0] for target in document["targets"]] == ["page", "freshness", "console"]
    assert summary["console_peak_pss_bytes"] > 0
    assert (status, "/billing: status 500" in said.err) == ((1, True) if broken else (0, False))


def test_wrong_numbers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forgetful = tmp_path / "forgetful.py"
    forgetful.write_text(STAND_IN.read_text().replace('SEEN.add(event["event_id"])', "pass"))
    monkeypatch.setattr(
        benchmarks.contestants, "adtally_command", lambda *o: [sys.executable, str(forgetful), "ingest", "--json", *o]
    )
    status, document = result(tmp_path, "--events", "800", "--only", "c", "--rounds", "1")
    assert status == 1
    assert "reported unique: 800, expected 760" in document["runs"][0]["wrong"]
    assert "wrong numbers: c" in capsys.readouterr().err
