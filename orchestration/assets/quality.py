"""The expectations as checks of the tables' hours: a failed check of severity error stops the later steps."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg

from orchestration.assets.hours import Metadata, closed_hours, markdown_table
from orchestration.assets.lakehouse import TABLE_ASSETS
from orchestration.assets.links import report_link, runbook
from orchestration.assets.outcome import Verdict, evaluations, translate_errors
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.duck import delta_cursor
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.marts import current_marts
from spark_jobs.lake.shared_folder import shared_folder
from spark_jobs.lake.tables import BATCH_LEDGER, CAMPAIGNS, EVENTS, MINUTE_METRICS, ORDERS

if TYPE_CHECKING:
    from expectations import HourValidation

EXPECTATIONS_CHECK = "expectations"
CHECKED = ("ad_events", "orders", "minute_metrics", "batch_ledger")
MARTS_CHECKED = (
    "fct_campaign_day",
    "fct_campaign_minute",
    "fct_event_accounting",
    "fct_reconciliation",
    "mart_build",
    "fct_billing_ledger",
    "fct_budget_pacing",
    "fct_attribution_credits",
    "fct_advertiser_attribution",
    "fct_advertiser_performance",
    "fct_late_arrivals",
    "fct_restatements",
    "fct_placement_day",
    "fct_user_frequency",
    "fct_invalid_traffic_day",
    "fct_invalid_traffic_sources",
)
# The ledger first: a batch in it is complete in the tables that are pinned after it.
_PINNED = (BATCH_LEDGER, EVENTS, MINUTE_METRICS, ORDERS, CAMPAIGNS)
_PROFILES = "quality/profiles"


Pins = dict[str, tuple[str, int | None]]
"""The tables that a check reads, each at a fixed version: name -> (uri, version)."""


def expectation_checks(hours: dg.HourlyPartitionsDefinition) -> list[dg.AssetChecksDefinition]:
    """Return one check for each table of CHECKED."""
    tables = {asset.key: asset.table.name for asset in TABLE_ASSETS}
    return [_expectations(key, tables[key], hours) for key in CHECKED]


def _expectations(key: str, table: str, hours: dg.HourlyPartitionsDefinition) -> dg.AssetChecksDefinition:
    spec = dg.AssetCheckSpec(
        EXPECTATIONS_CHECK,
        asset=key,
        blocking=True,
        partitions_def=hours,
        description="Great Expectations over the hour, from one scan of it: schema, ranges, uniqueness, references, drift and "
        "volume against the trailing week.\n\n" + runbook("expectations"),
    )

    @dg.multi_asset_check(name=f"{key}_{EXPECTATIONS_CHECK}", specs=[spec], pool="quality")
    def expectations(context: dg.AssetCheckExecutionContext) -> Iterator[Any]:
        """Validate each hour of this run."""
        settings = load_settings()
        with _translate_expectation_errors(context), shared_folder(settings, _PROFILES):
            wanted = closed_hours(context, settings)
            lake = Lake(settings)
            pins = {pinned.name: (lake.uri(pinned), lake.version(pinned)) for pinned in _PINNED}
            run_name = _run_name(context)
            yield from evaluations(spec, (_verdict(settings, pins, table, hour, run_name) for hour in wanted))

    return expectations


def _verdict(settings: Settings, pins: Pins, table: str, hour: datetime, run_name: str) -> Verdict:
    from expectations import related_tables, validate_hour  # Great Expectations takes seconds to import

    uri, version = pins[table]
    related = {name: pins[name] for name in related_tables(table) if pins[name][1] is not None}
    spill = settings.scratch_path / f"quality-{os.getpid()}"  # DuckDB creates it if needed, and removes it
    with delta_cursor(settings.lakehouse_uri, memory_limit="2GB", temp_directory=str(spill)) as cursor:
        found = validate_hour(cursor, table, uri, version, hour, related=related, docs=settings.quality_path, run_name=run_name)
    return Verdict(
        hour,
        passed=found.success,
        is_error=found.error_failed,
        description=_failed(found),
        metadata={"delta_version": version} | _results(settings, found),
    )


def marts_expectations() -> dg.AssetChecksDefinition:
    """Return one check for each published mart of MARTS_CHECKED. No step waits for it: dbt tests a mart before it is published."""
    specs = [
        dg.AssetCheckSpec(
            EXPECTATIONS_CHECK,
            asset=name,
            description="Great Expectations over the published mart.\n\n" + runbook("expectations"),
        )
        for name in MARTS_CHECKED
    ]

    @dg.multi_asset_check(name=f"marts_{EXPECTATIONS_CHECK}", specs=specs, can_subset=True, pool="quality")
    def expectations(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        """Validate the selected marts."""
        from expectations import validate_marts

        settings = load_settings()
        names = sorted(key.asset_key.path[-1] for key in context.selected_asset_check_keys)
        with _translate_expectation_errors(context):
            run_name = _run_name(context)
            path = current_marts(settings).path
            if path is None:
                raise AdtallyError("there are no marts to check yet", hint="run `adtally marts build` first")
            for found in validate_marts(path, marts=names, docs=settings.quality_path, run_name=run_name):
                yield dg.AssetCheckResult(
                    asset_key=found.table,
                    check_name=EXPECTATIONS_CHECK,
                    passed=found.success,
                    severity=dg.AssetCheckSeverity.ERROR if found.error_failed else dg.AssetCheckSeverity.WARN,
                    description=_failed(found),
                    metadata=_results(settings, found),
                )

    return expectations


@contextmanager
def _translate_expectation_errors(context: dg.AssetCheckExecutionContext) -> Iterator[None]:
    from expectations import ExpectationsError

    with translate_errors(context):
        try:
            yield
        except ExpectationsError as error:
            raise dg.Failure(description=str(error), allow_retries=error.retryable) from error


def _run_name(context: dg.AssetCheckExecutionContext) -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{context.op_execution_context.run_id[:8]}"


def _failed(found: "HourValidation") -> str | None:
    parts = [
        f"{severity}: {', '.join(names)}"
        for severity in ("error", "warn")
        if (names := [result.name for result in found.failed if result.severity == severity])
    ]
    return "; ".join(parts) or None


def _results(settings: Settings, found: "HourValidation") -> Metadata:
    """Return the results of all checks, and a few of the rows that fail."""
    rows = [
        {
            "check": result.name,
            "severity": result.severity,
            "passed": "yes" if result.success else "NO",
            "observed": "not judged" if result.observed is None else result.observed,
            "expected": result.expected,
        }
        for result in (*found.failed, *(result for result in found.results if result.success))
    ]
    page = settings.quality_path / "index.html" if found.page is None else found.page
    return {
        **{f"rows of {result.name}": _as_json(result.failing_rows) for result in found.failed if result.failing_rows},
        "expectations": markdown_table(rows),
        "data_docs": report_link(settings, page),
        "rows": found.rows,
        "seconds": found.seconds,
    }


def _as_json(rows: list[dict[str, Any]]) -> dg.JsonMetadataValue:
    return dg.MetadataValue.json(json.loads(json.dumps(rows, default=str)))
