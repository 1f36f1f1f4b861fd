"""The key index of `events`: sorted runs of keys, derived from the table and tied to its version.

It remembers nothing of its own: it says which version of the table it covers, catches up from the commits behind that version,
and is rebuilt from the table when it is missing, of another table, or when rows were changed or removed. A look-up is a
binary search in a few memory-mapped runs, so its cost grows with the number of new keys, hardly with the history.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spark_jobs.dedupe.keys import Keys, Words

FANOUT = 4
MAX_RUN_ROWS = 16_000_000
MERGE_ROWS = 1_000_000
_FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A file of keys sorted by (low, high): the rows that versions ``first`` to ``last`` added."""

    file: str
    rows: int
    first: int
    last: int


class KeyIndex:
    """Runs of keys under ``folder`` and a manifest that names them. One process writes at a time (the ingest lock)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.table_id: str | None = None
        self.version = -1
        self.runs: list[Run] = []
        self._arrays: dict[str, Words] = {}
        self._load()

    @property
    def rows(self) -> int:
        """Keys held."""
        return sum(run.rows for run in self.runs)

    def reset(self, table_id: str) -> None:
        """Forget everything; cover nothing of ``table_id`` yet."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.table_id, self.version, self.runs, self._arrays = table_id, -1, [], {}

    def rebuild(self, table_id: str, parts: Iterable[Keys], version: int) -> None:
        """Start again with the keys that ``version`` of ``table_id`` holds. Until all are written the index covers nothing."""
        self.reset(table_id)
        self.runs = [self._write([keys], len(keys), 0, version) for keys in parts if len(keys)]
        self.version = version
        self._save()

    def can_cut(self, version: int) -> bool:
        """Whether the keys of later versions can be left out (no run holds keys from both sides)."""
        return all(run.last <= version or run.first > version for run in self.runs)

    def cut(self, version: int) -> None:
        """Forget the versions behind ``version``."""
        self.runs = [run for run in self.runs if run.last <= version]
        self.version = min(self.version, version)
        self._save()

    def append(self, keys: Keys, version: int) -> None:
        """Cover ``version``; it and those since the last one covered added ``keys`` (any order).

        Earlier runs are merged first, the newest never.
        """
        self._merge()
        if len(keys):
            self.runs.append(self._write([keys], len(keys), min(self.version + 1, version), version))
        self.version = version
        self._save()

    def lookup(self, low: Words, high: Words) -> tuple[npt.NDArray[np.bool_], Words]:
        """For keys sorted by (low, high): is each one held, and the fingerprint it is held with."""
        found = np.zeros(len(low), dtype=bool)
        fingerprint = np.zeros(len(low), dtype=np.uint64)
        for run in self.runs:
            run_low, run_high, run_fingerprint = self._open(run)
            at = np.searchsorted(run_low, low)
            pending = np.flatnonzero(at < run.rows)
            while len(pending):  # more than one round only where two ids share half of their hash
                place = at[pending]
                same_low = run_low[place] == low[pending]
                pending, place = pending[same_low], place[same_low]
                hit = run_high[place] == high[pending]
                found[pending[hit]] = True
                fingerprint[pending[hit]] = run_fingerprint[place[hit]]
                pending = pending[~hit]
                at[pending] += 1
                pending = pending[at[pending] < run.rows]
            self._release(run)
        return found, fingerprint

    def _open(self, run: Run) -> Words:
        if run.file not in self._arrays:
            self._arrays[run.file] = np.load(self._folder / run.file, mmap_mode="r")
        return self._arrays[run.file]

    def _release(self, run: Run) -> None:
        """Give the run's pages back: they stay in the system's cache, and this process does not grow with the history."""
        mapped = getattr(self._open(run), "_mmap", None)
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)

    def _write(self, parts: Iterable[Keys], rows: int, first: int, last: int) -> Run:
        """A run of ``rows`` keys in all. The parts follow one another in (low, high); within one the order is any."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"run-{first:012d}-{last:012d}-{uuid.uuid4().hex[:8]}.npy"
        temporary = self._folder / f".{name}.tmp"
        with open(temporary, "wb") as handle:
            np.lib.format.write_array_header_1_0(handle, {"descr": "<u8", "fortran_order": False, "shape": (3, rows)})
            start, done = handle.tell(), 0
            for keys in parts:
                order = keys.order
                for number, column in enumerate((keys.low, keys.high, keys.fingerprint)):
                    handle.seek(start + 8 * (number * rows + done))
                    handle.write(np.ascontiguousarray(column[order]).data)
                done += len(keys)
        assert done == rows, f"{done} keys for a run of {rows}"
        os.replace(temporary, self._folder / name)
        return Run(name, rows, first, last)

    def _parts(self, group: list[Run]) -> Iterator[Keys]:
        """The keys of several runs, a range of low at a time: what is held at once does not grow with the runs."""
        arrays = [self._open(run) for run in group]
        count = -(-sum(run.rows for run in group) // MERGE_ROWS)
        bounds = [np.uint64(number * 2**64 // count) for number in range(1, count)]
        ends = [[0, *np.searchsorted(array[0], bounds).tolist(), run.rows] for array, run in zip(arrays, group, strict=True)]
        for number in range(count):
            cuts = [array[:, end[number] : end[number + 1]] for array, end in zip(arrays, ends, strict=True)]
            yield Keys.concatenate([Keys(*np.array(cut)) for cut in cuts])
            for run in group:
                self._release(run)

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
        self._folder.mkdir(parents=True, exist_ok=True)
        manifest = {
            "format": _FORMAT,
            "table_id": self.table_id,
            "version": self.version,
            "runs": [asdict(run) for run in self.runs],
        }
        temporary = self._folder / ".manifest.json.tmp"
        temporary.write_text(json.dumps(manifest, indent=1), "utf-8")
        os.replace(temporary, self._folder / "manifest.json")
        kept = {run.file for run in self.runs}
        for stale in self._folder.glob("run-*.npy"):
            if stale.name not in kept:
                stale.unlink(missing_ok=True)
                self._arrays.pop(stale.name, None)
        for unfinished in self._folder.glob(".run-*.tmp"):
            unfinished.unlink(missing_ok=True)

    def _load(self) -> None:
        try:
            manifest = json.loads((self._folder / "manifest.json").read_text("utf-8"))
            if manifest["format"] != _FORMAT:
                return
            runs = [Run(**run) for run in manifest["runs"]]
            if any(self._open(run).shape != (3, run.rows) for run in runs):
                return
            self.table_id, self.version, self.runs = manifest["table_id"], manifest["version"], runs
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            self._arrays = {}  # unreadable: as if it were not there, it is rebuilt from the table


def _tier(rows: int) -> int:
    tier = 0
    while rows >= FANOUT * 1024:
        rows //= FANOUT
        tier += 1
    return tier
