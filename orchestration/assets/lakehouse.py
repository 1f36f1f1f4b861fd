"""The Delta tables, as one ingest run materialises them."""

from collections.abc import Iterator
from dataclasses import asdict

import dagster as dg

from spark_jobs.config import load_settings
from spark_jobs.delta_log import DeltaLog
from spark_jobs.jobs.ingest import run_ingest
from spark_jobs.tables import TABLES

LANDING = dg.AssetSpec("landing_files", group_name="landing", description="JSON lines and CSV files, as collectors rename them in.")
NAMES = {"ad_events": "events"} | {name: name for name in TABLES if name != "events"}


@dg.multi_asset(
    name="ingest",
    group_name="lakehouse",
    specs=[dg.AssetSpec(asset, deps=[LANDING], description=TABLES[table].grain) for asset, table in NAMES.items()],
    pool="spark",
)
def ingest(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
    """Ingest all that is in the landing folder."""
    settings = load_settings()
    report = run_ingest(settings, progress=lambda batch: context.log.info("%s", asdict(batch)))
    for asset, table in NAMES.items():
        version = DeltaLog(settings.table_uri(table)).latest_version()
        yield dg.MaterializeResult(asset_key=asset, metadata={"delta_version": version, **asdict(report)})
