"""The stream of orders. Orders are few and have one row each, so the driver settles them row by row and merges the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from spark_jobs.ingest.batch import Batch
from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA
from spark_jobs.ingest.order_rows import SettledOrders, settle_orders
from spark_jobs.ingest.stage import staged
from spark_jobs.ingest.stream import StreamJob, stamp_of
from spark_jobs.ingest.write import Written
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.stamp import stamped_records
from spark_jobs.lake.tables import ORDERS, REJECTED_ORDERS
from spark_jobs.lake.writes import merge_orders
from spark_jobs.steps import Step
from spark_jobs.traffic.rules import no_rules


class OrdersJob(StreamJob[SettledOrders]):
    """Orders."""

    stream = "orders"
    accepted_table = ORDERS
    rejected_table = REJECTED_ORDERS
    rejected_step = Step.REJECTED_ORDERS
    ledger_step = Step.ORDERS_LEDGER

    def plan_prices(self) -> int:
        """See StreamJob: orders have no prices."""
        return 0

    def classify(self, batch: Batch) -> SettledOrders:
        """See StreamJob."""
        records: list[dict[str, Any]] = []
        for task, first in zip(batch.tasks, batch.first_lines, strict=True):
            for table in staged(task, "rows", CAMPAIGN_SCHEMA.empty_table(), no_rules()):
                place = {"source_file": task.split.name}
                records += [{**row, **place, "source_line": row["n"] + first} for row in table.to_pylist()]
        return settle_orders(records, self._known(sorted({r["order_id"] for r in records}), batch.history_version))

    def _known(self, ids: list[str], version: int) -> dict[str, dict[str, Any]]:
        """Return the rows of some orders at a version of the table."""
        if not ids:
            return {}
        found = Lake(self.settings).at({ORDERS.name: version}).rows(ORDERS, where_in=("order_id", pa.array(ids)))
        return {row["order_id"]: row for row in found.to_pylist()}

    def contradictions(
        self, batch: Batch, classified: SettledOrders, written: list[Written], ledger: list[dict[str, Any]]
    ) -> Iterator[str]:
        """See StreamJob: orders that are merged already must be as they would be merged now."""
        if batch.committed is None:
            return
        version, transaction = batch.committed.version, batch.transaction
        rows = stamped_records(classified.changed, ORDERS, stamp_of(batch)).to_pylist()
        known = self._known(sorted(row["order_id"] for row in rows), version)
        changed = [row["order_id"] for row in rows if row != {name: known.get(row["order_id"], {}).get(name) for name in row}]
        if changed:
            yield f"order {changed[0]} is not as version {version} of orders has it from this batch"
        own = ("_query_id", pa.array([transaction.query_id]))
        held = Lake(self.settings).at({ORDERS.name: version}).rows(ORDERS, "_query_id", "_batch_id", where_in=own)
        count = held["_batch_id"].to_pylist().count(transaction.batch_id)
        if count != len(rows):
            yield f"{len(rows)} orders changed, but {count} in version {version} of orders"

    def commit_accepted(self, batch: Batch, classified: SettledOrders, written: list[Written]) -> None:
        """See StreamJob."""
        rows = stamped_records(classified.changed, ORDERS, stamp_of(batch))
        merge_orders(rows, self.settings, batch.transaction, batch.plan.to_metadata(batch.transaction))
