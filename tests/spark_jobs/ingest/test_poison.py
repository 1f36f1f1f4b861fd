"""Batches that fail for what is in them: the file or the offset that makes them fail is set aside, and the rest goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import correct
import lake
import pytest
from local import LocalEvents

from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.errors import KafkaError
from spark_jobs.ingest import stage
from spark_jobs.ingest.batch import Plan
from spark_jobs.ingest.contract.spec import BatchLimits
from spark_jobs.ingest.files.landing import LandingFile
from spark_jobs.ingest.kafka.ranges import OffsetRange
from spark_jobs.ingest.poison import ATTEMPTS, Attempts, Unit, find_poison, is_of_content
from spark_jobs.ingest.quarantine import Quarantined
from spark_jobs.ingest.stage import StageTask
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.status import read_status

FILES = [LandingFile(n, f"/landing/events/eu/{n}.jsonl", 10) for n in range(9)]
ME = Transaction("query", 7)


def _fails_by(wrong: Callable[[Unit], bool], tries: list[int]) -> Callable[[Sequence[Unit]], str | None]:
    def failure_of(units: Sequence[Unit]) -> str | None:
        tries.append(len(units))
        return "ValueError: no" if any(wrong(unit) for unit in units) else None

    return failure_of


def test_the_files_that_fail_by_themselves_are_found(tmp_path: Path) -> None:
    tries: list[int] = []
    failure_of = _fails_by(lambda unit: unit in (FILES[2], FILES[8]), tries)
    attempts = Attempts(tmp_path / "a.json", ME)
    assert find_poison(FILES, attempts, failure_of) == [(FILES[2], "ValueError: no"), (FILES[8], "ValueError: no")]
    assert len(tries) < 2 * 9
    assert find_poison(FILES[:2], attempts, failure_of) == []
    together = _fails_by(lambda _: len(tries) < 2, tries := [])  # the two fail together, neither alone
    assert find_poison(FILES[:2], attempts, together) == []


def test_the_offsets_that_fail_are_found(tmp_path: Path) -> None:
    def wrong(unit: Unit) -> bool:
        return isinstance(unit, OffsetRange) and any(unit.start <= at < unit.end for at in (1003, 1200))

    ranges = [OffsetRange("kafka/eu/ad-events/0", 1000, 1500), OffsetRange("kafka/eu/ad-events/1", 0, 7)]
    found = find_poison(ranges, Attempts(tmp_path / "a.json", ME), _fails_by(wrong, []))
    assert [unit for unit, _ in found] == [OffsetRange(ranges[0].name, at, at + 1) for at in (1003, 1200)]
    plan = Plan(BatchLimits(0, 0, 0, 0), 0, [], None, ranges, 0, [Quarantined(ranges[0].name, "poison", "", 1003, 1004)])
    assert [(one.start, one.end) for one in plan.input.ranges] == [(1000, 1003), (1003, 1004), (1004, 1500), (0, 7)]


def test_a_process_that_dies_of_a_file_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    killer = FILES[5]

    def failure_of(units: Sequence[Unit]) -> str | None:
        if killer in units:
            raise KeyboardInterrupt  # as far as the next process can tell
        return None

    deaths = 0
    found: list[tuple[Unit, str]] = []
    while not found and deaths < 20:
        try:
            found = find_poison(FILES, Attempts.read(path, ME), failure_of)
        except KeyboardInterrupt:
            deaths += 1
    assert [unit for unit, _ in found] == [killer]
    # once for each cut that has it, three times for itself
    assert deaths <= 4 + ATTEMPTS
    assert Attempts.read(path, Transaction("query", 8)).deaths == {}
    path.write_text("{", "utf-8")
    assert Attempts.read(path, ME).count == 0


@pytest.mark.parametrize(
    "error",
    [
        KafkaError("broker eu does not answer"),
        OSError(28, "No space left on device"),
        RuntimeError(
            "An exception\nTraceback (most recent call last):\n  File x\nOSError: [Errno 28] No space left on device: '/x'"
        ),
        RuntimeError(
            "x\nTraceback (most recent call last):\n  File x\nspark_jobs.errors.KafkaError: kafka/eu/ad-events/0: nothing came"
        ),
        RuntimeError("Job 3 cancelled because SparkContext was shut down"),
    ],
)
def test_other_causes_are_no_content(error: Exception) -> None:
    assert not is_of_content(error)


def test_content_and_killed_workers_are() -> None:
    assert is_of_content(
        RuntimeError("x\nTraceback (most recent call last):\n  File x\nOverflowError: int too big to convert\n\n\tat java")
    )
    assert is_of_content(
        RuntimeError("org.apache.spark.SparkException: Python worker exited unexpectedly (crashed)\n\tat org.apache")
    )


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    found = load_settings(home=tmp_path / "home")
    ensure_tables(found)
    lake.campaigns(found)
    return found


def test_a_poison_file_is_set_aside_and_the_rest_goes_on(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def stage_splits(tasks: Iterable[StageTask], *rest: Any) -> Any:
        some = list(tasks)
        if any(task.split.name.endswith("-1.jsonl") and task.quarantined is None for task in some):
            tries.append(len(some))
            raise OverflowError("int too big to convert")
        return stage.stage_splits(some, *rest)

    monkeypatch.setattr("spark_jobs.ingest.stream.stage_splits", stage_splits)
    batches = LocalEvents(home)
    report = batches.take_files([[lake.event("a")], [lake.event("poison"), lake.event("lost")], [lake.event("b")], []])
    assert (report.offered, report.accepted, report.rejected) == (3, 2, 1)
    assert tries == [4] * ATTEMPTS + [4, 2, 1]  # then all, a half, and the file alone
    (row,) = correct.rows(home, "select source_file, source_line, reason_codes, raw, records from rejected_events")
    assert row == ("events/eu-west/local-0000-1.jsonl", 0, ["poison"], "OverflowError: int too big to convert", None)
    found = read_status(home)
    assert [(one.source_file, one.reason_codes) for one in found.quarantined_files] == [(row[0], ["poison"])]
    assert found.conservation_holds
    assert not reconcile(home, None).differences
    # the next batch is tried as always
    assert batches.take([lake.event("c")]).accepted == 1
    assert json.loads((home.attempts_path / "events.json").read_text("utf-8"))["count"] == 1
    correct.delete(home, "rejected_events", "true")
    correct.delete(home, "batch_ledger", "rejected = 1")
    assert {one.cause for one in reconcile(home, None, repair=True).differences} == {"rejected_lost", "ledger_missing"}
    assert not reconcile(home, None).differences
    assert correct.rows(home, "select source_file, source_line, reason_codes, raw, records from rejected_events") == [row]


def test_a_batch_that_fails_for_the_disk_is_not_taken_apart(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spark_jobs.ingest.stream.stage_splits", full)
    monkeypatch.setattr("spark_jobs.ingest.stream.find_poison", full)
    with pytest.raises(OSError, match="No space"):
        LocalEvents(home).take([lake.event("a")])
