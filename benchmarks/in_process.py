"""Batches of landing files without Spark: the ingest's own jobs and sources, and a checkpoint of the form that Spark writes.

Only the scheduling is replaced: tasks run in this process, one after the other. So a batch takes a tenth of a second, and ninety
days of them are made in minutes.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spark_jobs.config import Settings

Item = TypeVar("Item")
Result = TypeVar("Result")

_KEPT_BATCHES = 100  # Spark deletes the plans of older ones


class LocalExecutor:
    """Runs the work of a batch in this process (see `spark_jobs.ingest.job.Executor`)."""

    parallelism = 1
    shares_disk = True
    was_cut_off = False

    def map(self, function: Callable[[Iterable[Item]], Iterable[Result]], items: Sequence[Item], slices: int) -> list[Result]:
        """Run all items as one task."""
        return list(function(iter(items)))

    def scatter(
        self, function: Callable[[Iterable[Item]], Iterable[tuple[int, Any]]], items: Sequence[Item], slices: int, parts: int
    ) -> LocalScattered:
        """Run all items as one task."""
        return LocalScattered(list(function(iter(items))))


class LocalScattered:
    """Values of this process (see `spark_jobs.ingest.job.Scattered`)."""

    def __init__(self, values: list[tuple[int, Any]]) -> None:
        self._values = values

    def gather(self, function: Callable[[int, Iterable[Any]], Result], parts: Sequence[int]) -> list[Result]:
        """Run one task after the other. The last values come first: Spark has no order either."""
        return [function(wanted, [value for part, value in reversed(self._values) if part == wanted]) for wanted in parts]

    def delete(self) -> None:
        """Delete the values."""
        self._values.clear()


class Checkpoint:
    """The checkpoint of a stream of files, of which ``commits`` says what has ended."""

    def __init__(self, settings: Settings, stream: str) -> None:
        self._folder = settings.checkpoints_path / stream
        if not (self._folder / "metadata").exists():
            self._write("metadata", json.dumps({"id": str(uuid.uuid4())}))

    def _write(self, name: str, *lines: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))

    def _numbers(self, folder: str) -> list[int]:
        return [int(path.name.removesuffix(".compact")) for path in self._folder.glob(f"{folder}/*")]

    @property
    def planned(self) -> int:
        """How many batches were planned."""
        return max(self._numbers("offsets"), default=-1) + 1

    def _entries(self) -> list[str]:
        paths = sorted(self._folder.glob("sources/0/*"), key=lambda path: int(path.name.removesuffix(".compact")))
        return [line for path in paths for line in path.read_text().splitlines()[1:]]

    def taken(self) -> set[str]:
        """The paths of all files of planned batches."""
        return {json.loads(line)["path"].removeprefix("file://") for line in self._entries()}

    def plan(self, files: Iterable[Path], planned_ms: int | None = None) -> int:
        """Plan a batch of these files; returns its id."""
        batch = self.planned
        entries = [
            json.dumps({"path": path.as_uri(), "timestamp": path.stat().st_mtime_ns // 10**6, "batchId": batch}) for path in files
        ]
        self._write(f"sources/0/{batch}", "v1", *entries)
        meta = json.dumps({"batchTimestampMs": int(time.time() * 1000) if planned_ms is None else planned_ms})
        self._write(f"offsets/{batch}", "v1", meta, json.dumps({"logOffset": batch}))
        return batch

    def end(self, batch: int) -> None:
        """Note that a batch has ended."""
        self._write(f"commits/{batch}", "v1", "{}")

    def compact(self) -> None:
        """Merge the lists of files into one, and delete the plans that Spark would have deleted by now."""
        lists = list(self._folder.glob("sources/0/*"))
        newest = max(self._numbers("sources/0"), default=None)
        if newest is None:
            return
        entries = self._entries()
        for path in lists:
            path.unlink()
        self._write(f"sources/0/{newest}.compact", "v1", *entries)
        for folder in ("offsets", "commits"):
            for path in self._folder.glob(f"{folder}/*"):
                if int(path.name) <= newest - _KEPT_BATCHES:
                    path.unlink()
