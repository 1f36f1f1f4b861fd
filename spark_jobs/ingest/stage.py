"""The first pass: parse a split once, keep its columns in a scratch file, give them out again as often as needed.

Scratch files are a cache: a task that does not find one (another worker, a lost disk) parses the split again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs.failure import working_on
from spark_jobs.ingest.contract.parse import Parsed, Reject, encode_raw, parse_all
from spark_jobs.ingest.contract.spec import CONTRACTS, Limits
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.event_columns import enrich
from spark_jobs.ingest.files.landing import Split
from spark_jobs.ingest.files.lines import FileFault, Lines, LongLine, read_lines
from spark_jobs.ingest.files.small_files import groups, parse_together
from spark_jobs.ingest.kafka.ranges import OffsetSplit
from spark_jobs.ingest.kafka.reading import read_records
from spark_jobs.ingest.quarantine import GZIP_BOMB, TOO_MANY_REJECTS, Quarantined, QuarantineLimits
from spark_jobs.ingest.reject_rows import RejectCounts, RejectTally, one_reject
from spark_jobs.ingest.scratch import forget_earlier_batches, scratch_folder
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
        ("time_us", pa.int64()),
    ]
)


@dataclass(frozen=True)
class StageTask:
    """One split of a batch and all that its parsing depends on. ``scratch`` names the batch's folder (ingest/scratch.py).

    ``limits_of_files`` say when its file is set aside (None: never); ``quarantined`` says that it is: then nothing of it is read.
    """

    stream: str
    split: Split | OffsetSplit
    limits: Limits
    scratch: str
    limits_of_files: QuarantineLimits | None = None
    quarantined: Quarantined | None = None

    def path(self, part: str) -> Path:
        """The scratch file of ``part``: "rows" or "rejects"."""
        return scratch_folder(self.scratch) / f"{self.split.number:06d}.{part}.arrow"


@dataclass(frozen=True)
class StagedSplit:
    """What the driver learns of a split. ``keys`` (Keys.to_bytes), ``hours`` (int32 hours since the epoch), ``late``, ``invalid``,
    ``unpriced`` (bool), ``spend`` (int64 nanos) and ``received`` (int64 micros) are of the valid rows in order. ``quarantined``:
    the file is to be set aside, for what was found before it was read to its end; then nothing else counts."""

    number: int
    offered: int
    keys: bytes
    hours: bytes
    late: bytes
    invalid: bytes
    unpriced: bytes
    spend: bytes
    received: bytes
    rejects: RejectCounts
    quarantined: Quarantined | None = None


def _reject_table(rejects: list[Reject]) -> pa.Table:
    return pa.table(
        {
            "n": [r.number for r in rejects],
            "reason_codes": [r.reasons for r in rejects],
            "raw": [r.raw for r in rejects],
            "raw_encoding": [r.raw_encoding for r in rejects],
            "raw_size_bytes": [r.raw_size_bytes for r in rejects],
            "record_id": [r.record_id for r in rejects],
            "time_us": [r.time_us for r in rejects],
        },
        schema=REJECT_SCHEMA,
    )


class _Writer:
    """An Arrow file that appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._sink: pa.ipc.RecordBatchFileWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self._sink is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = pa.ipc.new_file(str(self._temporary), table.schema)
        self._sink.write_table(table)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()
            os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Remove what was written."""
        if self._sink is not None:
            self._sink.close()
            self._temporary.unlink()


def unread_split(task: StageTask, quarantined: Quarantined) -> StagedSplit:
    """What stands for a split of which nothing is read: one rejected record."""
    rejects = one_reject(quarantined.reason)
    return StagedSplit(task.split.number, 1, b"", b"", b"", b"", b"", b"", b"", rejects, quarantined)


def stage_split(
    task: StageTask,
    campaigns: pa.Table,
    rules: InvalidTrafficRules,
    parsed_already: list[tuple[Parsed, pa.Table]] | None = None,
) -> StagedSplit:
    """Parse a split into its two scratch files (valid rows, rejects). ``parsed_already``: its chunks (ingest/files/small_files.py).

    Memory is bounded by a chunk of lines and by what the driver learns; a file that is a flood of rejects is left early.
    """
    if task.quarantined is not None:
        return unread_split(task, task.quarantined)
    forget_earlier_batches(task.scratch)
    rows, rejected = _Writer(task.path("rows")), _Writer(task.path("rejects"))
    offered = 0
    keys: list[Keys] = []
    columns: dict[str, list[npt.NDArray[np.generic]]] = {
        n: [] for n in ("hours", "late", "invalid", "unpriced", "spend", "received")
    }
    tally = RejectTally(task.limits.rejects_kept)
    wrote_rows = wrote_rejects = False
    chunks = _parsed(task, campaigns, rules) if parsed_already is None else parsed_already
    for parsed, table in chunks:
        offered += parsed.offered
        if parsed.valid.num_rows or not wrote_rows:
            rows.write(table)
            wrote_rows = True
            keys.append(Keys(*(table[n].to_numpy() for n in ("key_low", "key_high", "fingerprint"))))
            columns["hours"].append((table["hour_us"].to_numpy() // HOUR_US).astype(np.int32))
            columns["late"].append(table["is_late"].to_numpy())
            columns["received"].append(table["received_at"].to_numpy())
            if "billing_model" in table.column_names:
                columns["invalid"].append(table["invalid_traffic_rule"].is_valid().to_numpy())
                columns["unpriced"].append(table["billing_model"].is_null().to_numpy())
                columns["spend"].append(table["spend_nanos"].to_numpy())
            else:
                for name in ("invalid", "unpriced"):
                    columns[name].append(np.zeros(table.num_rows, dtype=bool))
                columns["spend"].append(np.zeros(table.num_rows, dtype=np.int64))
        chosen = tally.take(parsed)
        if chosen or not wrote_rejects:
            rejected.write(_reject_table(chosen))
            wrote_rejects = True
        found = _set_aside(task, parsed.rejects, tally.total, offered)
        if found is not None:
            rows.discard()
            rejected.discard()
            return unread_split(task, found)
    rows.close()
    rejected.close()

    def joined(name: str, kind: type[np.generic]) -> bytes:
        parts = columns[name]
        return b"" if not parts else np.concatenate(parts).astype(kind).tobytes()

    return StagedSplit(
        number=task.split.number,
        offered=offered,
        keys=Keys.concatenate(keys).to_bytes(),
        hours=joined("hours", np.int32),
        late=joined("late", np.bool_),
        invalid=joined("invalid", np.bool_),
        unpriced=joined("unpriced", np.bool_),
        spend=joined("spend", np.int64),
        received=joined("received", np.int64),
        rejects=tally.counts(),
    )


def _set_aside(task: StageTask, rejects: list[Reject], rejected: int, offered: int) -> Quarantined | None:
    """Why the file of a split is not read on; ``rejects`` are those of its last chunk, the numbers those of all so far."""
    if task.limits_of_files is None or isinstance(task.split, OffsetSplit):
        return None
    if rejects and rejects[-1].reasons == [GZIP_BOMB]:
        return Quarantined(task.split.name, GZIP_BOMB, "unpacks to more than a gzip file may (ADTALLY_MAX_GZIP_RATIO)")
    if task.limits_of_files.is_flood(rejected, offered):
        return flood(task.split.name, rejected, offered)
    return None


def flood(name: str, rejected: int, offered: int) -> Quarantined:
    """A file of too many rejects."""
    return Quarantined(name, TOO_MANY_REJECTS, f"{rejected} of the first {offered} records are rejected")


def stage_splits(tasks: Iterable[StageTask], campaigns: pa.Table, rules: InvalidTrafficRules) -> Iterator[StagedSplit]:
    """Parse the splits of one task, one after the other, small files together."""
    work = list(tasks)
    for group in groups(None if task.quarantined else task.split for task in work):
        ready: dict[int, list[tuple[Parsed, pa.Table]]] = {}
        first = work[group[0]]
        if len(group) > 1:
            splits = [split for position in group if isinstance(split := work[position].split, Split)]
            with working_on(f"{first.split} and {len(group) - 1} more"):
                ready = parse_together(splits, CONTRACTS[first.stream], first.limits, campaigns, rules)
        for position in group:
            task = work[position]
            with working_on(task.split):
                made = stage_split(task, campaigns, rules, ready.get(task.split.number))
            yield made


def _parsed(task: StageTask, campaigns: pa.Table, rules: InvalidTrafficRules) -> Iterator[tuple[Parsed, pa.Table]]:
    """The chunks of a split, parsed and enriched."""
    contract = CONTRACTS[task.stream]
    is_mirrored = isinstance(task.split, OffsetSplit)  # a topic may hold what other regions have taken in
    for parsed in parse_all(
        _chunks(task.split, task.limits_of_files), contract, task.split.region, task.limits, own_region=is_mirrored
    ):
        yield parsed, enrich(parsed.valid, contract, task.limits, campaigns, rules)


def staged(task: StageTask, part: str, campaigns: pa.Table, rules: InvalidTrafficRules) -> Iterator[pa.Table]:
    """The scratch file of a split, "rows" or "rejects", a chunk of lines at a time; made again where it is missing.

    Nothing if the split has no line at all, or is set aside.
    """
    if task.quarantined is not None:
        return
    path = task.path(part)
    if not path.exists():
        stage_split(task, campaigns, rules)
    if not path.exists():
        return
    with pa.OSFile(str(path)) as source:  # not mapped: pages of a whole file would stay in memory
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)], reader.schema)


def _chunks(split: Split | OffsetSplit, limits: QuarantineLimits | None = None) -> Iterator[Lines | LongLine | FileFault]:
    return read_records(split) if isinstance(split, OffsetSplit) else read_lines(split.path, split.start, split.end, limits)


def raw_lines(split: Split | OffsetSplit, wanted: npt.NDArray[np.int64]) -> Iterator[tuple[int, str, str, int]]:
    """(n, raw, encoding, size in bytes) of the lines ``wanted`` (ascending numbers within the split), read again."""
    if not len(wanted):
        return
    if isinstance(split, OffsetSplit):
        first, last = int(wanted[0]), int(wanted[-1])
        split = replace(split, start=split.start + first, end=split.start + last + 1)
        for number, raw, encoding, size in _raw_of(split, wanted - first):
            yield number + first, raw, encoding, size
        return
    yield from _raw_of(split, wanted)


def _raw_of(split: Split | OffsetSplit, wanted: npt.NDArray[np.int64]) -> Iterator[tuple[int, str, str, int]]:
    for chunk in _chunks(split):
        if isinstance(chunk, FileFault):
            return
        if isinstance(chunk, Lines):
            for number, index in chunk.find(wanted):
                raw = chunk.raw(index)
                yield number, *encode_raw(raw), len(raw)
