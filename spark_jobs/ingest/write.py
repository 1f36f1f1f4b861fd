"""The second pass: write staged rows, by their outcome, as data files of Delta tables. The driver commits the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.failure import working_on
from spark_jobs.ingest.contract.parse import encode_raw
from spark_jobs.ingest.contract.spec import CONTRACTS
from spark_jobs.ingest.dedupe.keys import hex_fingerprint
from spark_jobs.ingest.event_columns import INCREMENT_INPUT, event_columns, increments, sum_increments
from spark_jobs.ingest.kafka.ranges import OffsetSplit
from spark_jobs.ingest.reject_rows import RejectKind, Share, hour_of
from spark_jobs.ingest.stage import StageTask, raw_lines, staged
from spark_jobs.lake.data_files import DataFile, DataFileWriter
from spark_jobs.lake.duck import task_connection
from spark_jobs.lake.stamp import Stamp, stamped, stamped_records
from spark_jobs.lake.tables import EVENTS, Table
from spark_jobs.traffic.rules import InvalidTrafficRules

_GATHERED_ROWS = 16_384  # of several splits, before they are written
_SUMMED_ROWS = 524_288  # at once: half of a batch of a million, which two tasks write
_ROWS_AT_ONCE = 8192  # of rejects, as Python objects
_RAW_AT_ONCE = 16 * 1024 * 1024  # characters


@dataclass(frozen=True)
class SplitRows:
    """A staged split, the number of its first line, and the outcome of its rows. All row numbers are ascending."""

    task: StageTask
    first_line: int
    dropped: npt.NDArray[np.int64]  # row numbers of duplicates and conflicts
    conflicts: npt.NDArray[np.int64]  # row numbers of those conflicts that get a row
    accepted_fingerprints: npt.NDArray[np.uint64]  # of these conflicts
    conflict_records: npt.NDArray[np.int64]  # how many records the rows of these conflicts stand for; 0: only its own
    shares: dict[RejectKind, Share]  # of the rejects (ingest/reject_rows.py)


@dataclass(frozen=True)
class WriteJob:
    """What the tasks of a batch write: rejects, and for events also increments and, to ``events_uri``, the events themselves.

    ``events_uri`` is None if the events are committed already.
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
    """The files of a task, the increments of its accepted events, and the number of records that its ``rejects`` stand for."""

    events: list[DataFile]
    rejects: list[DataFile]
    increments: pa.Table
    rejected_records: int


def load_task_code(_: Iterable[object]) -> None:
    """Open the worker's DuckDB. The call itself imports the code of the tasks."""
    task_connection()


def write_splits(work: Iterable[SplitRows], job: WriteJob) -> Written:
    """Write the splits of one task."""
    rejected_records = 0
    with ExitStack() as stack:
        rejects = stack.enter_context(DataFileWriter(job.rejected_uri, job.rejected_table))
        events = stack.enter_context(DataFileWriter(job.events_uri, EVENTS)) if job.events_uri else None
        accepted = _Accepted(job, events)
        for split in work:
            with working_on(split.task.split):
                for rows in reject_rows(split, job):
                    rejects.write(rows)
                    rejected_records += int(pc.sum(pc.fill_null(rows["records"], 1)).as_py() or 0)
                for rows in accepted_rows(split, job.campaigns, job.rules) if job.of_events else ():
                    accepted.add(rows, split)
        sums = accepted.increments()
    return Written(events.files if events else [], rejects.files, sums, rejected_records)


class _Accepted:
    """Writes accepted rows and sums their increments. It gathers the rows of small files first."""

    def __init__(self, job: WriteJob, events: DataFileWriter | None) -> None:
        self._job = job
        self._events = events
        self._gathered: list[tuple[pa.Table, SplitRows]] = []
        self._rows = 0
        self._unsummed: list[pa.Table] = []
        self._unsummed_rows = 0
        self._sums: list[pa.Table] = []

    def add(self, rows: pa.Table, split: SplitRows) -> None:
        """Add rows of a split; they may be written later."""
        self._gathered.append((rows, split))
        self._rows += rows.num_rows
        if self._rows >= _GATHERED_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the gathered rows."""
        if not self._gathered:
            return
        rows = pa.concat_tables([part for part, _ in self._gathered])
        self._unsummed.append(rows.select(INCREMENT_INPUT))
        self._unsummed_rows += rows.num_rows
        if self._unsummed_rows >= _SUMMED_ROWS:
            self._sum()
        if self._events is not None:
            files = [pa.repeat(pa.scalar(split.task.split.name), part.num_rows) for part, split in self._gathered]
            lines = [pa.repeat(pa.scalar(split.first_line, pa.int64()), part.num_rows) for part, split in self._gathered]
            columns = event_columns(rows, pa.chunked_array(files), pa.chunked_array(lines), self._job.rule_set)
            self._events.write(stamped(columns, EVENTS, self._job.stamp))
        self._gathered, self._rows = [], 0

    def increments(self) -> pa.Table:
        """Return the sums of all rows. Writes what is gathered."""
        self.flush()
        self._sum()
        return sum_increments(self._sums)

    def _sum(self) -> None:
        if self._unsummed:
            self._sums.append(increments(pa.concat_tables(self._unsummed)))
        self._unsummed, self._unsummed_rows = [], 0


def accepted_rows(work: SplitRows, campaigns: pa.Table, rules: InvalidTrafficRules) -> Iterator[pa.Table]:
    """Read the staged rows of a split that are neither duplicates nor conflicts, a chunk at a time."""
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
    """Make rows of the rejected table: the rejected, then the conflicting records of a split, some at a time."""
    split = work.task.split
    place: dict[str, Any] = {"source": "files", "region": split.region, "source_file": split.name}
    if isinstance(split, OffsetSplit):
        place |= {"source": "kafka", "source_topic": split.topic, "source_partition": split.partition}

    for records in _some_at_a_time(chain(_rejects(work, job), _conflicts(work, job))):
        for record in records:
            record |= place
            if isinstance(split, OffsetSplit):
                record["source_offset"] = record["source_line"]
        yield stamped_records(records, job.rejected_table, job.stamp)


def _some_at_a_time(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of records, limited in number and in the size of their raw texts."""
    made: list[dict[str, Any]] = []
    size = 0
    for record in records:
        made.append(record)
        size += len(record.get("raw") or "")
        if len(made) >= _ROWS_AT_ONCE or size >= _RAW_AT_ONCE:
            yield made
            made, size = [], 0
    if made:
        yield made


def _rejects(work: SplitRows, job: WriteJob) -> Iterator[dict[str, Any]]:
    """Make the rows of a split's rejects; of quarantined input, one row whose ``raw`` is the cause."""
    if work.task.quarantined is not None:
        cause = work.task.quarantined.cause.encode("utf-8", "backslashreplace")
        raw, encoding = encode_raw(cause)
        yield {
            "outcome": "rejected",
            "reason_codes": [work.task.quarantined.reason],
            "source_line": work.task.quarantined.start,  # 0 for a file
            "raw": raw,
            "raw_encoding": encoding,
            "raw_size_bytes": len(raw),
        }
        return
    seen: Counter[RejectKind] = Counter()
    for table in staged(work.task, "rejects", job.campaigns, job.rules):
        for start in range(0, table.num_rows, _ROWS_AT_ONCE):
            for reject in table.slice(start, _ROWS_AT_ONCE).to_pylist():
                kind = (tuple(reject["reason_codes"]), hour_of(reject["record_time"]))
                share = work.shares.get(kind)
                rank = seen[kind]
                if share is not None:
                    seen[kind] += 1
                row = {"outcome": "rejected", **reject, "source_line": 0 if reject["n"] < 0 else reject["n"] + work.first_line}
                if share is None or rank < share.own:
                    yield row
                elif rank == share.own and share.summary:
                    yield _summary(row, share.summary)


def _summary(row: dict[str, Any], records: int) -> dict[str, Any]:
    """Return a row that stands for ``records`` records, with place, time and reasons of the first one, ``row``."""
    return {name: row[name] for name in ("outcome", "reason_codes", "source_line", "record_time")} | {"records": records}


def _conflicts(work: SplitRows, job: WriteJob) -> Iterator[dict[str, Any]]:
    """Make the rows of a split's conflicts that get one, in order. Read their lines again, for the raw text."""
    if not len(work.conflicts):
        return
    contract = CONTRACTS[work.task.stream]
    columns = ["n", contract.id_field, contract.time_field, "fingerprint"]
    chosen = []
    start = 0
    for table in staged(work.task, "rows", job.campaigns, job.rules):
        low, high = np.searchsorted(work.conflicts, (start, start + table.num_rows))
        if low < high:
            chosen.append(table.select(columns).take(pa.array(work.conflicts[low:high] - start)))
        start += table.num_rows
    found = pa.concat_tables(chosen)
    raws = raw_lines(work.task.split, found["n"].to_numpy(), work.task.suppression)
    accepted, records = work.accepted_fingerprints.tolist(), work.conflict_records.tolist()
    for index, (_, raw, encoding, size) in enumerate(raws):
        record = found.slice(index, 1).to_pylist()[0]
        row = {
            "outcome": "conflict",
            "reason_codes": ["conflict"],
            "source_line": record["n"] + work.first_line,
            "raw": raw,
            "raw_encoding": encoding,
            "raw_size_bytes": size,
            "record_id": record[contract.id_field],
            "record_time": record[contract.time_field],
            "fingerprint": hex_fingerprint(record["fingerprint"]),
            "accepted_fingerprint": hex_fingerprint(accepted[index]),
        }
        yield _summary(row, records[index]) if records[index] else row
