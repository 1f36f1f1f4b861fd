"""The pauses between two batches, and which batches are full."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import lake
import pytest

from benchmarks.in_process import Checkpoint
from spark_jobs.config import load_settings
from spark_jobs.ingest.kafka.source import KafkaSource
from spark_jobs.ingest.pace import Pace, default_interval
from spark_jobs.ingest.source import FilesSource


@pytest.mark.parametrize(
    ("ended_at", "is_full", "pause"),
    [(100.25, False, 0.75), (100.25, True, 0.0), (101.0, False, 0.0), (107.0, False, 0.0)],
    ids=["small", "full", "as long as the interval", "longer"],
)
def test_only_a_small_batch_that_took_less_than_the_interval_is_followed_by_a_pause(
    ended_at: float, is_full: bool, pause: float
) -> None:
    assert Pace(1.0, now=lambda: ended_at).pause_after(100.0, is_full=is_full) == pause


def test_looking_takes_a_tenth_of_a_core_at_most_and_is_estimated_once_a_minute() -> None:
    now, cost = 100.0, 0.0
    pace = Pace(1.0, lambda: cost, now=lambda: now)
    assert pace.interval_seconds == 1.0
    cost = 0.6
    assert pace.interval_seconds == 1.0
    now += 60.0
    assert pace.interval_seconds == pytest.approx(6.0)
    assert pace.pause_after(now, is_full=True) == 0.0
    pace.end()
    assert pace.pause_after(now, is_full=False) == pytest.approx(6.0)
    cost, now = 0.01, now + 60.0
    assert pace.interval_seconds == 1.0


def test_a_look_lists_all_files_of_the_folder_and_of_those_below_it(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    source = FilesSource(settings, "events")
    assert source.look_seconds() == 0.0
    for number in range(4):
        lake.land(settings, f"events/eu/{'day=1/' * (number % 2)}{number}.jsonl", [])
    lake.land(settings, "events/eu/_hidden.jsonl", [])
    lake.land(settings, "orders/eu/0.jsonl", [])
    assert source.look_seconds() == pytest.approx(4 * 15e-6)


def test_the_end_ends_the_present_pause_and_all_later_ones() -> None:
    pace, order = Pace(36_000.0), list[str]()

    def batches() -> None:
        for number in range(3):
            pace.pause_after(pace._now(), is_full=False)
            order.append(f"pause {number}")

    thread = threading.Thread(target=batches, daemon=True)
    thread.start()
    order.append("end")
    pace.end()
    thread.join(60)
    assert order == ["end", "pause 0", "pause 1", "pause 2"]


def test_a_store_has_longer_pauses_than_a_disk(tmp_path: Path) -> None:
    at = {"home": tmp_path}
    on_disk = default_interval(load_settings(**at))
    assert default_interval(load_settings(**at, lakehouse=str(tmp_path / "elsewhere"))) == on_disk
    for remote in ({"lakehouse": "s3://bucket/lake"}, {"landing": "s3://bucket/landing"}):
        assert default_interval(load_settings(**at, **remote)) > on_disk


@pytest.mark.parametrize(
    ("limits", "fullness"),
    [
        ({"max_files_per_batch": 3}, [False, True]),
        ({"max_bytes_per_batch": 4_000}, [False, True]),  # 2 and 3 files of 1,000 bytes, the next one would exceed the size
        ({}, [False, False]),
    ],
    ids=["files", "bytes", "default"],
)
def test_a_batch_of_files_is_full_by_the_limit_of_the_settings(
    tmp_path: Path, limits: dict[str, int], fullness: list[bool]
) -> None:
    settings = load_settings(home=tmp_path, **limits)
    files = [lake.land(settings, f"events/eu/{number}.jsonl", b"x" * 999 + b"\n") for number in range(5)]
    checkpoint = Checkpoint(settings, "events")
    batches = [checkpoint.plan(files[:2]), checkpoint.plan(files[2:])]
    source = FilesSource(settings, "events")
    assert [source.is_full(batch) for batch in batches] == fullness
    files[3].unlink()  # after the batch
    assert source.is_full(batches[1]) == (fullness[1] and "max_files_per_batch" in limits)


@pytest.mark.parametrize(("most", "fullness"), [(100, [False, True]), (1_000, [False, False])])
def test_a_batch_of_offsets_is_full_by_the_limit_of_the_cluster(tmp_path: Path, most: int, fullness: list[bool]) -> None:
    source = KafkaSource.__new__(KafkaSource)  # without a broker
    source.checkpoint, source.topic, source._max_offsets = tmp_path, "ad-events", most
    for folder in ("offsets", "sources/0"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sources/0/0").write_text("v1\n" + json.dumps({"ad-events": {"0": 0, "1": 0}}))
    for batch, ends in enumerate([{"0": 20, "1": 30}, {"0": 20, "1": 130}]):
        lines = ("v1", json.dumps({"batchTimestampMs": 0}), json.dumps({"ad-events": ends}))
        (tmp_path / "offsets" / str(batch)).write_text("\n".join(lines))
    assert [source.is_full(batch) for batch in range(2)] == fullness
