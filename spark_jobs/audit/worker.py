"""Parse one landing file, or one chunk of a topic's raw records, into one entry of the store.

As a process (``python -m spark_jobs.audit.worker``) it reads tasks as JSON lines from its standard input and answers with JSON
lines: ``{"read": bytes}`` while it reads, ``{"done": kept}`` or ``{"error": text}`` at the end of a task. It ends when its input
ends. The store starts it instead of forking, because a fork copies locks that other threads hold. So it imports little.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
import sys
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spark_jobs.audit.contract import LONGEST_LINE, record_schema
from spark_jobs.audit.decode import Ints, parse_values
from spark_jobs.audit.files import UNREADABLE, parse_file
from spark_jobs.audit.suppressed import NOBODY, State
from spark_jobs.lake.landing_view import landed_object
from spark_jobs.lake.landing_view import modified_ms as object_ms
from spark_jobs.no_pandas import hide_pandas

FORMAT = 3  # raise it when the records or their meaning change: entries with another format are made again
METADATA_KEY = b"adtally.recount"
ROW_GROUP_ROWS = 128 * 1024
RECORD_BYTES = 350  # about the size of a raw record; only for progress
_VALUES_AT_ONCE = 4096
_SORT_MEMORY = "512MB"  # the rest spills to disk
_PLAIN_COLUMNS = ("record_id", "impression_id", "user_id")  # too many different values for a dictionary


@dataclass(frozen=True)
class ParseTask:
    """A landing file in one state (``mtime_ms``, ``size``), and the entry to write."""

    path: str
    name: str
    mtime_ms: int
    size: int
    stream: str
    region: str
    target: str
    suppressed: State = NOBODY

    @property
    def state(self) -> list[int | str]:
        """The state of the file, as the entry stores it."""
        return [self.mtime_ms, self.size]


@dataclass(frozen=True)
class ChunkTask:
    """Offsets [start, end) of a Kafka partition (``name``: ``kafka/<cluster>/<topic>/<partition>``), and the entry to write.

    ``paths`` are the data files of the raw table ``table_id`` that may have some of the records.
    """

    name: str
    start: int
    end: int
    table_id: str
    paths: list[str]
    stream: str
    target: str
    suppressed: State = NOBODY

    @property
    def size(self) -> int:
        """About the number of bytes to read."""
        return (self.end - self.start) * RECORD_BYTES

    @property
    def state(self) -> list[int | str]:
        """The table and the offsets, as the entry stores them."""
        return [self.table_id, self.start, self.end]


AnyTask = ParseTask | ChunkTask


def mtime_ms(state: os.stat_result) -> int:
    """Return the time of modification in milliseconds, wrapped to 64 bits as in the plans of batches."""
    return int.from_bytes((state.st_mtime_ns // 1_000_000 % 2**64).to_bytes(8), signed=True)


def is_in_state(path: str, modified_ms: int, size: int) -> bool:
    """Return whether a regular file or an object exists in this state. Raises StoreError if a store does not answer."""
    stored = landed_object(path)
    if stored is not None:
        present = stored.find()
        return present is not None and (object_ms(present), present.size) == (modified_ms, size)
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and (mtime_ms(found), found.st_size) == (modified_ms, size)


class _Facts:
    """Facts about all records of an entry."""

    def __init__(self) -> None:
        self.records = 0
        self.min_us: int | None = None
        self.max_us: int | None = None
        self.has_unknown_time = self.is_unreadable = False

    def add(self, table: pa.Table) -> None:
        self.records += table.num_rows
        times = [*pc.min_max(table["time_us"]).as_py().values(), self.min_us, self.max_us]
        known = [time for time in times if time is not None]
        self.min_us, self.max_us = min(known, default=None), max(known, default=None)
        self.has_unknown_time |= table["time_us"].null_count > 0
        self.is_unreadable |= table.num_rows == 1 and table["reasons"][0].as_py() == [UNREADABLE]


def parse_into(task: AnyTask, on_read: Callable[[int], None]) -> bool:
    """Parse the input of a task into its ``target``, which appears whole or not at all.

    Returns False, and writes nothing, if the landing file is not, or no longer, in the state that the task names.
    """
    if not _is_there(task):
        return False
    target = Path(task.target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write(task, temporary, on_read)
        if not _is_there(task):
            return False
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _is_there(task: AnyTask) -> bool:
    """Return whether the input is in its state. Raw records never change; a landing file may."""
    return isinstance(task, ChunkTask) or is_in_state(task.path, task.mtime_ms, task.size)


def _suppressed(task: AnyTask) -> State:
    folder, key_file, digest = task.suppressed  # a list if the task came as JSON
    return folder, key_file, digest


def _records(task: AnyTask, on_read: Callable[[int], None]) -> Iterator[pa.Table]:
    if isinstance(task, ParseTask):
        yield from parse_file(task.path, task.stream, task.region, on_read, _suppressed(task))
        return
    reported = 0
    for offsets, values in raw_values(task):
        yield parse_values(values, offsets, task.stream, _suppressed(task))
        count = min(len(values) * RECORD_BYTES, task.size - reported)
        reported += count
        on_read(count)
    on_read(task.size - reported)


def raw_values(
    task: ChunkTask, only: Collection[int] | None = None, *, cut: bool = True
) -> Iterator[tuple[Ints, list[bytes | None]]]:
    """Yield (offsets, values) of a task's records in the order of their offsets, each offset once, a few thousand at a time.

    ``only`` selects offsets. With ``cut`` a shorter value, which is still too long to be valid, replaces one that is too long.
    """
    if not task.paths:
        return
    _, cluster, topic, partition = task.name.split("/")
    is_long = f"octet_length(value) > {LONGEST_LINE}" if cut else "false"
    chosen = "true" if only is None else f"source_offset in ({', '.join(map(str, only))})"
    config: dict[str, Any] = {"threads": 1, "memory_limit": _SORT_MEMORY, "temp_directory": f"{task.target}.spill"}
    with duckdb.connect(":memory:", config=config) as database:
        found = database.execute(
            f"""
            select source_offset, if({is_long}, null, value) as value, {is_long} as is_long
            from read_parquet(?)
            where cluster = ? and source_topic = ? and source_partition = ? and source_offset >= ? and source_offset < ?
                and {chosen}
            order by source_offset
            """,
            [task.paths, cluster, topic, int(partition), task.start, task.end],
        )
        last = -1
        for batch in found.to_arrow_reader(_VALUES_AT_ONCE):
            offsets = batch["source_offset"].to_numpy()
            once = np.diff(offsets, prepend=last) != 0  # after a lost checkpoint the raw table may have a record twice
            last = int(offsets[-1]) if len(offsets) else last
            kept = batch.filter(pa.array(once))
            values = kept["value"].to_pylist()
            for at in np.flatnonzero(kept["is_long"].fill_null(False).to_numpy(zero_copy_only=False)).tolist():
                values[at] = b" " * (LONGEST_LINE + 1)
            yield offsets[once], values


def _write(task: AnyTask, temporary: Path, on_read: Callable[[int], None]) -> None:
    schema, facts = record_schema(task.stream), _Facts()
    coded = [field.name for field in schema if field.type == pa.string() and field.name not in _PLAIN_COLUMNS]
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": coded, "write_page_checksum": True}
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(temporary, schema, **options) as writer:
        for table in _records(task, on_read):
            facts.add(table)
            waiting.append(table)
            if sum(part.num_rows for part in waiting) >= ROW_GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
        entry = {"format": FORMAT, "name": task.name, "state": task.state, **vars(facts)}
        writer.add_key_value_metadata({METADATA_KEY.decode(): json.dumps(entry)})


def main() -> int:
    """Do tasks until the standard input ends."""
    hide_pandas()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends this process
    gc.disable()  # records have no cycles
    pa.set_cpu_count(1)  # each core has a process
    for line in sys.stdin:
        fields = json.loads(line)
        task = ChunkTask(**fields) if "paths" in fields else ParseTask(**fields)
        try:
            answer: dict[str, object] = {"done": parse_into(task, lambda read: print(json.dumps({"read": read}), flush=True))}
        except Exception as error:  # the parent must hear of any failure
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
