"""The stream of orders: few, and one row an order, so they are settled row by row against the table and merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from spark_jobs.ingest.batch import Batch
from spark_jobs.ingest.dedupe.classify import Classification
from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA
from spark_jobs.ingest.order_rows import Settled, settle_orders
from spark_jobs.ingest.stage import staged
from spark_jobs.ingest.stream import StreamJob, stamp_of
from spark_jobs.ingest.write import Written
from spark_jobs.lake.reading import file_paths, read_files
from spark_jobs.lake.stamp import stamped_records
from spark_jobs.lake.tables import ORDERS, REJECTED_ORDERS
from spark_jobs.lake.writes import merge_orders
from spark_jobs.steps import Step
from spark_jobs.traffic.rules import no_rules

_IDENTITY = pa.schema([ORDERS.schema.field(name) for name in ("order_id", "_query_id", "_batch_id")])


class OrdersJob(StreamJob):
    """Orders."""

    stream = "orders"
    accepted_table = ORDERS
    rejected_table = REJECTED_ORDERS
    rejected_step = Step.REJECTED_ORDERS
    ledger_step = Step.ORDERS_LEDGER
    _settled: Settled

    def plan_prices(self) -> int:
        """See StreamJob: orders have none."""
        return 0

    def classify(self, batch: Batch, history_version: int) -> Classification:
        """See StreamJob."""
        records: list[dict[str, Any]] = []
        for task, first in zip(batch.tasks, batch.first_lines, strict=True):
            for table in staged(task, "rows", CAMPAIGN_SCHEMA.empty_table(), no_rules()):
                place = {"source_file": task.split.name}
                records += [{**row, **place, "source_line": row["n"] + first} for row in table.to_pylist()]
        known = self._known(sorted({r["order_id"] for r in records}), history_version)
        self._settled = settle_orders(records, known)
        return Classification(
            np.array(self._settled.outcome, dtype=np.int8),
            np.array(self._settled.accepted_fingerprint, dtype=np.uint64),
        )

    def _known(self, ids: list[str], version: int) -> dict[str, dict[str, Any]]:
        if not ids:
            return {}
        uri = self.settings.table_uri(ORDERS.name)
        found = read_files(uri, file_paths(uri, version), ORDERS.schema, ("order_id", pa.array(ids)))
        return {row["order_id"]: row for row in found.to_pylist()}

    def contradictions(
        self, batch: Batch, classified: Classification, written: list[Written], ledger: list[dict[str, Any]]
    ) -> Iterator[str]:
        """See StreamJob: where the orders are merged already, they are as they would be merged now."""
        if batch.committed is None:
            return
        rows = stamped_records(self._settled.changed, ORDERS, stamp_of(batch)).to_pylist()
        known = self._known(sorted(row["order_id"] for row in rows), batch.committed.version)
        own = (batch.transaction.query_id, batch.transaction.batch_id)
        changed = [row["order_id"] for row in rows if row != {name: known.get(row["order_id"], {}).get(name) for name in row}]
        if changed:
            yield f"order {changed[0]} is not as version {batch.committed.version} of orders has it from this batch"
        uri = self.settings.table_uri(ORDERS.name)
        held = read_files(uri, file_paths(uri, batch.committed.version), _IDENTITY, ("_query_id", pa.array([own[0]])))
        count = sum(1 for row in held.to_pylist() if row["_batch_id"] == own[1])
        if count != len(rows):
            yield f"{len(rows)} orders changed, but {count} in version {batch.committed.version} of orders"

    def commit_accepted(self, batch: Batch, history_version: int, classified: Classification, written: list[Written]) -> None:
        """See StreamJob."""
        rows = stamped_records(self._settled.changed, ORDERS, stamp_of(batch))
        merge_orders(rows, self.settings, batch.transaction, batch.plan.to_metadata(batch.transaction))
