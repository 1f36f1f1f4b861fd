"""Indexes that are derived from a Delta table: sorted files (runs) and a manifest that names them.

An index covers one version of one table. It follows the table by appending the rows of later commits as new runs, and it merges
small runs, so that a look-up searches few files. Large merges run in a thread, and a later append adopts their result. The table
stays the only record: an index that is missing, damaged, of a different format or shape, or that cannot follow its table is
discarded and rebuilt. All files are sealed and checked when they are read (``spark_jobs.lake.checked``).

`SortedRuns` knows files, versions and merging. A `Codec` knows the rows. An index is a subclass that adds its look-up.
"""

from __future__ import annotations

import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from spark_jobs import disk
from spark_jobs.background import Task
from spark_jobs.lake.checked import CheckedFile, DamagedError, Words, manifest_text, read_manifest, seal

FANOUT = 4
FORMAT = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class RunFile:
    """A sealed file of sorted rows: those that versions ``first_version`` to ``last_version`` of the table added or changed.

    ``size`` counts the bytes before the footer; ``checksum`` is the footer's.
    """

    name: str
    rows: int
    size: int
    checksum: str
    first_version: int
    last_version: int


class OpenRun(Protocol):
    """A memory-mapped run. Its reader checks what it reads through ``file``."""

    file: CheckedFile


Rows = TypeVar("Rows", bound=Sized)
Run = TypeVar("Run", bound=OpenRun)


class Codec(ABC, Generic[Rows, Run]):
    """What the rows of an index are, and how a run of them is written, opened and merged."""

    ending: str
    """Ending of the files' names."""
    shape = ""
    """What the rows mean. An index that was made with a different shape is discarded."""
    small_run_rows: int
    """Runs below FANOUT times this many rows count as equally small."""
    max_run_rows: int
    """Rows of the largest run that a merge writes."""
    quick_merge_rows: int
    """Rows of the largest merge that an append waits for. A larger one runs in a thread."""

    @abstractmethod
    def write(self, path: Path, rows: Rows) -> Words:
        """Write ``rows`` (any order), sorted. Returns words for the footer, which `open` gets back as ``file.extra``."""

    @abstractmethod
    def merge(self, path: Path, runs: Sequence[Run]) -> tuple[int, Words]:
        """Write the rows of ``runs`` (oldest first, all bytes checked). Returns the number of rows and words for the footer."""

    @abstractmethod
    def open(self, file: CheckedFile, rows: int) -> Run:
        """Open a run. Raises DamagedError if it cannot be decoded."""


@dataclass(frozen=True)
class _Merge:
    """A merge of ``runs``, which are neighbours, in a thread."""

    runs: list[RunFile]
    target: str
    task: Task[RunFile]


class SortedRuns(Generic[Rows, Run]):
    """The runs in ``folder``. One process writes at a time: its caller has a lock.

    The index covers ``version`` of the table ``table_id``; ``commit`` identifies that version's commit. It covers nothing if
    ``version`` is -1. ``problem`` says why the contents of the folder were discarded.
    """

    def __init__(self, folder: Path, codec: Codec[Rows, Run]) -> None:
        """Open the index in ``folder``. If there is none that can be used, the index is empty."""
        self._folder = folder
        self._codec = codec
        self.table_id: str | None = None
        self.version = -1
        self.commit = ""
        self.problem: str | None = None
        self.runs: list[RunFile] = []
        self._opened: dict[str, Run] = {}
        self._merging: _Merge | None = None
        self._load()

    @property
    def rows(self) -> int:
        """Rows in all runs."""
        return _rows_of(self.runs)

    def open_runs(self) -> Iterator[Run]:
        """Yield each run, oldest first. Raises DamagedError."""
        return map(self._open, self.runs)

    def reset(self, table_id: str) -> None:
        """Delete all runs. The index covers no version of ``table_id`` yet."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._merging = None  # if its thread still runs, it finds the folder gone
        self.table_id, self.version, self.commit, self.problem, self.runs, self._opened = table_id, -1, "", None, [], {}

    def rebuild(self, table_id: str, parts: Iterable[Rows], version: int, commit: str = "") -> None:
        """Replace all runs by ``parts``: the rows of ``version``. The index covers nothing until all parts are written."""
        self.reset(table_id)
        for rows in parts:
            if len(rows):
                self._merge(self._codec.max_run_rows)
                self.runs.append(self.write_run(rows, 0, version))
        self.version, self.commit = version, commit
        self._save()

    def follow(self, table_id: str, runs: Sequence[RunFile], version: int) -> None:
        """Consist of ``runs``, which another index of this shape has named; their files are in the folder. Raises DamagedError."""
        self.table_id, self.version, self.commit, self.problem, self.runs = table_id, version, "", None, list(runs)
        for run in runs:
            self._open(run)

    def append(self, rows: Rows, version: int, commit: str = "") -> None:
        """Add the rows of all versions after the covered one up to ``version``, and cover it.

        Merges earlier runs first, but never the new one, so the last append can be cut. Raises DamagedError if a run that was to be
        merged is damaged.
        """
        if len(rows):
            self._adopt()
            self._merge(self._codec.quick_merge_rows)
            self.runs.append(self.write_run(rows, min(self.version + 1, version), version))
        self.version, self.commit = version, commit
        self._save()

    def finish_merges(self, writing: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Wait for the merge in a thread, if there is one, and for those that follow from it. Raises DamagedError.

        Calls ``writing`` for the caller's lock, to hold it while it changes the index and not while it waits.
        """
        while self._merging is not None:
            self._merging.task.wait()
            with writing():
                self._adopt()
                self._merge(self._codec.quick_merge_rows, keeps_newest=True)
                self._save()

    def can_cut(self, version: int) -> bool:
        """Whether `cut` can remove the later versions: no run has rows from both sides."""
        return all(run.last_version <= version or run.first_version > version for run in self.runs)

    def cut(self, version: int, commit: str = "") -> None:
        """Remove the rows of versions after ``version``, whose commit is ``commit``."""
        self.runs = [run for run in self.runs if run.last_version <= version]
        if version < self.version:
            self.version, self.commit = version, commit
        self._save()

    def _open(self, run: RunFile) -> Run:
        if run.name not in self._opened:
            file = CheckedFile(self._folder / run.name, run.size, run.checksum)
            self._opened[run.name] = self._codec.open(file, run.rows)
        return self._opened[run.name]

    def write_run(self, rows: Rows, first: int, last: int) -> RunFile:
        """Write a file of rows of these versions. It belongs to no index until a manifest names it."""

        def write(path: Path) -> tuple[int, Words]:
            return len(rows), self._codec.write(path, rows)

        return self._write(self._new_name(first, last), write, first, last)

    def _new_name(self, first: int, last: int) -> str:
        return f"run-{first:012d}-{last:012d}-{uuid.uuid4().hex[:8]}.{self._codec.ending}"

    def _write(self, name: str, write: Callable[[Path], tuple[int, Words]], first: int, last: int) -> RunFile:
        with disk.replacing(self._folder / name) as temporary:
            rows, extra = write(temporary)
            size = temporary.stat().st_size
            checksum = seal(temporary, extra)
        return RunFile(name, rows, size, checksum, first, last)

    def _merge(self, quick_rows: int, *, keeps_newest: bool = False) -> None:
        """Merge groups of FANOUT runs until no group is left. Starts a thread for a group of more than ``quick_rows`` rows."""
        while (start := self._next_group(self.runs[:-1] if keeps_newest else self.runs, quick_rows)) is not None:
            group = self.runs[start : start + FANOUT]
            first, last = group[0].first_version, group[-1].last_version
            name = self._new_name(first, last)
            call = partial(self._merge_group, name, [self._open(run) for run in group], first, last)
            if _rows_of(group) > quick_rows:
                self._merging = _Merge(group, name, Task("merge", call))
            else:
                self.runs[start : start + FANOUT] = [call()]

    def _merge_group(self, name: str, runs: list[Run], first: int, last: int) -> RunFile:
        for run in runs:
            run.file.check_rest()
        return self._write(name, partial(self._codec.merge, runs=runs), first, last)

    def _adopt(self) -> None:
        """Replace runs by what a thread has merged, once it has ended. Discards that if a cut has removed one of the runs."""
        merge = self._merging
        if merge is None or not merge.task.has_ended:
            return
        self._merging = None
        try:
            merged = merge.task.result()
        except FileNotFoundError:  # another process has written the index, and has removed the file that was not in its manifest
            return
        if merge.runs[0] in self.runs and merge.runs[-1] in self.runs and (self._folder / merged.name).exists():
            start = self.runs.index(merge.runs[0])
            self.runs[start : start + FANOUT] = [merged]

    def _next_group(self, runs: Sequence[RunFile], quick_rows: int) -> int | None:
        """Return where the newest FANOUT neighbours of like size start, or None. So each row is rewritten only a few times.

        A run counts as large as the largest run after it: otherwise a small run between large ones would keep these apart forever.
        While a thread merges, only quick merges of other runs are next.
        """
        most = self._codec.max_run_rows if self._merging is None else quick_rows
        taken = [] if self._merging is None else self._merging.runs
        tiers = list(accumulate((self._tier(run.rows) for run in reversed(runs)), max))[::-1]
        for start in range(len(runs) - FANOUT, -1, -1):
            group = runs[start : start + FANOUT]
            if len(set(tiers[start : start + FANOUT])) == 1 and _rows_of(group) <= most and not any(run in taken for run in group):
                return start
        return None

    def _tier(self, rows: int) -> int:
        tier = 0
        while rows >= FANOUT * self._codec.small_run_rows:
            rows //= FANOUT
            tier += 1
        return tier

    def _save(self) -> None:
        """Write the manifest, which makes ``runs`` valid. Then delete files that it does not name."""
        manifest = {
            "format": FORMAT,
            "shape": self._codec.shape,
            "table_id": self.table_id,
            "version": self.version,
            "commit": self.commit,
            "runs": [asdict(run) for run in self.runs],
        }
        disk.write_file(self._folder / MANIFEST, manifest_text(manifest).encode())
        named = {run.name for run in self.runs}
        merging = None if self._merging is None else self._merging.target
        for path in (*self._folder.glob("run-*"), *self._folder.glob(f".*{disk.TEMPORARY_ENDING}")):
            if path.name not in named and (merging is None or merging not in path.name):
                path.unlink(missing_ok=True)
                self._opened.pop(path.name, None)

    def _load(self) -> None:
        try:
            manifest = _read_manifest(self._folder)
            if manifest is None or manifest["shape"] != self._codec.shape:
                return
            runs = [RunFile(**run) for run in manifest["runs"]]
            for run in runs:
                self._open(run)
            self.table_id, self.version, self.commit = manifest["table_id"], manifest["version"], manifest["commit"]
            self.runs = runs
        except (DamagedError, ValueError, KeyError, TypeError) as error:
            self._opened = {}
            self.problem = str(error)


def _rows_of(runs: Sequence[RunFile]) -> int:
    return sum(run.rows for run in runs)


def check_runs(folder: Path) -> None:
    """Check every byte of the index in ``folder``, whatever its shape. Raises DamagedError."""
    manifest = _read_manifest(folder)
    for run in (RunFile(**run) for run in manifest["runs"]) if manifest is not None else ():
        file = CheckedFile(folder / run.name, run.size, run.checksum)
        file.check_rest()
        file.release()


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    manifest = read_manifest(folder / MANIFEST)
    if manifest is not None and manifest.get("format") != FORMAT:
        raise DamagedError(f"{folder} has a different format")
    return manifest
