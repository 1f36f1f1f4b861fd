"""Rows of a table by a 128-bit key and a time, as sorted runs (``spark_jobs.lake.runs``).

A run is one Arrow file, memory-mapped, so a look-up reads only the pages of the rows that it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs.lake.checked import CheckedFile, DamagedError, Ints, Words, bisect
from spark_jobs.lake.runs import Codec, SortedRuns

_FENCE_ROWS = 512  # the footer repeats the low half of every 512th row (a fence), which shows where a key can be

KEY_FIELDS = (
    pa.field("low", pa.uint64()),
    pa.field("high", pa.uint64()),
    pa.field("time_us", pa.int64()),
    pa.field("id", pa.uint64()),
    pa.field("counts", pa.bool_()),
)
"""The first columns of each row: the halves of its key, its time, the hash of its id, and whether it counts.

A row that does not count takes back an earlier one with the same key, time and id.
"""


class RowRun:
    """A run of rows, memory-mapped. Its times are from ``first_us`` to ``last_us``."""

    def __init__(self, file: CheckedFile) -> None:
        """Check the bytes that name the places of the columns. Raises DamagedError."""
        self.file = file
        self.first_us, self.last_us = file.extra[:2].view(np.int64).tolist()
        self._fences = file.extra[2:]
        whole = pa.py_buffer(file.data)
        self._base = whole.address
        try:
            self.table = pa.ipc.open_file(whole).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DamagedError(f"{file.path} is damaged: {error}") from error
        self._columns = {name: self.table[name].chunk(0) for name in self.table.column_names}  # a run is one batch
        buffers = [buffer for column in self._columns.values() for buffer in column.buffers() if buffer is not None]
        head = min(buffer.address for buffer in buffers) - self._base
        tail = max(buffer.address + buffer.size for buffer in buffers) - self._base
        file.check(np.array([0, tail]), np.array([head, file.size]))

    def values(self, name: str) -> Any:
        """Return a column of numbers without a copy. They are unchecked until `check_values`."""
        return self._columns[name].to_numpy(zero_copy_only=True)

    def counts(self, at: Ints) -> npt.NDArray[np.bool_]:
        """Return whether the rows at places ``at`` count. They are unchecked until `check_rows`."""
        packed = np.frombuffer(self._columns["counts"].buffers()[1], dtype=np.uint8)
        found: npt.NDArray[np.bool_] = (packed[at >> 3] >> (at & 7) & 1).astype(bool)
        return found

    def check_values(self, name: str, left: Ints, right: Ints) -> None:
        """Check the numbers of a column at places [left, right), none of them empty. Raises DamagedError."""
        start = self._columns[name].buffers()[1].address - self._base
        self.file.check(start + 8 * left, start + 8 * right)

    def check_rows(self, at: Ints) -> None:
        """Check all columns of the rows at places ``at``. Raises DamagedError."""
        for column in self._columns.values():
            validity, *buffers = column.buffers()
            if validity is not None:
                self._check_bytes(validity, at // 8, at // 8 + 1)
            if len(buffers) == 2:  # strings: offsets, then text
                self._check_bytes(buffers[0], 4 * at, 4 * at + 8)
                places = np.frombuffer(buffers[0], dtype=np.int32)
                self._check_bytes(buffers[1], places[at].astype(np.int64), places[at + 1].astype(np.int64))
            elif pa.types.is_boolean(column.type):
                self._check_bytes(buffers[0], at // 8, at // 8 + 1)
            else:
                self._check_bytes(buffers[0], 8 * at, 8 * at + 8)

    def _check_bytes(self, buffer: pa.Buffer, starts: Ints, ends: Ints) -> None:
        is_filled = starts < ends
        start = buffer.address - self._base
        self.file.check(start + starts[is_filled], start + ends[is_filled])

    def search(self, low: Words, *, after: bool = False) -> Ints:
        """For each of ``low``, return the first place whose low half is not smaller (``after``: is larger). Raises DamagedError.

        Reads only the rows between two fences.
        """
        left = np.maximum(np.searchsorted(self._fences, low, "right" if after else "left") - 1, 0) * _FENCE_ROWS
        right = np.minimum(left + _FENCE_ROWS, self.table.num_rows)
        self.check_values("low", left, right)
        return bisect(self.values("low"), left, right, low, after=after)

    def between(self, low: Words, start_us: Ints, end_us: Ints) -> tuple[Ints, Ints]:
        """Return the places where (low, start <= time < end) holds, and for each the number of its query. Raises DamagedError."""
        left, right = self.search(low), self.search(low, after=True)
        hits = np.flatnonzero(left < right)
        left, right = left[hits], right[hits]
        self.check_values("time_us", left, right)
        times = self.values("time_us")
        lower = bisect(times, left, right, start_us[hits])
        upper = bisect(times, lower, right, end_us[hits])
        counts = upper - lower
        query = np.repeat(hits, counts)
        before = np.cumsum(counts) - counts
        return np.arange(len(query)) + np.repeat(lower - before, counts), query


class RowCodec(Codec[pa.Table, RowRun]):
    """Rows sorted by (low, time_us), as one Arrow batch. Of rows with the same key, time and id a merge keeps the newest."""

    ending = "arrow"
    small_run_rows = 4096
    max_run_rows = 2_000_000  # a merge has all rows in memory two or three times
    quick_merge_rows = max_run_rows

    def __init__(self, schema: pa.Schema, shape: str) -> None:
        self.schema = schema
        self.shape = f"{shape}\n{schema.to_string()}"

    def write(self, path: Path, rows: pa.Table) -> Words:
        """See Codec. The words are the first and the last time, then the fences."""
        rows = rows.select(self.schema.names).cast(self.schema)
        times = rows["time_us"].to_numpy()
        rows = rows.take(pa.array(np.lexsort((times, rows["low"].to_numpy())))).combine_chunks()
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, self.schema) as writer:
            writer.write_table(rows, max_chunksize=max(1, rows.num_rows))
        span = np.array([times.min(), times.max()], dtype=np.int64)
        return np.concatenate([span.view(np.uint64), rows["low"].to_numpy()[::_FENCE_ROWS]])

    def merge(self, path: Path, runs: Sequence[RowRun]) -> tuple[int, Words]:
        """See Codec."""
        rows = pa.concat_tables([run.table for run in runs])
        columns = [rows[name].to_numpy() for name in ("low", "high", "time_us", "id")]
        order = np.lexsort(columns[::-1])
        rows = rows.take(pa.array(order[_last_of_equal(*(column[order] for column in columns))]))
        return rows.num_rows, self.write(path, rows)

    def open(self, file: CheckedFile, rows: int) -> RowRun:
        """See Codec."""
        return RowRun(file)


class RowIndex(SortedRuns[pa.Table, RowRun]):
    """Rows of KEY_FIELDS and ``payload``. Of rows with the same key, time and id the one that was appended last is valid.

    ``shape`` says how the rows were made: an index with a different shape is discarded and rebuilt.
    """

    def __init__(self, folder: Path, payload: pa.Schema, shape: str = "") -> None:
        self.schema = pa.schema([*KEY_FIELDS, *payload])
        super().__init__(folder, RowCodec(self.schema, shape))

    def between(self, low: Words, high: Words, start_us: Ints, end_us: Ints) -> tuple[Ints, pa.Table]:
        """For queries (key, start <= time < end) return the number of each row's query, and the rows, by (query, time).

        Raises DamagedError.
        """
        found: list[tuple[RowRun, Ints, Ints]] = []
        by = np.argsort(low, kind="stable")  # so that neighbouring queries read the same pages
        for run in self.open_runs() if len(low) else ():
            if run.last_us < start_us.min() or run.first_us >= end_us.max():
                continue
            at, query = run.between(low[by], start_us[by], end_us[by])
            number = by[query]
            run.check_values("high", at, at + 1)
            is_same = run.values("high")[at] == high[number]
            if is_same.any():
                at = at[is_same]
                run.check_rows(at)
                found.append((run, at, number[is_same]))
        if not found:
            return np.empty(0, dtype=np.int64), self.schema.empty_table()
        number = np.concatenate([numbers for _, _, numbers in found])
        time, ids = (np.concatenate([run.values(name)[at] for run, at, _ in found]) for name in ("time_us", "id"))
        order = _sorted_by(number, time, ids)
        order = order[_last_of_equal(number[order], time[order], ids[order])]
        if len(found) == 1:
            ((run, at, _),) = found
            rows, order = run.table, order[run.counts(at[order])]
            return number[order], rows.take(pa.array(at[order]))
        rows = pa.concat_tables([run.table.take(pa.array(at)) for run, at, _ in found]).combine_chunks()
        order = order[rows["counts"].to_numpy()[order]]
        return number[order], rows.take(pa.array(order))


def _sorted_by(number: Ints, time: Ints, ids: Words) -> Ints:
    """Return the indices that sort rows by (number, time, id); of equal rows the one that was appended last comes last."""
    if not len(number):
        return number
    since = time - time.min()
    span = int(since.max()) + 1
    if (int(number.max()) + 1) * span < 2**63:  # sorting one number takes a third of the time of sorting three
        key = number * span + since
        order = np.argsort(key)
        key = key[order]
        if np.all(key[1:] != key[:-1]):
            return order
    return np.lexsort((ids, time, number))


def _last_of_equal(*columns: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Mark the rows, sorted by ``columns``, that no equal row follows."""
    last = np.ones(len(columns[0]), dtype=bool)
    last[:-1] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return last
