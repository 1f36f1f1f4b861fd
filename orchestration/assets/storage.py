"""What is done with the tables as a whole: compaction of all that is closed, and vacuum."""

import dagster as dg
from pydantic import Field

from orchestration.assets.hours import compaction_metadata, markdown_table
from orchestration.assets.lakehouse import OWNERS, TABLE_ASSETS, runbook
from orchestration.assets.outcome import failing_clearly
from spark_jobs.config import load_settings


class Vacuum(dg.Config):
    """What a run of the vacuum may be told."""

    dry_run: bool = Field(default=False, description="Tell what would be deleted, and delete nothing.")


@dg.asset(
    group_name="maintenance",
    kinds={"deltalake"},
    owners=OWNERS,
    deps=[asset.key for asset in TABLE_ASSETS],
    pool="compaction",
    description="Every table whose small files are worth merging: all closed hours of `events` that have changed since they were "
    "compacted, and the other tables.\n\n" + runbook("compaction"),
)
def compacted_tables(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
    """Compact all that needs it."""
    from spark_jobs.jobs.compact import compact

    with failing_clearly():
        report = compact(load_settings(), None, progress=context.log.info)
    return dg.MaterializeResult(metadata=compaction_metadata(report.tables) | {"seconds": report.seconds})


@dg.asset(
    group_name="maintenance",
    kinds={"deltalake"},
    owners=OWNERS,
    deps=["compacted_tables"],
    pool="compaction",
    description="Data files that nothing needs any more are deleted: no running stream, no published mart, no time travel within "
    "ADTALLY_VACUUM_RETENTION. `dry_run` in the run's configuration lists them.\n\n" + runbook("vacuum"),
)
def vacuumed_tables(context: dg.AssetExecutionContext, config: Vacuum) -> dg.MaterializeResult[None]:
    """Vacuum every table."""
    from spark_jobs.jobs.vacuum import vacuum

    with failing_clearly():
        report = vacuum(load_settings(), dry_run=config.dry_run, progress=context.log.info)
    rows = [
        {
            "table": found.table,
            "files": found.files,
            "bytes": found.bytes,
            "kept versions": "; ".join(f"{version}: {reason}" for version, reason in found.reasons.items()),
        }
        for found in report.tables
    ]
    return dg.MaterializeResult(
        metadata={
            "dry_run": report.dry_run,
            "files": sum(found.files for found in report.tables),
            "bytes": sum(found.bytes for found in report.tables),
            "tables": markdown_table(rows),
            "seconds": report.seconds,
        }
    )
