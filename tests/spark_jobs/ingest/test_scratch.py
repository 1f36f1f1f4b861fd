"""Where an executor keeps parsed rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from spark_jobs.ingest.stage import forget_earlier_batches, scratch_folder


def test_on_one_machine_it_is_the_driver_s_folder(tmp_path: Path) -> None:
    held = tmp_path / "events-q-1"
    held.mkdir()
    assert scratch_folder(str(held)) == held
    forget_earlier_batches(str(tmp_path / "events-q-2"))
    assert held.exists()


def test_an_executor_keeps_one_batch_of_a_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_DIRS", f"{tmp_path},/elsewhere")
    for name in ("events-q-9", "events-q-10", "events-q-11", "events-q2-3", "orders-q-2", "events-q-x"):
        scratch_folder(name).mkdir(parents=True)
    forget_earlier_batches("events-q-10")
    left = {path.name for path in scratch_folder("events-q-10").parent.iterdir()}
    assert left == {"events-q-10", "events-q-11", "events-q2-3", "orders-q-2", "events-q-x"}
