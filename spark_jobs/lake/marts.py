"""Publishes the file of the marts and finds the newest one.

With a lakehouse on disk it is ``settings.marts_path``, which each build replaces by a rename; its frozen days are in the folder
``frozen`` beside it (see `mart_days`). With a lakehouse in an object store a build is a folder of objects,
``<state_uri>/marts/<build id>/``: the DuckDB file, and each mart as Parquet. The frozen files are in
``<state_uri>/marts/frozen/``, where builds share them. The object ``<state_uri>/marts/current.json``, the pointer, names the
published build and its frozen files. A build swaps the pointer after all its objects are there. Each machine reads a copy of the
DuckDB file at ``settings.marts_path`` and of the frozen files, which it brings up to the pointer first.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import duckdb
from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import BusyError, StoreError
from spark_jobs.failure import one_line
from spark_jobs.lake.duck import connect_delta, literal
from spark_jobs.lake.mart_days import (
    FROZEN,
    FrozenDays,
    MartFile,
    are_moved,
    create_views,
    describe_file,
    find_damage,
    frozen_folder,
    read_frozen,
    remove_others,
)
from spark_jobs.lake.places import Place, SharedObject, StorePlace, open_place
from spark_jobs.steps import Step, durable

KEPT_AFTER = timedelta(hours=1)
"""A replaced build is kept this long for readers that still download it, or query its Parquet files."""

_POINTER = "current.json"
_POINTER_SECONDS = 2.0  # between two reads of the pointer by one process
_SECONDS_AFTER_FAILURE = 10.0
_TRIES = 3  # to download a build, which newer ones may replace meanwhile; to read the pointer quickly
_ANSWER_SECONDS, _PAUSE_SECONDS = 5.0, 1.0  # of quick tries
_log = logging.getLogger("adtally")


@dataclass(frozen=True)
class Pointer:
    """The published build. ``files`` by name; ``replaced``: earlier builds that are still kept -> when they were replaced.

    ``frozen``: the frozen files by name, with those of ``replaced``.
    """

    build_id: str
    built_at: datetime
    files: dict[str, MartFile]
    replaced: dict[str, datetime]
    frozen: dict[str, MartFile] = field(default_factory=dict)


@dataclass(frozen=True)
class CurrentMarts:
    """The newest build: its file on this machine, None if nothing is published. ``pointer`` and ``tag``: those of a store."""

    path: Path | None
    pointer: Pointer | None = None
    tag: str | None = None


_POINTERS = TypeAdapter(Pointer)


def current_marts(settings: Settings, *, is_quick: bool = False) -> CurrentMarts:
    """Return the newest build, after bringing this machine's copy up to it. Raises StoreError if the store does not answer.

    ``is_quick``: wait some seconds for the answer, instead of a minute.
    """
    place = _place(settings)
    if not isinstance(place, StorePlace):
        if not settings.marts_path.is_file():
            return CurrentMarts(None)
        _follow_move(settings)
        return CurrentMarts(settings.marts_path)
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):  # newer builds replaced this one so long ago that it is deleted
            return _copy_of_store(settings, place, is_quick=is_quick)
    raise StoreError(f"get {place.uri} failed: builds are deleted faster than this machine can download them")


def readable_marts(settings: Settings) -> Path | None:
    """Return the file of the marts for a reader: of the newest build, as of two seconds ago.

    If the store does not answer, returns this machine's copy and logs once that it may be old. Raises StoreError without a copy.
    """
    place = _place(settings)
    return _watched(settings).path(place) if isinstance(place, StorePlace) else current_marts(settings).path


def publish_marts(
    settings: Settings,
    new: Path,
    *,
    build_id: str,
    built_at: datetime,
    replaces: CurrentMarts,
    export: Callable[[Path], Iterable[Path]],
) -> None:
    """Publish the closed DuckDB file ``new`` whole, in place of the build ``replaces``; a reader sees one or the other.

    Its new frozen files are in the folder of frozen files already; those that no build of the last hour shows are deleted.
    ``export`` writes each mart as a Parquet file into a folder; a store keeps them beside the DuckDB file.
    Raises BusyError if another build was published since ``replaces`` was read.
    """
    disk.sync_file(new)
    place, days = _place(settings), read_frozen(new)
    if isinstance(place, StorePlace):
        pointer = _upload(settings, place, new, build_id, built_at, replaces, export, days)
        with durable(Step.MARTS):
            _swap(place, pointer, replaces.tag)
        _point_views(new, frozen_folder(settings), days)
        with _copying(settings):
            _install(settings, new, place, build_id)
        _delete_others(place, pointer)
    else:
        _replace(new, settings.marts_path)
    remove_others(frozen_folder(settings), [*days.shown, *days.dropped])


def _follow_move(settings: Settings) -> None:
    """Let the views of marts that were moved or copied read the frozen files beside them, if these are there and it may write."""
    path, frozen = settings.marts_path, frozen_folder(settings)
    with suppress(OSError, duckdb.Error):  # a damaged file, or a home that nobody may change: the reader says so
        found = path.stat()
        if not _is_moved(path, frozen, found.st_ino, found.st_mtime_ns):
            return
        with _copying(settings) as folder:
            new = folder / path.name
            shutil.copyfile(path, new)
            days = read_frozen(new)
            if find_damage(days.shown, frozen) is None:
                _point_views(new, frozen, days)
                now = path.stat()
                if (now.st_ino, now.st_mtime_ns) == (found.st_ino, found.st_mtime_ns):  # no build was published meanwhile
                    _replace(new, path)


@lru_cache(maxsize=8)
def _is_moved(path: Path, frozen: Path, _inode: int, _modified_ns: int) -> bool:
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"attach {literal(path)} as marts (read_only)")
        return are_moved(connection, "marts", frozen)


def _upload(
    settings: Settings,
    place: StorePlace,
    new: Path,
    build_id: str,
    built_at: datetime,
    replaces: CurrentMarts,
    export: Callable[[Path], Iterable[Path]],
    days: FrozenDays,
) -> Pointer:
    now, earlier = datetime.now(UTC), replaces.pointer
    known = {} if earlier is None else earlier.frozen
    for name in days.shown:
        if name not in known:
            place.upload(frozen_folder(settings) / name, f"{FROZEN}/{name}")
    files, exported = {}, list(export(new.parent))
    _point_views(new, f"{place.uri}/{FROZEN}", days)  # so that whoever attaches the object reads the frozen ones
    for path in (new, *exported):
        place.upload(path, f"{build_id}/{path.name}")
        files[path.name] = describe_file(path)
    replaced = {}
    if earlier is not None:
        replaced = {earlier.build_id: now} | {build: at for build, at in earlier.replaced.items() if now - at < KEPT_AFTER}
    frozen = days.shown | {name: file for name, file in known.items() if name in days.dropped}
    return Pointer(build_id, built_at, files, replaced, frozen)


def _swap(place: StorePlace, pointer: Pointer, tag: str | None) -> None:
    """Put the pointer in the place of the one with ``tag``. Raises BusyError if that one is not there any more."""
    data = _POINTERS.dump_json(pointer, indent=2)
    try:
        is_swapped = (place.create(_POINTER, data) if tag is None else place.swap(_POINTER, data, tag)) is not None
    except FileExistsError:
        is_swapped = False
    if not is_swapped and place.read(_POINTER) != data:  # else a first try, whose answer was lost, has swapped it
        raise BusyError("another build of the marts was published meanwhile", hint="build them again")


def _delete_others(place: StorePlace, pointer: Pointer) -> None:
    """Delete the builds that the pointer does not name: replaced long ago, or left by a killed build."""
    named = {_POINTER, pointer.build_id, *pointer.replaced}
    frozen = {f"{FROZEN}/{name}" for name in pointer.frozen}
    place.delete([found.name for found in place.list() if found.name.partition("/")[0] not in named and found.name not in frozen])


def _place(settings: Settings) -> Place:
    return open_place(f"{settings.state_uri}/marts")


def _copy_of_store(settings: Settings, place: StorePlace, *, is_quick: bool) -> CurrentMarts:
    """Return the published build, downloaded if this machine has another one. Raises FileNotFoundError if it was deleted since."""
    found = _read_pointer(place, is_quick=is_quick)
    if found is not None and not _has_copy(settings, place, found[0].build_id):
        with _copying(settings) as folder:
            found = _read_pointer(place)  # another process of this machine may have copied an even newer build meanwhile
            if found is not None and not _has_copy(settings, place, found[0].build_id):
                new = _download(settings, place, found[0], folder)
                _install(settings, new, place, found[0].build_id)
                remove_others(frozen_folder(settings), found[0].frozen)
    return CurrentMarts(None) if found is None else CurrentMarts(settings.marts_path, *found)


def _read_pointer(place: StorePlace, *, is_quick: bool = False) -> tuple[Pointer, str] | None:
    try:
        found = _read_quickly(place) if is_quick else place.read_tagged(_POINTER)
    except FileNotFoundError:
        return None
    if found is None:
        return None
    data, tag = found
    try:
        return _POINTERS.validate_json(data), tag
    except ValidationError as error:
        raise StoreError(
            f"{place.uri}/{_POINTER} cannot be read: {one_line(error)}", hint="delete it, and build the marts again"
        ) from error


def _read_quickly(place: StorePlace) -> tuple[bytes, str] | None:
    pointer = SharedObject(place.uri, _POINTER, _ANSWER_SECONDS)
    for _ in range(_TRIES - 1):
        with suppress(StoreError):
            return pointer.read()
        time.sleep(_PAUSE_SECONDS)
    return pointer.read()


def _download(settings: Settings, place: StorePlace, pointer: Pointer, folder: Path) -> Path:
    """Download the file of a build, and the frozen files that it shows and this machine lacks. Raises FileNotFoundError."""
    name, frozen = settings.marts_path.name, frozen_folder(settings)
    target = folder / name
    _download_file(place, f"{pointer.build_id}/{name}", target, pointer.files[name])
    days = read_frozen(target)
    for name, file in days.shown.items():
        path = frozen / name
        if not path.is_file() or path.stat().st_size != file.size:
            disk.make_folder(path.parent)
            _download_file(place, f"{FROZEN}/{name}", path, file)
    _point_views(target, frozen, days)
    return target


def _point_views(path: Path, folder: Path | str, days: FrozenDays) -> None:
    """Let the views of a file read their frozen days in another folder."""
    if days.shown:
        with connect_delta(lakehouse=str(folder)) as connection:
            connection.execute(f"attach {literal(path)} as marts")
            create_views(connection, "marts", folder)
            connection.execute("checkpoint marts")
        disk.sync_file(path)


def _download_file(place: StorePlace, name: str, target: Path, wanted: MartFile) -> None:
    place.download(name, target)
    if describe_file(target) != wanted:
        target.unlink(missing_ok=True)
        raise StoreError(
            f"get {place.uri}/{name} failed: the content differs from what {_POINTER} says",
            hint="try again; if it remains, build the marts again",
        )


@contextmanager
def _copying(settings: Settings) -> Iterator[Path]:
    """Hold this machine's copy against its other processes, with an empty folder for a download."""
    folder = settings.marts_path.with_name(".download")
    disk.make_folder(folder.parent)
    with FileLock(folder.with_name(".download.lock")):
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _install(settings: Settings, new: Path, place: StorePlace, build_id: str) -> None:
    """Make a file this machine's copy of a build, and note what it is."""
    _replace(new, settings.marts_path)
    disk.write_file(_note(settings), json.dumps(_described(settings, place, build_id)).encode())


def _has_copy(settings: Settings, place: StorePlace, build_id: str | None = None) -> bool:
    """Return whether this machine's file is a copy of a build (None: of any) of the store, unchanged since."""
    try:
        noted = json.loads(_note(settings).read_bytes())
        return bool(noted == _described(settings, place, noted["build_id"] if build_id is None else build_id))
    except (OSError, ValueError, KeyError):
        return False


def _note(settings: Settings) -> Path:
    return settings.marts_path.with_name(".copy.json")


def _described(settings: Settings, place: StorePlace, build_id: str) -> dict[str, Any]:
    found = settings.marts_path.stat()
    return {
        "place": place.uri,
        "build_id": build_id,
        "inode": found.st_ino,
        "size": found.st_size,
        "modified_ns": found.st_mtime_ns,
    }


def _replace(new: Path, published: Path) -> None:
    # DuckDB must not replay into the new file a log that a writing session left beside the old one.
    published.with_name(published.name + ".wal").unlink(missing_ok=True)
    disk.replace(new, published)


class _Watched:
    """The marts of a home as a process sees them that reads them again and again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._found: Path | None = None
        self._looks_at: float | None = None
        self._is_failing = False

    def path(self, place: StorePlace) -> Path | None:
        """See `readable_marts`. While one thread looks, others get what was found before: a slow store does not stop them."""
        if not self._lock.acquire(blocking=self._looks_at is None):
            return self._found
        try:
            if self._looks_at is None or time.monotonic() >= self._looks_at:
                self._look(place)
            return self._found
        finally:
            self._lock.release()

    def _look(self, place: StorePlace) -> None:
        try:
            self._found = current_marts(self._settings, is_quick=_has_copy(self._settings, place)).path
            self._is_failing = False
        except StoreError as error:
            if not _has_copy(self._settings, place):
                raise
            if not self._is_failing:
                _log.warning("adtally: %s; the marts are this machine's last copy, which may be old", one_line(error))
            self._found, self._is_failing = self._settings.marts_path, True
        self._looks_at = time.monotonic() + (_SECONDS_AFTER_FAILURE if self._is_failing else _POINTER_SECONDS)


@cache
def _watched(settings: Settings) -> _Watched:
    return _Watched(settings)
