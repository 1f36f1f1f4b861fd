"""Sorted runs of rows, found by a 128-bit key and a range of times: derived from a Delta table and tied to its version.

As the key index (``spark_jobs.dedupe.index``) it remembers nothing of its own: it says which version of which table it covers,
takes what later commits added or changed, and is built anew where it is missing or cannot follow. A run is one Arrow file,
memory-mapped, so a look-up reads the pages of the rows that it finds: its cost grows with what is asked for. Runs outside the times
that are asked for are passed over.
"""

from __future__ import annotations

import json
import os
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

FANOUT = 4
MAX_RUN_ROWS = 2_000_000  # what a merge holds in memory, two or three times
_SMALLEST = 4096
_FORMAT = 1

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
    """A file of rows sorted by (low, time_us), and their times from the first to the last."""

    file: str
    rows: int
    first_us: int
    last_us: int


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
        self.runs: list[Run] = []
        self._tables: dict[str, pa.Table] = {}
        self._load()

    def rebuild(self, table_id: str, parts: Iterable[pa.Table], version: int) -> None:
        """Start again with the rows that ``version`` of ``table_id`` holds. Until all are written the index covers nothing."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.table_id, self.version, self.runs, self._tables = table_id, -1, [], {}
        self.runs = [self._write(part) for part in parts if part.num_rows]
        self.version = version
        self._save()

    def append(self, rows: pa.Table, version: int) -> None:
        """Cover ``version``; it and those since the last one covered added or changed ``rows``."""
        if rows.num_rows:
            self._merge()
            self.runs.append(self._write(rows))
        self.version = version
        self._save()

    def between(self, low: Words, high: Words, start_us: Ints, end_us: Ints) -> tuple[Ints, pa.Table]:
        """For queries (key, start <= time < end): the rows found, sorted by (query, time), and the number of each row's query."""
        if not len(low):
            return np.empty(0, dtype=np.int64), self.schema.empty_table()
        by = np.argsort(low, kind="stable")  # so that neighbouring queries meet the same pages
        earliest, latest = int(start_us.min()), int(end_us.max())
        numbers, parts = [], []
        runs = [run for run in self.runs if run.last_us >= earliest and run.first_us < latest]
        for run in runs:
            rows = self._open(run)
            at, query = _ranges(_column(rows, "low"), _column(rows, "time_us"), low[by], start_us[by], end_us[by])
            number = by[query]
            same = _column(rows, "high")[at] == high[number]
            if same.any():
                numbers.append(number[same])
                parts.append(rows.take(pa.array(at[same])))
        if not parts:
            return np.empty(0, dtype=np.int64), self.schema.empty_table()
        found, number = pa.concat_tables(parts).combine_chunks(), np.concatenate(numbers)
        time = found["time_us"].to_numpy()
        ids = found["id"].to_numpy()
        order = np.lexsort((ids, time, number))  # stable: what was appended last comes last
        order = order[_last_of_equal(number[order], time[order], ids[order])]
        order = order[found["counts"].to_numpy()[order]]
        return number[order], found.take(pa.array(order))

    def _open(self, run: Run) -> pa.Table:
        if run.file not in self._tables:
            with pa.memory_map(str(self._folder / run.file)) as source:
                self._tables[run.file] = pa.ipc.open_file(source).read_all()
        return self._tables[run.file]

    def _write(self, rows: pa.Table) -> Run:
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = rows.select(self.schema.names).cast(self.schema)
        time = rows["time_us"].to_numpy()
        rows = rows.take(pa.array(np.lexsort((time, rows["low"].to_numpy())))).combine_chunks()
        name = f"run-{uuid.uuid4().hex}.arrow"
        temporary = self._folder / f".{name}.tmp"
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, self.schema) as writer:
            writer.write_table(rows, max_chunksize=max(1, rows.num_rows))
        os.replace(temporary, self._folder / name)
        return Run(name, rows.num_rows, int(time.min()), int(time.max()))

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
        rows = pa.concat_tables([self._open(run) for run in group])
        columns = [rows[name].to_numpy() for name in ("low", "high", "time_us", "id")]
        order = np.lexsort(columns[::-1])
        return self._write(rows.take(pa.array(order[_last_of_equal(*(column[order] for column in columns))])))

    def _save(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        manifest = {
            "format": _FORMAT,
            "shape": self._shape,
            "table_id": self.table_id,
            "version": self.version,
            "runs": [asdict(run) for run in self.runs],
        }
        temporary = self._folder / ".manifest.json.tmp"
        temporary.write_text(json.dumps(manifest, indent=1), "utf-8")
        os.replace(temporary, self._folder / "manifest.json")
        kept = {run.file for run in self.runs}
        for stale in (*self._folder.glob("run-*.arrow"), *self._folder.glob(".run-*.tmp")):
            if stale.name not in kept:
                stale.unlink(missing_ok=True)
                self._tables.pop(stale.name, None)

    def _load(self) -> None:
        try:
            manifest = json.loads((self._folder / "manifest.json").read_text("utf-8"))
            if manifest["format"] != _FORMAT or manifest["shape"] != self._shape:
                return
            runs = [Run(**run) for run in manifest["runs"]]
            if any(self._open(run).num_rows != run.rows for run in runs):
                return
            self.table_id, self.version, self.runs = manifest["table_id"], manifest["version"], runs
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            self._tables = {}  # unreadable: as if it were not there, it is rebuilt from the table


def _column(rows: pa.Table, name: str) -> Any:
    return rows[name].chunk(0).to_numpy(zero_copy_only=True)  # a run is one batch


def _last_of_equal(*columns: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Of sorted rows those that no equal one follows."""
    last = np.ones(len(columns[0]), dtype=bool)
    last[:-1] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return last


def _ranges(keys: Words, times: Words, low: Words, start_us: Ints, end_us: Ints) -> tuple[Ints, Ints]:
    """Places in a run where (key, start <= time < end) holds, and for each the number of its query. ``low`` is sorted."""
    left, right = np.searchsorted(keys, low, "left"), np.searchsorted(keys, low, "right")
    held = np.flatnonzero(left < right)
    left, right = left[held], right[held]
    lower = _bisect(times, left, right, start_us[held])
    upper = _bisect(times, lower, right, end_us[held])
    counts = upper - lower
    query = np.repeat(held, counts)
    before = np.cumsum(counts) - counts
    return np.arange(len(query)) + np.repeat(lower - before, counts), query


def _bisect(times: Words, left: Ints, right: Ints, wanted: Ints) -> Ints:
    """For each slice of sorted ``times`` the first place whose time is not before ``wanted``."""
    left, right = left.copy(), right.copy()
    open_ = np.flatnonzero(left < right)
    while len(open_):
        middle = (left[open_] + right[open_]) // 2
        before = times[middle] < wanted[open_]
        left[open_] = np.where(before, middle + 1, left[open_])
        right[open_] = np.where(before, right[open_], middle)
        open_ = open_[left[open_] < right[open_]]
    return left


def _tier(rows: int) -> int:
    tier = 0
    while rows >= FANOUT * _SMALLEST:
        rows //= FANOUT
        tier += 1
    return tier
