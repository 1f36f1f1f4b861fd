"""Attribution as a stream: a query over the ledger of batches that credits the orders concerned by what they brought.

The ledger only says that there is something to do: what, and how far it has come, stands in the commits of `attributed_orders`,
so a lost checkpoint costs nothing, and a batch that runs again finds nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.config import Settings
from spark_jobs.errors import BusyError
from spark_jobs.jobs.attribute import AttributionReport, attribute
from spark_jobs.rules.attribution import load_attribution_rules
from spark_jobs.tables import BATCH_LEDGER

TRIGGER_SECONDS = 10.0  # at least: the events need not wait for it, nor share their cores with it more often


class AttributionStream:
    """The query, beside those of events and orders. Raises RuleFileError where the rules are wrong."""

    stream = "attribution"

    def __init__(self, settings: Settings, report: Callable[[AttributionReport], None] | None = None) -> None:
        load_attribution_rules(settings)
        self.settings = settings
        self.failure: Exception | None = None
        self._report = report

    def start(self, spark: SparkSession, *, continuous: bool, trigger_seconds: float) -> StreamingQuery:
        """Start it: until stopped, or up to the ledger as it is."""
        rows = (
            spark.readStream.format("delta")
            .option("skipChangeCommits", "true")  # a correction rewrites files; what it changes is in `events` too
            .load(self.settings.table_uri(BATCH_LEDGER.name))
            .select("_batch_id")
        )
        checkpoint = str(self.settings.checkpoints_path / self.stream)
        writer = rows.writeStream.queryName(self.stream).foreachBatch(self._run).option("checkpointLocation", checkpoint)
        if continuous:
            writer = writer.trigger(processingTime=f"{int(max(TRIGGER_SECONDS, trigger_seconds) * 1000)} milliseconds")
        else:
            writer = writer.trigger(availableNow=True)
        return writer.start()

    def _run(self, _: DataFrame, batch_id: int) -> None:
        try:
            with suppress(BusyError):  # another attribution is at it; the next batch looks again
                report = attribute(self.settings)
                if self._report is not None:
                    self._report(report)
        except Exception as error:
            self.failure = error  # Spark passes on its text only
            raise
