"""The second pass: write what became of the staged rows as data files of Delta tables; the driver commits them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs.contract.spec import CONTRACTS
from spark_jobs.dedupe.keys import hex_fingerprint
from spark_jobs.duck import task_connection
from spark_jobs.kafka.ranges import OffsetSplit
from spark_jobs.rules.invalid_traffic import InvalidTrafficRules
from spark_jobs.sinks.data_files import DataFile, DataFileWriter
from spark_jobs.tables import EVENTS, Table
from spark_jobs.tasks.stage import StageTask, raw_lines, staged
from spark_jobs.transforms.events import event_columns, increments, sum_increments
from spark_jobs.transforms.stamp import Stamp, stamped, stamped_records


@dataclass(frozen=True)
class SplitRows:
    """A staged split, the number of its first line, and what became of its rows."""

    task: StageTask
    first_line: int
    dropped: npt.NDArray[np.int64]  # row numbers of duplicates and conflicts, ascending
    conflicts: npt.NDArray[np.int64]  # row numbers of conflicts, ascending
    accepted_fingerprints: npt.NDArray[np.uint64]  # of the conflicts


@dataclass(frozen=True)
class WriteJob:
    """What the tasks of a batch write: rejects always; of a batch of events also the increments, and the events themselves to
    ``events_uri`` (None where they stand in the table already).
    """

    of_events: bool
    stamp: Stamp
    campaigns: pa.Table
    rules: InvalidTrafficRules
    rule_set: str | None
    rejected_table: Table
    rejected_uri: str
    events_uri: str | None


@dataclass(frozen=True)
class Written:
    """What a task wrote. ``increments``: the sums over its accepted events, an Arrow stream (None: not of the events' stream)."""

    events: list[DataFile]
    rejects: list[DataFile]
    increments: bytes | None


def load_task_code(_: Iterable[object]) -> None:
    """Nothing but what importing this module does, and the process's DuckDB."""
    task_connection()


def write_splits(work: Iterable[SplitRows], job: WriteJob) -> Written:
    """Write the splits of one task."""
    sums: list[pa.Table] = []
    with ExitStack() as stack:
        rejects = stack.enter_context(DataFileWriter(job.rejected_uri, job.rejected_table))
        events = stack.enter_context(DataFileWriter(job.events_uri, EVENTS)) if job.events_uri else None
        for split in work:
            for rows in reject_rows(split, job):
                rejects.write(rows)
            for rows in accepted_rows(split, job.campaigns, job.rules) if job.of_events else ():
                sums.append(increments(rows))
                if events is not None:
                    columns = event_columns(rows, split.task.split.name, split.first_line, job.rule_set)
                    events.write(stamped(columns, EVENTS, job.stamp))
    summed = to_stream(sum_increments(sums)) if job.of_events else None
    return Written(events.files if events else [], rejects.files, summed)


def to_stream(table: pa.Table) -> bytes:
    """A table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def from_stream(data: bytes) -> pa.Table:
    """The inverse of ``to_stream``."""
    return pa.ipc.open_stream(data).read_all()


def accepted_rows(work: SplitRows, campaigns: pa.Table, rules: InvalidTrafficRules) -> Iterator[pa.Table]:
    """The staged rows of a split that are neither duplicates nor conflicts, a chunk at a time."""
    start = 0
    for table in staged(work.task, "rows", campaigns, rules):
        low, high = np.searchsorted(work.dropped, (start, start + table.num_rows))
        if low < high:
            keep = np.ones(table.num_rows, dtype=bool)
            keep[work.dropped[low:high] - start] = False
            yield table.filter(pa.array(keep))
        else:
            yield table
        start += table.num_rows


def reject_rows(work: SplitRows, job: WriteJob) -> Iterator[pa.Table]:
    """Rejected, then conflicting records of a split, as rows of the rejected table."""
    split = work.task.split
    place: dict[str, Any] = {"source": "files", "region": split.region, "source_file": split.name}
    if isinstance(split, OffsetSplit):
        place |= {"source": "kafka", "source_topic": split.topic, "source_partition": split.partition}

    def rows(records: Iterable[dict[str, Any]]) -> pa.Table:
        made = [{**record, **place} for record in records]
        if isinstance(split, OffsetSplit):
            made = [{**record, "source_offset": record["source_line"]} for record in made]
        return stamped_records(made, job.rejected_table, job.stamp)

    for table in staged(work.task, "rejects", job.campaigns, job.rules):
        if table.num_rows:
            yield rows(_rejected(reject, work.first_line) for reject in table.to_pylist())
    if len(work.conflicts):
        yield rows(_conflicts(work, job.campaigns, job.rules))


def _rejected(reject: dict[str, Any], first_line: int) -> dict[str, Any]:
    return {
        "outcome": "rejected",
        "reason_codes": reject["reason_codes"],
        "source_line": 0 if reject["n"] < 0 else reject["n"] + first_line,
        "raw": reject["raw"],
        "raw_encoding": reject["raw_encoding"],
        "raw_size_bytes": reject["raw_size_bytes"],
        "record_id": reject["record_id"],
        "record_time": reject["time_us"],
    }


def _conflicts(work: SplitRows, campaigns: pa.Table, rules: InvalidTrafficRules) -> Iterator[dict[str, Any]]:
    contract = CONTRACTS[work.task.stream]
    id_field, time_field = contract.id_field, contract.time_field
    records: list[dict[str, Any]] = []
    start = 0
    for table in staged(work.task, "rows", campaigns, rules):
        low, high = np.searchsorted(work.conflicts, (start, start + table.num_rows))
        if low < high:
            chosen = table.select(["n", id_field, time_field, "fingerprint"]).take(pa.array(work.conflicts[low:high] - start))
            records += chosen.to_pylist()
        start += table.num_rows
    numbers = np.array([record["n"] for record in records], dtype=np.int64)
    raws = {number: rest for number, *rest in raw_lines(work.task.split, numbers)}
    for record, accepted in zip(records, work.accepted_fingerprints.tolist(), strict=True):
        raw, encoding, size = raws[record["n"]]
        yield {
            "outcome": "conflict",
            "reason_codes": ["conflict"],
            "source_line": record["n"] + work.first_line,
            "raw": raw,
            "raw_encoding": encoding,
            "raw_size_bytes": size,
            "record_id": record[id_field],
            "record_time": record[time_field],
            "fingerprint": hex_fingerprint(record["fingerprint"]),
            "accepted_fingerprint": hex_fingerprint(accepted),
        }
