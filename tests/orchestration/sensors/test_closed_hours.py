"""Runs are asked for hours that are closed, once, contiguous ones together."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from orchestration.partitions import KEY_FORMAT, RANGE_END_TAG, RANGE_START_TAG
from orchestration.sensors import closed_hours
from spark_jobs.config import load_settings
from spark_jobs.lake.tables import BATCH_LEDGER
from tests.orchestration.marts.delta_files import commit, utc
from tests.orchestration.marts.lakes import ledger_row


class Ticks:
    """A home whose ledger is written by hand, and the sensor on it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, start: str = "2026-03-10T00:00") -> None:
        monkeypatch.setenv("ADTALLY_HOME", str(path))
        self.lake = Path(load_settings().lakehouse_uri)
        self.cursor: str | None = None
        self.start_at(start)

    def start_at(self, start: str) -> None:
        hours = dg.HourlyPartitionsDefinition(start_date=utc(start), timezone="UTC", fmt=KEY_FORMAT, end_offset=1)
        asset = dg.AssetSpec("reconciled_hours", partitions_def=hours)

        @dg.asset(partitions_def=hours, deps=[asset], backfill_policy=dg.BackfillPolicy.single_run())
        def work() -> None: ...

        job = dg.define_asset_job("closed_hours", dg.AssetSelection.assets("work"), partitions_def=hours)
        self.sensor = closed_hours.closed_hours_sensor(hours, job)
        self.repository = dg.Definitions(assets=[asset, work], jobs=[job], sensors=[self.sensor]).get_repository_def()

    def book(self, at: str, *hours: str, **changes: Any) -> None:
        """A batch that was ingested ``at``, with records of ``hours``."""
        times = {"max_received_at": utc(at), "ingested_at": utc(at)}
        commit(self.lake, BATCH_LEDGER, [ledger_row(0, hour, accepted=1, **times, **changes) for hour in hours])

    def tick(self) -> tuple[list[tuple[str, str]], str | None]:
        """The ranges of keys that runs are asked for, and why none is."""
        with dg.DagsterInstance.ephemeral() as instance:
            context = dg.build_sensor_context(instance=instance, cursor=self.cursor, repository_def=self.repository)
            result = self.sensor.evaluate_tick(context)
        self.cursor = result.cursor
        keys = {request.run_key for request in result.run_requests or []}
        assert len(keys) == len(result.run_requests or [])
        return [_range(request) for request in result.run_requests or []], result.skip_message


def _range(request: dg.RunRequest) -> tuple[str, str]:
    if request.partition_key is not None:
        return request.partition_key, request.partition_key
    return request.tags[RANGE_START_TAG], request.tags[RANGE_END_TAG]


@pytest.fixture
def ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ticks:
    return Ticks(tmp_path, monkeypatch)


def test_nothing_is_closed_where_nothing_was_ingested(ticks: Ticks) -> None:
    assert ticks.tick() == ([], "no hour is closed yet")


def test_closed_hours_are_asked_for_once(ticks: Ticks) -> None:
    ticks.book("2026-03-10T13:14", "2026-03-10T10:00", "2026-03-10T12:00")
    # the grace of 12:00 ends at 13:15
    assert ticks.tick() == ([("2026-03-10-10:00", "2026-03-10-11:00")], None)
    assert ticks.tick() == ([], "closed through 2026-03-10T12Z, all of it asked for")
    ticks.book("2026-03-10T13:15", "2026-03-10T13:00")
    assert ticks.tick() == ([("2026-03-10-12:00", "2026-03-10-12:00")], None)
    assert ticks.tick()[0] == []


def test_a_silent_source_holds_hours_open_and_is_named(ticks: Ticks) -> None:
    ticks.book("2026-03-10T08:20", "2026-03-10T08:00", region="us")
    ticks.book("2026-03-10T13:20", "2026-03-10T12:00")
    assert ticks.tick() == ([], "closed through 2026-03-10T08Z, all of it asked for; silent sources hold hours open: events/us")
    ticks.book("2026-03-10T13:20", "2026-03-10T09:00", region="us")
    assert ticks.tick() == ([("2026-03-10-08:00", "2026-03-10-12:00")], None)


def test_many_hours_are_a_bounded_number_of_bounded_runs(ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_hours, "HOURS_A_RUN", 3)
    monkeypatch.setattr(closed_hours, "RUNS_A_TICK", 2)
    ticks.book("2026-03-10T10:20", "2026-03-10T01:00", "2026-03-10T09:00")
    asked = [ticks.tick()[0] for _ in range(3)]
    assert asked == [
        [("2026-03-10-01:00", "2026-03-10-03:00"), ("2026-03-10-04:00", "2026-03-10-06:00")],
        [("2026-03-10-07:00", "2026-03-10-09:00")],
        [],
    ]


def test_a_long_time_without_records_is_left_out(ticks: Ticks) -> None:
    ticks.book("2026-06-01T03:20", "2026-03-10T10:00", "2026-06-01T01:00")
    assert ticks.tick()[0] == [("2026-03-10-10:00", "2026-03-10-10:00"), ("2026-06-01-01:00", "2026-06-01-02:00")]


def test_hours_before_the_first_partition_wait_for_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks(tmp_path, monkeypatch, start="2026-03-12T00:00")
    ticks.book("2026-03-10T11:20", "2026-03-10T10:00")
    assert ticks.tick()[0] == []
    ticks.start_at("2026-03-10T00:00")  # loaded again
    assert ticks.tick()[0] == [("2026-03-10-10:00", "2026-03-10-10:00")]


def test_partitions_that_begin_earlier_than_before_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks(tmp_path, monkeypatch, start="2026-03-11T00:00")
    ticks.book("2026-03-11T04:20", "2026-03-10T22:00", "2026-03-11T01:00")
    assert ticks.tick()[0] == [("2026-03-11-00:00", "2026-03-11-03:00")]
    ticks.start_at("2026-03-10T00:00")  # loaded again
    assert ticks.tick()[0] == [("2026-03-10-22:00", "2026-03-11-03:00")]
    assert ticks.tick()[0] == []


def test_the_cursor_is_what_was_asked_for(ticks: Ticks) -> None:
    ticks.book("2026-03-10T11:20", "2026-03-10T10:00")
    ticks.tick()
    start, through = map(datetime.fromisoformat, str(ticks.cursor).split("/"))
    assert (start, through) == (utc("2026-03-10T00:00"), utc("2026-03-10T11:00"))
