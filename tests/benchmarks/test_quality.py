"""The benchmark of the expectations: one real round at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import LABELS, Bench, figures_of, parser, targets_of


@pytest.mark.e2e
def test_a_round_and_what_it_holds_the_validations_to(tmp_path: Path) -> None:
    args = parser().parse_args(["--batch", "400", "--files", "4", "--rounds", "1", "--work", str(tmp_path / "work")])
    args.adtally_env = {}
    small = Bench(args)
    runs = small.round(0)
    assert [(run["round"], run["what"]) for run in runs] == [(1, what) for what in ("ingest", "steady", "cold", "warm")]
    assert [problem for run in runs for problem in run["wrong"]] == []
    figures = figures_of(runs)
    assert set(figures) == set(LABELS)
    assert all(target.value > 0 for target in targets_of(figures))
    assert small._wrong([{"events": 3, "failed": ["events: event_id.unique"]}]) == [
        f"validated 3 events of {small.expected['unique']}, failed: ['events: event_id.unique']"
    ]
