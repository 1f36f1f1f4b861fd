"""Copies an index (``runs.py``) to a remote lakehouse, so that another machine fetches it instead of rebuilding it.

The copy is the same sealed files and their manifest. Files are copied first, then the manifest replaces the one that this machine
saw last, then the files that it no longer names are deleted. So a reader finds all files of the manifest, whenever a machine is
lost, and two machines cannot overwrite each other's manifest. The checksums of the files decide what a fetched index is worth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import LeaseLostError
from spark_jobs.lake.checked import DamagedError, parse_manifest, read_manifest
from spark_jobs.lake.places import StorePlace, state_copies
from spark_jobs.lake.runs import MANIFEST


class RunsCopy:
    """The copy of the index in ``folder``. One process copies at a time: its caller has a lock."""

    def __init__(self, place: StorePlace, folder: Path, shape: str) -> None:
        """``shape`` is the index's own: a copy of another shape is not fetched, but replaced."""
        self._place = place
        self._folder = folder
        self._shape = shape
        self._tag: str | None = None  # of the manifest in the copy
        self._last = b""
        self._names: set[str] = set()

    def fetch(self) -> bool:
        """Download the copy if it covers more than the local index. Returns whether it did; a damaged copy is ignored."""
        self._names = {found.name for found in self._place.list() if found.name != MANIFEST}
        try:
            data, self._tag = self._place.read_tagged(MANIFEST)
            wanted = parse_manifest(data, f"{self._place.uri}/{MANIFEST}")
            if wanted["shape"] != self._shape or _covers(self._folder, wanted):
                return False
            for run in wanted["runs"]:
                if not (self._folder / run["name"]).exists():
                    self._place.download(run["name"], self._folder / run["name"])
        except (FileNotFoundError, DamagedError, KeyError, TypeError):
            return False
        disk.write_file(self._folder / MANIFEST, data)
        self._last = data
        return True

    def update(self) -> None:
        """Copy the local index as it is now. Raises LeaseLostError if another machine has replaced the copy."""
        try:
            data = (self._folder / MANIFEST).read_bytes()
            named = {run["name"] for run in parse_manifest(data, MANIFEST)["runs"]}
        except (FileNotFoundError, DamagedError):
            return
        if data == self._last:
            return
        for name in sorted(named - self._names):
            path = self._folder / name
            if not path.exists():
                return  # merged meanwhile; the next call copies the new manifest
            self._place.upload(path, name)
            self._names.add(name)
        self._tag = replace_manifest(self._place, data, self._tag)
        old = self._names - named
        self._place.delete(sorted(old))
        self._names -= old
        self._last = data


def replace_manifest(place: StorePlace, data: bytes, tag: str | None) -> str:
    """Replace the manifest that has ``tag`` (None: there is none); return the new tag.

    Raises LeaseLostError if another machine has replaced it.
    """
    try:
        made = place.create(MANIFEST, data) if tag is None else place.swap(MANIFEST, data, tag)
    except FileExistsError:
        made = None
    if made is None:
        present, made = place.read_tagged(MANIFEST)
        if present != data:  # else it was this call, whose answer was lost
            raise LeaseLostError(f"another machine has replaced {place.uri}/{MANIFEST}")
    return made


def copied_version(settings: Settings, folder: Path) -> int | None:
    """Return the version that the copy of an index covers; None if there is no copy."""
    place = state_copies(settings, folder.name)
    if place is None:
        return None
    try:
        return int(parse_manifest(place.read(MANIFEST), MANIFEST)["version"])
    except (FileNotFoundError, DamagedError, KeyError):
        return None


def _covers(folder: Path, wanted: dict[str, Any]) -> bool:
    """Return whether the index in a folder is complete and covers what a manifest does."""
    try:
        local = read_manifest(folder / MANIFEST)
    except DamagedError:
        return False
    if local is None or any(not (folder / run["name"]).exists() for run in local["runs"]):
        return False
    same = all(local[name] == wanted[name] for name in ("format", "shape", "table_id"))
    return bool(same and local["version"] >= wanted["version"])
