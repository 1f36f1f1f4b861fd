"""The invariant at every start: which disagreements of a checkpoint and its tables are refused, and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from pyspark.sql import DataFrame, SparkSession

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.agreement import check_agreement
from spark_jobs.ingest.files.landing import Split
from spark_jobs.ingest.kafka.ranges import OffsetSplit
from spark_jobs.ingest.source import Planned, RecordSource
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, MINUTE_METRICS, ORDERS, RAW_EVENTS, REJECTED_EVENTS, Table
from spark_jobs.lake.writes import DeltaSink, ensure_tables
from spark_jobs.steps import Step

CHAIN = [EVENTS, MINUTE_METRICS, BATCH_LEDGER]


class Planner(RecordSource):
    """A source of which only the batches that had records are known."""

    kind, name = "files", "events"

    def __init__(self, checkpoint: Path, empty: Sequence[int]) -> None:
        self.checkpoint, self.empty = checkpoint, empty

    def has_records(self, batch_id: int) -> bool:
        return batch_id not in self.empty

    def load(self, spark: SparkSession) -> DataFrame:
        raise NotImplementedError

    def plan(self, batch_id: int) -> Planned:
        raise NotImplementedError

    def is_full(self, batch_id: int) -> bool:
        raise NotImplementedError

    def splits(self, planned: Planned) -> Sequence[Split | OffsetSplit]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = load_settings(home=tmp_path_factory.mktemp("home"))
    ensure_tables(settings)
    return settings


def _check(
    settings: Settings,
    planned: int,
    ended: int,
    last: dict[Table, int],
    empty: Sequence[int] = (),
    chain: Sequence[Table] = CHAIN,
    rejected: Table | None = REJECTED_EVENTS,
) -> None:
    _check.calls = getattr(_check, "calls", 0) + 1  # type: ignore[attr-defined]
    query = f"query-{_check.calls}"  # type: ignore[attr-defined]
    checkpoint = settings.checkpoints_path / query
    for part, newest in (("offsets", planned), ("commits", ended)):
        (checkpoint / part).mkdir(parents=True)
        for batch in range(newest + 1):
            (checkpoint / part / str(batch)).touch()
    (checkpoint / "metadata").write_text(f'{{"id":"{query}"}}')
    for table, batch in last.items():
        DeltaSink(table, settings).append([], Step.EVENTS, Transaction(query, batch))
    check_agreement(settings, Planner(checkpoint, empty), chain, rejected)


E, R, M, L = EVENTS, REJECTED_EVENTS, MINUTE_METRICS, BATCH_LEDGER


@pytest.mark.parametrize(
    ("planned", "ended", "last", "empty"),
    [
        pytest.param(-1, -1, {}, (), id="nothing planned"),
        pytest.param(0, -1, {}, (), id="the first batch is planned"),
        pytest.param(4, 3, {E: 3, M: 3, L: 3}, (), id="a batch is planned"),
        pytest.param(4, 3, {E: 4, M: 3, L: 3}, (), id="killed behind the events"),
        pytest.param(4, 3, {E: 4, R: 4, M: 3, L: 3}, (), id="killed behind the rejects"),
        pytest.param(4, 3, {E: 4, R: 1, M: 4, L: 3}, (), id="killed before the ledger; rejects are seldom"),
        pytest.param(4, 3, {E: 4, M: 4, L: 4}, (), id="killed before its end was written"),
        pytest.param(4, 4, {E: 4, M: 4, L: 4}, (), id="at rest"),
        pytest.param(6, 6, {E: 4, M: 4, L: 4}, (5, 6), id="batches without a record"),
        pytest.param(6, 5, {E: 6, M: 4, L: 4}, (5,), id="killed behind a batch without a record"),
    ],
)
def test_what_a_kill_or_a_power_cut_leaves_agrees(
    tables: Settings, planned: int, ended: int, last: dict[Table, int], empty: Sequence[int]
) -> None:
    _check(tables, planned, ended, last, empty)


@pytest.mark.parametrize(
    ("planned", "ended", "last", "message"),
    [
        pytest.param(
            2, 2, {E: 4, M: 4, L: 4}, "table events has batch 4 .* batches up to 2: .*lost-checkpoint", id="older checkpoint"
        ),
        pytest.param(-1, -1, {E: 0, M: 0, L: 0}, "only knows no batch.*lost-checkpoint", id="emptied checkpoint"),
        pytest.param(4, 4, {E: 4, M: 4, L: 3}, "batch 4 .* ended .* batch_ledger ends with batch 3 .*fsck", id="ledger cut"),
        pytest.param(4, 4, {E: 4, M: 3, L: 4}, "batch_ledger has batch 4 .*minute_metrics.* batch 3 .*fsck", id="metrics"),
        pytest.param(4, 4, {E: 3, M: 4, L: 4}, "minute_metrics has batch 4 .*table events.* batch 3 .*fsck", id="events cut"),
        pytest.param(4, 3, {E: 3, R: 4, M: 3, L: 3}, "rejected_events has batch 4 .*table events", id="rejects without events"),
        pytest.param(4, 2, {E: 4, M: 2, L: 2}, "batch 3 .* batch_ledger ends with batch 2", id="a batch left out"),
        pytest.param(4, 4, {}, "batch 0 .* ended .* batch_ledger ends with batch -1", id="the tables were made anew"),
    ],
)
def test_what_neither_leaves_is_refused(tables: Settings, planned: int, ended: int, last: dict[Table, int], message: str) -> None:
    with pytest.raises(TableCorruptionError, match=message):
        _check(tables, planned, ended, last)


def test_orders_and_raw_copies_are_held_to_it(tables: Settings) -> None:
    _check(tables, 1, 0, {ORDERS: 1, L: 0}, chain=[ORDERS, L], rejected=None)
    _check(tables, 1, 0, {RAW_EVENTS: 1}, chain=[RAW_EVENTS], rejected=None)
    with pytest.raises(TableCorruptionError, match="raw_events ends with batch 0"):
        _check(tables, 1, 1, {RAW_EVENTS: 0}, chain=[RAW_EVENTS], rejected=None)
    with pytest.raises(TableCorruptionError, match="batch_ledger has batch 1"):
        _check(tables, 1, 1, {ORDERS: 0, L: 1}, chain=[ORDERS, L], rejected=None)
