"""The invariant at every start of a query: its checkpoint and the tables that its batches commit to tell the same story.

A batch commits to its tables in a fixed order, and ends (Spark's ``commits/N``) when it is in the last of them. So the tables never
know a batch that the checkpoint does not, an earlier table is never behind a later one, and no batch with records is missing from
the last table once a later batch began. Where that does not hold (a backup of one side was restored, a commit was lost after it was
acknowledged) going on would lose records: Delta would take new batches for ones it has.
"""

from __future__ import annotations

from collections.abc import Sequence

from deltalake import DeltaTable

from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.durable_checkpoint import read_state
from spark_jobs.ingest.source import Source
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import Table

_KEPT = 100  # batches that Spark keeps in a checkpoint
_FSCK = "`adtally fsck` says what is lost and repairs it; docs/runbooks/power-cut.md"


def check_agreement(settings: Settings, source: Source, tables: Sequence[Table], rejected: Table | None = None) -> None:
    """Raise TableCorruptionError, saying which command mends it, if a query's checkpoint and its tables do not agree.

    ``tables`` are those that each batch with records commits to, in that order; ``rejected`` gets a commit only of some batches,
    after the first of ``tables``. Reads a snapshot of each table. A query without a checkpoint agrees with anything.
    """
    state = read_state(source.checkpoint)
    if state is None:
        return
    last = {table.name: _last_batch(settings, table, state.query_id) for table in tables}
    first, final = tables[0].name, tables[-1].name
    known = {**last, **({rejected.name: _last_batch(settings, rejected, state.query_id)} if rejected else {})}
    where = f"the checkpoint {source.checkpoint}"

    newest = max(known, key=lambda name: known[name])
    if known[newest] > state.planned:
        raise TableCorruptionError(
            f"table {newest} has batch {known[newest]} of the {source.name} query, {where} only knows {_count(state.planned)}: "
            "it is older than the tables, and new batches would be taken for old ones and lost",
            hint=f"move {source.checkpoint} away: all input is then read again and nothing counts twice; "
            "docs/runbooks/lost-checkpoint.md",
        )
    for earlier, later in [*zip(list(last)[:-1], list(last)[1:], strict=True), *([(first, rejected.name)] if rejected else [])]:
        if known[later] > known[earlier]:
            raise TableCorruptionError(
                f"table {later} has batch {known[later]} of the {source.name} query, but table {earlier}, which is committed "
                f"before, ends with batch {known[earlier]}",
                hint=_FSCK,
            )
    must = max(state.ended, last[first] - 1)
    for batch in range(max(last[final] + 1, must - _KEPT), must + 1):
        if source.has_records(batch):
            raise TableCorruptionError(
                f"batch {batch} of the {source.name} query has ended by {where}, but table {final} ends with batch {last[final]}",
                hint=_FSCK,
            )


def _last_batch(settings: Settings, table: Table, query_id: str) -> int:
    """The newest batch of a query that a table has; -1: none."""
    uri = settings.table_uri(table.name)
    found = DeltaTable(uri).transaction_version(query_id) if DeltaLog(uri).exists() else None
    return -1 if found is None else int(found)


def _count(planned: int) -> str:
    return "no batch" if planned < 0 else f"batches up to {planned}"
