"""Which version of each Delta table a build reads."""

from __future__ import annotations

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import (
    ATTRIBUTED_ORDERS,
    BATCH_LEDGER,
    BILLING_LINES,
    CAMPAIGNS,
    EVENTS,
    MINUTE_METRICS,
    NAMES,
    RECONCILIATIONS,
    RESTATEMENTS,
)
from spark_jobs.lake.writes import ensure_tables

_INGESTED = (BATCH_LEDGER, MINUTE_METRICS, CAMPAIGNS, RECONCILIATIONS)  # there is nothing to show without these
SOURCES = (BILLING_LINES, *_INGESTED, RESTATEMENTS, EVENTS, ATTRIBUTED_ORDERS, NAMES)
"""Tables that the dbt project declares as sources, in the order in which they are pinned. The ledger before all that a batch
writes: a batch's ledger rows are written last, so a batch in the pinned ledger is complete in every version pinned after it.
The billing lines before the ledger: they were made from increments that the build sees too."""


def pin_versions(settings: Settings) -> dict[str, int]:
    """Pin SOURCES in that order; return table name -> version.

    First adds the tables and columns that a lakehouse of an older adtally lacks. Raises AdtallyError if tables do not exist yet.
    """
    lake = Lake(settings)
    missing = [table.name for table in _INGESTED if not lake.exists(table)]
    if missing:
        raise AdtallyError(
            f"no marts without the Delta table{'s' if len(missing) > 1 else ''} {', '.join(missing)} in {settings.lakehouse_uri}",
            hint="run `adtally ingest` first",
        )
    ensure_tables(settings)
    return lake.pin(*SOURCES).versions


def table_ids(settings: Settings) -> dict[str, str]:
    """Return Delta's id of each table of SOURCES: table name -> id. A table that was created again has another id."""
    return {table.name: DeltaLog(settings.table_uri(table.name)).table_id() for table in SOURCES}
