"""Lists all definitions of Dagster."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import dagster as dg

from orchestration import schedules
from orchestration.alerts.checks import signal_checks
from orchestration.alerts.sensors import alert_sensors
from orchestration.assets.hours import backfilled_hours, compacted_events, reconciled_hours
from orchestration.assets.lakehouse import landing_files, landing_ingest, table_specs
from orchestration.assets.marts import marts_asset
from orchestration.assets.quality import expectation_checks, marts_expectations
from orchestration.assets.settlement import attributed_orders, billing_lines, reviewed_hours, settled_records
from orchestration.assets.storage import checked_storage, compacted_tables, erased_people, vacuumed_tables
from orchestration.marts.manifest import load_manifest
from orchestration.partitions import hourly_partitions
from orchestration.sensors.closed_hours import closed_hours_sensor
from orchestration.sensors.stream_progress import stream_progress_sensor
from spark_jobs.config import Settings, load_settings
from spark_jobs.private import keep_files_private


def build_definitions(settings: Settings) -> dg.Definitions:
    """Return the definitions of one home. Its first partition depends on its records."""
    with warnings.catch_warnings():
        # Partitions of checks and backfill policies are new in Dagster. Its version is pinned, and tests check their behaviour.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        warnings.simplefilter("ignore", dg.BetaWarning)
        return _definitions(settings)


def _with_code_version(spec: dg.AssetSpec) -> dg.AssetSpec:
    """Add adtally's version to an asset of Python. A model has the hash of its SQL."""
    return spec if spec.code_version else spec.replace_attributes(code_version=version("adtally"))


def _definitions(settings: Settings) -> dg.Definitions:
    hours = hourly_partitions(settings)
    manifest = load_manifest(settings)
    marts = marts_asset(manifest)
    closed_hours = schedules.closed_hours_job(hours)
    closed_hours_marts = schedules.closed_hours_marts_job(manifest)
    reconciliation = schedules.reconciliation_job(hours)
    near_real_time = schedules.marts_job("near_real_time", manifest)
    hourly = schedules.marts_job("hourly", manifest)
    return dg.Definitions(
        assets=dg.with_source_code_references(
            dg.map_asset_specs(
                _with_code_version,
                [
                    landing_files(),
                    landing_ingest,
                    *table_specs(hours),
                    reviewed_hours(hours),
                    compacted_events(hours),
                    compacted_tables,
                    reconciled_hours(hours),
                    backfilled_hours(hours),
                    attributed_orders(hours),
                    billing_lines,
                    settled_records,
                    vacuumed_tables,
                    checked_storage,
                    erased_people,
                    marts,
                ],
            ),
        ),
        asset_checks=[*expectation_checks(hours), marts_expectations(), signal_checks()],
        jobs=[
            schedules.ingest_job,
            closed_hours,
            closed_hours_marts,
            reconciliation,
            near_real_time,
            hourly,
            schedules.compaction_job,
            schedules.vacuum_job,
            schedules.storage_check_job,
            schedules.erasure_job,
            schedules.settlement_job,
        ],
        schedules=[
            schedules.marts_schedule("near_real_time", "*/5 * * * *", near_real_time),
            schedules.marts_schedule("hourly", "20 * * * *", hourly),
            schedules.compaction_schedule,
            schedules.vacuum_schedule,
            schedules.erasure_schedule,
            schedules.settlement_schedule,
            schedules.reconciliation_schedule(hours, reconciliation),
        ],
        sensors=[
            schedules.ingest_sensor,
            stream_progress_sensor(hours),
            closed_hours_sensor(hours, closed_hours),
            schedules.closed_hours_marts_sensor(closed_hours, closed_hours_marts),
            *alert_sensors(settings),
        ],
        # Each run has a process. A second one for a step would load these definitions again.
        executor=dg.in_process_executor,
    )


keep_files_private()  # in case Dagster itself starts this, and not `adtally up`
defs = build_definitions(load_settings())
