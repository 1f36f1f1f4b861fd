"""Find out what a landing file was before erasures replaced it: plans of batches name the state that the batch read."""

from __future__ import annotations

import pyarrow.compute as pc

from spark_jobs.config import Settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.landing_view import whole_time
from spark_jobs.lake.tables import ERASURES

FileState = tuple[int, int]
"""Time of modification in milliseconds, and size in bytes."""


class ReplacedFiles:
    """The landing files that erasures replaced, with their states, the oldest first."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._states: dict[str, list[tuple[FileState, FileState]]] = {}
        names = ("source_file", "old_modified_ms", "old_size_bytes", "new_modified_ms", "new_size_bytes", "kind", "erased_at")
        rows = Lake(settings).rows(ERASURES, *names)
        files = rows.filter(pc.equal(rows["kind"], "file")).sort_by("erased_at")
        for row in files.to_pylist():
            before = self._state(row["old_modified_ms"], row["old_size_bytes"])
            after = self._state(row["new_modified_ms"], row["new_size_bytes"])
            self._states.setdefault(row["source_file"], []).append((before, after))

    def __contains__(self, name: object) -> bool:
        return name in self._states

    def present(self, name: str, modified_ms: int, size: int) -> FileState:
        """Return the state that a file has now if it had this one when a batch was planned, and only erasures replaced it."""
        state = self._state(modified_ms, size)
        left = list(self._states.get(name, ()))
        while (step := next((one for one in left if one[0] == state), None)) is not None:
            left.remove(step)
            state = step[1]
        return state

    def times(self, name: str, modified_ms: int) -> set[int]:
        """Return the times of modification that a file with this one may have had or may have now."""
        found = {self._state(modified_ms, 0)[0]}
        left = list(self._states.get(name, ()))
        while (step := next((one for one in left if one[0][0] in found), None)) is not None:
            left.remove(step)
            found.add(step[1][0])
        return found

    def _state(self, modified_ms: int, size: int) -> FileState:
        return whole_time(self._settings, modified_ms), size
