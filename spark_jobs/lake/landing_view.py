"""Keep local views of a landing folder and of rule files that are in an object store.

Spark's file source, the reports and the recount list folders. So each object of the landing folder has a stand-in in a local view:
a sparse file with the object's size and its time of modification. The records are read from the object itself. Files that are read
whole (CSV, rules) are copies. A view is derived from the store: it may be deleted at any time.

- An object is complete when the store lists it. Objects are read in the order of (last modified, key). S3 reports whole seconds,
  and Spark orders files by time alone. So the milliseconds of a stand-in number the objects of one second, in the order of their
  keys; an object that is found later comes later. Times are compared by ``whole_time``: a new view may number objects differently.
- The digits of a stand-in's time below a millisecond are a hash of the object's tag, so that new content of the same size and
  second is noticed.
- A key that cannot be a path has no stand-in; ``impossible_keys`` returns it. Hidden names, and the empty objects by which tools
  mark folders, are skipped.
- A full listing also finds objects that were overwritten or deleted, and keys that sort before others. Between full listings only
  keys behind the largest of each region's folder are listed.

For a local folder nothing here does anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO
from zlib import crc32

from filelock import FileLock
from obstore.exceptions import InvalidPathError

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import ConfigurationError, MachineError, StoreError
from spark_jobs.lake.locations import is_local
from spark_jobs.lake.places import PlacedFile, StorePlace, open_place
from spark_jobs.lake.tables import STREAMS

CAMPAIGNS_FOLDER = "campaigns"
NAMES_FOLDER = "names"
_CSV_FOLDERS = (CAMPAIGNS_FOLDER, NAMES_FOLDER)
_HIDDEN = (".", "_")  # beginnings of hidden names
_LOCK, _SWEPT, _IMPOSSIBLE = ".lock", ".swept", ".impossible_keys.json"
_LONGEST_NAME = 255  # bytes of a part of a path
_LONGEST_PATH = 3_500
_MOST_STRAYS = 10_000  # of a folder that nothing reads: by mistake, it may be a whole lakehouse
_MOST_RULE_FILES = 1_000
_THREADS = 16
_LAST_NUMBER = 999  # of the objects of a second: any further ones have no order among them
_CLOCK_SLACK_SECONDS = 0.05


@dataclass(frozen=True)
class LandedObject:
    """An object of a landing folder in a store."""

    place: StorePlace
    name: str

    def open(self) -> BinaryIO:
        """Open the object for reading. A read raises FileNotFoundError if it is gone, StoreError if the store does not answer."""
        return self.place.open(self.name)

    def find(self) -> PlacedFile | None:
        """Return the present object; None if it is gone. Raises StoreError."""
        return self.place.find(self.name)

    def copy(self, name: str) -> None:
        """Copy the object to another name in its folder, in the store. Raises FileNotFoundError, StoreError."""
        self.place.copy(self.name, name)


def landed_object(path: str | Path) -> LandedObject | None:
    """Return the object that a path of a landing file names; None for a file of this machine."""
    if is_local(str(path)):
        return None
    folder, _, name = str(path).rpartition("/")
    return LandedObject(_place(folder), name)


def find_objects(paths: Iterable[str]) -> dict[str, PlacedFile | None]:
    """Return the present objects of those ``paths`` that name objects, several requests at a time. Raises StoreError."""
    wanted = {path: found for path in paths if (found := landed_object(path)) is not None}
    if not wanted:
        return {}
    with ThreadPoolExecutor(min(_THREADS, len(wanted)), thread_name_prefix="head") as pool:
        return dict(zip(wanted, pool.map(LandedObject.find, wanted.values()), strict=True))


def modified_ms(found: PlacedFile) -> int:
    """Return an object's time of modification in milliseconds, of whole seconds."""
    return int(found.modified.timestamp()) * 1000


def whole_time(settings: Settings, ms: int) -> int:
    """Return a time of modification of the landing folder as it is compared: of an object, in whole seconds (as milliseconds)."""
    return ms // 1000 * 1000 if has_view(settings) else ms


def arrived_at(settings: Settings, modified_seconds: float, changed_seconds: float) -> float:
    """Return when an entry of the landing folder arrived: a file with its rename, an object with its last modification."""
    return modified_seconds if has_view(settings) else changed_seconds


def has_view(settings: Settings) -> bool:
    """Return whether the landing folder is in a store, so that its view must be refreshed."""
    return not is_local(settings.landing_uri)


def landing_exists(settings: Settings) -> bool:
    """Return whether the landing folder exists. Of a store it does, even while it has no object."""
    return has_view(settings) or settings.landing_path.exists()


def impossible_keys(landing: Path) -> list[str]:
    """Return the keys of a landing folder in a store that cannot be paths: they have no stand-in in its view ``landing``."""
    try:
        keys: list[str] = json.loads((landing / _IMPOSSIBLE).read_text("utf-8"))
        return keys
    except (OSError, ValueError):
        return []


def refresh_landing(settings: Settings, *, is_full: bool = False) -> None:
    """Bring the view of a landing folder up to its store. Lists all of it with ``is_full``, or if ADTALLY_LANDING_SWEEP is over.

    Does nothing for a local folder. Raises StoreError if the store cannot be listed.
    """
    if has_view(settings):
        view = _View(settings.landing_uri, settings.landing_path)
        with view.lock():
            if is_full or view.age_seconds() >= settings.landing_sweep.total_seconds() or not view.add_new():
                view.sweep()


def remove_landed(settings: Settings, names: Collection[str]) -> None:
    """Delete landed files, by their names under the landing folder. Keeps their folders, into which others land files."""
    if has_view(settings):
        open_place(settings.landing_uri).delete(names)
        refresh_landing(settings, is_full=True)
        return
    for name in names:
        (settings.landing_path / name).unlink(missing_ok=True)
    disk.sync_files({(settings.landing_path / name).parent for name in names})


def fresh_rules_path(settings: Settings) -> Path:
    """Return the folder of the rule files, after its copy was brought up to the store if they are in one.

    Raises StoreError if the store cannot be read, ConfigurationError if the folder has too many files.
    """
    if not is_local(settings.rules_uri):
        view = _View(settings.rules_uri, settings.rules_path)
        with view.lock():
            view.copy_all()
    return settings.rules_path


@contextlib.contextmanager
def landing_folder(uri: str) -> Iterator[Path]:
    """Yield the folder at a location or, for a store, a temporary one that `land_folder` copies at the end of the block."""
    if is_local(uri):
        yield Path(uri)
        return
    with TemporaryDirectory(prefix="adtally-landing-") as folder:
        yield Path(folder)
        land_folder(Path(folder), uri)


def land_folder(folder: Path, uri: str) -> None:
    """Copy a local landing folder to ``uri``, so that its files are read in the same order, that of their times.

    An object has the time at which it was written, in whole seconds. So this waits for the next second where the names alone would
    give another order. Raises StoreError.
    """
    place = open_place(uri)
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {path: path.relative_to(folder).as_posix() for path in files}
    top = {path: name.partition("/")[0] for path, name in named.items()}
    before = ""
    for path in sorted(files, key=lambda path: (top[path], path.stat().st_mtime_ns, named[path])):
        if top[path] in STREAMS and before.partition("/")[0] == top[path] and named[path] < before:
            time.sleep(1.0 - time.time() % 1.0 + _CLOCK_SLACK_SECONDS)
        place.upload(path, named[path])
        before = named[path]


class _View:
    """The view ``folder`` of the objects below ``uri``. Hold its lock meanwhile."""

    def __init__(self, uri: str, folder: Path) -> None:
        self._place, self._folder = _place(uri), folder

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from changing the view: one that listed earlier would remove what another has just found."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / _LOCK):
                yield
        except OSError as error:
            problem = error.strerror or type(error).__name__
            raise MachineError(f"the view of {self._place.uri} in {self._folder} cannot be written: {problem}") from error

    def age_seconds(self) -> float:
        """Return how long ago the store was listed whole."""
        try:
            return abs(time.time() - (self._folder / _SWEPT).stat().st_mtime)
        except OSError:
            return float("inf")

    def add_new(self) -> bool:
        """Add the objects with larger names than those of their region, and all CSV files. Returns whether that was possible."""
        try:
            for top in _CSV_FOLDERS:
                self._bring(_usable(self._place.list_any(top))[0], top)
            found = [one for folder in self._regions() for one in self._place.list_any(folder, after=self._largest(folder))]
            self._make_all(_usable(found)[0].values())
        except StoreError as error:
            if isinstance(error.__cause__, InvalidPathError):
                return False
            raise
        except OSError:  # an object has the name of a folder
            return False
        return True

    def sweep(self) -> None:
        """List all objects, add and renew stand-ins, and remove those of objects that are gone."""
        wanted, impossible = _usable(self._listed())
        self._bring(wanted, "")
        disk.write_file(self._folder / _IMPOSSIBLE, json.dumps(impossible).encode())
        (self._folder / _SWEPT).touch()

    def copy_all(self) -> None:
        """Copy all objects, and remove the copies of those that are gone."""
        found = list(islice(self._place.list(), _MOST_RULE_FILES + 1))
        if len(found) > _MOST_RULE_FILES:
            raise ConfigurationError(f"{self._place.uri} has too many objects for a folder of rules", hint="correct ADTALLY_RULES")
        self._bring(_usable(found)[0], "", copies=True)

    def _listed(self) -> Iterator[PlacedFile]:
        try:
            files, folders = self._place.list_folder("")
        except StoreError as error:
            if not isinstance(error.__cause__, InvalidPathError):
                raise
            yield from self._place.list_any()
            return
        yield from files
        for top in folders:
            found = self._place.list_any(top)
            yield from found if top in (*STREAMS, *_CSV_FOLDERS) else islice(found, _MOST_STRAYS)

    def _regions(self) -> list[str]:
        return [region for stream in STREAMS for region in self._place.list_folder(stream)[1]]

    def _largest(self, folder: str) -> str | None:
        names = [entry.name for entry in _scan(self._folder / folder) if not entry.name.startswith(_HIDDEN)]
        return f"{folder}/{max(names)}" if names else None

    def _bring(self, wanted: dict[str, PlacedFile], below: str, *, copies: bool = False) -> None:
        """Make a folder of the view what is ``wanted`` there."""
        self._remove_others(wanted, below)
        self._make_all(wanted.values(), copies=copies)

    def _remove_others(self, wanted: dict[str, PlacedFile], below: str) -> None:
        root = f"{self._folder}/"
        for folder, _, files in os.walk(self._folder / below):
            for name in files:
                path = f"{folder}/{name}"
                if not name.startswith(_HIDDEN) and path.removeprefix(root) not in wanted:
                    Path(path).unlink(missing_ok=True)

    def _make_all(self, objects: Iterable[PlacedFile], *, copies: bool = False) -> None:
        """Make the stand-ins that are missing or differ.

        A view is made newest first, because the recount takes a file for passed over if a newer one that was read had appeared
        clearly before it. Afterwards the oldest is first, as files arrive in a folder.
        """
        missing = sorted((one for one in objects if not self._has(one)), key=lambda one: (one.modified, one.name))
        numbers = self._next_numbers(missing)
        numbered = []
        for one in missing:
            key = _second(one)
            numbered.append((one, min(numbers[key], _LAST_NUMBER)))
            numbers[key] += 1
        is_new = not (self._folder / _SWEPT).exists()
        for one, number in reversed(numbered) if is_new else numbered:
            is_csv = one.name.partition("/")[0] in _CSV_FOLDERS and one.name.endswith(".csv")
            self._make(one, number, is_copy=copies or is_csv)

    def _next_numbers(self, missing: list[PlacedFile]) -> Counter[tuple[str, int]]:
        """Return for each top folder and second of ``missing`` the number of its next stand-in."""
        wanted = {_second(one) for one in missing}
        found: Counter[tuple[str, int]] = Counter()
        for top in {top for top, _ in wanted}:
            for folder, _, files in os.walk(self._folder / top):
                for name in files:
                    with contextlib.suppress(OSError):
                        second, rest = divmod(os.lstat(f"{folder}/{name}").st_mtime_ns, 10**9)  # a Path takes longer than this
                        if (top, second) in wanted:
                            found[top, second] = max(found[top, second], rest // 10**6 + 1)
        return found

    def _has(self, one: PlacedFile) -> bool:
        try:
            state = os.lstat(f"{self._folder}/{one.name}")
        except OSError:
            return False
        second, rest = divmod(state.st_mtime_ns, 10**9)
        present = (state.st_size, second, rest % 10**6)
        return present == (one.size, int(one.modified.timestamp()), _tag_digits(one)) and stat.S_ISREG(state.st_mode)

    def _make(self, one: PlacedFile, number: int, *, is_copy: bool) -> None:
        path = self._folder / one.name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".new{disk.TEMPORARY_ENDING}"
        if is_copy:
            try:
                self._place.download(one.name, temporary)
            except FileNotFoundError:  # it was deleted meanwhile
                return
        else:
            with temporary.open("wb") as file:
                file.truncate(one.size)
        time_ns = int(one.modified.timestamp()) * 10**9 + number * 10**6 + _tag_digits(one)
        os.utime(temporary, ns=(time_ns, time_ns))
        if path.is_dir():
            for folder, _, _ in os.walk(path, topdown=False):
                os.rmdir(folder)  # it is empty, or raises
        temporary.replace(path)


def _usable(objects: Iterable[PlacedFile]) -> tuple[dict[str, PlacedFile], list[str]]:
    """Return the objects that can have a stand-in, by name, and the keys that cannot be paths, sorted."""
    found = {
        one.name: one
        for one in objects
        if not any(part.startswith(_HIDDEN) and part not in (".", "..") for part in one.name.split("/"))
    }
    impossible = {name for name in found if not _is_path(name) or _file_above(name) in found}
    folders: set[str] = set()
    for name in found.keys() - impossible:
        folder = name.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    wanted = {}
    for name, one in found.items():
        if one.size == 0 and (name in folders or "." not in name.rpartition("/")[2]):
            impossible.discard(name)  # it only marks a folder
        elif name in folders:
            impossible.add(name)
        elif name not in impossible:
            wanted[name] = one
    return wanted, sorted(impossible)


def _is_path(name: str) -> bool:
    parts = name.split("/")
    return (
        all(part not in ("", ".", "..") and "\0" not in part and len(part.encode()) <= _LONGEST_NAME for part in parts)
        and len(name.encode()) <= _LONGEST_PATH
    )


def _file_above(name: str) -> str | None:
    """Return the name above ``name`` that is in the place of a file: what is there is a file, not a folder."""
    parts = name.split("/")
    depth = 3 if parts[0] in STREAMS else 2 if parts[0] in _CSV_FOLDERS else len(parts)
    return "/".join(parts[:depth]) if len(parts) > depth else None


def _tag_digits(one: PlacedFile) -> int:
    return crc32(one.tag.encode()) % 10**6


def _second(one: PlacedFile) -> tuple[str, int]:
    """Return the top folder and the second of an object. The objects of both are numbered together: one query reads them."""
    return one.name.partition("/")[0], int(one.modified.timestamp())


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


@cache
def _place(uri: str) -> StorePlace:
    return StorePlace(uri)
