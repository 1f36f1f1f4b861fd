"""The expectations as checks of the tables, hour by hour: a failed one of severity error holds up what comes after it."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from orchestration.assets.hours import closed_hours, markdown_table
from orchestration.assets.lakehouse import TABLE_ASSETS, runbook
from orchestration.assets.outcome import Verdict, evaluations, failing_clearly
from spark_jobs.config import Settings, load_settings
from spark_jobs.delta_log import DeltaLog

EXPECTATIONS_CHECK = "expectations"
CHECKED = ("ad_events", "orders", "minute_metrics", "batch_ledger")
# The ledger first: whatever batch it holds is complete in the versions that are read after it.
_PINNED = ("batch_ledger", "events", "minute_metrics", "orders", "campaigns")


@dataclass(frozen=True)
class Pins:
    """The tables that a check reads, each at a fixed version: name -> (uri, version)."""

    tables: dict[str, tuple[str, int | None]]

    @classmethod
    def of(cls, settings: Settings) -> "Pins":
        """The newest versions, the ledger's before the others'."""
        uris = {name: settings.table_uri(name) for name in _PINNED}
        return cls({name: (uri, DeltaLog(uri).latest_version()) for name, uri in uris.items()})


def expectation_checks(hours: dg.HourlyPartitionsDefinition) -> list[dg.AssetChecksDefinition]:
    """A check a table of CHECKED."""
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
        """Validate the hours of this run, each by itself."""
        settings = load_settings()
        with failing_clearly():
            wanted = closed_hours(context, settings)
            pins = Pins.of(settings)
            yield from evaluations(
                spec, (_verdict(settings, pins, table, hour, context.op_execution_context.run_id) for hour in wanted)
            )

    return expectations


def _verdict(settings: Settings, pins: Pins, table: str, hour: datetime, run_id: str) -> Verdict:
    from expectations import validate_hour  # Great Expectations takes seconds to import

    uri, version = pins.tables[table]
    related = {name: pin for name, pin in pins.tables.items() if name != table}
    run_name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{run_id[:8]}"
    found = validate_hour(table, uri, version, hour, related=related, docs=settings.quality_path, run_name=run_name)
    failed = [result for result in found.results if not result.success]
    rows = [
        {
            "check": result.name,
            "column": result.column or "",
            "severity": result.severity,
            "passed": "yes" if result.success else "NO",
            "observed": result.observed,
            "expected": result.expected,
        }
        for result in found.results
    ]
    return Verdict(
        hour,
        passed=found.success,
        is_error=found.error_failed,
        description=f"failed: {', '.join(result.name for result in failed)}" if failed else None,
        metadata={
            "rows": found.rows,
            "delta_version": version,
            "results": markdown_table(rows),
            "seconds": found.seconds,
            "data_docs": dg.MetadataValue.url(data_docs(settings)),
            **{f"failing rows: {result.name}": result.failing_rows for result in failed if result.failing_rows},
        },
    )


def data_docs(settings: Settings) -> str:
    """Where the data docs are read."""
    return (settings.quality_path / "index.html").as_uri()
