"""Attribution as a stream: a query over the ledger of batches that credits the orders concerned by what they brought.

The ledger only says that there is something to do: what, and how far it has come, stands in the commits of `attributed_orders`,
so a lost checkpoint costs nothing, and a batch that runs again finds nothing to do.
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
from spark_jobs.lake.tables import BATCH_LEDGER

TRIGGER_SECONDS = 10.0  # at least: the events need not wait for it, nor share their cores with it more often


class AttributionStream:
    """The query, beside those of events and orders. Raises RuleFileError where the rules are wrong.

    Rules that turn bad later hold credits up until the file is right again: ``notice`` is told once of either.
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
        """Start it: until stopped, or up to the ledger as it is. A torn checkpoint is set aside, or removed: it costs nothing."""
        checkpoint = self.settings.checkpoints_path / self.stream
        try:
            set_aside_torn(checkpoint)
        except TableCorruptionError:
            shutil.rmtree(checkpoint)
        rows = (
            spark.readStream.format("delta")
            .option("skipChangeCommits", "true")  # a correction rewrites files; what it changes is in `events` too
            .load(self.settings.table_uri(BATCH_LEDGER.name))
            .select("_batch_id")
        )
        writer = rows.writeStream.queryName(self.stream).foreachBatch(self._run).option("checkpointLocation", str(checkpoint))
        if continuous:
            writer = writer.trigger(processingTime=f"{int(max(TRIGGER_SECONDS, trigger_seconds) * 1000)} milliseconds")
        else:
            writer = writer.trigger(availableNow=True)
        return writer.start()

    def _run(self, _: DataFrame, batch_id: int) -> None:
        try:
            if self.stopping.is_set():
                raise StoppedError("stopped before this batch")
            with suppress(BusyError):  # another attribution is at it; the next batch looks again
                report = attribute(self.settings)
                self._say("")
                if self._report is not None:
                    self._report(report)
        except RuleFileError as error:  # nothing was done; the next batch, or the next run, does it
            self._say(f"{error}; orders are credited again once it is right")
        except Exception as error:
            self.failure = error  # Spark passes on its text only
            raise

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            self._notice(problem or "rules of attribution: all is right again")
        self._problem = problem
