"""Batches of the copy of a topic, without a broker."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.in_process import LocalExecutor
from spark_jobs.config import load_settings
from spark_jobs.ingest.kafka.raw import RawCopy
from spark_jobs.ingest.source import Planned
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.tables import RAW_TABLES
from spark_jobs.lake.writes import DeltaSink, ensure_tables
from spark_jobs.steps import Step


def test_a_batch_whose_records_are_copied_reads_no_topic(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    ensure_tables(settings)
    asked: list[int] = []

    def plan(batch_id: int) -> Planned:
        asked.append(batch_id)
        return Planned(0)

    job = RawCopy.__new__(RawCopy)  # without a broker
    job._sink = DeltaSink(RAW_TABLES["events"], settings)
    source: Any = SimpleNamespace(query_id=lambda: "q", plan=plan, cluster=SimpleNamespace(client_options=dict))
    job.source = job._topic = source
    job._sink.append([], Step.RAW_COPY, Transaction("q", 0))
    for batch_id in (0, 1):
        job.run_batch(batch_id, LocalExecutor())
    assert asked == [1]
