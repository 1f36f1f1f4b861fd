"""The durable steps of the jobs, each named once. Every durable write runs in a ``with durable(...)`` block.

The crash tests use these steps: a process with ``ADTALLY_CRASH_AT=before:events:2`` in its environment kills itself with SIGKILL
right before it commits the events of batch 2. Nothing else reads that variable.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

CRASH_VARIABLE = "ADTALLY_CRASH_AT"


class Step(StrEnum):
    """A durable step. First the steps of a batch in their order, then the steps of maintenance."""

    CAMPAIGNS = "campaigns"
    OFFSETS = "offsets"  # Spark's: the batch is planned (checkpoint offsets/N)
    EVENTS = "events"
    KEY_INDEX = "key_index"
    REJECTED_EVENTS = "rejected_events"
    MINUTE_METRICS = "minute_metrics"
    EVENTS_LEDGER = "events_ledger"
    ORDERS = "orders"
    REJECTED_ORDERS = "rejected_orders"
    ORDERS_LEDGER = "orders_ledger"
    COMMITS = "commits"  # Spark's: the batch is done (checkpoint commits/N)
    TYPES_CHANGED = "types_changed"  # a table of an older release is rewritten with the types of this one
    NAMES = "names"
    HOUR_CLOSINGS = "hour_closings"
    SOURCE_GAPS = "source_gaps"
    RELEASES = "releases"  # of quarantined files
    RAW_ARCHIVED = "raw_archived"  # raw input is copied to the archive
    RAW_RETIREMENTS = "raw_retirements"  # what is archived or dropped is decided
    RAW_REMOVED = "raw_removed"  # and removed
    RAW_COPY = "raw_copy"  # of a topic, by a separate query
    COMPACTION = "compaction"
    RESTORE = "restore"  # a compaction is reverted
    VACUUM = "vacuum"
    DAMAGE_REMOVED = "damage_removed"  # damaged data files are removed from a table
    CORRECTION_DECIDED = "correction_decided"  # the whole correction is written
    CORRECTED_EVENTS = "corrected_events"
    CORRECTED_REJECTS = "corrected_rejects"
    CORRECTED_METRICS = "corrected_metrics"
    CORRECTED_ORDERS = "corrected_orders"
    CORRECTED_ORDER_REJECTS = "corrected_order_rejects"
    CORRECTED_LEDGER = "corrected_ledger"
    RESTATEMENTS = "restatements"
    HOUR_RULES = "hour_rules"
    RECONCILIATIONS = "reconciliations"
    CORRECTION_DONE = "correction_done"  # the correction is finished and may be deleted
    ERASURE_QUEUED = "erasure_queued"
    ERASURE_DECIDED = "erasure_decided"  # the ids, their tokens and the files to rewrite are written
    SUPPRESSED = "suppressed"  # from here on no record brings the id back
    ERASED_INPUT = "erased_input"  # a landing file or a rule file is replaced
    ERASED_ROWS = "erased_rows"  # of one table
    ERASED_COMMIT = "erased_commit"  # a commit of a log no longer has what an operator wrote of a person
    ERASURES = "erasures"  # the states of the replaced files, before them; the receipts, after the proof
    ERASED_VERSIONS = "erased_versions"  # data files of older versions with the id are deleted
    ERASURE_CARRIED_OUT = "erasure_carried_out"  # only the proof is missing
    ERASURE_DONE = "erasure_done"  # the ids are forgotten
    RULE_SETS = "rule_sets"
    TRAFFIC_REVIEWS = "traffic_reviews"
    ATTRIBUTED_ORDERS = "attributed_orders"
    BILLING_LINES = "billing_lines"
    CHAINED = "chained"  # the rows of an older adtally get their places in the hash chain
    AUDIT_LOG = "audit_log"
    PUBLISHED_METRICS = "published_metrics"  # a version's increments are in their topic
    PUBLISHED_CREDITS = "published_credits"
    PUBLICATIONS = "publications"
    FENCES = "fences"  # of a lease that was not released, on each table
    MARTS = "marts"  # the pointer of the marts in a store names a new build


def crash_point(moment: str, step: Step, batch_id: int) -> None:
    """Kill this process if CRASH_VARIABLE names exactly this point."""
    if os.environ.get(CRASH_VARIABLE) == f"{moment}:{step}:{batch_id}":
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def durable(step: Step, batch_id: int = 0) -> Iterator[None]:
    """Mark the block as one durable write, with a crash point before and after it."""
    crash_point("before", step, batch_id)
    yield
    crash_point("after", step, batch_id)


def watch_checkpoint(checkpoint: Path) -> None:
    """Kill this process once Spark, which makes this step itself, has written the checkpoint file that CRASH_VARIABLE names."""
    ordered = os.environ.get(CRASH_VARIABLE, "").split(":")
    if len(ordered) != 3 or ordered[0] != "after" or ordered[1] != Step.COMMITS:
        return
    target = checkpoint / "commits" / ordered[2]

    def watch() -> None:
        while not target.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="crash-watch").start()
