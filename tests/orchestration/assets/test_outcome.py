"""What the wrapper of an asset's work adds to it."""

from datetime import UTC, datetime

import dagster as dg

from orchestration.assets.outcome import translate_errors
from spark_jobs.config import Settings
from spark_jobs.lake.acts import read_audit_log
from spark_jobs.operate.watermark import close_by_hand


def test_the_acts_of_an_asset_are_those_of_its_run(settings: Settings) -> None:
    @dg.asset
    def closing(context: dg.AssetExecutionContext) -> None:
        with translate_errors(context):
            close_by_hand(settings, datetime(2025, 6, 4, tzinfo=UTC), reason="r", closed_by="ann")

    result = dg.materialize([closing])
    (entry,) = read_audit_log(settings)
    assert (entry.command, entry.run_id) == ("dagster closing", result.run_id)
