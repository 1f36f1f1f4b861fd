"""Sorted runs of rows, found by a 128-bit key and a range of times: derived from a Delta table and tied to its version.

As the key index (``ingest.dedupe.index``) it remembers nothing of its own: it says which version of which table it covers,
takes what later commits added or changed, and is built anew where it is missing, damaged or cannot follow. A run is one Arrow file,
memory-mapped, so a look-up reads the pages of the rows that it finds: its cost grows with what is asked for. Runs outside the times
that are asked for are passed over. What a look-up reads is checked before it is believed (``spark_jobs.lake.checked``).
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs import disk
from spark_jobs.lake.checked import CheckedFile, DamagedError, bisect, manifest_text, read_manifest, seal

FANOUT = 4
MAX_RUN_ROWS = 2_000_000  # what a merge holds in memory, two or three times
_SMALLEST = 4096
_FORMAT = 2
_FENCE_ROWS = 512  # the low half of one row of every so many stands in the footer: it says where a key can lie

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

KEY_FIELDS = (
    pa.field("low", pa.uint64()),
    pa.field("high", pa.uint64()),
    pa.field("time_us", pa.int64()),
    pa.field("id", pa.uint64()),
    pa.field("counts", pa.bool_()),
)
"""Of each row: the key's halves, its time, the hash of its own id, and whether it counts (False takes an earlier one back)."""


@dataclass(frozen=True)
class Run:
    """A file of rows sorted by (low, time_us), and their times from the first to the last.

    ``size``: bytes of the Arrow file. ``checksum``: of the footer behind it.
    """

    file: str
    rows: int
    first_us: int
    last_us: int
    size: int
    checksum: str


class _OpenRun:
    """A run's rows, memory-mapped, and the checks of what is read of them."""

    def __init__(self, path: Path, run: Run) -> None:
        self.file = CheckedFile(path, run.size, run.checksum)
        whole = pa.py_buffer(self.file.data)
        self._base = whole.address
        try:
            self.rows = pa.ipc.open_file(whole).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DamagedError(f"{path} is damaged: {error}") from error
        self._columns = {name: self.rows[name].chunk(0) for name in self.rows.column_names}  # a run is one batch
        buffers = [buffer for column in self._columns.values() for buffer in column.buffers() if buffer is not None]
        head = min(buffer.address for buffer in buffers) - self._base
        tail = max(buffer.address + buffer.size for buffer in buffers) - self._base
        self.file.check(np.array([0, tail]), np.array([head, run.size]))  # what told Arrow where the columns lie

    def values(self, name: str) -> Any:
        """A column of numbers, as it lies in the file. What is read of it is to be checked."""
        return self._columns[name].to_numpy(zero_copy_only=True)

    def check_whole(self) -> None:
        """Check what was not checked before."""
        self.file.check(np.zeros(1, dtype=np.int64), np.full(1, self.file.size))

    def check_values(self, name: str, left: Ints, right: Ints) -> None:
        """Check the numbers of a column at places [left, right), none of them empty."""
        start = self._columns[name].buffers()[1].address - self._base
        self.file.check(start + 8 * left, start + 8 * right)

    def check_rows(self, at: Ints) -> None:
        """Check all columns of the rows at some places."""
        for column in self._columns.values():
            validity, *buffers = column.buffers()
            if validity is not None:
                self._check_bytes(validity, at // 8, at // 8 + 1)
            if len(buffers) == 2:  # of strings: where each one lies, and the text
                self._check_bytes(buffers[0], 4 * at, 4 * at + 8)
                places = np.frombuffer(buffers[0], dtype=np.int32)
                self._check_bytes(buffers[1], places[at].astype(np.int64), places[at + 1].astype(np.int64))
            elif pa.types.is_boolean(column.type):
                self._check_bytes(buffers[0], at // 8, at // 8 + 1)
            else:
                self._check_bytes(buffers[0], 8 * at, 8 * at + 8)

    def _check_bytes(self, buffer: pa.Buffer, starts: Ints, ends: Ints) -> None:
        held = starts < ends
        start = buffer.address - self._base
        self.file.check(start + starts[held], start + ends[held])

    def search(self, low: Words, *, after: bool = False) -> Ints:
        """For ``low`` the first place whose low half is not below it (``after``: is above it). Reads what can hold it only."""
        fences = self.file.extra
        left = np.maximum(np.searchsorted(fences, low, "right" if after else "left") - 1, 0) * _FENCE_ROWS
        right = np.minimum(left + _FENCE_ROWS, self.rows.num_rows)
        self.check_values("low", left, right)
        return bisect(self.values("low"), left, right, low, after=after)


class RowIndex:
    """Runs under ``folder`` and a manifest that names them. ``shape`` is what they were made with: another one is none of ours.

    Of rows with the same key, time and id the one appended last holds. One process uses it at a time (the lock of attribution).
    """

    def __init__(self, folder: Path, payload: pa.Schema, shape: str = "") -> None:
        self._folder = folder
        self.schema = pa.schema([*KEY_FIELDS, *payload])
        self._shape = f"{shape}\n{self.schema.to_string()}"
        self.table_id: str | None = None
        self.version = -1
        self.commit = ""  # identifies the commit of ``version``
        self.runs: list[Run] = []
        self.problem: str | None = None  # why what lies in the folder was discarded
        self._open_runs: dict[str, _OpenRun] = {}
        self._load()

    def rebuild(self, table_id: str, parts: Iterable[pa.Table], version: int, commit: str = "") -> None:
        """Start again with the rows that ``version`` of ``table_id`` holds. Until all are written the index covers nothing."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.table_id, self.version, self.commit, self.runs, self._open_runs = table_id, -1, "", [], {}
        self.problem = None
        self.runs = [self._write(part) for part in parts if part.num_rows]
        self.version, self.commit = version, commit
        self._save()

    def append(self, rows: pa.Table, version: int, commit: str = "") -> None:
        """Cover ``version``; it and those since the last one covered added or changed ``rows``. Raises DamagedError."""
        if rows.num_rows:
            self._merge()
            self.runs.append(self._write(rows))
        self.version, self.commit = version, commit
        self._save()

    def between(self, low: Words, high: Words, start_us: Ints, end_us: Ints) -> tuple[Ints, pa.Table]:
        """For queries (key, start <= time < end): the rows found, sorted by (query, time), and the number of each row's query.

        Raises DamagedError.
        """
        if not len(low):
            return np.empty(0, dtype=np.int64), self.schema.empty_table()
        by = np.argsort(low, kind="stable")  # so that neighbouring queries meet the same pages
        earliest, latest = int(start_us.min()), int(end_us.max())
        numbers, parts = [], []
        runs = [run for run in self.runs if run.last_us >= earliest and run.first_us < latest]
        for run in runs:
            held = self._open(run)
            at, query = _ranges(held, low[by], start_us[by], end_us[by])
            number = by[query]
            held.check_values("high", at, at + 1)
            same = held.values("high")[at] == high[number]
            if same.any():
                numbers.append(number[same])
                held.check_rows(at[same])
                parts.append(held.rows.take(pa.array(at[same])))
        if not parts:
            return np.empty(0, dtype=np.int64), self.schema.empty_table()
        found, number = pa.concat_tables(parts).combine_chunks(), np.concatenate(numbers)
        time = found["time_us"].to_numpy()
        ids = found["id"].to_numpy()
        order = np.lexsort((ids, time, number))  # stable: what was appended last comes last
        order = order[_last_of_equal(number[order], time[order], ids[order])]
        order = order[found["counts"].to_numpy()[order]]
        return number[order], found.take(pa.array(order))

    def _open(self, run: Run) -> _OpenRun:
        if run.file not in self._open_runs:
            self._open_runs[run.file] = _OpenRun(self._folder / run.file, run)
        return self._open_runs[run.file]

    def _write(self, rows: pa.Table) -> Run:
        rows = rows.select(self.schema.names).cast(self.schema)
        time = rows["time_us"].to_numpy()
        rows = rows.take(pa.array(np.lexsort((time, rows["low"].to_numpy())))).combine_chunks()
        name = f"run-{uuid.uuid4().hex}.arrow"
        with disk.replacing(self._folder / name) as temporary:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, self.schema) as writer:
                writer.write_table(rows, max_chunksize=max(1, rows.num_rows))
            size = temporary.stat().st_size
            checksum = seal(temporary, rows["low"].to_numpy()[::_FENCE_ROWS])
        return Run(name, rows.num_rows, int(time.min()), int(time.max()), size, checksum)

    def _merge(self) -> None:
        """Merge neighbouring runs of like size, FANOUT at a time; a run counts as large as any behind it."""
        while True:
            sizes = list(accumulate((_tier(run.rows) for run in reversed(self.runs)), max))[::-1]
            for start in range(len(self.runs) - FANOUT, -1, -1):
                group = self.runs[start : start + FANOUT]
                if len(set(sizes[start : start + FANOUT])) == 1 and sum(run.rows for run in group) <= MAX_RUN_ROWS:
                    self.runs[start : start + FANOUT] = [self._merged(group)]
                    break
            else:
                return

    def _merged(self, group: list[Run]) -> Run:
        held = [self._open(run) for run in group]
        for each in held:
            each.check_whole()
        rows = pa.concat_tables([each.rows for each in held])
        columns = [rows[name].to_numpy() for name in ("low", "high", "time_us", "id")]
        order = np.lexsort(columns[::-1])
        return self._write(rows.take(pa.array(order[_last_of_equal(*(column[order] for column in columns))])))

    def _save(self) -> None:
        manifest = {
            "format": _FORMAT,
            "shape": self._shape,
            "table_id": self.table_id,
            "version": self.version,
            "commit": self.commit,
            "runs": [asdict(run) for run in self.runs],
        }
        disk.write_file(self._folder / "manifest.json", manifest_text(manifest).encode())
        kept = {run.file for run in self.runs}
        for stale in (*self._folder.glob("run-*.arrow"), *self._folder.glob(".*.tmp")):
            if stale.name not in kept:
                stale.unlink(missing_ok=True)
                self._open_runs.pop(stale.name, None)

    def _load(self) -> None:
        try:
            manifest = read_manifest(self._folder / "manifest.json")
            if manifest is None or manifest["shape"] != self._shape:
                return
            if manifest["format"] != _FORMAT:
                raise DamagedError(f"{self._folder} has another format")
            runs = [Run(**run) for run in manifest["runs"]]
            for run in runs:
                self._open(run)
            self.table_id, self.version, self.commit = manifest["table_id"], manifest["version"], manifest["commit"]
            self.runs = runs
        except (DamagedError, ValueError, KeyError, TypeError) as error:
            self._open_runs = {}  # as if it were not there: it is rebuilt from the table
            self.problem = str(error)


def check_index(folder: Path) -> None:
    """Check every byte of the index under ``folder``, whatever shape it has. Raises DamagedError."""
    manifest = read_manifest(folder / "manifest.json")
    if manifest is None:
        return
    if manifest.get("format") != _FORMAT:
        raise DamagedError(f"{folder} has another format")
    for run in (Run(**run) for run in manifest["runs"]):
        _OpenRun(folder / run.file, run).file.check_all()


def _last_of_equal(*columns: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Of sorted rows those that no equal one follows."""
    last = np.ones(len(columns[0]), dtype=bool)
    last[:-1] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return last


def _ranges(held: _OpenRun, low: Words, start_us: Ints, end_us: Ints) -> tuple[Ints, Ints]:
    """Places in a run where (key, start <= time < end) holds, and for each the number of its query."""
    left, right = held.search(low), held.search(low, after=True)
    hits = np.flatnonzero(left < right)
    left, right = left[hits], right[hits]
    held.check_values("time_us", left, right)
    times = held.values("time_us")
    lower = bisect(times, left, right, start_us[hits])
    upper = bisect(times, lower, right, end_us[hits])
    counts = upper - lower
    query = np.repeat(hits, counts)
    before = np.cumsum(counts) - counts
    return np.arange(len(query)) + np.repeat(lower - before, counts), query


def _tier(rows: int) -> int:
    tier = 0
    while rows >= FANOUT * _SMALLEST:
        rows //= FANOUT
        tier += 1
    return tier
