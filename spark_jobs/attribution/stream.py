"""Attribution beside an ingest: a thread that looks at the ledger of batches and credits the orders which new batches changed.

The ledger only shows that there is work. The commits of `attributed_orders` store how far the inputs were read, so the thread needs
no checkpoint, and finds nothing to do where there is nothing new.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from spark_jobs.attribution.job import AttributionReport, attribute
from spark_jobs.attribution.rules import load_attribution_rules
from spark_jobs.config import Settings
from spark_jobs.errors import BusyError, RuleFileError
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import BATCH_LEDGER

TRIGGER_SECONDS = 10.0  # the minimum, because attribution takes cores from the ingest of events


class AttributionQuery:
    """The running thread, with the part of `pyspark.sql.streaming.StreamingQuery` that the ingest's loop of queries uses."""

    lastProgress = None

    def __init__(self, step: Callable[[], None], seconds: float) -> None:
        self._step, self._seconds = step, seconds
        self._is_active = False
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="attribution", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._is_active = True
                self._step()
                self._is_active = False
                self._stop.wait(self._seconds)
        except Exception as error:
            self._error = error

    @property
    def isActive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def status(self) -> dict[str, bool]:
        """Whether it is crediting now, under Spark's name."""
        return {"isTriggerActive": self._is_active}

    def exception(self) -> Exception | None:
        """Return the error that ended the thread."""
        return self._error

    def stop(self) -> None:
        """End the thread after what it does now, for which this does not wait."""
        self._stop.set()


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

    def start(self, *, trigger_seconds: float) -> AttributionQuery:
        """Start the query: it credits at once, and then after each change of the ledger."""
        ledger = Lake(self.settings).log(BATCH_LEDGER)
        credited: list[int | None] = []

        def credit_changes() -> None:
            version = ledger.latest_version()
            if credited != [version] and not self.stopping.is_set() and self._credit():
                credited[:] = [version]

        return AttributionQuery(credit_changes, max(TRIGGER_SECONDS, trigger_seconds))

    def _credit(self) -> bool:
        """Return whether the orders were credited; if not, the next trigger tries again."""
        try:
            report = attribute(self.settings)
        except BusyError:  # another attribution runs
            return False
        except RuleFileError as error:  # nothing was committed
            self._say(f"{error}; orders are credited again once it is right")
            return False
        except Exception as error:
            self.failure = error
            raise
        self._say("")
        if self._report is not None:
            self._report(report)
        return True

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            self._notice(problem or "rules of attribution: all is right again")
        self._problem = problem
