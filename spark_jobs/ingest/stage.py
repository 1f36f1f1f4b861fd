"""The first pass: parse each split once into scratch files, and read these as often as needed.

Scratch files are a cache: a task that does not find one (another worker, a lost disk) parses the split again. On one machine they
are under HOME/scratch; the driver removes them. On a cluster each executor has its own folder in Spark's local folders.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs import disk
from spark_jobs.erasure.suppression import Suppression
from spark_jobs.failure import working_on
from spark_jobs.ingest.contract.parse import Parsed, Reject, encode_raw, parse_all
from spark_jobs.ingest.contract.spec import CONTRACTS, BatchLimits
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.event_columns import enrich
from spark_jobs.ingest.files.landing import Split
from spark_jobs.ingest.files.lines import FileFault, Lines, LongLine, read_lines
from spark_jobs.ingest.files.small_files import groups, parse_together
from spark_jobs.ingest.kafka.ranges import OffsetSplit
from spark_jobs.ingest.kafka.reading import read_records
from spark_jobs.ingest.quarantine import GZIP_BOMB, TOO_MANY_REJECTS, Quarantined, QuarantineLimits
from spark_jobs.ingest.reject_rows import RejectCounts, RejectTally, one_reject
from spark_jobs.traffic.rules import InvalidTrafficRules
from spark_jobs.units import HOUR_US

REJECT_SCHEMA = pa.schema(
    [
        ("n", pa.int64()),
        ("reason_codes", pa.list_(pa.string())),
        ("raw", pa.string()),
        ("raw_encoding", pa.string()),
        ("raw_size_bytes", pa.int64()),
        ("record_id", pa.string()),
        ("record_time", pa.int64()),  # microseconds
    ]
)


@dataclass(frozen=True)
class StageTask:
    """One split of a batch and all that its parsing depends on. ``scratch`` names the batch's folder (`scratch_folder`).

    ``limits_of_files`` decide whether to set its file aside (None: never). A split with ``quarantined`` is not read.
    """

    stream: str
    split: Split | OffsetSplit
    limits: BatchLimits
    scratch: str
    limits_of_files: QuarantineLimits | None = None
    quarantined: Quarantined | None = None
    suppression: Suppression | None = None

    def path(self, part: str) -> Path:
        """Return the path of the scratch file of ``part``: "rows" or "rejects"."""
        return scratch_folder(self.scratch) / f"{self.split.number:06d}.{part}.arrow"


@dataclass(frozen=True, eq=False)
class ValidRows:
    """The columns of valid rows that the driver needs: parallel arrays. ``hours`` are since the epoch."""

    hours: npt.NDArray[np.int32]
    is_late: npt.NDArray[np.bool_]
    is_invalid: npt.NDArray[np.bool_]
    is_unpriced: npt.NDArray[np.bool_]
    spend_nanos: npt.NDArray[np.int64]
    received_us: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.hours)

    @classmethod
    def of(cls, table: pa.Table) -> ValidRows:
        """Take the columns from a table of ``event_columns.enrich``. Orders, which have no prices and rules, cost nothing."""
        rows = table.num_rows
        is_invalid, is_unpriced, spend = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool), np.zeros(rows, dtype=np.int64)
        if "billing_model" in table.column_names:
            is_invalid = table["invalid_traffic_rule"].is_valid().to_numpy()
            is_unpriced = table["billing_model"].is_null().to_numpy()
            spend = table["spend_nanos"].to_numpy()
        hours = (table["hour_us"].to_numpy() // HOUR_US).astype(np.int32)
        return cls(hours, table["is_late"].to_numpy(), is_invalid, is_unpriced, spend, table["received_at"].to_numpy())

    @classmethod
    def concatenate(cls, parts: Sequence[ValidRows]) -> ValidRows:
        """Join rows of several chunks, in order."""
        return cls(*(np.concatenate([getattr(part, one.name) for part in (NO_ROWS, *parts)]) for one in fields(cls)))


_NO_FLAG, _NO_NUMBER = np.empty(0, dtype=np.bool_), np.empty(0, dtype=np.int64)
NO_ROWS = ValidRows(np.empty(0, dtype=np.int32), _NO_FLAG, _NO_FLAG, _NO_FLAG, _NO_NUMBER, _NO_NUMBER)


@dataclass(frozen=True, eq=False)
class StagedSplit:
    """The result of a split for the driver: number of records, keys and columns of the valid ones, counts of the rejected ones.

    With ``quarantined`` the split's file must be set aside.
    """

    number: int
    offered: int
    keys: Keys
    rows: ValidRows
    rejects: RejectCounts
    quarantined: Quarantined | None = None


_REJECT_FIELDS = ("number", "reasons", "raw", "raw_encoding", "raw_size_bytes", "record_id", "time_us")
"""The fields of a Reject, in the order of the schema."""


class _Writer:
    """Writes an Arrow file that appears whole or not at all. A file without rows has one table of none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._sink: pa.ipc.RecordBatchFileWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self._sink is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = pa.ipc.new_file(str(self._temporary), table.schema)
        elif not table.num_rows:
            return
        self._sink.write_table(table)

    def close(self, *, keep: bool) -> None:
        """Put the file into its place, or remove it."""
        if self._sink is not None:
            self._sink.close()
            if keep:
                os.replace(self._temporary, self._path)
            else:
                self._temporary.unlink()


def unread_split(task: StageTask, quarantined: Quarantined) -> StagedSplit:
    """Return the result of a split that is not read: one rejected record."""
    return StagedSplit(task.split.number, 1, Keys.concatenate([]), NO_ROWS, one_reject(quarantined.reason), quarantined)


def stage_split(
    task: StageTask,
    campaigns: pa.Table,
    rules: InvalidTrafficRules,
    parsed_already: list[tuple[Parsed, pa.Table]] | None = None,
) -> StagedSplit:
    """Parse a split into its two scratch files (valid rows, rejects). ``parsed_already`` are its chunks (files/small_files.py).

    Memory is bounded by a chunk of lines and by what the driver learns. A file that is a flood of rejects is not read to its end.
    """
    if task.quarantined is not None:
        return unread_split(task, task.quarantined)
    forget_earlier_batches(task.scratch)
    rows, rejected = _Writer(task.path("rows")), _Writer(task.path("rejects"))
    offered = 0
    keys: list[Keys] = []
    valid: list[ValidRows] = []
    tally = RejectTally(task.limits.rejects_kept)
    chunks = _parsed(task, campaigns, rules) if parsed_already is None else parsed_already
    for parsed, table in chunks:
        offered += parsed.offered
        rows.write(table)
        keys.append(Keys(*(table[name].to_numpy() for name in ("key_low", "key_high", "fingerprint"))))
        valid.append(ValidRows.of(table))
        chosen = tally.take(parsed)
        rejected.write(pa.table([[getattr(one, name) for one in chosen] for name in _REJECT_FIELDS], schema=REJECT_SCHEMA))
        found = _set_aside(task, parsed.rejects, tally.total, offered)
        if found is not None:
            rows.close(keep=False)
            rejected.close(keep=False)
            return unread_split(task, found)
    rows.close(keep=True)
    rejected.close(keep=True)
    return StagedSplit(task.split.number, offered, Keys.concatenate(keys), ValidRows.concatenate(valid), tally.counts())


def _set_aside(task: StageTask, rejects: list[Reject], rejected: int, offered: int) -> Quarantined | None:
    """Return why a split's file must be set aside, if it must. ``rejects`` are those of its last chunk; both counts are totals."""
    if task.limits_of_files is None or isinstance(task.split, OffsetSplit):
        return None
    if rejects and rejects[-1].reasons == [GZIP_BOMB]:
        return Quarantined(task.split.name, GZIP_BOMB, "unpacks to more than a gzip file may (ADTALLY_MAX_GZIP_RATIO)")
    if task.limits_of_files.is_flood(rejected, offered):
        return flood(task.split.name, rejected, offered)
    return None


def flood(name: str, rejected: int, offered: int) -> Quarantined:
    """Return the quarantine of a file with too many rejects."""
    return Quarantined(name, TOO_MANY_REJECTS, f"{rejected} of the first {offered} records are rejected")


def stage_splits(tasks: Iterable[StageTask], campaigns: pa.Table, rules: InvalidTrafficRules) -> Iterator[StagedSplit]:
    """Stage the splits of one task, in order; parse small files together."""
    work = list(tasks)
    for group in groups(None if task.quarantined else task.split for task in work):
        ready: dict[int, list[tuple[Parsed, pa.Table]]] = {}
        first = work[group[0]]
        if len(group) > 1:
            splits = [split for position in group if isinstance(split := work[position].split, Split)]
            with working_on(f"{first.split} and {len(group) - 1} more"):
                ready = parse_together(splits, CONTRACTS[first.stream], first.limits, campaigns, rules, first.suppression)
        for position in group:
            task = work[position]
            with working_on(task.split):
                made = stage_split(task, campaigns, rules, ready.get(task.split.number))
            yield made


def _parsed(task: StageTask, campaigns: pa.Table, rules: InvalidTrafficRules) -> Iterator[tuple[Parsed, pa.Table]]:
    """Parse and enrich a split, a chunk at a time."""
    contract = CONTRACTS[task.stream]
    is_topic = isinstance(task.split, OffsetSplit)  # it may have records that other regions received
    chunks = _chunks(task.split, task.limits_of_files)
    for parsed in parse_all(chunks, contract, task.split.region, task.limits, own_region=is_topic, suppression=task.suppression):
        yield parsed, enrich(parsed.valid, contract, task.limits, campaigns, rules)


def staged(task: StageTask, part: str, campaigns: pa.Table, rules: InvalidTrafficRules) -> Iterator[pa.Table]:
    """Read the scratch file of a split, "rows" or "rejects", a chunk at a time. Parse the split again if the file is missing.

    Yields nothing if the split has no line, or is set aside.
    """
    if task.quarantined is not None:
        return
    path = task.path(part)
    if not path.exists():
        stage_split(task, campaigns, rules)
    if not path.exists():
        return
    with pa.OSFile(str(path)) as source:  # not memory-mapped: the pages of the whole file would stay in memory
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)], reader.schema)


def _chunks(split: Split | OffsetSplit, limits: QuarantineLimits | None = None) -> Iterator[Lines | LongLine | FileFault]:
    return read_records(split) if isinstance(split, OffsetSplit) else read_lines(split.path, split.start, split.end, limits)


def raw_lines(
    split: Split | OffsetSplit, wanted: npt.NDArray[np.int64], suppression: Suppression | None = None
) -> Iterator[tuple[int, str, str, int]]:
    """Read lines of a split again: (n, raw, encoding, size in bytes) of those ``wanted`` (ascending numbers in the split)."""
    if not len(wanted):
        return
    first = 0
    if isinstance(split, OffsetSplit):
        first = int(wanted[0])
        split = replace(split, start=split.start + first, end=split.start + int(wanted[-1]) + 1)
    for chunk in _chunks(split):
        if isinstance(chunk, FileFault):
            return
        if isinstance(chunk, Lines):
            for number, index in chunk.find(wanted - first):
                raw = chunk.raw(index) if suppression is None else suppression.line(chunk.raw(index))
                yield number + first, *encode_raw(raw), len(raw)


def scratch_folder(scratch: str) -> Path:
    """Return the folder of a batch: ``scratch`` itself if it is an absolute path, else this executor's folder of that name."""
    return Path(scratch) if os.path.isabs(scratch) else _executor_folder() / scratch


def forget_earlier_batches(scratch: str) -> None:
    """Remove this executor's folders of earlier batches of a query; the driver cannot. ``scratch`` is <query>-<batch>."""
    if os.path.isabs(scratch):
        return
    query, _, batch = scratch.rpartition("-")
    for folder in _executor_folder().glob(f"{query}-*"):
        number = folder.name.removeprefix(f"{query}-")
        if number.isdecimal() and int(number) < int(batch):
            shutil.rmtree(folder, ignore_errors=True)


def _executor_folder() -> Path:
    return disk.scratch_folder() / "adtally"
