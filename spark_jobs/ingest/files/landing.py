"""The landing folder: what lies in it, which of it is read, and the splits of a file that one task parses at a time.

Writers follow one protocol: write elsewhere, or under a name that starts with ``.`` or ``_``, on the same file system, then
rename into ``<landing>/<stream>/<region>/``. A file is read once, whole, after it appears under its final name. Only regular files
are read, and no symbolic link below the landing folder is followed. Everything else is named with a Reason, never passed over in
silence. Only hidden names are: they are the writers' temporary files.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlparse

from spark_jobs.errors import LandingPathError
from spark_jobs.lake.tables import STREAMS
from spark_jobs.texts import printable

CAMPAIGNS_FOLDER = "campaigns"
NAMES_FOLDER = "names"
_CSV_FOLDERS = (CAMPAIGNS_FOLDER, NAMES_FOLDER)
MAX_STRAYS = 100_000
"""One walk names so many entries that nothing reads: by mistake the landing folder may hold a whole disk."""

_FILE_ENDINGS = (".jsonl", ".jsonl.gz")
_REGION = re.compile(r"[a-z0-9-]{1,32}")
_OF_THE_SIMULATOR = ("truth.json", "rules")  # `adtally simulate` writes them beside the streams


class Reason(StrEnum):
    """Why nothing reads an entry of the landing folder."""

    WRONG_ENDING = "wrong_ending"
    WRONG_DEPTH = "wrong_depth"
    NO_REGION = "no_region"
    REGION_NAME = "region_name"
    UNKNOWN_FOLDER = "unknown_folder"
    WRONG_KIND = "wrong_kind"
    SYMLINK = "symlink"
    NAME_NOT_UTF8 = "name_not_utf8"
    UNREADABLE_FOLDER = "unreadable_folder"
    CHANGED = "changed"
    HIDDEN = "hidden"

    @property
    def text(self) -> str:
        """What is wrong, for a person."""
        return _TEXTS[self]


_TEXTS = {
    Reason.WRONG_ENDING: "the name ends in neither .jsonl nor .jsonl.gz (campaigns, names: .csv)",
    Reason.WRONG_DEPTH: "in a folder too deep: only files directly in <stream>/<region>/ are read",
    Reason.NO_REGION: "in no region: files belong into <stream>/<region>/",
    Reason.REGION_NAME: "the name of the region is not 1 to 32 of a-z, 0-9 and -",
    Reason.UNKNOWN_FOLDER: "beside the folders that are read: events, orders, campaigns, names",
    Reason.WRONG_KIND: "no regular file: a pipe, a socket, a device, a folder, or a file in the place of a folder",
    Reason.SYMLINK: "a symbolic link: none is followed",
    Reason.NAME_NOT_UTF8: "unreadable: the name is not UTF-8",
    Reason.UNREADABLE_FOLDER: "unreadable: the folder cannot be listed",
    Reason.CHANGED: "changed after it was read: new content needs a new name",
    Reason.HIDDEN: "hidden: the name starts with . or _",
}


class Kind(StrEnum):
    """What an entry of a folder is."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "other"


@dataclass(frozen=True)
class Entry:
    """One entry of the landing folder. ``reason`` None: it is read, or will be.

    ``name`` is its path under the landing folder, as the file system has it (surrogateescape). ``source`` is what it counts to:
    ``<stream>/<region>``, the stream, ``campaigns``, ``names`` or ``landing``. Of what is read, ``modified_ms`` is the time of
    modification as Java tells it, and ``arrived`` the last change of state (the rename) in seconds since the epoch.
    """

    name: str
    source: str
    reason: Reason | None
    modified_ms: int = 0
    arrived: float = 0.0


@dataclass(frozen=True)
class LandingFile:
    """A file of a batch. The order of records everywhere is (modified_ms, path, line): first accepted wins."""

    modified_ms: int
    path: str
    size: int

    @property
    def order(self) -> tuple[int, str]:
        """The sort key of files."""
        return (self.modified_ms, self.path)


@dataclass(frozen=True)
class Split:
    """Bytes [start, end) of a file (end None: to the end), the ``number``-th split of its batch."""

    number: int
    path: str
    name: str
    region: str
    start: int
    end: int | None

    def __str__(self) -> str:
        """The file by its name, and which bytes of it where it is not all."""
        if self.end is None:
            return f"{self.name} from byte {self.start}" if self.start else self.name
        return f"{self.name} bytes {self.start} to {self.end}"


def walk_landing(landing: Path) -> Iterator[Entry]:
    """All entries of the landing folder but the hidden ones: files, links, pipes and so on, and folders in the place of a file.

    Follows no link. Names at most MAX_STRAYS entries that nothing reads, and all that are read.
    """
    strays = 0
    folders: list[tuple[str, ...]] = [()]
    while folders:
        for entry, parts in _folder_entries(landing, folders.pop()):
            if entry is None:  # a folder that holds no file of its own accord: look into it
                if strays < MAX_STRAYS or _may_hold_files(parts):
                    folders.append(parts)
                continue
            if entry.reason is not None:
                strays += 1
                if strays > MAX_STRAYS:
                    continue
            yield entry


def region_folders(stream_folder: Path) -> list[str]:
    """The folders of a stream whose names are those of regions, sorted."""
    return sorted(e.name for e in _list(stream_folder) or () if e.is_dir(follow_symlinks=False) and _REGION.fullmatch(e.name))


def csv_files(landing: Path, folder: str) -> list[str]:
    """The CSV files of CAMPAIGNS_FOLDER or NAMES_FOLDER, by their names under the landing folder, sorted."""
    entries = (entry for entry, _ in _folder_entries(landing, (folder,)) if entry is not None)
    return sorted(entry.name for entry in entries if entry.reason is None)


def oldest_file_at(landing: Path, stream: str, region: str) -> datetime | None:
    """When the oldest file of a region was modified, None where there is none: Spark reads it first.

    A file cannot have come later than it was renamed, whatever its time of modification says; times before 1970 count as 1970.
    """
    entries = (entry for entry, _ in _folder_entries(landing, (stream, region)) if entry is not None and entry.reason is None)
    oldest = min((min(entry.modified_ms / 1000, entry.arrived) for entry in entries), default=None)
    return None if oldest is None else datetime.fromtimestamp(max(oldest, 0.0), UTC)


def reason_of(landing: Path, name: str) -> Reason | None:
    """Why the file ``name`` of the landing folder is not read; None: it is. A file that is gone is read, and found unreadable."""
    parts = tuple(name.split("/"))
    if any(_is_hidden(part) for part in parts):
        return Reason.HIDDEN
    for depth in range(1, len(parts)):
        if kind_of(landing.joinpath(*parts[:depth])) is Kind.LINK:
            return Reason.SYMLINK
    return _reason(parts, kind_of(landing / name) or Kind.FILE)


def name_below(path: str, landing: Path, stream: str) -> str:
    """The name under the landing folder of a file that a checkpoint or a commit calls ``path``.

    The landing folder may have been spelled in another way then, or moved since; what stands below the stream's folder has not.
    Raises LandingPathError where the path names no folder of the stream.
    """
    prefix = f"{landing}/{stream}/"
    if path.startswith(prefix):
        return path[len(prefix) - len(stream) - 1 :]
    parts = Path(path).parts
    if stream not in parts[:-1]:
        raise LandingPathError(
            f"{printable(path)} was planned to be read, but lies in no folder {stream} of {landing}",
            hint="docs/runbooks/lost-checkpoint.md says how to start with a new checkpoint without counting twice",
        )
    at = len(parts) - 2 - parts[-2::-1].index(stream)
    return "/".join(parts[at:])


def open_regular(path: str | Path, depth: int = 3) -> BinaryIO:
    """Open a regular file for reading; a pipe in its place cannot make this wait.

    Raises OSError for anything else than a regular file, and where one of the last ``depth`` parts of the path is a symbolic link.
    """
    parts = Path(path).absolute().parts
    depth = min(depth, len(parts) - 1)
    folder = os.open(os.path.join(*parts[:-depth]), os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[-depth:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        _require_regular(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False), path)  # to open a device may do something
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        _require_regular(os.fstat(file), path)  # it may have been put in its place just now
    except OSError:
        os.close(file)
        raise
    return os.fdopen(file, "rb")


def java_ms(nanos: int) -> int:
    """A time of modification as Java tells it: milliseconds in 64 bits, which wrap."""
    return (nanos // 1_000_000 + 2**63) % 2**64 - 2**63


def local_path(uri: str) -> str:
    """A plain path of a file: URI as Spark prints it."""
    parsed = urlparse(uri)
    return unquote(parsed.path) if parsed.scheme == "file" else uri


def relative_name(path: str, landing: Path) -> str:
    """The name by which tables call a file: its path under the landing folder, with ``/``."""
    try:
        return Path(path).relative_to(landing).as_posix()
    except ValueError:
        return path


def _reason(parts: tuple[str, ...], kind: Kind) -> Reason | None:
    """Why an entry at these parts of a path under the landing folder is not read."""
    if kind is Kind.LINK:
        return Reason.SYMLINK
    if kind is not Kind.FILE:
        return Reason.WRONG_KIND
    if not all(_is_utf8(part) for part in parts):
        return Reason.NAME_NOT_UTF8
    if parts[0] in _CSV_FOLDERS:
        return _reason_of_name(parts, 2, (".csv",))
    if parts[0] not in STREAMS:
        return Reason.UNKNOWN_FOLDER
    if len(parts) == 2:
        return Reason.NO_REGION
    if len(parts) > 2 and not _REGION.fullmatch(parts[1]):
        return Reason.REGION_NAME
    return _reason_of_name(parts, 3, _FILE_ENDINGS)


def _reason_of_name(parts: tuple[str, ...], depth: int, endings: tuple[str, ...]) -> Reason | None:
    if len(parts) == 1:
        return Reason.WRONG_KIND  # a file in the place of a folder
    if len(parts) > depth:
        return Reason.WRONG_DEPTH
    return None if parts[-1].endswith(endings) else Reason.WRONG_ENDING


def _is_place_of_file(parts: tuple[str, ...]) -> bool:
    if parts[0] in _CSV_FOLDERS:
        return len(parts) == 2 and parts[1].endswith(".csv")
    return len(parts) == 3 and parts[0] in STREAMS and parts[2].endswith(_FILE_ENDINGS)


def _may_hold_files(parts: tuple[str, ...]) -> bool:
    is_stream = parts[0] in STREAMS and len(parts) <= 2 and all(_REGION.fullmatch(region) for region in parts[1:])
    return is_stream or (len(parts) == 1 and parts[0] in _CSV_FOLDERS)


def _folder_entries(landing: Path, folder: tuple[str, ...]) -> Iterator[tuple[Entry | None, tuple[str, ...]]]:
    """(entry, parts) of what one folder holds; an entry None for a folder to look into."""
    listed = _list(landing.joinpath(*folder))
    if listed is None:
        yield Entry("/".join(folder) or ".", _source(folder), Reason.UNREADABLE_FOLDER), folder
        return
    for found in listed:
        parts = (*folder, found.name)
        kind = _kind(found)
        if not folder and found.name in _OF_THE_SIMULATOR:
            continue
        if kind is Kind.FOLDER:
            yield None, parts
            if not _is_place_of_file(parts):
                continue
        reason = _reason(parts, kind)
        name, source = "/".join(parts), _source(parts[:-1])
        if reason is not None:
            yield Entry(name, source, reason), parts
            continue
        try:
            state = found.stat(follow_symlinks=False)
        except OSError:  # gone meanwhile
            continue
        yield Entry(name, source, None, java_ms(state.st_mtime_ns), state.st_ctime), parts


def _source(folder: tuple[str, ...]) -> str:
    """What the entries of a folder count to."""
    if not folder or folder[0] not in (*STREAMS, *_CSV_FOLDERS):
        return "landing"
    if len(folder) == 1 or folder[0] in _CSV_FOLDERS or not _REGION.fullmatch(folder[1]):
        return folder[0]
    return f"{folder[0]}/{folder[1]}"


def _list(folder: Path) -> list[os.DirEntry[str]] | None:
    """What a folder holds but for the hidden; empty where there is none, or a link, None where it cannot be listed."""
    if folder.is_symlink():
        return []
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not _is_hidden(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        return None


def _kind(entry: os.DirEntry[str]) -> Kind:
    return _first_kind(entry.is_symlink, lambda: entry.is_dir(follow_symlinks=False), lambda: entry.is_file(follow_symlinks=False))


def kind_of(path: Path) -> Kind | None:
    """What lies at a path, a link not followed; None: nothing, or nobody can tell."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    return _first_kind(lambda: stat.S_ISLNK(mode), lambda: stat.S_ISDIR(mode), lambda: stat.S_ISREG(mode))


def _first_kind(is_link: Callable[[], bool], is_folder: Callable[[], bool], is_file: Callable[[], bool]) -> Kind:
    if is_link():
        return Kind.LINK
    if is_folder():
        return Kind.FOLDER
    return Kind.FILE if is_file() else Kind.OTHER


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _require_regular(state: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def plan_splits(files: Iterable[LandingFile], landing: Path, split_bytes: int) -> list[Split]:
    """The splits of a batch in the order of its records. A gzip file is one split."""
    return list(_plan(sorted(files, key=lambda file: file.order), landing, split_bytes))


def _plan(files: list[LandingFile], landing: Path, split_bytes: int) -> Iterator[Split]:
    number = 0
    for file in files:
        name, region = relative_name(file.path, landing), Path(file.path).parent.name
        starts = [0] if file.path.endswith(".gz") else list(range(0, max(file.size, 1), split_bytes))
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            yield Split(number, file.path, name, region, start, end)
            number += 1
