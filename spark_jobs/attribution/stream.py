"""Attribution as a stream: a query over the ledger of batches that credits the orders which the batches changed.

The ledger only shows that there is work. The commits of `attributed_orders` store how far the inputs were read, so a lost
checkpoint costs nothing, and a batch that runs again finds nothing to do.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import suppress

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.attribution.job import AttributionReport, attribute
from spark_jobs.attribution.rules import load_attribution_rules
from spark_jobs.config import Settings
from spark_jobs.errors import BusyError, RuleFileError, StoppedError, TableCorruptionError
from spark_jobs.ingest.durable_checkpoint import set_aside_torn
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER

TRIGGER_SECONDS = 10.0  # the minimum, because attribution takes cores from the ingest of events


class AttributionStream:
    """The query, beside those of events and orders. Raises RuleFileError if the rules are wrong.

    If the rule file becomes invalid later, no order is credited until it is valid again; ``notice`` gets one line at each change.
    """

    stream = "attribution"

    def __init__(
        self,
        settings: Settings,
        report: Callable[[AttributionReport], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        load_attribution_rules(settings)
        self.settings = settings
        self.failure: Exception | None = None
        self.stopping = threading.Event()
        self._report = report
        self._notice = notice or (lambda _line: None)
        self._problem = ""

    def start(self, spark: SparkSession, *, continuous: bool, trigger_seconds: float) -> StreamingQuery:
        """Start the query, ``continuous`` or up to the ledger's newest version. Sets aside or removes a torn checkpoint."""
        checkpoint = self.settings.checkpoints_path / self.stream
        try:
            set_aside_torn(checkpoint)
        except TableCorruptionError:
            shutil.rmtree(checkpoint)
        rows = (
            spark.readStream.format("delta")
            .option("skipChangeCommits", "true")  # a correction rewrites files; what it changes is in `events` too
            .load(Lake(self.settings).uri(BATCH_LEDGER))
            .select("_batch_id")
        )
        writer = rows.writeStream.queryName(self.stream).foreachBatch(self._run).option("checkpointLocation", str(checkpoint))
        if not continuous:
            return writer.trigger(availableNow=True).start()
        milliseconds = int(max(TRIGGER_SECONDS, trigger_seconds) * 1000)
        return writer.trigger(processingTime=f"{milliseconds} milliseconds").start()

    def _run(self, _: DataFrame, batch_id: int) -> None:
        try:
            if self.stopping.is_set():
                raise StoppedError("stopped before this batch")
            with suppress(BusyError):  # another attribution runs; the next batch tries again
                report = attribute(self.settings)
                self._say("")
                if self._report is not None:
                    self._report(report)
        except RuleFileError as error:  # nothing was committed; the next batch or run tries again
            self._say(f"{error}; orders are credited again once it is right")
        except Exception as error:
            self.failure = error  # Spark keeps only its text
            raise

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            self._notice(problem or "rules of attribution: all is right again")
        self._problem = problem
