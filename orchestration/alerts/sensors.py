"""The sensors that raise alerts: one per health signal, and those for failed runs, failed checks and budget pacing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord, AssetCheckExecutionRecordStatus

from orchestration.alerts.notifier import Alert, AlertSeverity, make_notifiers, notify
from orchestration.assets.hours import RECOUNT_CHECK
from orchestration.assets.links import runbook, runbook_link
from orchestration.assets.quality import EXPECTATIONS_CHECK
from orchestration.marts.pacing import EarlySpend, early_spends
from spark_jobs.config import Settings, load_settings
from spark_jobs.failure import one_line
from spark_jobs.texts import money

if TYPE_CHECKING:
    from spark_jobs.operate.health import Signal

PAGED_CHECKS = {RECOUNT_CHECK: "docs/runbooks/reconciliation-difference.md", EXPECTATIONS_CHECK: "docs/runbooks/expectations.md"}
"""Checks whose failure with severity error raises an alert, and their runbooks. A failed dbt test fails its run instead."""

SECONDS_BETWEEN_EVALUATIONS = 900
PACING_CHECK, PACING_ASSET = "budget_pacing", "fct_budget_pacing"
_BUDGET_PACING = "docs/runbooks/budget-pacing.md"
_CAMPAIGNS_SHOWN = 5
_CHECKS_READ = 200  # newest failed evaluations of a check that a tick reads and remembers
_PARTITIONS_SHOWN = 5
_SECONDS_WITHOUT_KAFKA = 600
_NEW_SECONDS = 3600  # the first tick ever ignores older failures


@dataclass(frozen=True)
class SignalSensor:
    """How to watch a health signal. ``bad_ticks``: how often in a row it must be bad before an alert is raised.

    A tick costs Dagster 0.15 CPU seconds, so a signal over an hour's records or a file that a person edits is measured every five
    minutes, and a signal ``of_kafka`` every ten while there is no kafka.toml.
    """

    signal: str
    asset: str
    description: str
    seconds: int = 60
    bad_ticks: int = 1
    of_kafka: bool = False

    def interval_seconds(self, settings: Settings) -> int:
        """Return the seconds between two ticks with these settings."""
        return _SECONDS_WITHOUT_KAFKA if self.of_kafka and not settings.kafka_path.exists() else self.seconds


SIGNAL_SENSORS = (
    SignalSensor(
        "stream_lag", "ad_events", "Landing files or records of a topic wait longer than ADTALLY_MAX_STREAM_LAG to be ingested."
    ),
    SignalSensor("ignored_files", "landing_files", "Files lie in the landing folder where nothing reads them.", 300),
    # twice: a broker that restarts does not answer for some seconds
    SignalSensor(
        "kafka_clusters", "ad_events", "A cluster of Kafka does not answer, or lacks a topic.", 60, bad_ticks=2, of_kafka=True
    ),
    SignalSensor("freshness", "mart_build", "The published marts lag the ledger by more than ADTALLY_MAX_MART_AGE.", 120),
    SignalSensor(
        "publishing_behind",
        "minute_metrics",
        "Versions wait longer than ADTALLY_MAX_PUBLISH_LAG to be published to Kafka.",
        120,
        of_kafka=True,
    ),
    SignalSensor(
        "rejected_share", "rejected_events", "More than ADTALLY_MAX_REJECTED_SHARE of the last hour's records are rejected.", 300
    ),
    SignalSensor(
        "duplicate_share", "batch_ledger", "More than ADTALLY_MAX_DUPLICATE_SHARE of the last hour's records are resent.", 300
    ),
    SignalSensor("user_share", "ad_events", "One user has more than ADTALLY_MAX_USER_SHARE of the last hour's events.", 300),
    # twice: a correction writes its rows to one table before the other
    SignalSensor(
        "conservation", "batch_ledger", "Tables contradict each other over the batches of the last hour.", 300, bad_ticks=2
    ),
    SignalSensor("campaign_file", "campaigns", "A campaign file cannot be read; the prices in force stay.", 300),
    SignalSensor("rule_file", "ad_events", "A rule file cannot be right; the rules in force stay, or a step waits.", 300),
    SignalSensor("erasure_due", "erased_people", "A person must be erased within 7 days, or an erasure is not proven.", 3600),
    SignalSensor("disk_space", "landing_files", "Less than ADTALLY_MIN_FREE_BYTES are free under ADTALLY_HOME.", 120),
)


@dataclass
class SignalState:
    """The cursor of a signal's sensor.

    ``bad_ticks``: how often in a row it was bad. ``is_told``: whether its alert is active. ``pending``: the last alert, until
    the notifiers ``pending_for`` have sent it too.
    """

    bad_ticks: int = 0
    is_told: bool = False
    evaluated_at: float = 0.0
    pending: dict[str, Any] | None = None
    pending_for: list[str] = field(default_factory=list)

    @classmethod
    def from_cursor(cls, cursor: str | None) -> Self:
        """Return the state of the last tick, or a new one if the cursor is missing or has another form."""
        try:
            return cls(**json.loads(cursor)) if cursor else cls()
        except (ValueError, TypeError):
            return cls()

    def to_cursor(self) -> str:
        """Return the cursor of this state."""
        return json.dumps(self.__dict__)

    def takes_turn(self, now: float, *, is_new: bool) -> bool:
        """Return whether to evaluate the check at this tick, and note it: at an alert, and every SECONDS_BETWEEN_EVALUATIONS."""
        if not is_new and now - self.evaluated_at < SECONDS_BETWEEN_EVALUATIONS:
            return False
        self.evaluated_at = now
        return True


@dataclass
class PacingState(SignalState):
    """The cursor of the pacing sensor: also the day, and the campaigns that an alert of that day named."""

    day: str | None = None
    campaigns: list[str] = field(default_factory=list)


def signal_sensor(watched: SignalSensor, interval_seconds: int) -> dg.SensorDefinition:
    """Return a sensor that raises one alert when a signal turns bad and one when it is well again, and evaluates its check."""
    page = "conservation-broken" if watched.signal == "conservation" else watched.signal.replace("_", "-")

    @dg.sensor(
        name=f"alert_{watched.signal}",
        minimum_interval_seconds=interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"{watched.description} Alerts once when it begins and once when it ends; the check "
        f"`{watched.signal}` of `{watched.asset}` fails meanwhile.\n\n{runbook(page)}",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        """Measure the signal and raise an alert if it changed."""
        from spark_jobs.operate.health import read_signal

        settings = load_settings()
        state, now = SignalState.from_cursor(context.cursor), time.time()
        signal = read_signal(settings, watched.signal)
        alert = change_of(signal, state, watched.bad_ticks, now)
        _deliver(context, settings, state, alert)
        evaluates = state.takes_turn(now, is_new=alert is not None)
        events = [signal_evaluation(settings, watched.asset, signal, passed=not state.is_told)] if evaluates else []
        reason = f"{signal.name} is {'well' if signal.ok else 'BAD'}: {signal.detail}"
        return dg.SensorResult(skip_reason=reason, cursor=state.to_cursor(), asset_events=events)

    return sensor


def change_of(signal: Signal, state: SignalState, bad_ticks: int, now: float) -> Alert | None:
    """Return the alert that this measurement requires, if any, and update the state."""
    state.bad_ticks = 0 if signal.ok else state.bad_ticks + 1
    turned_bad = not state.is_told and state.bad_ticks >= bad_ticks
    is_over = state.is_told and signal.ok
    if not turned_bad and not is_over:
        return None
    state.is_told = turned_bad
    bad = "disk space runs out" if signal.name == "disk_space" else f"{signal.name} is over its threshold"
    return Alert(
        name=signal.name,
        title=bad if turned_bad else f"{signal.name} is well again",
        detail=f"{signal.detail} (threshold: {signal.threshold:g} {signal.unit})",
        runbook=signal.runbook,
        severity=AlertSeverity.CRITICAL if turned_bad else AlertSeverity.INFO,
        at=datetime.fromtimestamp(now, UTC),
    )


def _deliver(context: dg.SensorEvaluationContext, settings: Settings, state: SignalState, alert: Alert | None) -> None:
    """Send a new alert by all notifiers. If there is none, send the pending alert by the notifiers that failed before."""
    if alert is not None:
        context.log.info(f"{alert.title}: {alert.detail}")
        state.pending = alert.to_json()
    if state.pending is not None:
        only = state.pending_for if alert is None else None
        state.pending_for = notify(Alert.from_json(state.pending), make_notifiers(settings), only=only)
        state.pending = state.pending if state.pending_for else None


def signal_evaluation(settings: Settings, asset: str, signal: Signal, *, passed: bool) -> dg.AssetCheckEvaluation:
    """Return the evaluation of a signal's check: an error while its alert is active."""
    return dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey(asset),
        check_name=signal.name,
        passed=passed,
        severity=dg.AssetCheckSeverity.ERROR,
        description=signal.detail,
        metadata={
            **({} if signal.value is None else {signal.unit: signal.value}),
            "threshold": signal.threshold,
            "runbook": runbook_link(settings, signal.runbook),
        },
    )


def pacing_evaluation(settings: Settings, early: Sequence[EarlySpend]) -> dg.AssetCheckEvaluation:
    """Return the evaluation of the pacing check: an error while a campaign of the newest day spends early."""
    return dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey(PACING_ASSET),
        check_name=PACING_CHECK,
        passed=not early,
        severity=dg.AssetCheckSeverity.ERROR,
        description=_early_spend(early).detail if early else None,
        metadata={"campaigns": len(early), "runbook": runbook_link(settings, _BUDGET_PACING)},
    )


@dg.run_failure_sensor(
    name="alert_failed_run",
    minimum_interval_seconds=120,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=f"Sends an alert for every failed run of this code location.\n\n{runbook('failed-run')}",
)
def failed_run_sensor(context: dg.RunFailureSensorContext) -> None:
    """Raise an alert for a run that failed."""
    run = context.dagster_run
    failures = context.get_step_failure_events()
    steps = ", ".join(sorted(event.step_key for event in failures if event.step_key))
    reasons = "; ".join(filter(None, map(failure_reason, failures)))
    alert = Alert(
        name="failed_run",
        title=f"run of {run.job_name} failed" + (f" in {steps}" if steps else ""),
        detail=one_line(reasons, 1000) or one_line(context.failure_event.message or "", 500),
        runbook="docs/runbooks/failed-run.md",
        run_id=run.run_id,
    )
    context.log.info(f"{alert.title}: {alert.detail}")
    notify(alert, make_notifiers(load_settings()))


def failure_reason(event: dg.DagsterEvent) -> str:
    """Return why a step failed in one line: the description of a dg.Failure, else the innermost error."""
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return " ".join(data.user_failure_data.description.split())
    error = data.error
    while error is not None and error.cause is not None:
        error = error.cause
    return "" if error is None else " ".join(error.message.split())


@dg.sensor(
    name="alert_failed_check",
    minimum_interval_seconds=120,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Alerts once for each failed check of severity error: differences that no repair corrected, unmet expectations."
    f"\n\n{runbook('reconciliation-difference')}\n\n{runbook('expectations')}",
)
def failed_check_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Raise alerts for the evaluations that failed since the last tick."""
    reported: dict[str, list[int]] | None = json.loads(context.cursor) if context.cursor else None
    repository = context.repository_def
    keys = [key for key in repository.asset_graph.asset_check_keys if key.name in PAGED_CHECKS] if repository else []
    remembered: dict[str, list[int]] = {}
    alerts: list[Alert] = []
    for key in sorted(keys):
        failed = context.instance.event_log_storage.get_asset_check_execution_history(
            key, _CHECKS_READ, status={AssetCheckExecutionRecordStatus.FAILED}
        )
        name = key.to_user_string()
        # Compares ids, not the highest id: an evaluation gets its id when it is planned, so a lower one may come later.
        new = [record for record in failed if record.id not in reported.get(name, ())] if reported is not None else _recent(failed)
        remembered[name] = [record.id for record in failed]
        alerts += _failed_check(key, new)
    if alerts:
        notifiers = make_notifiers(load_settings())
        for alert in alerts:
            context.log.info(f"{alert.title}: {alert.detail}")
            notify(alert, notifiers)
    reason = "; ".join(alert.title for alert in alerts) or "no check failed since the last tick"
    return dg.SensorResult(skip_reason=reason, cursor=json.dumps(remembered))


def _recent(records: Sequence[AssetCheckExecutionRecord]) -> list[AssetCheckExecutionRecord]:
    return [record for record in records if time.time() - record.create_timestamp < _NEW_SECONDS]


def _failed_check(key: dg.AssetCheckKey, records: Sequence[AssetCheckExecutionRecord]) -> list[Alert]:
    found = [
        (record, record.event.dagster_event.asset_check_evaluation_data)
        for record in records
        if record.event and record.event.dagster_event
    ]
    errors = [(record, data) for record, data in found if data.severity is dg.AssetCheckSeverity.ERROR]
    if not errors:
        return []
    partitions = sorted({data.partition for _, data in errors if data.partition})
    more = f" and {len(partitions) - _PARTITIONS_SHOWN} more" if len(partitions) > _PARTITIONS_SHOWN else ""
    shown = ", ".join(partitions[:_PARTITIONS_SHOWN]) + more
    record, data = errors[0]
    alert = Alert(
        name="failed_check",
        title=f"check {key.name} of {key.asset_key.to_user_string()} failed" + (f" for {shown}" if shown else ""),
        detail=one_line(data.description or "see the check's metadata", 1000),
        runbook=PAGED_CHECKS[key.name],
        run_id=record.run_id,
    )
    return [alert]


@dg.sensor(
    name="alert_budget_pacing",
    minimum_interval_seconds=120,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Alerts once a day for each campaign that spent more than 90 % of its budget before 80 % of the day, by "
    f"`{PACING_ASSET}`, whose check `{PACING_CHECK}` fails meanwhile.\n\n{runbook('budget-pacing')}",
)
def budget_pacing_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Raise an alert for the campaigns of the newest day that no alert has named yet."""
    settings = load_settings()
    early, state, now = early_spends(settings), PacingState.from_cursor(context.cursor), time.time()
    day = early[0].event_date.isoformat() if early else state.day
    if day != state.day:
        state.day, state.campaigns = day, []
    new = {name: found for found in early if (name := f"{found.campaign_id} {found.currency}") not in state.campaigns}
    evaluates = state.takes_turn(now, is_new=bool(new))
    state.campaigns += new
    _deliver(context, settings, state, _early_spend(list(new.values())) if new else None)
    events = [pacing_evaluation(settings, early)] if evaluates else []
    reason = f"{len(early)} campaigns spend their budget early on {day}" if early else "no campaign spends its budget early"
    return dg.SensorResult(skip_reason=reason, cursor=state.to_cursor(), asset_events=events)


def _early_spend(found: Sequence[EarlySpend]) -> Alert:
    shown = [
        f"{each.campaign_id}: {money(each.spent_micros * 1000, each.currency)} of "
        f"{money(each.daily_budget_micros * 1000, each.currency)} {each.currency} spent by {each.event_minute:%H:%M}, "
        f"{money(each.projected_micros * 1000, each.currency)} by the end of the day at this rate"
        for each in found[:_CAMPAIGNS_SHOWN]
    ]
    more = [f"and {len(found) - _CAMPAIGNS_SHOWN} more"] if len(found) > _CAMPAIGNS_SHOWN else []
    campaigns = "campaign spends its budget" if len(found) == 1 else "campaigns spend their budgets"
    return Alert(
        name="budget_pacing",
        title=f"{len(found)} {campaigns} early on {found[0].event_date}",
        detail="; ".join([*shown, *more]),
        runbook=_BUDGET_PACING,
    )


def alert_sensors(settings: Settings) -> list[dg.SensorDefinition]:
    """Return all alert sensors, for the definitions of a home."""
    signals = [signal_sensor(watched, watched.interval_seconds(settings)) for watched in SIGNAL_SENSORS]
    return [*signals, failed_run_sensor, failed_check_sensor, budget_pacing_sensor]
