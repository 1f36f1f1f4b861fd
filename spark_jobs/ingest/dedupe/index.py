"""The key index of `events`: the key and fingerprint of every accepted event, as sorted runs (``spark_jobs.lake.runs``).

A look-up is a binary search in a few memory-mapped runs: its cost grows with the number of new keys, hardly with the history.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spark_jobs.ingest.dedupe.keys import Keys, Words
from spark_jobs.lake.checked import BLOCK_BYTES, CheckedFile, Ints, bisect
from spark_jobs.lake.runs import Codec, SortedRuns

MERGE_ROWS = 1_000_000
_FENCE_ROWS = BLOCK_BYTES // 8  # the footer repeats one low half a block (a fence), which tells in which block a key can be


class KeyRun:
    """A run of keys, memory-mapped. ``words`` are its columns: low, high, fingerprint. They are unchecked until `check`."""

    def __init__(self, file: CheckedFile, rows: int) -> None:
        self.file = file
        self.rows = rows
        self.words = np.frombuffer(file.data, dtype="<u8").reshape(3, rows)
        self.low, self.high, self.fingerprint = self.words

    def check(self, column: int, places: Ints) -> None:
        """Check the words of a column (0 low, 1 high, 2 fingerprint) at ``places``. Raises DamagedError."""
        if column == 0 and self.file.is_checked(8 * self.rows):
            return
        starts = 8 * (column * self.rows + places)
        self.file.check(starts, starts + 8)

    def search(self, low: Words) -> Ints:
        """For each of sorted ``low``, return the first place whose low half is not smaller. Raises DamagedError.

        Few keys read only the blocks that can hold them.
        """
        end = 8 * self.rows
        if len(low) >= len(self.file.extra):
            self.file.check(np.array([0]), np.array([end]))
        if self.file.is_checked(end):
            return np.searchsorted(self.low, low)
        left = np.maximum(np.searchsorted(self.file.extra, low) - 1, 0) * _FENCE_ROWS
        right = np.minimum(left + _FENCE_ROWS, self.rows)
        self.file.check(8 * left, 8 * right)
        return bisect(self.low, left, right, low)


class KeyCodec(Codec[Keys, KeyRun]):
    """Keys sorted by (low, high). A file holds all low halves, then all high halves, then all fingerprints."""

    ending = "keys"
    small_run_rows = 1024
    max_run_rows = 16_000_000

    def write(self, path: Path, rows: Keys) -> Words:
        """See Codec."""
        return _write(path, [rows], len(rows))

    def merge(self, path: Path, runs: Sequence[KeyRun]) -> tuple[int, Words]:
        """See Codec."""
        rows = sum(run.rows for run in runs)
        return rows, _write(path, _ranges(runs, -(-rows // MERGE_ROWS)), rows)

    def open(self, file: CheckedFile, rows: int) -> KeyRun:
        """See Codec."""
        return KeyRun(file, rows)


def _write(path: Path, parts: Iterable[Keys], rows: int) -> Words:
    """Write ``rows`` keys and return their fences. The parts are in order of (low, high); the keys within a part need not be."""
    fences: list[Words] = []
    done = 0
    with open(path, "wb") as file:
        for keys in parts:
            order = keys.order
            for number, column in enumerate((keys.low, keys.high, keys.fingerprint)):
                file.seek(8 * (number * rows + done))
                file.write(np.ascontiguousarray(column[order], dtype="<u8").data)
            fences.append(keys.low[order[-done % _FENCE_ROWS :: _FENCE_ROWS]])
            done += len(keys)
    assert done == rows, f"{done} keys for a run of {rows}"
    return np.concatenate(fences)


def _ranges(runs: Sequence[KeyRun], count: int) -> Iterator[Keys]:
    """Yield the keys of all runs in ``count`` ranges of low, so that a merge needs the same memory however large the runs are."""
    bounds = [np.uint64(number * 2**64 // count) for number in range(1, count)]
    ends = [[0, *np.searchsorted(run.low, bounds).tolist(), run.rows] for run in runs]
    for number in range(count):
        cuts = [run.words[:, end[number] : end[number + 1]] for run, end in zip(runs, ends, strict=True)]
        yield Keys.concatenate([Keys(*np.array(cut)) for cut in cuts])
        for run in runs:
            run.file.release()


class KeyIndex(SortedRuns[Keys, KeyRun]):
    """The keys that a version of `events` holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, KeyCodec())

    def lookup(self, low: Words, high: Words) -> tuple[npt.NDArray[np.bool_], Words]:
        """For each key, sorted by (low, high), return whether the index has it, and its fingerprint. Raises DamagedError."""
        found = np.zeros(len(low), dtype=bool)
        fingerprint = np.zeros(len(low), dtype=np.uint64)
        for run in self.open_runs() if len(low) else ():
            at = run.search(low)
            pending = np.flatnonzero(at < run.rows)
            while len(pending):  # a second round happens only if two ids share the low half of their hash
                place = at[pending]
                run.check(0, place)
                same_low = run.low[place] == low[pending]
                pending, place = pending[same_low], place[same_low]
                run.check(1, place)
                hit = run.high[place] == high[pending]
                run.check(2, place[hit])
                found[pending[hit]] = True
                fingerprint[pending[hit]] = run.fingerprint[place[hit]]
                pending = pending[~hit]
                at[pending] += 1
                pending = pending[at[pending] < run.rows]
            run.file.release()
        return found, fingerprint

    def parts(self) -> Iterator[Keys]:
        """Yield the keys of each run. Raises DamagedError."""
        for run in self.open_runs():
            run.file.check_rest()
            yield Keys(*np.array(run.words))
            run.file.release()
