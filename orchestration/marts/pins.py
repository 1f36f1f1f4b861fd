"""Which version of each Delta table a build reads."""

from __future__ import annotations

import re
from pathlib import Path

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, TableCorruptionError
from spark_jobs.lake.roots import require_local
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
    Table,
)
from spark_jobs.lake.writes import ensure_tables

SOURCES: tuple[Table, ...] = (
    *(BILLING_LINES, BATCH_LEDGER, MINUTE_METRICS, CAMPAIGNS, RECONCILIATIONS),
    *(RESTATEMENTS, EVENTS, ATTRIBUTED_ORDERS, NAMES),
)
"""Tables that the dbt project declares as sources, in the order in which they are pinned. The ledger before all that a batch
writes: a batch's ledger rows are written last, so a batch in the pinned ledger is complete in every version pinned after it.
The billing lines before the ledger: they were made from increments that the build sees too."""

_INGESTED = (BATCH_LEDGER, MINUTE_METRICS, CAMPAIGNS, RECONCILIATIONS)  # there is nothing to show without these

# A commit, or a checkpoint of it in one of its forms: classic, of several parts, or named by a UUID.
_LOG_ENTRY = re.compile(r"(\d{20})\.(?:json|checkpoint(?:\.\d{10}\.\d{10}|\.[0-9a-f-]{36})?\.(?:parquet|json))")


def latest_version(table_path: Path) -> int | None:
    """Newest committed version of the Delta table in ``table_path``; None when there is no table.

    Reads the names in ``_delta_log`` only: a commit appears there by a rename, so a name that is there is whole.
    Raises TableCorruptionError when the folder exists and holds no version.
    """
    log = table_path / "_delta_log"
    if not log.is_dir():
        return None
    versions = [int(match[1]) for entry in log.iterdir() if (match := _LOG_ENTRY.fullmatch(entry.name))]
    if not versions:
        raise TableCorruptionError(f"{log} holds no version", hint="a Delta table has at least version 0")
    return max(versions)


def pin_versions(settings: Settings) -> dict[str, int]:
    """Table name -> version, for SOURCES, pinned one after the other in that order.

    A lakehouse that an older adtally made gets the tables and columns that it lacks first. Raises UsageError when the lakehouse
    is not a local path, AdtallyError naming the tables that do not exist yet.
    """
    require_local(settings, "marts build")
    missing = [table.name for table in _INGESTED if latest_version(Path(settings.table_uri(table.name))) is None]
    if missing:
        raise AdtallyError(
            f"no marts without the Delta table{'s' if len(missing) > 1 else ''} {', '.join(missing)} in {settings.lakehouse_uri}",
            hint="run `adtally ingest` first",
        )
    ensure_tables(settings)
    return {table.name: latest_version(Path(settings.table_uri(table.name))) or 0 for table in SOURCES}
