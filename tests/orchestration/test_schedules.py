"""When the jobs run by themselves, and when they need not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest
from filelock import FileLock

from orchestration import schedules
from orchestration.marts.follow import nothing_to_build
from orchestration.marts.pins import SOURCES
from orchestration.partitions import KEY_FORMAT, RANGE_END_TAG, RANGE_START_TAG
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.locks import INGEST
from spark_jobs.lake.tables import BATCH_LEDGER
from tests.orchestration.marts.delta_files import commit, utc
from tests.orchestration.marts.lakes import first_batch, ledger_row

NOW = utc("2026-03-12T08:31")
Tick = Callable[..., list[dg.RunRequest] | str]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path))
    return load_settings()


class Dagster:
    """The instance of these tests, made once: a schedule's context wants one on disk."""

    instance: dg.DagsterInstance


@pytest.fixture(scope="module", autouse=True)
def _instance() -> Iterator[None]:
    with dg.instance_for_test() as Dagster.instance:
        yield


def tick(schedule: dg.ScheduleDefinition) -> list[dg.RunRequest] | str:
    """The runs that are asked for, or why none is."""
    context = dg.build_schedule_context(instance=Dagster.instance, scheduled_execution_time=NOW)
    result = schedule.evaluate_tick(context)
    return list(result.run_requests) if result.run_requests else str(result.skip_message)


def land(settings: Settings, name: str) -> None:
    path = settings.landing_path / "events" / "eu" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}\n")


def sense(cursor: str | None, runs: Sequence[dg.DagsterRun] = ()) -> tuple[bool, str | None, str]:
    """Whether a run of the ingest is asked for, the cursor after it, and why none is. ``runs`` are there already."""
    for run in runs:
        Dagster.instance.add_run(run)
    context = dg.build_sensor_context(instance=Dagster.instance, cursor=cursor)
    result = schedules.ingest_sensor(context)
    for run in runs:
        Dagster.instance.delete_run(run.run_id)
    return isinstance(result, dg.RunRequest), context.cursor, str(getattr(result, "skip_message", ""))


def ago(minutes: float) -> str:
    """A cursor: a run was asked for so long ago."""
    return (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()


def test_ingest_runs_when_a_file_waits(settings: Settings) -> None:
    before = ago(1)
    assert sense(before) == (False, before, "no landing file waits")
    land(settings, ".hidden.jsonl")
    assert sense(before) == (False, before, "no landing file waits")
    land(settings, "a.jsonl")
    asked, after, _ = sense(before)
    assert asked
    assert after is not None and after > before


def test_ingest_runs_each_half_hour_for_the_campaigns(settings: Settings) -> None:
    assert [sense(cursor)[0] for cursor in (None, ago(29), ago(31))] == [True, False, True]


def test_ingest_leaves_the_work_to_a_continuous_one(settings: Settings) -> None:
    land(settings, "a.jsonl")
    with FileLock(settings.home_path / INGEST.file):
        assert "another ingest runs" in sense(None)[2]
    assert sense(None)[0]


@pytest.mark.parametrize(
    ("job", "status", "asked"),
    [("ingest", "STARTING", False), ("ingest", "NOT_STARTED", False), ("ingest", "SUCCESS", True), ("vacuum", "STARTING", True)],
)
def test_ingest_is_not_asked_for_while_a_run_of_it_waits(settings: Settings, job: str, status: str, asked: bool) -> None:
    land(settings, "a.jsonl")
    run = dg.DagsterRun(job_name=job, status=dg.DagsterRunStatus(status))
    assert sense(None, [run])[0] == asked


def test_marts_follow_closed_hours_unless_a_run_of_them_waits() -> None:
    @dg.op
    def nothing() -> None: ...

    @dg.job
    def hours() -> None:
        nothing()

    @dg.job
    def marts() -> None:
        nothing()

    sensor = schedules.closed_hours_marts_sensor(hours, marts)
    done = hours.execute_in_process(instance=Dagster.instance)

    def sense() -> Any:
        event = done.get_run_success_event()
        return sensor(dg.build_run_status_sensor_context(sensor.name, event, Dagster.instance, done.dagster_run))

    assert sense().run_key == done.run_id
    waiting = Dagster.instance.add_run(dg.DagsterRun(job_name="marts", status=dg.DagsterRunStatus.STARTING))
    assert sense().skip_message == "a run waits in the queue already"
    Dagster.instance.delete_run(waiting.run_id)


def publish(settings: Settings, group: str, built_at: str, **versions: int) -> None:
    settings.marts_path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect(str(settings.marts_path)) as connection:
        connection.execute(
            "create table if not exists mart_build (mart_group text, table_name text, delta_version bigint, built_at timestamp)"
        )
        for table, version in versions.items():
            connection.execute("insert into mart_build values (?, ?, ?, ?)", [group, table, version, built_at])


def test_marts_are_built_when_their_tables_have_changed(settings: Settings) -> None:
    lake = Path(settings.lakehouse_uri)
    assert "run `adtally ingest` first" in str(nothing_to_build(settings, "hourly", now=NOW))
    first_batch(lake)
    assert nothing_to_build(settings, "hourly", now=NOW) is None
    publish(settings, "hourly", "2026-03-12 08:20:00", **{table.name: 0 for table in SOURCES})
    reason = "nothing was committed since the build of 11 minutes ago"
    assert nothing_to_build(settings, "hourly", now=NOW) == reason
    assert nothing_to_build(settings, "near_real_time", now=NOW) is None  # each group by itself
    assert nothing_to_build(settings, "hourly", now=NOW + timedelta(minutes=30)) is None  # marts stay fresh
    commit(lake, BATCH_LEDGER, [])
    assert nothing_to_build(settings, "hourly", now=NOW) is None


def test_nothing_is_compacted_or_vacuumed_before_there_is_something(settings: Settings) -> None:
    for schedule in (schedules.compaction_schedule, schedules.vacuum_schedule, schedules.settlement_schedule):
        assert "run `adtally ingest` first" in str(tick(schedule))
    first_batch(Path(settings.lakehouse_uri))
    for schedule in (schedules.compaction_schedule, schedules.vacuum_schedule, schedules.settlement_schedule):
        assert len(tick(schedule)) == 1


def test_the_last_two_closed_days_are_recounted_again(settings: Settings) -> None:
    hours = dg.HourlyPartitionsDefinition(start_date=utc("2026-03-01T00:00"), timezone="UTC", fmt=KEY_FORMAT, end_offset=1)
    schedule = schedules.reconciliation_schedule(hours, schedules.reconciliation_job(hours))
    assert tick(schedule) == "no hour is closed yet"
    at = utc("2026-03-10T12:20")
    rows = [ledger_row(0, f"2026-03-0{day}T10:00", accepted=1, max_received_at=at, ingested_at=at) for day in (2, 9)]
    commit(Path(settings.lakehouse_uri), BATCH_LEDGER, rows)
    [request] = list(tick(schedule))
    assert isinstance(request, dg.RunRequest)
    assert (request.tags[RANGE_START_TAG], request.tags[RANGE_END_TAG]) == ("2026-03-08-12:00", "2026-03-10-11:00")
