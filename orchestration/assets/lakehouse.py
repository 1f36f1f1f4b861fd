"""The landing folder, the ingest, and the Delta tables that it writes.

A stream writes the tables, with or without Dagster. So they have no computation here: the sensor `stream_progress` reports what the
stream committed, per event hour.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

import dagster as dg

from orchestration.assets.links import runbook
from orchestration.assets.outcome import translate_errors
from orchestration.listening import listener
from spark_jobs.config import load_settings
from spark_jobs.errors import BusyError
from spark_jobs.lake.columns import COLUMNS
from spark_jobs.lake.tables import (
    BATCH_LEDGER,
    CAMPAIGNS,
    EVENTS,
    MINUTE_METRICS,
    NAMES,
    ORDERS,
    REJECTED_EVENTS,
    REJECTED_ORDERS,
    Table,
)

OWNERS = ("team:ads-data",)
LANDING_FILES = "landing_files"
LANDING_INGEST = "landing_ingest"


@dataclass(frozen=True)
class TableAsset:
    """A Delta table as Dagster shows it. ``is_hourly``: it has one partition per event hour."""

    key: str
    table: Table
    runbook: str
    is_hourly: bool = True


TABLE_ASSETS = (
    TableAsset("ad_events", EVENTS, "stream-lag"),
    TableAsset("rejected_events", REJECTED_EVENTS, "rejected-share"),
    TableAsset("minute_metrics", MINUTE_METRICS, "conservation-broken"),
    TableAsset("batch_ledger", BATCH_LEDGER, "conservation-broken"),
    TableAsset("orders", ORDERS, "stream-lag"),
    TableAsset("rejected_orders", REJECTED_ORDERS, "rejected-share"),
    TableAsset("campaigns", CAMPAIGNS, "ingest-does-not-start", is_hourly=False),
    TableAsset("names", NAMES, "ignored-files", is_hourly=False),
)


def landing_files() -> dg.AssetSpec:
    """Return the asset of the files that collectors bring."""
    return dg.AssetSpec(
        LANDING_FILES,
        group_name="landing",
        kinds={"json", "file"},
        owners=OWNERS,
        description="JSON lines and CSV files, as collectors rename them into the landing folder.\n\n" + runbook("unreadable-file"),
    )


@dg.asset(
    name=LANDING_INGEST,
    group_name="landing",
    kinds={"spark"},
    owners=OWNERS,
    deps=[LANDING_FILES],
    pool="spark",
    output_required=False,
    description="One run of the ingest: all that is in the landing folder. It does nothing where a continuous ingest "
    "(`adtally up`, `adtally ingest --continuous`) does the work already.\n\n" + runbook("ingest-does-not-start"),
)
def landing_ingest(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
    """Ingest all that is in the landing folder."""
    from spark_jobs.ingest.batch import BatchReport  # imports Spark, which loading the definitions does not need
    from spark_jobs.ingest.files.backlog import read_landing
    from spark_jobs.ingest.runner import run_ingest

    report_batch = listener()
    settings = load_settings()

    def progress(batch: BatchReport) -> None:
        context.log.info("%s", asdict(batch))
        report_batch(batch)

    with translate_errors(context):
        try:
            report = run_ingest(settings, progress=progress, notice=context.log.warning)
        except BusyError as busy:
            context.log.info("nothing done: %s", busy)
            return
        landing = read_landing(settings)
        left = {"waiting_files": sum(found.files for found in landing.waiting), "ignored_files": landing.ignored_files}
        yield dg.MaterializeResult(metadata=asdict(report) | left | {"ignored": landing.ignored_text})


def table_specs(hours: dg.HourlyPartitionsDefinition) -> list[dg.AssetSpec]:
    """Return the specs of TABLE_ASSETS, with their columns."""
    fresh = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=1), warn_window=timedelta(hours=2))
    return [
        dg.AssetSpec(
            asset.key,
            deps=[LANDING_INGEST],
            group_name="lakehouse",
            kinds={"deltalake", "spark"},
            owners=OWNERS,
            description=f"Table `{asset.table.name}`: {asset.table.grain}.\n\n{runbook(asset.runbook)}",
            metadata={
                "dagster/table_name": asset.table.name,
                "dagster/column_schema": column_schema(asset.table),
                "key": ", ".join(asset.table.key),
                "partitioned by": ", ".join(asset.table.partition_by) or "nothing",
            },
            partitions_def=hours if asset.is_hourly else None,
            freshness_policy=fresh if asset.is_hourly else None,
        )
        for asset in TABLE_ASSETS
    ]


def column_schema(table: Table) -> dg.TableSchema:
    """Return the table's columns as Dagster shows them."""
    columns = []
    for name, kind in table.types.items():
        is_key = dg.TableColumnConstraints(unique=(name,) == table.key)
        columns.append(dg.TableColumn(name, kind.lower(), COLUMNS.get(name), constraints=is_key))
    return dg.TableSchema(columns)
