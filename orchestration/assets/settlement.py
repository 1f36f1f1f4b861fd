"""The assets of money and credit: review for invalid traffic, attribution, billing, and the settlement of late records."""

from typing import TYPE_CHECKING

import dagster as dg

from orchestration.assets.hours import Metadata, closed_hours, markdown_table
from orchestration.assets.lakehouse import OWNERS
from orchestration.assets.links import runbook
from orchestration.assets.outcome import translate_errors
from orchestration.partitions import hours_of, key_of
from spark_jobs.config import load_settings
from spark_jobs.texts import money

if TYPE_CHECKING:
    from spark_jobs.attribution.job import AttributionReport
    from spark_jobs.billing.job import BillingReport
    from spark_jobs.traffic.review import ReviewReport

_REVIEWED = ("events", "invalid", "changed")
_ATTRIBUTED = ("orders", "credited", "unattributed", "cancelled", "revisions", "touches", "seconds")


def reviewed_hours(hours: dg.HourlyPartitionsDefinition) -> dg.AssetsDefinition:
    """Return the asset of the review for invalid traffic."""

    @dg.asset(
        group_name="settlement",
        kinds={"duckdb", "deltalake"},
        owners=OWNERS,
        deps=["ad_events", "minute_metrics", "batch_ledger"],
        partitions_def=hours,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="corrections",
        description="The hour's events judged as a whole for invalid traffic: repeats, activity, crawlers, lists. What is found "
        "stays in `events`, marked. Compensating increments take its money back, and the restatements show it.\n\n"
        + runbook("invalid-traffic"),
    )
    def reviewed_hours(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        """Review the hours of this run."""
        from spark_jobs.traffic.review import review

        settings = load_settings()
        with translate_errors(context):
            report = review(settings, closed_hours(context, settings), run_id=context.run_id, progress=context.log.info)
        for found in report.hours:
            figures = {name: getattr(found, name) for name in (*_REVIEWED, "rule_set")}
            context.add_asset_metadata(figures, partition_key=key_of(found.event_hour))
        return dg.MaterializeResult(metadata=review_metadata(report))

    return reviewed_hours


def attributed_orders(hours: dg.HourlyPartitionsDefinition) -> dg.AssetsDefinition:
    """Return the asset of the attribution of the orders of closed hours."""

    @dg.asset(
        group_name="settlement",
        kinds={"deltalake"},
        owners=OWNERS,
        deps=["orders", "reviewed_hours"],
        partitions_def=hours,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="attribution",
        description="The orders of the hour, credited again from all their touches, and every other order that a touch of the hour "
        "concerns. An order with unchanged credits keeps its revision.\n\n" + runbook("attribution"),
    )
    def attributed_orders(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        """Credit the orders of this run's hours."""
        from spark_jobs.attribution.job import attribute

        settings = load_settings()
        with translate_errors(context):
            attribute(settings, run_id=context.run_id, progress=context.log.info)
            report = attribute(settings, hours_of(context.partition_key_range), run_id=context.run_id, progress=context.log.info)
        return dg.MaterializeResult(metadata=attribution_metadata(report))

    return attributed_orders


@dg.asset(
    group_name="settlement",
    kinds={"duckdb", "deltalake"},
    owners=OWNERS,
    deps=["minute_metrics", "batch_ledger", "reviewed_hours", "reconciled_hours"],
    pool="billing",
    description="Table `billing_lines`: a charge per campaign and day once the day is closed; what changes later is a line of its "
    "own with its reason, run and rule set. Nothing is ever taken back but by a further line.\n\n" + runbook("billing"),
)
def billing_lines(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
    """Bill the closed days that are not billed yet."""
    from spark_jobs.billing.job import bill

    with translate_errors(context):
        report = bill(load_settings(), run_id=context.run_id, progress=context.log.info)
    return dg.MaterializeResult(metadata=billing_metadata(report))


@dg.asset(
    group_name="settlement",
    kinds={"duckdb", "deltalake"},
    owners=OWNERS,
    deps=["ad_events", "orders", "minute_metrics", "batch_ledger"],
    pool="corrections",
    description="What came since, late records among it: hours whose review is out of date are reviewed, orders concerned "
    "credited, closed days billed.\n\n" + runbook("invalid-traffic"),
)
def settled_records(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
    """Settle all that is out of date."""
    from spark_jobs.operate.settle import settle

    with translate_errors(context):
        report = settle(load_settings(), run_id=context.run_id, progress=context.log.info)
    parts = {
        "review": review_metadata(report.review),
        "attribution": attribution_metadata(report.attribution),
        "billing": billing_metadata(report.billing),
    }
    return dg.MaterializeResult(
        metadata={f"{part}_{name}": value for part, found in parts.items() for name, value in found.items()}
    )


def review_metadata(report: "ReviewReport") -> Metadata:
    """Return the sums of a review, and a table of the hours in which marks changed."""
    rows = [
        {"hour": key_of(found.event_hour), "events": found.events, "invalid": found.invalid, "marks changed": found.changed}
        for found in report.hours
        if found.changed
    ]
    sums = {name: sum(getattr(found, name) for found in report.hours) for name in _REVIEWED}
    return {"hours": len(report.hours), **sums, "changes": markdown_table(rows), "seconds": report.seconds}


def attribution_metadata(report: "AttributionReport") -> Metadata:
    """Return the figures of an attribution."""
    return {name: getattr(report, name) for name in _ATTRIBUTED}


def billing_metadata(report: "BillingReport") -> Metadata:
    """Return the figures of a billing run, and a table of its lines."""
    rows = [
        {
            "day": str(line.event_date),
            "campaign": line.campaign_id,
            "type": line.line_type,
            "amount": money(line.amount_micros * 1000, line.currency),
            "currency": line.currency,
            "reason": line.reason,
        }
        for line in report.lines
    ]
    return {"days": report.days, "lines": len(report.lines), "written": markdown_table(rows), "seconds": report.seconds}
