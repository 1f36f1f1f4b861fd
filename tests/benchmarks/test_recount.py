"""The benchmark of the recount: one real round at a small size, and the order of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.recount import Bench, figures_of, parser


def bench(tmp_path: Path, *options: str) -> Bench:
    return Bench(parser().parse_args(["--events", "400", "--files", "4", "--work", str(tmp_path / "work"), *options]))


@pytest.mark.e2e
def test_a_round_and_what_it_holds_the_recount_to(tmp_path: Path) -> None:
    small = bench(tmp_path, "--rounds", "1")
    small.args.adtally_env = {}
    runs = small.run()
    assert [(run["round"], run["what"], run["wrong"]) for run in runs] == [(1, "ingest", []), (1, "cold", []), (1, "warm", [])]
    assert all(figures["wall_seconds"] > 0 for figures in figures_of(runs).values())
    small.expected["unique"] += 1
    [problem] = small._wrong(small.job(0).home)
    assert "'none', 380, 380)], expected 381 events" in problem


def test_every_second_round_begins_with_the_recounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(_: Bench, home: int, what: str = "ingest") -> dict[str, Any]:
        return {"what": what, "home": home, "wall_seconds": float(home), "cpu_seconds": 0.0, "peak_pss_bytes": 0}

    monkeypatch.setattr(Bench, "ingest", step)
    monkeypatch.setattr(Bench, "reconcile", step)
    runs = bench(tmp_path, "--rounds", "3").run()
    assert [(run["what"], run["home"]) for run in runs] == [
        *(("ingest", 0), ("cold", 0), ("warm", 0)),
        *(("cold", 0), ("warm", 0), ("ingest", 1)),
        *(("ingest", 2), ("cold", 2), ("warm", 2)),
    ]
    assert figures_of(runs)["ingest"]["wall_seconds"] == 1.0
