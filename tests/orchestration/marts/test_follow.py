"""Builds of the near-real-time marts that follow the ledger."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from terminal import PROGRAM, environment

from orchestration.marts import MartBuild, build_marts, follow, query_marts
from orchestration.marts.follow import DISK_SECONDS, STORE_SECONDS, build_after_batches, pause_between
from orchestration.up.services import MARTS, services
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import BATCH_LEDGER
from tests.orchestration.marts.delta_files import commit
from tests.orchestration.marts.lakes import first_batch, late_batch, ledger_row

CLICKS = "select event_date, clicks from fct_campaign_day where campaign_id = 'c1' order by 1 limit 1"
FIRST, LATE = [(date(2026, 3, 10), 2)], [(date(2026, 3, 10), 3)]
PATIENCE_SECONDS = 120


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", lakehouse=None)


def lake_of(settings: Settings) -> Path:
    return Path(settings.lakehouse_uri)


def clicks(settings: Settings) -> list[tuple[Any, ...]]:
    with suppress(AdtallyError):
        return query_marts(settings, CLICKS)[1]
    return []


class Steps(threading.Event):
    """An event whose waits take no time: the n-th one does step n, and the one after the last step sets it."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        super().__init__()
        self.waits: list[float] = []
        self._steps = list(steps)

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        if len(self.waits) > len(self._steps):
            self.set()
        else:
            self._steps[len(self.waits) - 1]()
        return self.is_set()


def nothing() -> None: ...


def built(settings: Settings, steps: Steps) -> list[MartBuild]:
    found: list[MartBuild] = []
    build_after_batches(settings, steps, found.append)
    return found


# One thread, step by step


def test_a_batch_is_built_once_followed_by_a_pause(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "pause_between", lambda interval, cpu: 1e6 if interval == DISK_SECONDS and cpu > 0 else 0.0)
    lake = lake_of(settings)
    steps = Steps(lambda: first_batch(lake), nothing, nothing, nothing, lambda: late_batch(lake), nothing, nothing)
    found = built(settings, steps)
    assert [build.versions[BATCH_LEDGER.name] for build in found] == [0, 1]
    assert [build.full_because is None for build in found] == [False, True]
    assert clicks(settings) == LATE
    assert [wait > 1e5 for wait in steps.waits] == [False, True, False, False, False, True, False, False]


def test_a_look_without_news_pins_and_lists_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first_batch(lake_of(settings))
    listed: list[str] = []
    listing = DeltaLog.latest_version

    def latest_version(log: DeltaLog) -> int | None:
        listed.append(log.uri)
        return listing(log)

    def forget() -> None:
        listed.clear()
        monkeypatch.setattr(follow, "nothing_to_build", lambda *_, **__: pytest.fail("it looked further than at the ledger"))

    monkeypatch.setattr(DeltaLog, "latest_version", latest_version)
    assert len(built(settings, Steps(forget, nothing, nothing, nothing))) == 1
    assert listed == []


def test_what_another_build_made_is_not_built_again(settings: Settings) -> None:
    first_batch(lake_of(settings))
    other = FileLock(settings.marts_path.parent / ".build.lock")
    settings.marts_path.parent.mkdir(parents=True)
    with other:

        def build() -> None:
            other.release()
            build_marts(settings)

        found = built(settings, Steps(nothing, nothing, build, nothing))
    assert found == []
    assert clicks(settings) == FIRST


def test_it_builds_when_the_other_build_has_ended(settings: Settings) -> None:
    first_batch(lake_of(settings))
    settings.marts_path.parent.mkdir(parents=True)
    with FileLock(settings.marts_path.parent / ".build.lock") as other:
        found = built(settings, Steps(nothing, other.release, nothing))
    assert len(found) == 1


def test_a_ledger_that_was_created_again_is_noticed_at_the_next_listing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "_LIST_SECONDS", 0.0)
    lake = lake_of(settings)
    first_batch(lake)
    late_batch(lake)

    def create_again() -> None:
        for path in sorted((lake / BATCH_LEDGER.name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        commit(lake, BATCH_LEDGER, [ledger_row(0, "2026-03-10T10:00", accepted=5)])

    asked: list[str] = []

    def nothing_to_build(_: Settings, group: str, **__: object) -> str:
        asked.append(group)
        return "no build in this test"

    monkeypatch.setattr(follow, "nothing_to_build", nothing_to_build)
    assert built(settings, Steps(nothing, create_again, nothing)) == []
    assert asked == ["near_real_time"] * 2


def test_building_takes_a_third_of_a_core_at_most() -> None:
    assert pause_between(DISK_SECONDS, 0.4) == DISK_SECONDS
    assert pause_between(DISK_SECONDS, 20.0) == 60.0


# The process


@contextmanager
def process(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [*PROGRAM, "--home", str(settings.home_path), "marts", "build", "--continuous", "--json"],
        env=environment(ADTALLY_MARTS_INTERVAL="0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=settings.home_path.parent,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def wait_for(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def left_over(settings: Settings) -> list[Path]:
    return list(settings.marts_path.parent.glob(".build-*"))


def test_a_process_follows_the_ledger_until_sigterm(settings: Settings) -> None:
    lake = lake_of(settings)
    with process(settings) as running:
        first_batch(lake)
        wait_for(lambda: clicks(settings) == FIRST, running)
        late_batch(lake)
        wait_for(lambda: clicks(settings) == LATE, running)
        running.send_signal(signal.SIGTERM)
        output, error = running.communicate(timeout=PATIENCE_SECONDS)
    assert (running.returncode, error) == (0, "")
    lines = [json.loads(line) for line in output.splitlines()]
    assert lines[-1]["versions"][BATCH_LEDGER.name] == 1 and "seconds" in lines[-1]


def test_a_killed_build_is_made_by_the_next_process(settings: Settings) -> None:
    first_batch(lake_of(settings))
    with process(settings) as running:
        wait_for(lambda: bool(left_over(settings)), running)
        running.kill()
    assert left_over(settings) and clicks(settings) == []
    with process(settings) as running:
        wait_for(lambda: clicks(settings) == FIRST, running)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 0 and left_over(settings) == []


def test_a_failed_build_ends_it_with_a_line_and_the_marts_stay(settings: Settings) -> None:
    lake = lake_of(settings)
    with process(settings) as running:
        first_batch(lake)
        wait_for(lambda: clicks(settings) == FIRST, running)
        commit(lake, BATCH_LEDGER, [ledger_row(1, "2026-03-10T10:00", accepted=7)])  # without increments
        _, error = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 1
    assert error.startswith("adtally: error: ") and error.count("\n") == 1
    assert clicks(settings) == FIRST


# In adtally up


@pytest.mark.parametrize(("interval", "is_started"), [(None, True), ("5", True), ("0", False)])
def test_adtally_up_has_it_unless_the_interval_is_0(settings: Settings, interval: str | None, is_started: bool) -> None:
    chosen = load_settings(home=settings.home_path, marts_interval=interval)
    chosen.dagster_path.mkdir(parents=True)
    found = services(
        chosen,
        {},
        port=3000,
        console_port=3001,
        code_socket=Path("/tmp/code.sock"),
        trigger_seconds=None,
        ingest=False,
        tell=lambda *_: None,
    )
    assert (MARTS in found) is is_started
    if is_started:
        assert found[MARTS].command[-3:] == ("marts", "build", "--continuous")


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({}, DISK_SECONDS),
        ({"lakehouse": "s3://bucket/lake"}, STORE_SECONDS),
        ({"lakehouse": "s3://bucket/lake", "marts_interval": "10"}, 10.0),
    ],
)
def test_the_interval_is_longer_where_a_build_uploads(tmp_path: Path, values: dict[str, str], seconds: float) -> None:
    assert follow._interval(load_settings(home=tmp_path, **values)) == seconds
