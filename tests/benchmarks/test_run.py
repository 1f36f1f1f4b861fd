"""The harness: choosing, measuring, comparing, following a table."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from benchmarks import delta_log, environments, run
from benchmarks.followers import COUNTS, IncrementReader
from benchmarks.measure import BenchmarkError, quantile, quantiles, run_measured


def commit(table: Path, version: int, actions: list[dict[str, object]]) -> None:
    """Write a log entry as Delta does: beside, then renamed."""
    entry = delta_log.version_file(table, version)
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = entry.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(a) + "\n" for a in actions))
    scratch.rename(entry)


def test_only_names_contestants_by_letter() -> None:
    assert run.chosen("a,d") == ["a", "d-hashmap", "d-rocksdb"]
    assert run.chosen("d-rocksdb") == ["d-rocksdb"]
    assert len(run.chosen(None)) == 7
    with pytest.raises(BenchmarkError, match="x"):
        run.chosen("a,x")


def test_ratios_take_the_better_flink() -> None:
    def medians(wall: float, steady: float | None) -> dict[str, float | None]:
        return {"wall_seconds": wall, "steady_batch_seconds": steady, "cpu_seconds": 2 * wall}

    one = {"a": medians(40, 8), "c": medians(50, 10), "d-hashmap": medians(100, None), "d-rocksdb": medians(125, None)}
    ratios = run.throughput_ratios(one | {"e": medians(20, None)}, 4)
    assert ratios == {
        "c/a wall": 1.25,
        "c/a steady batch": 1.25,
        "c/d-hashmap wall": 0.5,
        "c/d-rocksdb wall": 0.4,
        "c/e wall": 2.5,
        "c/e CPU": 2.5,
        "c steady batch / e a batch": 2.0,
        "c/better d wall": 0.5,
    }


def test_measure_sees_children_and_lines(tmp_path: Path) -> None:
    child = """
import time
x = bytearray(120 << 20)
while time.process_time() < 0.5: pass
print('{}', flush=True)
time.sleep(1.5)
"""
    parent = f"""
import subprocess, sys
print('{{"seconds": 1}}', flush=True)
subprocess.run([sys.executable, '-c', {child!r}])
"""
    measured = run_measured([sys.executable, "-c", parent], os.environ, tmp_path / "log")
    assert measured.peak_pss_bytes > 120 << 20
    assert measured.wall_seconds > 1.5
    assert [b.get("seconds") for b in measured.batches] == [1, None]
    workers, java = ([b["cpu"][program] for b in measured.batches] for program in ("workers", "java"))
    assert workers[0] <= workers[1]
    assert workers[1] == pytest.approx(0.5, abs=0.2)
    assert java == [0.0, 0.0]
    assert run.steady_cpu(measured.batches)["workers"] == pytest.approx(workers[1] - workers[0], abs=0.01)


def test_failed_and_endless_commands_are_errors(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="status 3"):
        run_measured([sys.executable, "-c", "raise SystemExit(3)"], os.environ, tmp_path / "log")
    with pytest.raises(BenchmarkError, match="status -9"):
        run_measured([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, tmp_path / "log", timeout=0.5)


def test_log_is_replayed_with_removals(tmp_path: Path) -> None:
    for name in ("one", "two", "th ree"):
        pq.write_table(pa.table({"n": [1, 2, None]}), tmp_path / f"{name}.parquet")
    commit(tmp_path, 0, [{"add": {"path": "one.parquet"}}, {"add": {"path": "two.parquet"}}])
    commit(tmp_path, 1, [{"remove": {"path": "one.parquet"}}, {"add": {"path": "th%20ree.parquet"}}])
    files = delta_log.active_files(tmp_path)
    assert {f.name for f in files} == {"two.parquet", "th ree.parquet"}
    assert delta_log.row_count(files) == 6
    assert delta_log.column_sums(files, ["n"]) == {"n": 6}


def test_a_file_is_readable_when_all_its_lines_are(tmp_path: Path) -> None:
    metrics, ledger = tmp_path / "minute_metrics", tmp_path / "batch_ledger"

    def increments(name: str, batch: int, rows: dict[str, int]) -> list[dict[str, object]]:
        columns = {"placement": list(rows)} | {c: [0] * len(rows) for c in COUNTS} | {"impressions": list(rows.values())}
        pq.write_table(pa.table(columns), metrics / name)
        return [{"txn": {"appId": "q", "version": batch}}, {"add": {"path": name}}]

    reader = IncrementReader(tmp_path, 10)
    reader.start()
    commit(metrics, 0, [{"metaData": {}}])
    commit(metrics, 1, increments("a.parquet", 7, {"f1": 10, "f2": 4}))
    wait_for(lambda: "f1" in reader.readable_at)
    assert "f2" not in reader.readable_at
    assert reader.ledger_version("f1") is None
    commit(metrics, 2, increments("b.parquet", 8, {"f2": 6}))
    wait_for(lambda: "f2" in reader.readable_at)
    for version, batch in enumerate((7, 8)):
        commit(ledger, version, [{"txn": {"appId": "q", "version": batch}}])
    wait_for(lambda: reader.ledger_version("f2") == 1)
    assert reader.ledger_version("f1") == 0 and reader.ledger_version("f3") is None
    reader.stop()
    assert reader.readable_at["f1"] < reader.readable_at["f2"] and reader.failure is None


def wait_for(condition: object, seconds: float = 10.0) -> None:
    """Until the condition holds; fails after ``seconds``."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_quantiles_are_of_the_values() -> None:
    values = [float(v) for v in range(1, 101)]
    assert quantile(values, 0.5) == 50
    assert quantile(values, 0.95) == 95
    assert quantile([3.0], 0.95) == 3
    assert quantiles(values) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert quantiles([]) == {}


def test_wrong_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["ingest", "--events", "10", "--work", str(tmp_path)]) == 1
    assert "whole number of batches" in capsys.readouterr().err
    assert run.report(tmp_path) == "No results yet."


def test_only_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(tmp_path / "lock"):
        assert run.main(["ingest", "--only", "e", "--work", str(tmp_path)]) == 1
    assert "another one is running" in capsys.readouterr().err


def test_an_environment_is_made_again_only_for_other_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run_command(command: list[str]) -> None:
        (tmp_path / "venv").mkdir(exist_ok=True)
        commands.append(command)
        if "install" in command and Path(command[-1]).read_text() == "broken==1":
            raise BenchmarkError("no such package")

    monkeypatch.setattr(environments, "run_command", run_command)

    def made(requirement: str) -> int:
        commands.clear()
        assert environments.environment(tmp_path / "venv", [requirement], alone=True) == tmp_path / "venv" / "bin" / "python"
        return len(commands)

    assert [made("one==1"), made("one==1"), made("one==2 --hash=sha256:00"), made("one==2 --hash=sha256:00")] == [2, 0, 2, 0]
    for _ in range(2):  # an environment that could not be made is not taken for a complete one
        with pytest.raises(BenchmarkError, match="no such package"):
            made("broken==1")
        assert len(commands) == 2 and "--no-deps" in commands[-1]
