"""The jobs, and the schedules and sensors that start them. A person can start each job as well."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import dagster as dg

from orchestration.assets.lakehouse import LANDING_INGEST
from orchestration.assets.marts import groups_of
from orchestration.assets.quality import CHECKED, EXPECTATIONS_CHECK, MARTS_CHECKED
from orchestration.marts.follow import nothing_to_build
from orchestration.marts.manifest import Manifest, is_mart
from orchestration.marts.pins import pin_versions
from orchestration.partitions import range_tags
from spark_jobs.config import load_settings
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.locks import INGEST, is_held
from spark_jobs.units import HOUR, HourRange

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

    Job = UnresolvedAssetJobDefinition | dg.JobDefinition

_RUNNING = dg.DefaultScheduleStatus.RUNNING
PRIORITY_TAG = "dagster/priority"
_BETWEEN_IDLE_RUNS = timedelta(minutes=30)
_SECONDS_TO_MARTS = 120
RECOUNTED_AGAIN = 48 * HOUR
CLOSED_HOURS = ("reviewed_hours", "compacted_events", "reconciled_hours", "attributed_orders")


def _job(name: str, asset: str, description: str) -> UnresolvedAssetJobDefinition:
    return dg.define_asset_job(name, dg.AssetSelection.assets(asset), description=description)


ingest_job = _job("ingest", LANDING_INGEST, "Ingests all files of the landing folder once.")
compaction_job = _job("compaction", "compacted_tables", "Compacts every table whose small files are worth merging.")
vacuum_job = _job("vacuum", "vacuumed_tables", "Deletes data files that nothing needs any more.")
storage_check_job = _job("storage_check", "checked_storage", "Checks, or repairs, every byte that adtally keeps.")
erasure_job = _job("erasure", "erased_people", "Erases everybody in the queue, in one rewrite, and proves it.")
settlement_job = _job(
    "settlement",
    "settled_records",
    "Settles invalid traffic, credits and billing of all that is out of date, late records included.",
)


def closed_hours_job(hours: dg.HourlyPartitionsDefinition) -> UnresolvedAssetJobDefinition:
    """Return the job that checks closed hours first, and then processes those without an error."""
    checks = [dg.AssetCheckKey(dg.AssetKey(key), EXPECTATIONS_CHECK) for key in CHECKED]
    return dg.define_asset_job(
        "closed_hours",
        dg.AssetSelection.assets(*CLOSED_HOURS) | dg.AssetSelection.checks(*checks),
        partitions_def=hours,
        description="Closed hours: the expectations; where no error was found, the review for invalid traffic, compaction, the "
        "recount and attribution. When it succeeds, `closed_hours_marts` runs.",
    )


def closed_hours_marts_job(manifest: Manifest) -> UnresolvedAssetJobDefinition:
    """Return the job of what follows closed hours and has no partitions.

    It is a separate job, since in a run with 48 partitions Dagster plans 48 executions of each unpartitioned check and sees the end
    of one.
    """
    models = [node["name"] for node in manifest["nodes"].values() if node["resource_type"] == "model"]
    expectations = [dg.AssetCheckKey(dg.AssetKey(name), EXPECTATIONS_CHECK) for name in MARTS_CHECKED]
    tests = _test_keys(manifest)
    return dg.define_asset_job(
        "closed_hours_marts",
        dg.AssetSelection.assets("billing_lines", *models).without_checks() | dg.AssetSelection.checks(*tests, *expectations),
        description="After closed hours: billing, all marts, their tests and expectations.",
    )


def closed_hours_marts_sensor(closed_hours: Job, marts: Job) -> dg.SensorDefinition:
    """Return the sensor that runs ``marts`` when a run of ``closed_hours`` has succeeded."""

    @dg.run_status_sensor(
        name="closed_hours_marts_sensor",
        run_status=dg.DagsterRunStatus.SUCCESS,
        monitored_jobs=[closed_hours],
        request_job=marts,
        minimum_interval_seconds=_SECONDS_TO_MARTS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Bills and builds the marts when closed hours have passed their checks and are recounted.",
    )
    def sensor(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
        if waits_already(context.instance, marts.name):
            return dg.SkipReason("a run waits in the queue already")
        return dg.RunRequest(run_key=context.dagster_run.run_id)

    return sensor


def reconciliation_job(hours: dg.HourlyPartitionsDefinition) -> UnresolvedAssetJobDefinition:
    """Return the job that only recounts hours."""
    return dg.define_asset_job(
        "reconciliation",
        dg.AssetSelection.assets("reconciled_hours"),
        partitions_def=hours,
        description="Recounts closed hours, with the late records that came after their first recount.",
    )


def marts_job(group: str, manifest: Manifest) -> UnresolvedAssetJobDefinition:
    """Return the job that builds the marts of one group, the models that they need, and the tests that need no other mart."""
    nodes, parents = manifest["nodes"], manifest["parent_map"]
    models: set[str] = set()
    waiting = [unique_id for unique_id, node in nodes.items() if is_mart(node) and group in groups_of(node)]
    while waiting:
        unique_id = waiting.pop()
        if unique_id.startswith("model.") and unique_id not in models:
            models.add(unique_id)
            waiting += parents[unique_id]
    tests = _test_keys(manifest, models)
    names = sorted(nodes[unique_id]["name"] for unique_id in models)
    selection = dg.AssetSelection.assets(*names).without_checks() | dg.AssetSelection.checks(*tests)
    return dg.define_asset_job(
        f"marts_{group}",
        selection,
        description=f"The {group.replace('_', ' ')} marts, built and tested.",
        tags={PRIORITY_TAG: "1"},  # before closed hours in the queue
    )


def _test_keys(manifest: Manifest, models: set[str] | None = None) -> list[dg.AssetCheckKey]:
    """Return the keys of dbt's tests, or of those that need no other nodes than ``models``."""
    return [
        dg.AssetCheckKey(dg.AssetKey(manifest["nodes"][attached]["name"]), node["name"])
        for unique_id, node in manifest["nodes"].items()
        if node["resource_type"] == "test"
        and (models is None or set(manifest["parent_map"][unique_id]) <= models)
        and (attached := _attached(manifest, unique_id))
    ]


def _attached(manifest: Manifest, test: str) -> str | None:
    """Return the model at which Dagster shows a test."""
    node = manifest["nodes"][test]
    named = node["config"].get("meta", {}).get("dagster", {}).get("ref", {}).get("name")
    models = [parent for parent in manifest["parent_map"][test] if parent.startswith("model.")]
    if named is not None:
        return next((model for model in models if manifest["nodes"][model]["name"] == named), None)
    return node.get("attached_node") or (models[0] if len(models) == 1 else None)


@dg.sensor(
    job=ingest_job,
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ingests what has landed, where no continuous ingest does. Each half hour also where nothing has: campaigns may "
    "have changed.",
)
def ingest_sensor(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Request one ingest, unless another one runs or nothing waits. The cursor is the time of the last request."""
    from spark_jobs.ingest.files.backlog import read_landing

    settings = load_settings()
    if is_held(settings, INGEST):
        return dg.SkipReason("another ingest runs on this home: nothing to do here")
    if waits_already(context.instance, ingest_job.name):
        return dg.SkipReason("a run waits in the queue already")
    now = datetime.now(UTC)
    is_idle = context.cursor is not None and now - datetime.fromisoformat(context.cursor) < _BETWEEN_IDLE_RUNS
    if is_idle and not read_landing(settings).waiting:
        return dg.SkipReason("no landing file waits")
    context.update_cursor(now.isoformat())
    return dg.RunRequest()


def waits_already(instance: dg.DagsterInstance, job: str) -> bool:
    """Return whether a requested run of the job has not started yet. It will process what another run would."""
    statuses = [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTING]
    return instance.get_runs_count(dg.RunsFilter(job_name=job, statuses=statuses)) > 0


def marts_schedule(group: str, cron: str, job: UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """Return the schedule that builds ``group`` at ``cron`` if there is something to build."""

    @dg.schedule(
        name=f"marts_{group}_schedule",
        job=job,
        cron_schedule=cron,
        default_status=_RUNNING,
        description=f"Builds the {group.replace('_', ' ')} marts when their tables have changed, and every half hour without that.",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        if waits_already(context.instance, job.name):
            return dg.SkipReason("a run waits in the queue already")
        reason = nothing_to_build(load_settings(), group, now=datetime.now(UTC))
        return dg.RunRequest() if reason is None else dg.SkipReason(reason)

    return schedule


def _schedule_unless_empty(job: UnresolvedAssetJobDefinition, cron: str, description: str) -> dg.ScheduleDefinition:
    """Return the schedule that runs ``job`` at ``cron`` if there are tables."""

    @dg.schedule(name=f"{job.name}_schedule", job=job, cron_schedule=cron, default_status=_RUNNING, description=description)
    def schedule() -> dg.RunRequest | dg.SkipReason:
        try:
            pin_versions(load_settings())
        except AdtallyError as error:
            return dg.SkipReason(str(error))
        return dg.RunRequest()

    return schedule


compaction_schedule = _schedule_unless_empty(compaction_job, "35 * * * *", "Compacts what needs it, every hour.")
vacuum_schedule = _schedule_unless_empty(vacuum_job, "15 3 * * *", "Vacuums the tables every night.")
settlement_schedule = _schedule_unless_empty(settlement_job, "50 * * * *", "Settles late records, every hour.")


@dg.schedule(
    job=erasure_job,
    cron_schedule="15 4 * * *",
    default_status=_RUNNING,
    description="Erases everybody in the queue, every night, and finishes what was begun.",
)
def erasure_schedule() -> dg.RunRequest | dg.SkipReason:
    """Request a run if somebody is in the queue, or an erasure is not proven."""
    from spark_jobs.erasure.job import queued_erasures, unproven_runs

    settings = load_settings()
    waiting = len(queued_erasures(settings)) + len(unproven_runs(settings))
    return dg.RunRequest() if waiting else dg.SkipReason("nobody is to be erased")


def reconciliation_schedule(hours: dg.HourlyPartitionsDefinition, job: UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """Return the schedule that recounts the newest closed hours every night."""

    @dg.schedule(
        name="reconciliation_schedule",
        job=job,
        cron_schedule="45 2 * * *",
        default_status=_RUNNING,
        description="Recounts the last two days that are closed again: what came late is in them now.",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        from spark_jobs.operate.watermark import read_closing

        closing = read_closing(load_settings())
        if closing.closed_through is None or closing.first_hour is None:
            return dg.SkipReason("no hour is closed yet")
        start = max(closing.closed_through - RECOUNTED_AGAIN, closing.first_hour, hours.start)
        if start >= closing.closed_through:
            return dg.SkipReason("the closed hours lie before the first partition: reload the code location")
        return dg.RunRequest(tags=range_tags(HourRange(start, closing.closed_through)))

    return schedule
