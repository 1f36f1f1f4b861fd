"""The alert sensors, ticked as the daemon does, on real instances; a webhook keeps what is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest

from orchestration.alerts.checks import signal_checks
from orchestration.alerts.sensors import PACING_CHECK, SIGNAL_SENSORS, alert_sensors, failed_check_sensor, failed_run_sensor
from orchestration.assets.hours import RECOUNT_CHECK
from orchestration.marts.pacing import early_spends
from spark_jobs.config import load_settings
from spark_jobs.operate.health import SIGNALS
from tests.orchestration.alerts.test_notifier import Hook, hook

__all__ = ["hook"]

BY_NAME = {sensor.name: sensor for sensor in alert_sensors(load_settings())}


@pytest.fixture
def home(tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ADTALLY_ALERT_WEBHOOK", hook.url())
    monkeypatch.setenv("ADTALLY_MIN_FREE_BYTES", "0")
    return tmp_path / "home"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def tick(name: str, cursor: str | None, instance: dg.DagsterInstance) -> Any:
    return BY_NAME[name](dg.build_sensor_context(instance=instance, cursor=cursor))


def told(hook: Hook) -> list[tuple[str, str]]:
    return [(each["body"]["title"], each["body"]["severity"]) for each in hook.got]


def test_every_signal_has_a_running_sensor_that_names_its_runbook() -> None:
    assert {watched.signal for watched in SIGNAL_SENSORS} == set(SIGNALS)
    for sensor in BY_NAME.values():
        assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
        pages = [word.strip("`") for word in (sensor.description or "").split() if word.startswith("`docs/")]
        assert pages, sensor.name
        assert [page for page in pages if not (Path(__file__).parents[3] / page).is_file()] == []


def test_an_alert_is_told_once_when_it_begins_and_once_when_it_is_over(
    home: Path, hook: Hook, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursor = None
    evaluated: list[tuple[str, str, bool, dg.AssetCheckSeverity]] = []
    for least_free in ("0", "0", str(2**60), str(2**60), "0", "0"):
        monkeypatch.setenv("ADTALLY_MIN_FREE_BYTES", least_free)
        result = tick("alert_disk_space", cursor, instance)
        cursor = result.cursor
        evaluated += [(e.asset_key.to_user_string(), e.check_name, e.passed, e.severity) for e in result.asset_events]
    assert told(hook) == [("disk space runs out", "critical"), ("disk_space is well again", "info")]
    assert hook.got[0]["body"]["runbook"] == "docs/runbooks/disk-space.md"
    # at the first tick and at each change
    error = dg.AssetCheckSeverity.ERROR
    assert evaluated == [("landing_files", "disk_space", passed, error) for passed in (True, False, True)]


def test_an_alert_that_could_not_be_told_is_told_later(
    home: Path, hook: Hook, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADTALLY_MIN_FREE_BYTES", str(2**60))
    hook.answers = [404, 200]
    first = tick("alert_disk_space", None, instance)
    second = tick("alert_disk_space", first.cursor, instance)
    third = tick("alert_disk_space", second.cursor, instance)
    assert len(hook.got) == 2
    assert hook.got[0] == hook.got[1]
    assert json.loads(third.cursor)["pending"] is None


def test_conservation_has_to_be_broken_twice_in_a_row(
    home: Path, hook: Hook, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([["x"], [], ["x"], ["x"], ["x"]])
    monkeypatch.setattr("spark_jobs.operate.health.read_recent_problems", lambda settings, since: (1, next(answers)))
    cursor, tellings, passed = None, [], []
    for _ in range(5):
        result = tick("alert_conservation", cursor, instance)
        cursor = result.cursor
        tellings.append(len(hook.got))
        passed += [each.passed for each in result.asset_events]
    assert tellings == [0, 0, 0, 1, 1]
    assert passed == [True, False]


def pacing(home: Path, *rows: tuple[str, str, str, int, bool]) -> None:
    """Published marts with minutes of fct_budget_pacing: campaign, day, minute, spend of a budget of 1,000,000, alert."""
    path = home / "marts" / "marts.duckdb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "create table fct_budget_pacing (event_date date, event_minute timestamp, campaign_id varchar, currency varchar, "
            "daily_budget_micros bigint, spent_micros bigint, projected_micros bigint, is_alert boolean)"
        )
        for campaign, day, minute, spent, is_alert in rows:
            values = [day, f"{day} {minute}", campaign, "EUR", 1_000_000, spent, 2_000_000, is_alert]
            connection.execute("insert into fct_budget_pacing values (?, ?, ?, ?, ?, ?, ?, ?)", values)


def test_a_campaign_that_spends_early_is_told_once_a_day(home: Path, hook: Hook, instance: dg.DagsterInstance) -> None:
    c1 = [("c1", "2025-06-02", "10:00", 800_000, False), ("c1", "2025-06-02", "10:05", 910_000, True)]
    later = [*c1, ("c1", "2025-06-02", "10:06", 950_000, True), ("c2", "2025-06-02", "11:00", 990_000, True)]
    next_day = [*later, ("c1", "2025-06-03", "09:00", 100_000, False)]
    again = [*next_day, ("c1", "2025-06-03", "09:30", 920_000, True)]
    cursor, tellings, passed = None, [], []
    for rows in ([], c1[:1], c1, c1, later, next_day, again):
        pacing(home, *rows)
        result = tick("alert_budget_pacing", cursor, instance)
        cursor = result.cursor
        tellings.append(len(hook.got))
        passed += [each.passed for each in result.asset_events]
    assert tellings == [0, 0, 1, 1, 2, 2, 3]
    assert passed == [True, False, False, False]
    assert [title for title, _ in told(hook)] == [
        "1 campaign spends its budget early on 2025-06-02",
        "1 campaign spends its budget early on 2025-06-02",
        "1 campaign spends its budget early on 2025-06-03",
    ]
    assert hook.got[0]["body"]["detail"] == ("c1: 0.91 of 1.00 EUR spent by 10:05, 2.00 by the end of the day at this rate")
    assert hook.got[1]["body"]["detail"].startswith("c2: ")
    assert hook.got[0]["body"]["runbook"] == "docs/runbooks/budget-pacing.md"


def test_pacing_that_could_not_be_told_is_told_later(home: Path, hook: Hook, instance: dg.DagsterInstance) -> None:
    pacing(home, ("c1", "2025-06-02", "10:05", 910_000, True))
    hook.answers = [404, 200]
    first = tick("alert_budget_pacing", None, instance)
    second = tick("alert_budget_pacing", first.cursor, instance)
    tick("alert_budget_pacing", second.cursor, instance)
    assert len(hook.got) == 2
    assert hook.got[0] == hook.got[1]


def test_marts_of_an_older_adtally_say_nothing_of_pacing(home: Path, hook: Hook, instance: dg.DagsterInstance) -> None:
    assert early_spends(load_settings()) == []
    path = home / "marts" / "marts.duckdb"
    path.parent.mkdir(parents=True)
    with duckdb.connect(str(path)) as connection:
        connection.execute("create table fct_campaign_day as select 1 as one")
    tick("alert_budget_pacing", None, instance)
    assert hook.got == []


def test_a_cursor_of_another_form_begins_anew(home: Path, hook: Hook, instance: dg.DagsterInstance) -> None:
    for cursor in ("", "{", '{"other": 1}'):
        assert json.loads(tick("alert_disk_space", cursor, instance).cursor)["is_told"] is False


def test_a_failed_run_is_told_with_the_reason(home: Path, hook: Hook, instance: dg.DagsterInstance) -> None:
    @dg.op
    def breaks() -> None:
        raise dg.Failure(description="hour 2025-06-02T10Z is not closed")

    @dg.job
    def a_job() -> None:
        breaks()

    run = a_job.execute_in_process(instance=instance, raise_on_error=False)
    context = dg.build_run_status_sensor_context(
        "alert_failed_run", run.get_run_failure_event(), instance, run.dagster_run, partition_key=None
    ).for_run_failure()
    failed_run_sensor(context)
    (sent,) = hook.got
    assert sent["body"]["title"] == "run of a_job failed in breaks"
    assert sent["body"]["detail"] == "hour 2025-06-02T10Z is not closed"
    assert (sent["body"]["run_id"], sent["body"]["runbook"]) == (run.run_id, "docs/runbooks/failed-run.md")


def checked(*, passed: bool, severity: dg.AssetCheckSeverity, check: str = RECOUNT_CHECK) -> dg.AssetsDefinition:
    """An asset with a check that answers so."""

    @dg.asset(check_specs=[dg.AssetCheckSpec(check, asset="reconciled_hours")])
    def reconciled_hours() -> Iterator[Any]:
        yield dg.MaterializeResult(
            check_results=[dg.AssetCheckResult(check_name=check, passed=passed, severity=severity, description="3 rows are lost")]
        )

    return reconciled_hours


@pytest.mark.parametrize(
    ("options", "tellings"),
    [
        pytest.param({"passed": False, "severity": dg.AssetCheckSeverity.ERROR}, [1, 1, 2], id="an error, each time that it fails"),
        pytest.param({"passed": False, "severity": dg.AssetCheckSeverity.WARN}, [0, 0, 0], id="a warning"),
        pytest.param({"passed": True, "severity": dg.AssetCheckSeverity.ERROR}, [0, 0, 0], id="passed"),
        pytest.param({"passed": False, "severity": dg.AssetCheckSeverity.ERROR, "check": "other"}, [0, 0, 0], id="not paged"),
    ],
)
def test_a_failed_check_is_told_once(
    home: Path, hook: Hook, instance: dg.DagsterInstance, options: dict[str, Any], tellings: list[int]
) -> None:
    asset = checked(**options)
    definitions = dg.Definitions(assets=[asset])
    cursor: str | None = None
    seen: list[int] = []

    def run() -> None:
        dg.materialize([asset], instance=instance)

    def look() -> None:
        nonlocal cursor
        result: Any = failed_check_sensor(dg.build_sensor_context(instance=instance, cursor=cursor, definitions=definitions))
        cursor = result.cursor
        seen.append(len(hook.got))

    run()
    look()
    look()
    run()
    look()
    assert seen == tellings
    if hook.got:
        assert hook.got[0]["body"]["title"] == "check recount_equals_stream of reconciled_hours failed"
        assert hook.got[0]["body"]["detail"] == "3 rows are lost"


def test_every_signal_is_a_check_that_says_where_to_look(
    home: Path, hook: Hook, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks that the sensors evaluate are there to be executed as well; one that is bad is red."""
    monkeypatch.setenv("ADTALLY_MIN_FREE_BYTES", str(2**60))
    monkeypatch.setenv("ADTALLY_REPORTS_URL", "http://127.0.0.1:3001")
    checks = signal_checks()
    assert {spec.name for spec in checks.check_specs} == {*SIGNALS, PACING_CHECK}
    result = dg.Definitions(asset_checks=[checks]).resolve_implicit_global_asset_job_def().execute_in_process(instance=instance)
    found = {each.check_name: each for each in result.get_asset_check_evaluations()}
    assert found.keys() == {*SIGNALS, PACING_CHECK}
    assert [name for name, each in found.items() if not each.passed] == ["disk_space"]
    assert found["disk_space"].severity is dg.AssetCheckSeverity.ERROR
    assert found["disk_space"].metadata["runbook"].value == "http://127.0.0.1:3001/docs/runbooks/disk-space.md"
    assert hook.got == []


def test_signals_of_kafka_are_measured_rarely_until_there_is_a_kafka_toml(home: Path) -> None:
    def seconds() -> dict[str, int | None]:
        return {sensor.name: sensor.minimum_interval_seconds for sensor in alert_sensors(load_settings())}

    without = seconds()
    home.mkdir()
    (home / "kafka.toml").touch()
    changed = {name: (without[name], each) for name, each in seconds().items() if without[name] != each}
    assert changed == {"alert_kafka_clusters": (600, 60), "alert_publishing_behind": (600, 120)}


def test_sensors_work_on_a_home_that_is_not_there(home: Path, hook: Hook, instance: dg.DagsterInstance) -> None:
    for watched in SIGNAL_SENSORS:
        tick(f"alert_{watched.signal}", None, instance)
    assert hook.got == []
    assert not home.exists()
    assert load_settings().home == home
