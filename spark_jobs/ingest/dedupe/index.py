"""The key index of `events`: the key and fingerprint of every accepted event, as sorted runs (``spark_jobs.lake.runs``).

Each run has a filter (``filters.py``). A look-up searches a run for the few keys that pass its filter, so new keys hardly touch the
rows. The filter only saves searches: a run whose filter is damaged is searched for all keys.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spark_jobs.ingest.dedupe.filters import ARRAYS, FilterBuilder, Probe, words_of
from spark_jobs.ingest.dedupe.keys import Keys, Words
from spark_jobs.lake.checked import BLOCK_BYTES, CheckedFile, DamagedError, Ints, bisect
from spark_jobs.lake.runs import Codec, SortedRuns

MERGE_ROWS = 65_536  # their arrays stay in the cache
_ROW_BYTES = 24
_FENCE_ROWS = 512  # the footer repeats the low half of every 512th row (a fence), which shows in which three blocks a key can be
_SEARCH_KEYS = 256  # pages are unmapped after so many keys: each can map up to 2 MiB, and the peak of memory counts that
_SYNC_BYTES = 64 * 1024 * 1024


class KeyRun:
    """A run of keys, memory-mapped: rows of (low, high, fingerprint), then the filter. Methods check what they read."""

    def __init__(self, file: CheckedFile, rows: int) -> None:
        self.file = file
        self.rows = rows
        self.table = np.frombuffer(file.data[: _ROW_BYTES * rows], dtype="<u8").reshape(rows, 3)
        self.low, self.high, self.fingerprint = self.table.T
        self._filter = np.frombuffer(file.data[_ROW_BYTES * rows :], dtype="<u8").reshape(ARRAYS, words_of(rows))
        self._is_array_checked = [False] * ARRAYS

    def candidates(self, probe: Probe) -> Ints:
        """Return which keys the run may have, ascending: those that pass its filter."""
        if len(probe) >= self._filter.nbytes // ARRAYS // BLOCK_BYTES:  # they touch most blocks of the first array
            self._check_array(0)
        return probe.candidates(self._filter, self._check_words)

    def _check_array(self, number: int) -> None:
        if not self._is_array_checked[number]:
            start = _ROW_BYTES * self.rows
            self.file.prefetch([start - start % BLOCK_BYTES], self.file.size - start)
            bounds = _ROW_BYTES * self.rows + self._filter.nbytes // ARRAYS * np.array([number, number + 1])
            self.file.check(bounds[:1], bounds[1:])
            self._is_array_checked[number] = True

    def _check_words(self, number: int, places: Ints) -> None:
        if not self._is_array_checked[number]:
            starts = _ROW_BYTES * self.rows + 8 * (number * self._filter.shape[1] + places)
            self.file.check(starts, starts + 8)

    def search(self, low: Words) -> Ints:
        """For each of sorted ``low``, return the first place whose low half is not smaller. Raises DamagedError."""
        left = np.maximum(np.searchsorted(self.file.extra, low) - 1, 0) * _FENCE_ROWS
        right = np.minimum(left + _FENCE_ROWS, self.rows)
        self.file.prefetch((_ROW_BYTES * left).tolist(), _ROW_BYTES * _FENCE_ROWS)
        self.file.check(_ROW_BYTES * left, _ROW_BYTES * right)
        return bisect(self.low, left, right, low)

    def find(self, low: Words, high: Words) -> tuple[Ints, Words]:
        """Return which of the keys, sorted by ``low``, the run has, and their fingerprints. Raises DamagedError."""
        pending, place = np.arange(len(low)), self.search(low)
        found, fingerprints = [pending[:0]], [low[:0]]
        while True:  # a second round happens only if two ids share the low half of their hash
            is_inside = place < self.rows
            pending, place = pending[is_inside], place[is_inside]
            if not len(pending):
                break
            self.file.check(_ROW_BYTES * place, _ROW_BYTES * (place + 1))
            same_low = self.low[place] == low[pending]
            pending, place = pending[same_low], place[same_low]
            hit = self.high[place] == high[pending]
            found.append(pending[hit])
            fingerprints.append(self.fingerprint[place[hit]])
            pending, place = pending[~hit], place[~hit] + 1
        return np.concatenate(found), np.concatenate(fingerprints)

    def parts(self) -> Iterator[Keys]:
        """Yield the keys in order, some at a time. Raises DamagedError, also if the filter denies one of them."""
        self.file.check_rest()
        for start in range(0, self.rows, MERGE_ROWS):
            keys = Keys(*self.table[start : start + MERGE_ROWS].T.copy())
            if len(self.candidates(Probe(keys.low, keys.high))) < len(keys):
                raise DamagedError(f"the filter of {self.file.path} denies a key of its run")
            self.file.release()
            yield keys


class KeyCodec(Codec[Keys, KeyRun]):
    """Keys sorted by (low, high), row by row, and their filter."""

    ending = "keys"
    shape = "rows, filter"
    small_run_rows = 1024
    max_run_rows = 256_000_000
    quick_merge_rows = 1_000_000

    def write(self, path: Path, rows: Keys) -> Words:
        """See Codec."""
        return write_keys(path, [_sorted_table(np.column_stack((rows.low, rows.high, rows.fingerprint)))], len(rows))

    def merge(self, path: Path, runs: Sequence[KeyRun]) -> tuple[int, Words]:
        """See Codec."""
        rows = sum(run.rows for run in runs)
        return rows, write_keys(path, _merged(runs, -(-rows // MERGE_ROWS)), rows)

    def open(self, file: CheckedFile, rows: int) -> KeyRun:
        """See Codec."""
        return KeyRun(file, rows)


def write_keys(path: Path, tables: Iterable[Words], rows: int) -> Words:
    """Write a run of ``rows`` keys, given as tables (n, 3), all in order. Returns its fences.

    It syncs as it goes: a large file that is synced at once would make the commits of others wait.
    """
    fences: list[Words] = []
    builder = FilterBuilder(rows)
    done = unsynced = 0

    def write_filter(at: int, words: Words) -> None:
        for number in range(ARRAYS):
            file.seek(_ROW_BYTES * rows + 8 * (number * words_of(rows) + at))
            file.write(np.ascontiguousarray(words[number], dtype="<u8").data)

    with open(path, "wb") as file:
        for table in tables:
            if not len(table):
                continue
            file.seek(_ROW_BYTES * done)
            file.write(np.ascontiguousarray(table, dtype="<u8").data)
            low, high = table[:, 0].copy(), table[:, 1].copy()
            write_filter(*builder.add(low, high))
            fences.append(low[-done % _FENCE_ROWS :: _FENCE_ROWS].copy())  # a view would keep all of `low`
            done += len(table)
            unsynced += table.nbytes
            if unsynced >= _SYNC_BYTES:
                file.flush()
                os.fdatasync(file.fileno())
                unsynced = 0
        write_filter(*builder.finish())
    assert done == rows, f"{done} keys for a run of {rows}"
    return np.concatenate(fences)


def _sorted_table(table: Words) -> Words:
    """Return the rows sorted by (low, high)."""
    ordered: Words = table.take(Keys(*table.T).order, axis=0)
    return ordered


def _merged(runs: Sequence[KeyRun], count: int) -> Iterator[Words]:
    """Yield the rows of all runs in ``count`` ranges of low, so that a merge needs the same memory however large the runs are."""
    ends = [0] * len(runs)
    for number in range(1, count + 1):
        starts, ends = ends, [run.rows for run in runs]
        if number < count:
            bound = np.array([number * 2**64 // count], dtype=np.uint64)
            ends = [int(run.search(bound)[0]) for run in runs]
        yield _sorted_table(np.concatenate([run.table[start:end] for run, start, end in zip(runs, starts, ends, strict=True)]))
        for run in runs:
            run.file.release()


class KeyIndex(SortedRuns[Keys, KeyRun]):
    """The keys that a version of `events` holds."""

    def __init__(self, folder: Path, codec: KeyCodec | None = None) -> None:
        super().__init__(folder, codec or KeyCodec())

    def lookup(self, low: Words, high: Words) -> tuple[npt.NDArray[np.bool_], Words]:
        """For each key, sorted by (low, high), return whether the index has it, and its fingerprint. Raises DamagedError."""
        found = np.zeros(len(low), dtype=bool)
        fingerprint = np.zeros(len(low), dtype=np.uint64)
        probe = Probe(low, high)
        for run in self.open_runs() if len(low) else ():
            try:
                pending = run.candidates(probe)
            except DamagedError:
                pending = np.arange(len(low))
            run.file.release()
            for start in range(0, len(pending), _SEARCH_KEYS):
                part = pending[start : start + _SEARCH_KEYS]
                hits, values = run.find(low[part], high[part])
                found[part[hits]] = True
                fingerprint[part[hits]] = values
                run.file.release()
        return found, fingerprint

    def parts(self) -> Iterator[Keys]:
        """Yield the keys of each run, some at a time. Raises DamagedError, also if a filter denies a key of its run."""
        for run in self.open_runs():
            yield from run.parts()
