"""Copies Spark's checkpoints to a remote lakehouse, so that another machine continues the queries.

Spark needs a checkpoint on a local disk, and a machine may be lost with its disk. So each batch copies its plan to
``<state_uri>/checkpoints/<query>/`` before its first commit. Each file is copied once, by a put that fails if the object exists, so
two machines cannot plan the same batch differently. ``metadata`` is copied last: without it the copy counts as none.

The lists of files (``sources/0``) name files by absolute paths of one machine. The copy has ``landing:`` instead of the path of the
landing folder, and each machine that reads the copy puts its own path there.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import LeaseLostError
from spark_jobs.lake.fencing import check_leases
from spark_jobs.lake.places import PlacedFile, StorePlace, state_copies

_COPIED = re.compile(r"metadata|topic\.json|(?:offsets|commits)/[0-9]+|sources/0/[0-9]+(?:\.compact)?")
_FOLDERS = ("", "offsets", "commits", "sources/0")
_LISTS = "sources/0/"
_KEPT_BATCHES = 100  # as Spark keeps them (minBatchesToRetain)
_OLD_OBJECTS = 200  # are deleted together, because a deletion is a request
_THREADS = 16
_TRIES = 3
_CHECKPOINTS = "checkpoints"
# What Java's URI class leaves as it is in a path; it also keeps letters outside of ASCII.
_UNQUOTED = "/_-!.~'()*,;:$&+=@"


class CheckpointCopy:
    """The copy of one query's checkpoint. ``names`` are the objects that it has."""

    def __init__(self, place: StorePlace, folder: Path, landing: Path, lakehouse: str) -> None:
        self.names: set[str] = set()
        self._place = place
        self._folder = folder
        self._lakehouse = lakehouse
        self._prefix = _list_prefix(landing)
        self._guard = threading.Lock()

    def bring_back(self) -> None:
        """Make the local checkpoint equal to the copy. Removes local plans that were never copied: no table has their batches.

        If there is no complete copy yet, keeps the local checkpoint and removes the rest of a copy that was begun.
        """
        with self._guard:
            found = _copied_files(self._place)
            if "metadata" in found:
                self.names = set(_bring(self._place, found, self._folder, self._prefix))
            else:
                self._place.delete(found)
                self.names = set()

    def add_new(self) -> None:
        """Copy the files that Spark has written since the last call.

        Raises LeaseLostError, and copies nothing, if another machine has taken over the ingest; also if it planned the same batch.
        """
        check_leases(self._lakehouse)
        with self._guard:
            new = _local_names(self._folder) - self.names
            plans = {name for name in new if name.startswith("offsets/")}
            # a plan is copied after the list of its files
            for group in (new - plans - {"metadata"}, plans, new & {"metadata"}):
                _each(self._add, group)

    def delete_old(self) -> None:
        """Delete the objects of batches so old that Spark no longer needs them, if they are many."""
        with self._guard:
            old = self.names - _needed(self.names)
            if len(old) >= _OLD_OBJECTS:
                self._place.delete(old)
                self.names -= old

    def _add(self, name: str) -> None:
        try:
            data = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return  # Spark has removed it as too old
        if name.startswith(_LISTS):
            data = data.replace(self._prefix, _NEUTRAL)
        try:
            self._place.create(name, data)
        except FileExistsError:
            if self._place.read(name) != data:
                raise LeaseLostError(
                    f"another machine has planned the same batch of query {self._folder.name} differently: "
                    f"{self._place.uri}/{name}; nothing of the batch was committed here",
                    hint="adtally ingest continues from that plan",
                ) from None
        self.names.add(name)


def checkpoint_copy(settings: Settings, query: str) -> CheckpointCopy | None:
    """Return the copy of a query's checkpoint; None for a local lakehouse, which needs none."""
    place = state_copies(settings, f"{_CHECKPOINTS}/{query}")
    return (
        None
        if place is None
        else CheckpointCopy(place, settings.checkpoints_path / query, settings.landing_path, settings.lakehouse_uri)
    )


def checkpoints_to_read(settings: Settings) -> Path:
    """Return the folder in which to read how far the queries are, a folder a query. Any machine may read it, while any ingests.

    For a local lakehouse these are the checkpoints themselves. For a remote one, they are brought up to the copies first.
    """
    place = state_copies(settings, _CHECKPOINTS)
    if place is None:
        return settings.checkpoints_path
    view, prefix = settings.checkpoints_view_path, _list_prefix(settings.landing_path)
    disk.make_folder(view)
    with FileLock(view / ".lock"):
        queries: dict[str, dict[str, PlacedFile]] = {}
        for found in place.list():
            query, _, name = found.name.partition("/")
            if _COPIED.fullmatch(name):
                queries.setdefault(query, {})[name] = found
        for query, files in queries.items():
            if "metadata" in files:
                _bring(place.below(query), files, view / query, prefix)
        for folder in view.iterdir():
            if folder.is_dir() and "metadata" not in queries.get(folder.name, {}):
                shutil.rmtree(folder)
    return view


def set_aside(settings: Settings, query: str, ending: str) -> None:
    """Rename the checkpoint of a query, and its copy, to ``<query>.<ending>``: the next ingest begins a new one."""
    place = state_copies(settings, f"{_CHECKPOINTS}/{query}")
    if place is not None:
        target = StorePlace(f"{place.uri}.{ending}")
        names = list(_copied_files(place))
        _each(lambda name: target.write(name, place.read(name)), names)
        place.delete(sorted(names, key="metadata".__ne__))  # without metadata it counts as none
    folder = settings.checkpoints_path / query
    if folder.exists():
        disk.replace(folder, folder.with_name(f"{query}.{ending}"))


_NEUTRAL = b'"path":"landing:/'


def _list_prefix(landing: Path) -> bytes:
    """Return how the entries of Spark's lists begin for files below the landing folder."""
    quoted = "".join(part if ord(part) > 127 else quote(part, safe=_UNQUOTED) for part in str(landing))
    return f'"path":"file://{quoted}/'.encode()


def _copied_files(place: StorePlace) -> dict[str, PlacedFile]:
    return {found.name: found for found in place.list() if _COPIED.fullmatch(found.name)}


def _local_names(folder: Path) -> set[str]:
    """Return the files of a checkpoint that are copied."""
    found = set()
    for part in _FOLDERS:
        place = folder / part
        names = [path.name for path in place.iterdir() if path.is_file()] if place.is_dir() else []
        found |= {name for name in (f"{part}/{name}".lstrip("/") for name in names) if _COPIED.fullmatch(name)}
    return found


def _needed(names: Iterable[str]) -> set[str]:
    """Return the files that Spark or a reader needs: the newest batches, the newest compacted list and all lists after it."""
    numbered = {name: int(name.rpartition("/")[2].removesuffix(".compact")) for name in names if "/" in name}
    compacted = max((number for name, number in numbered.items() if name.endswith(".compact")), default=-1)
    newest = max((number for name, number in numbered.items() if name.startswith("offsets/")), default=-1)

    def is_needed(name: str) -> bool:
        number = numbered.get(name)
        if number is None:
            return True
        if name.startswith(_LISTS):
            return number > compacted or name.endswith(f"/{compacted}.compact")
        return number >= newest - _KEPT_BATCHES

    return {name for name in names if is_needed(name)}


def _bring(place: StorePlace, found: Mapping[str, PlacedFile], folder: Path, prefix: bytes) -> Mapping[str, PlacedFile]:
    """Make ``folder`` equal to the needed part of the copy. A file has the object's time: equal times are equal files.

    Returns the objects of the copy, listed again if one was deleted as too old meanwhile.
    """
    for tries_left in reversed(range(_TRIES)):
        wanted = {name: found[name].modified_ns for name in _needed(found)}
        for name in _local_names(folder) - wanted.keys():
            _remove(folder / name)
        stale = [name for name, at in wanted.items() if not _has_time(folder / name, at)]
        try:
            _each(lambda name: _fetch(place, name, folder, prefix), stale)
        except FileNotFoundError:
            if not tries_left:
                raise
            found = _copied_files(place)
            continue
        disk.sync_files(folder / name for name in stale)
        for name in stale:  # after the sync: a power cut must not leave a torn file with this time
            os.utime(folder / name, ns=(wanted[name], wanted[name]))
        break
    return found


def _fetch(place: StorePlace, name: str, folder: Path, prefix: bytes) -> None:
    data = place.read(name)
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(target)
    temporary = target.with_name(f".{target.name}{disk.TEMPORARY_ENDING}")
    temporary.write_bytes(data.replace(_NEUTRAL, prefix) if name.startswith(_LISTS) else data)
    os.replace(temporary, target)


def _remove(path: Path) -> None:
    """Remove a file of a checkpoint, and the checksum that Spark wrote beside it."""
    path.with_name(f".{path.name}.crc").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _has_time(path: Path, nanoseconds: int) -> bool:
    try:
        return path.stat().st_mtime_ns == nanoseconds
    except FileNotFoundError:
        return False


def _each(function: Callable[[str], None], names: Iterable[str]) -> None:
    """Call ``function`` with each name, several at a time. Raises the first error."""
    several = list(names)
    if len(several) == 1:
        function(several[0])
    elif several:
        with ThreadPoolExecutor(min(_THREADS, len(several)), thread_name_prefix="copy") as pool:
            list(pool.map(function, several))
