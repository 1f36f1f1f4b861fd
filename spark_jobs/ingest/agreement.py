"""Check, at every start of a query, that its checkpoint agrees with the tables that its batches commit to.

A batch commits to its tables in a fixed order, and ends (Spark's ``commits/N``) after the last of them. So no table has a batch
that the checkpoint or an earlier table lacks, and the last table has every batch with records before the newest one. If this does
not hold (somebody restored a backup of one side, or an acknowledged commit was lost), an ingest would lose records: Delta would
skip new batches as batches that it has already.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.durable_checkpoint import read_state
from spark_jobs.ingest.source import RecordSource
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import Table

_KEPT = 100  # batches that Spark keeps in a checkpoint
_FSCK = "`adtally fsck` says what is lost and repairs it; docs/runbooks/power-cut.md"


def check_agreement(settings: Settings, source: RecordSource, tables: Sequence[Table], rejected: Table | None = None) -> None:
    """Raise TableCorruptionError, which names the command that repairs it, if a query's checkpoint and its tables do not agree.

    Each batch with records commits to ``tables``, in that order; only some batches commit to ``rejected``, after the first of
    ``tables``. Reads a snapshot of each table. A query without a checkpoint agrees with anything.
    """
    state = read_state(source.checkpoint)
    if state is None:
        return
    known = {table.name: _last_batch(settings, table, state.query_id) for table in (*tables, *filter(None, [rejected]))}
    first, final = tables[0].name, tables[-1].name
    where = f"the checkpoint {source.checkpoint}"

    planned = "no batch" if state.planned < 0 else f"batches up to {state.planned}"
    newest = max(known, key=lambda name: known[name])
    if known[newest] > state.planned:
        raise TableCorruptionError(
            f"table {newest} has batch {known[newest]} of the {source.name} query, {where} only knows {planned}: "
            "it is older than the tables, and new batches would be taken for old ones and lost",
            hint="`adtally fsck --repair` sets it aside: all input is then read again and nothing counts twice; "
            "docs/runbooks/lost-checkpoint.md",
        )
    in_order = [(earlier.name, later.name) for earlier, later in pairwise(tables)]
    if rejected:
        in_order.append((first, rejected.name))
    for earlier, later in in_order:
        if known[later] > known[earlier]:
            raise TableCorruptionError(
                f"table {later} has batch {known[later]} of the {source.name} query, but table {earlier}, which is committed "
                f"before, ends with batch {known[earlier]}",
                hint=_FSCK,
            )
    must = max(state.ended, known[first] - 1)
    for batch in range(max(known[final] + 1, must - _KEPT), must + 1):
        if source.has_records(batch):
            raise TableCorruptionError(
                f"batch {batch} of the {source.name} query has ended by {where}, but table {final} ends with batch {known[final]}",
                hint=_FSCK,
            )


def _last_batch(settings: Settings, table: Table, query_id: str) -> int:
    """Return the newest batch of a query that a table has; -1 if it has none."""
    lake = Lake(settings)
    batch = lake.last_transaction(table, query_id) if lake.exists(table) else None
    return -1 if batch is None else batch
