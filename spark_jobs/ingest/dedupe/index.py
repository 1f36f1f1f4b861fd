"""The key index of `events`: sorted runs of keys, derived from the table and tied to its version.

It remembers nothing of its own: it says which version of the table it covers, catches up from the commits behind that version,
and is rebuilt from the table when it is missing, damaged, of another table, or when rows were changed or removed. A look-up is a
binary search in a few memory-mapped runs, so its cost grows with the number of new keys, hardly with the history. What a look-up
reads is checked before it is believed (``spark_jobs.lake.checked``).
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spark_jobs import disk
from spark_jobs.ingest.dedupe.keys import Keys, Words
from spark_jobs.lake.checked import BLOCK_BYTES, CheckedFile, DamagedError, Ints, bisect, manifest_text, read_manifest, seal

FANOUT = 4
MAX_RUN_ROWS = 16_000_000
MERGE_ROWS = 1_000_000
_FORMAT = 2
_FENCE_ROWS = BLOCK_BYTES // 8  # one word of every so many stands in the footer: it says which block a key can lie in


@dataclass(frozen=True)
class Run:
    """A file of keys sorted by (low, high): the rows that versions ``first`` to ``last`` added.

    It holds all low halves, then all high halves, then all fingerprints. ``checksum`` is that of the file's footer.
    """

    file: str
    rows: int
    first: int
    last: int
    checksum: str


class _OpenRun:
    """A run's columns, memory-mapped, and the checks of what is read of them."""

    def __init__(self, path: Path, run: Run) -> None:
        self.file = CheckedFile(path, 24 * run.rows, run.checksum)
        self.rows = run.rows
        words = np.frombuffer(self.file.data, dtype="<u8").reshape(3, run.rows)
        self.low, self.high, self.fingerprint = words
        self.words = words

    def check(self, column: int, places: Ints) -> None:
        """Check the words of a column (0 low, 1 high, 2 fingerprint) at ``places``."""
        if column == 0 and self.file.is_checked(8 * self.rows):
            return
        starts = 8 * (column * self.rows + places)
        self.file.check(starts, starts + 8)

    def check_whole(self) -> None:
        """Check what was not checked before."""
        self.file.check(np.zeros(1, dtype=np.int64), np.full(1, self.file.size))

    def search(self, low: Words) -> Ints:
        """For sorted ``low`` the first place whose word is not below it. Of few, only blocks that can hold one are read."""
        column = 8 * self.rows
        if len(low) >= len(self.file.extra):
            self.file.check(np.zeros(1, dtype=np.int64), np.full(1, column))
        if self.file.is_checked(column):
            return np.searchsorted(self.low, low)
        left = np.maximum(np.searchsorted(self.file.extra, low) - 1, 0) * _FENCE_ROWS
        right = np.minimum(left + _FENCE_ROWS, self.rows)
        self.file.check(8 * left, 8 * right)
        return bisect(self.low, left, right, low)


class KeyIndex:
    """Runs of keys under ``folder`` and a manifest that names them. One process writes at a time (the ingest lock)."""

    def __init__(self, folder: Path) -> None:
        """``problem`` says why what lies in ``folder`` was discarded, ``commit`` identifies the commit of ``version``."""
        self._folder = folder
        self.table_id: str | None = None
        self.version = -1
        self.commit = ""
        self.problem: str | None = None
        self.runs: list[Run] = []
        self._open_runs: dict[str, _OpenRun] = {}
        self._load()

    @property
    def rows(self) -> int:
        """Keys held."""
        return sum(run.rows for run in self.runs)

    def reset(self, table_id: str) -> None:
        """Forget everything; cover nothing of ``table_id`` yet."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.table_id, self.version, self.commit, self.runs, self._open_runs = table_id, -1, "", [], {}

    def rebuild(self, table_id: str, parts: Iterable[Keys], version: int, commit: str = "") -> None:
        """Start again with the keys that ``version`` of ``table_id`` holds. Until all are written the index covers nothing."""
        self.reset(table_id)
        self.runs = [self._write([keys], len(keys), 0, version) for keys in parts if len(keys)]
        self.version, self.commit = version, commit
        self._save()

    def can_cut(self, version: int) -> bool:
        """Whether the keys of later versions can be left out (no run holds keys from both sides)."""
        return all(run.last <= version or run.first > version for run in self.runs)

    def cut(self, version: int, commit: str = "") -> None:
        """Forget the versions behind ``version``, whose commit is ``commit``."""
        self.runs = [run for run in self.runs if run.last <= version]
        if version < self.version:
            self.version, self.commit = version, commit
        self._save()

    def append(self, keys: Keys, version: int, commit: str = "") -> None:
        """Cover ``version``; it and those since the last one covered added ``keys`` (any order).

        Earlier runs are merged first, the newest never. Raises DamagedError where one of them is damaged.
        """
        self._merge()
        if len(keys):
            self.runs.append(self._write([keys], len(keys), min(self.version + 1, version), version))
        self.version, self.commit = version, commit
        self._save()

    def lookup(self, low: Words, high: Words) -> tuple[npt.NDArray[np.bool_], Words]:
        """For keys sorted by (low, high): is each one held, and the fingerprint it is held with. Raises DamagedError."""
        found = np.zeros(len(low), dtype=bool)
        fingerprint = np.zeros(len(low), dtype=np.uint64)
        for run in self.runs if len(low) else ():
            held = self._open(run)
            at = held.search(low)
            pending = np.flatnonzero(at < run.rows)
            while len(pending):  # more than one round only where two ids share half of their hash
                place = at[pending]
                held.check(0, place)
                same_low = held.low[place] == low[pending]
                pending, place = pending[same_low], place[same_low]
                held.check(1, place)
                hit = held.high[place] == high[pending]
                held.check(2, place[hit])
                found[pending[hit]] = True
                fingerprint[pending[hit]] = held.fingerprint[place[hit]]
                pending = pending[~hit]
                at[pending] += 1
                pending = pending[at[pending] < run.rows]
            held.file.release()
        return found, fingerprint

    def check(self) -> None:
        """Check every byte of every run. Raises DamagedError."""
        for run in self.runs:
            held = _OpenRun(self._folder / run.file, run)
            held.file.check_all()
            held.file.release()

    def parts(self) -> Iterator[Keys]:
        """The keys of each run, checked. Raises DamagedError."""
        for run in self.runs:
            held = self._open(run)
            held.check_whole()
            yield Keys(*np.array(held.words))
            held.file.release()

    def _open(self, run: Run) -> _OpenRun:
        if run.file not in self._open_runs:
            self._open_runs[run.file] = _OpenRun(self._folder / run.file, run)
        return self._open_runs[run.file]

    def _write(self, parts: Iterable[Keys], rows: int, first: int, last: int) -> Run:
        """A run of ``rows`` keys in all. The parts follow one another in (low, high); within one the order is any."""
        name = f"run-{first:012d}-{last:012d}-{uuid.uuid4().hex[:8]}.keys"
        fences: list[Words] = []
        with disk.replacing(self._folder / name) as temporary:
            with open(temporary, "wb") as handle:
                done = 0
                for keys in parts:
                    order = keys.order
                    for number, column in enumerate((keys.low, keys.high, keys.fingerprint)):
                        handle.seek(8 * (number * rows + done))
                        handle.write(np.ascontiguousarray(column[order], dtype="<u8").data)
                    fences.append(keys.low[order[-done % _FENCE_ROWS :: _FENCE_ROWS]])
                    done += len(keys)
            assert done == rows, f"{done} keys for a run of {rows}"
            checksum = seal(temporary, np.concatenate(fences))
        return Run(name, rows, first, last, checksum)

    def _parts(self, group: list[Run]) -> Iterator[Keys]:
        """The keys of several runs, a range of low at a time: what is held at once does not grow with the runs."""
        held = [self._open(run) for run in group]
        for each in held:
            each.check_whole()
        arrays = [each.words for each in held]
        count = -(-sum(run.rows for run in group) // MERGE_ROWS)
        bounds = [np.uint64(number * 2**64 // count) for number in range(1, count)]
        ends = [[0, *np.searchsorted(array[0], bounds).tolist(), run.rows] for array, run in zip(arrays, group, strict=True)]
        for number in range(count):
            cuts = [array[:, end[number] : end[number + 1]] for array, end in zip(arrays, ends, strict=True)]
            yield Keys.concatenate([Keys(*np.array(cut)) for cut in cuts])
            for each in held:
                each.file.release()

    def _merge(self) -> None:
        """Merge neighbouring runs of like size, FANOUT at a time: few runs, and each key is rewritten a few times at most.

        A run counts as large as any behind it: a small one between large ones would keep its neighbours apart for good.
        """
        while True:
            sizes = list(accumulate((_tier(run.rows) for run in reversed(self.runs)), max))[::-1]
            for start in range(len(self.runs) - FANOUT, -1, -1):
                group = self.runs[start : start + FANOUT]
                if len(set(sizes[start : start + FANOUT])) == 1 and sum(run.rows for run in group) <= MAX_RUN_ROWS:
                    rows = sum(run.rows for run in group)
                    merged = self._write(self._parts(group), rows, group[0].first, group[-1].last)
                    self.runs[start : start + FANOUT] = [merged]
                    break
            else:
                return

    def _save(self) -> None:
        manifest = {
            "format": _FORMAT,
            "table_id": self.table_id,
            "version": self.version,
            "commit": self.commit,
            "runs": [asdict(run) for run in self.runs],
        }
        disk.write_file(self._folder / "manifest.json", manifest_text(manifest).encode())
        kept = {run.file for run in self.runs}
        for stale in (path for ending in ("keys", "npy") for path in self._folder.glob(f"run-*.{ending}")):
            if stale.name not in kept:
                stale.unlink(missing_ok=True)
                self._open_runs.pop(stale.name, None)
        for unfinished in self._folder.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)

    def _load(self) -> None:
        try:
            manifest = read_manifest(self._folder / "manifest.json")
            if manifest is None:
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


def _tier(rows: int) -> int:
    tier = 0
    while rows >= FANOUT * 1024:
        rows //= FANOUT
        tier += 1
    return tier
