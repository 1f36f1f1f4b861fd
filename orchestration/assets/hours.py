"""The assets of closed hours: compaction, recount, backfill. One run takes a whole range of hours."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from orchestration.assets.lakehouse import LANDING_FILES, OWNERS
from orchestration.assets.links import runbook
from orchestration.assets.outcome import Verdict, evaluations, translate_errors
from orchestration.partitions import hours_of, key_of
from spark_jobs.config import Settings, load_settings
from spark_jobs.texts import counted, money, printable
from spark_jobs.units import HourRange

if TYPE_CHECKING:
    from spark_jobs.audit.compare import Difference
    from spark_jobs.corrections.reconcile import Waiting
    from spark_jobs.operate.compact import TableCompaction

Metadata = dict[str, Any]

RECOUNT_CHECK = "recount_equals_stream"
_ROWS_SHOWN = 100
_COMPACTED = ("files_before", "files_after", "bytes_before", "bytes_after")
_RECOUNTED = ("events_expected", "events_found", "orders_expected", "orders_found")


class Reconciliation(dg.Config):
    """Configuration of a run of the reconciliation."""

    repair: bool = Field(default=False, description="Write what is missing and compensate what is too much, exactly once.")


class Backfill(dg.Config):
    """Configuration of a run of a backfill."""

    dry_run: bool = Field(default=False, description="Show what would change, per campaign and day, and write nothing.")
    reason: str = Field(default="asked for in Dagster", description="Why; the restatements show it.")


def closed_hours(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, settings: Settings) -> HourRange:
    """Return the hours of this run. Raises UsageError if one of them is not closed, and names the silent sources."""
    from spark_jobs.operate.watermark import require_closed

    hours = hours_of(context.partition_key_range)
    require_closed(settings, hours)
    return hours


def compacted_events(hours: dg.HourlyPartitionsDefinition) -> dg.AssetsDefinition:
    """Return the asset of the compaction of table `events`."""

    @dg.asset(
        group_name="maintenance",
        kinds={"deltalake"},
        owners=OWNERS,
        deps=["ad_events", "reviewed_hours"],
        partitions_def=hours,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="compaction",
        description="The hour's data files of `events`, merged into few. The rows are the same before and after: the metadata show "
        "their number and hash.\n\n" + runbook("compaction"),
    )
    def compacted_events(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        """Compact the hours of this run."""
        from spark_jobs.operate.compact import compact

        settings = load_settings()
        with translate_errors(context):
            report = compact(settings, closed_hours(context, settings), progress=context.log.info)
        return dg.MaterializeResult(metadata=compaction_metadata(report.tables) | {"seconds": report.seconds})

    return compacted_events


def compaction_metadata(tables: Sequence["TableCompaction"]) -> Metadata:
    """Return the sums of the compactions, and a table of them."""
    rows = [
        {
            "table": found.table,
            "partition": found.partition or "",
            "files before": found.files_before,
            "files after": found.files_after,
            "rows": found.rows,
            "content hash": found.content_hash,
            "version": found.version_after,
        }
        for found in tables
    ]
    sums = {name: sum(getattr(found, name) for found in tables) for name in _COMPACTED}
    return sums | {"dagster/row_count": sum(found.rows for found in tables), "compactions": markdown_table(rows)}


def reconciled_hours(hours: dg.HourlyPartitionsDefinition) -> dg.AssetsDefinition:
    """Return the asset of the recount, with its check."""
    check = dg.AssetCheckSpec(
        RECOUNT_CHECK,
        asset="reconciled_hours",
        blocking=True,
        partitions_def=hours,
        description="The stream's tables equal a recount of the raw input by independent code, to the row and the nano. "
        "Differences that a repair put right do not count.\n\n" + runbook("reconciliation-difference"),
    )

    @dg.asset(
        group_name="maintenance",
        kinds={"duckdb", "deltalake"},
        owners=OWNERS,
        deps=[LANDING_FILES, "ad_events", "rejected_events", "minute_metrics", "orders", "batch_ledger", "reviewed_hours"],
        partitions_def=hours,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[check],
        pool="corrections",
        description="The hour's raw input, recounted and compared with all that was made of it. With `repair` in the run's "
        "configuration, differences are put right exactly once.\n\n" + runbook("reconciliation-difference"),
    )
    def reconciled_hours(
        context: dg.AssetExecutionContext, config: Reconciliation
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckEvaluation | dg.Output[None]]:
        """Recount the hours of this run."""
        from orchestration.reconciliation import run_reconciliation

        settings = load_settings()
        with translate_errors(context):
            wanted = closed_hours(context, settings)
            report = run_reconciliation(settings, wanted, repair=config.repair, run_id=context.run_id, progress=context.log.info)
        for found in report.hours:
            figures = {name: getattr(found, name) for name in _RECOUNTED}
            context.add_asset_metadata(figures | {"differences": len(found.differences)}, partition_key=key_of(found.hour))
        yield dg.MaterializeResult(metadata={"delta_versions": report.versions, "seconds": report.seconds, "repair": config.repair})
        yield from evaluations(check, recount_verdicts(wanted, report.remaining, report.waiting))

    return reconciled_hours


def recount_verdicts(hours: HourRange, remaining: Sequence["Difference"], waiting: Sequence["Waiting"] = ()) -> Iterator[Verdict]:
    """Yield for each hour whether stream and recount agree. Differences in records without a time count for the first hour.

    An hour with a batch that is ``waiting`` for raw records fails too: the recount left the batch out.
    """
    for hour in hours:
        own = [found for found in remaining if (found.event_hour or hours.start) == hour]
        rows = [
            {
                "layer": found.layer,
                "cause": found.cause,
                "campaign": found.campaign_id or "",
                "rows": found.rows_different,
                "nanos": found.nanos_found - found.nanos_expected,
                "detail": found.detail,
            }
            for found in own[:_ROWS_SHOWN]
        ]
        incomplete = [found for found in waiting if hour in (found.hours or [hours.start])]
        says = [f"{counted(len(own), 'difference')}, the first: {own[0].cause} in {own[0].layer}"] if own else []
        if incomplete:
            first = incomplete[0]
            says.append(f"{first.raw_table} lacks offsets {first.first_offset} to {first.end_offset - 1} of {first.source} yet")
        yield Verdict(
            hour,
            passed=not says,
            description="; ".join(says) or None,
            metadata={
                "differences": len(own),
                **({"waiting": len(incomplete)} if incomplete else {}),
                "rows_different": sum(found.rows_different for found in own),
                **({"found": markdown_table(rows)} if own else {}),
            },
        )


def backfilled_hours(hours: dg.HourlyPartitionsDefinition) -> dg.AssetsDefinition:
    """Return the asset of backfills on demand."""

    @dg.asset(
        group_name="maintenance",
        kinds={"duckdb", "deltalake"},
        owners=OWNERS,
        deps=[LANDING_FILES, "campaigns"],
        partitions_def=hours,
        backfill_policy=dg.BackfillPolicy.single_run(),
        output_required=False,
        pool="corrections",
        description="Backfill on demand: choose a range of closed hours, and they are recomputed from the raw input with today's "
        "rules. What changes is restated by compensating increments; nothing published is rewritten. `dry_run` in the "
        "run's configuration observes what would change, and materialises nothing.\n\n" + runbook("backfill"),
    )
    def backfilled_hours(context: dg.AssetExecutionContext, config: Backfill) -> Iterator[dg.MaterializeResult[None]]:
        """Recompute the hours of this run, or observe what a dry run would change."""
        from spark_jobs.corrections.backfill import backfill

        settings = load_settings()
        with translate_errors(context):
            wanted = closed_hours(context, settings)
            log = context.log.info
            report = backfill(settings, wanted, dry_run=config.dry_run, run_id=context.run_id, reason=config.reason, progress=log)
        changes = [
            {
                "day": str(change.event_date),
                "campaign": change.campaign_id,
                "currency": change.currency,
                "rows": change.rows,
                "impressions": change.impressions,
                "clicks": change.clicks,
                "spend before": money(change.spend_nanos_before, change.currency),
                "spend after": money(change.spend_nanos_after, change.currency),
            }
            for change in report.changes
        ]
        metadata = {
            "dry_run": report.dry_run,
            "hours_changed": report.hours_changed,
            "rows_changed": sum(change.rows for change in report.changes),
            "changes": markdown_table(changes),
            "seconds": report.seconds,
        }
        yield from materialize_unless_dry(context, metadata, wanted)

    return backfilled_hours


def markdown_text(value: object) -> str:
    """Return a value as Markdown that shows its text only: no image, link, HTML or further cell."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(str(value)))


def materialize_unless_dry(
    context: dg.AssetExecutionContext, metadata: Metadata, hours: HourRange | None = None
) -> Iterator[dg.MaterializeResult[None]]:
    """Yield the run's materialisation. A dry run logs its metadata as an observation of the asset instead."""
    if not metadata["dry_run"]:
        yield dg.MaterializeResult(metadata=metadata)
        return
    keys = [key_of(hour) for hour in hours or ()]
    described = "Dry run, nothing was written" + (f": {keys[0]} to {keys[-1]}" if keys else "")
    partition = keys[0] if len(keys) == 1 else None
    context.log_event(dg.AssetObservation(context.asset_key, description=described, metadata=metadata, partition=partition))


def markdown_table(rows: Sequence[Mapping[str, object]]) -> dg.MarkdownMetadataValue:
    """Return a table of the first _ROWS_SHOWN ``rows``, which have the same columns."""
    if not rows:
        return dg.MetadataValue.md("nothing")

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    shown = [line(map(markdown_text, row.values())) for row in rows[:_ROWS_SHOWN]]
    more = [f"\nand {len(rows) - len(shown)} more"] if len(rows) > len(shown) else []
    return dg.MetadataValue.md("\n".join([line(map(markdown_text, rows[0])), line("---" for _ in rows[0]), *shown, *more]))
