"""The assets of whole tables: compaction of all that is closed, vacuum, the check of every byte, and erasure."""

from collections.abc import Iterator
from dataclasses import asdict

import dagster as dg
from pydantic import Field

from orchestration.assets.hours import Metadata, compaction_metadata, markdown_table, materialize_unless_dry
from orchestration.assets.lakehouse import OWNERS, TABLE_ASSETS
from orchestration.assets.links import runbook
from orchestration.assets.outcome import translate_errors
from spark_jobs.config import load_settings


class Fsck(dg.Config):
    """Configuration of a run of the check."""

    repair: bool = Field(default=False, description="Put right what can be put right; without it nothing changes.")


class Vacuum(dg.Config):
    """Configuration of a run of the vacuum."""

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
    from spark_jobs.operate.compact import compact

    with translate_errors(context):
        report = compact(load_settings(), None, progress=context.log.info)
    return dg.MaterializeResult(metadata=compaction_metadata(report.tables) | {"seconds": report.seconds})


@dg.asset(
    group_name="maintenance",
    kinds={"deltalake"},
    owners=OWNERS,
    deps=["compacted_tables"],
    pool="compaction",
    output_required=False,
    description="Data files that nothing needs any more are deleted: no running stream, no published mart, no time travel within "
    "ADTALLY_VACUUM_RETENTION. `dry_run` in the run's configuration lists them. Landing files and raw copies older than "
    "ADTALLY_RAW_RETENTION are archived or dropped first.\n\n" + runbook("vacuum"),
)
def vacuumed_tables(context: dg.AssetExecutionContext, config: Vacuum) -> Iterator[dg.MaterializeResult[None]]:
    """Vacuum every table."""
    from spark_jobs.operate.vacuum import vacuum

    with translate_errors(context):
        report = vacuum(load_settings(), dry_run=config.dry_run, progress=context.log.info, run_id=context.run_id)
    rows = [
        {
            "table": found.table,
            "files": found.files,
            "bytes": found.bytes,
            "kept versions": "; ".join(f"{version}: {reason}" for version, reason in found.reasons.items()),
        }
        for found in report.tables
    ]
    metadata = {
        "dry_run": report.dry_run,
        "files": sum(found.files for found in report.tables),
        "bytes": sum(found.bytes for found in report.tables),
        "tables": markdown_table(rows),
        "landing_files_retired": report.raw.files,
        "raw_days_retired": ", ".join(report.raw.raw_days),
        "recountable_from": str(report.raw.recountable_from or ""),
        "seconds": report.seconds,
    }
    yield from materialize_unless_dry(context, metadata)


@dg.asset(
    group_name="maintenance",
    kinds={"deltalake"},
    owners=OWNERS,
    deps=[asset.key for asset in TABLE_ASSETS],
    pool="compaction",
    description="Every byte that adtally keeps is checked: logs, data files, indexes, corrections, books. `repair` in the run's "
    "configuration puts right what can be put right. No ingest may run during a repair.\n\n" + runbook("fsck"),
)
def checked_storage(context: dg.AssetExecutionContext, config: Fsck) -> dg.MaterializeResult[None]:
    """Check, and with `repair` repair, all that is stored; fail if findings remain."""
    from spark_jobs.operate.fsck import fsck

    with translate_errors(context):
        report = fsck(load_settings(), repair=config.repair, progress=context.log.info)
    metadata: Metadata = {
        "findings": markdown_table([asdict(found) for found in report.findings]),
        "files": report.files,
        "bytes": report.bytes,
        "commits": report.commits,
        "seconds": report.seconds,
    }
    if report.remaining:
        first = report.remaining[0]
        raise dg.Failure(
            f"{len(report.remaining)} findings remain, such as {first.kind} in {first.place}: {first.detail}",
            metadata=metadata,
            allow_retries=False,
        )
    return dg.MaterializeResult(metadata=metadata)


@dg.asset(
    group_name="maintenance",
    kinds={"deltalake"},
    owners=OWNERS,
    deps=[asset.key for asset in TABLE_ASSETS],
    pool="compaction",
    output_required=False,
    description="Everybody in the queue of `adtally erase --queue` is erased, in one rewrite, and what a killed erasure left is "
    "finished: input, tables, old versions, marts. It ends with the proof. A request is due after ADTALLY_ERASURE_DAYS.\n\n"
    + runbook("erasure-due"),
)
def erased_people(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
    """Erase everybody in the queue. Nobody's id is in the configuration of a run, because Dagster keeps that."""
    from orchestration.erasure import carry_out_erasures

    with translate_errors(context):
        receipts = carry_out_erasures(load_settings(), progress=context.log.info)
    if not receipts:
        context.log.info("the queue is empty")
        return
    yield dg.MaterializeResult(
        metadata={
            "people": sum(len(receipt.people) for receipt in receipts),
            "files": sum(receipt.files_rewritten for receipt in receipts),
            "rows": sum(sum(receipt.rows_rewritten.values()) for receipt in receipts),
            "files_searched": sum(receipt.files_searched for receipt in receipts),
            "receipts": ", ".join(receipt.erasure_id for receipt in receipts),
        }
    )
