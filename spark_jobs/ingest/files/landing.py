"""List the landing folder, decide which of its entries are read, and cut files into the splits that one task parses at a time.

Writers follow one protocol: write a file elsewhere on the same file system, or under a name that starts with ``.`` or ``_``, then
rename it into ``<landing>/<stream>/<region>/``. adtally reads a file once, whole, after it appears under its final name. It reads
only regular files and follows no symbolic link below the landing folder. It reports every other entry with a Reason, except hidden
names: these are the writers' temporary files.

Functions that list take the folder to list (``Settings.landing_path``), which for an object store is its view. The path of a file
that is read is below ``Settings.landing_uri``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlparse

from xxhash import xxh3_64_hexdigest

from spark_jobs.config import Settings
from spark_jobs.errors import LandingPathError
from spark_jobs.lake.landing_view import CAMPAIGNS_FOLDER, NAMES_FOLDER, find_objects, impossible_keys, landed_object
from spark_jobs.lake.places import PlacedFile
from spark_jobs.lake.tables import STREAMS
from spark_jobs.texts import printable

_CSV_FOLDERS = (CAMPAIGNS_FOLDER, NAMES_FOLDER)
MAX_STRAYS = 100_000
"""How many unread entries one walk reports: by mistake, the landing folder may contain a whole disk."""

_EDGE_BYTES = 64 * 1024
_HIDDEN = (".", "_")  # beginnings of hidden names
FILE_ENDINGS = (".jsonl", ".jsonl.gz")
_NEEDS_PARSING = re.compile("[%?#;]")
_REGION = re.compile(r"[a-z0-9-]{1,32}")
_OF_THE_SIMULATOR = ("truth.json", "rules")  # `adtally simulate` writes them beside the streams


class Reason(StrEnum):
    """Why nothing reads an entry of the landing folder. ``text`` is the reason for people."""

    text: str

    WRONG_ENDING = "wrong_ending", "the name ends in neither .jsonl nor .jsonl.gz (campaigns, names: .csv)"
    WRONG_DEPTH = "wrong_depth", "in a folder too deep: only files directly in <stream>/<region>/ are read"
    NO_REGION = "no_region", "in no region: files belong into <stream>/<region>/"
    REGION_NAME = "region_name", "the name of the region is not 1 to 32 of a-z, 0-9 and -"
    UNKNOWN_FOLDER = "unknown_folder", "beside the folders that are read: events, orders, campaigns, names"
    WRONG_KIND = "wrong_kind", "no regular file: a pipe, a socket, a device, a folder, or a file in the place of a folder"
    SYMLINK = "symlink", "a symbolic link: none is followed"
    NAME_NOT_UTF8 = "name_not_utf8", "unreadable: the name is not UTF-8"
    UNREADABLE_FOLDER = "unreadable_folder", "unreadable: the folder cannot be listed"
    IMPOSSIBLE_KEY = "impossible_key", "a key that cannot be a path: with an empty, . or .. part, too long, or the name of a folder"
    CHANGED = "changed", "changed after it was read: new content needs a new name"
    HIDDEN = "hidden", "hidden: the name starts with . or _"

    def __new__(cls, value: str, text: str) -> Reason:
        """Make a reason that is equal to its ``value``."""
        reason = str.__new__(cls, value)
        reason._value_, reason.text = value, text
        return reason


@dataclass(frozen=True)
class Entry:
    """One entry of the landing folder. ``reason`` is None if it is read, now or later.

    ``name`` is its path under the landing folder, as the file system has it (surrogateescape). ``source`` is the folder that it
    belongs to: ``<stream>/<region>``, the stream, ``campaigns``, ``names`` or ``landing``. An entry that is read also has
    ``modified_ms``, its time of modification as Java reports it, and ``arrived``, the last change of state (the rename) in seconds.
    """

    name: str
    source: str
    reason: Reason | None
    modified_ms: int = 0
    arrived: float = 0.0


@dataclass(frozen=True, order=True)
class LandingFile:
    """A file of a batch. Files sort as their records do, by (modified_ms, path): the first record of an id is accepted."""

    modified_ms: int
    path: str
    size: int


@dataclass(frozen=True)
class Split:
    """Bytes [start, end) of a file (end None: to the end), the ``number``-th split of its batch.

    ``file_size`` is as planned (None: unknown).
    """

    number: int
    path: str
    name: str
    region: str
    start: int
    end: int | None
    file_size: int | None = None

    def __str__(self) -> str:
        """Return the file's name and, unless the split is the whole file, the bytes."""
        if self.end is None:
            return f"{self.name} from byte {self.start}" if self.start else self.name
        return f"{self.name} bytes {self.start} to {self.end}"


def walk_landing(landing: Path) -> Iterator[Entry]:
    """Yield the entries of the landing folder: files, links, pipes and so on, and folders where a file should be. No hidden ones.

    Follows no link. Yields all entries that are read, and at most MAX_STRAYS others.
    """
    strays = 0
    folders: list[tuple[str, ...]] = [()]
    for key in impossible_keys(landing)[:MAX_STRAYS]:
        strays += 1
        yield Entry(key, "landing", Reason.IMPOSSIBLE_KEY)
    while folders:
        for entry, parts in _folder_entries(landing, folders.pop()):
            if entry is None:  # a folder: look into it
                if strays < MAX_STRAYS or _may_hold_files(parts):
                    folders.append(parts)
                continue
            strays += entry.reason is not None
            if entry.reason is None or strays <= MAX_STRAYS:
                yield entry


def region_folders(stream_folder: Path) -> list[str]:
    """Return the folders of a stream that have the name of a region, sorted."""
    return sorted(e.name for e in _list(stream_folder) or () if e.is_dir(follow_symlinks=False) and _REGION.fullmatch(e.name))


def csv_files(landing: Path, folder: str) -> list[str]:
    """Return the CSV files of CAMPAIGNS_FOLDER or NAMES_FOLDER: their names under the landing folder, sorted."""
    return sorted(entry.name for entry in _read_entries(landing, folder))


def oldest_file_at(landing: Path, stream: str, region: str) -> datetime | None:
    """Return when the oldest file of a region, which Spark reads first, was modified; None if there is no file.

    A file arrived no later than its rename, whatever its time of modification. Times before 1970 count as 1970.
    """
    entries = _read_entries(landing, stream, region)
    oldest = min((min(entry.modified_ms / 1000, entry.arrived) for entry in entries), default=None)
    return None if oldest is None else datetime.fromtimestamp(max(oldest, 0.0), UTC)


def _read_entries(landing: Path, *folder: str) -> Iterator[Entry]:
    return (entry for entry, _ in _folder_entries(landing, folder) if entry is not None and entry.reason is None)


def reason_of(landing: Path, name: str) -> Reason | None:
    """Return why the file ``name`` of the landing folder is not read; None if it is. A missing file is read and rejected."""
    parts = tuple(name.split("/"))
    if any(part.startswith(_HIDDEN) for part in parts):
        return Reason.HIDDEN
    if any(os.path.islink(landing.joinpath(*parts[:depth])) for depth in range(1, len(parts))):
        return Reason.SYMLINK
    try:
        mode = os.lstat(landing / name).st_mode
    except OSError:
        mode = stat.S_IFREG
    return _reason(parts, is_link=stat.S_ISLNK(mode), is_file=stat.S_ISREG(mode))


def name_below(path: str, settings: Settings, stream: str) -> str:
    """Return the name under the landing folder of a file that a checkpoint or a commit calls ``path``.

    The landing folder may have had another path then; the path below the stream's folder is the same. Raises LandingPathError if
    ``path`` has no folder of the stream.
    """
    for root in (settings.landing_uri, settings.landing_path):
        prefix = f"{root}/{stream}/"
        if path.startswith(prefix):
            return path[len(prefix) - len(stream) - 1 :]
    parts = Path(path).parts
    if stream not in parts[:-1]:
        raise LandingPathError(
            f"{printable(path)} was planned to be read, but lies in no folder {stream} of {settings.landing_uri}",
            hint="docs/runbooks/lost-checkpoint.md says how to start with a new checkpoint without counting twice",
        )
    at = len(parts) - 2 - parts[-2::-1].index(stream)
    return "/".join(parts[at:])


def open_regular(path: str | Path, depth: int = 3) -> BinaryIO:
    """Open a regular file for reading. A pipe instead of a file does not block.

    ``path`` may name an object, which is always regular. Raises OSError if it is no regular file, or if one of the last ``depth``
    parts of the path is a symbolic link; StoreError if a store does not answer.
    """
    stored = landed_object(path)
    if stored is not None:
        return stored.open()
    parts = Path(path).absolute().parts
    depth = min(depth, len(parts) - 1)
    folder = os.open(os.path.join(*parts[:-depth]), os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[-depth:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        _require_regular(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False), path)  # opening a device may have effects
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        _require_regular(os.fstat(file), path)  # somebody may have replaced it meanwhile
    except OSError:
        os.close(file)
        raise
    return os.fdopen(file, "rb")


def java_ms(nanos: int) -> int:
    """Return a time of modification as Java reports it: milliseconds in 64 bits, which wrap."""
    return (nanos // 1_000_000 + 2**63) % 2**64 - 2**63


def uri_path(uri: str) -> str:
    """Return the path that a file: URI of Spark names; any other text unchanged."""
    if uri.startswith("file:///") and not _NEEDS_PARSING.search(uri):
        return uri[len("file://") :]
    parsed = urlparse(uri)
    return unquote(parsed.path) if parsed.scheme == "file" else uri


def relative_name(path: str, landing: Path | str) -> str:
    """Return the name of a file in tables: its path under the landing folder, a path or a URI."""
    return path.removeprefix(f"{landing}/")


def _reason(parts: tuple[str, ...], *, is_link: bool, is_file: bool) -> Reason | None:
    """Return why an entry at this path under the landing folder is not read."""
    if is_link:
        return Reason.SYMLINK
    if not is_file:
        return Reason.WRONG_KIND
    if not "".join(parts).isascii() and any("\udc80" <= character <= "\udcff" for part in parts for character in part):
        return Reason.NAME_NOT_UTF8  # the characters are from surrogateescape
    if parts[0] in _CSV_FOLDERS:
        return _reason_of_name(parts, 2, (".csv",))
    if parts[0] not in STREAMS:
        return Reason.UNKNOWN_FOLDER
    if len(parts) == 2:
        return Reason.NO_REGION
    if len(parts) > 2 and not _REGION.fullmatch(parts[1]):
        return Reason.REGION_NAME
    return _reason_of_name(parts, 3, FILE_ENDINGS)


def _reason_of_name(parts: tuple[str, ...], depth: int, endings: tuple[str, ...]) -> Reason | None:
    if len(parts) == 1:
        return Reason.WRONG_KIND  # a file where a folder should be
    if len(parts) > depth:
        return Reason.WRONG_DEPTH
    return None if parts[-1].endswith(endings) else Reason.WRONG_ENDING


def _is_place_of_file(parts: tuple[str, ...]) -> bool:
    if parts[0] in _CSV_FOLDERS:
        return len(parts) == 2 and parts[1].endswith(".csv")
    return len(parts) == 3 and parts[0] in STREAMS and parts[2].endswith(FILE_ENDINGS)


def _may_hold_files(parts: tuple[str, ...]) -> bool:
    is_stream = parts[0] in STREAMS and len(parts) <= 2 and all(_REGION.fullmatch(region) for region in parts[1:])
    return is_stream or (len(parts) == 1 and parts[0] in _CSV_FOLDERS)


def _folder_entries(landing: Path, folder: tuple[str, ...]) -> Iterator[tuple[Entry | None, tuple[str, ...]]]:
    """Yield (entry, parts) of the entries of one folder; entry is None for a folder to look into."""
    listed = _list(landing.joinpath(*folder))
    if listed is None:
        yield Entry("/".join(folder) or ".", _source(folder), Reason.UNREADABLE_FOLDER), folder
        return
    for found in listed:
        parts = (*folder, found.name)
        if not folder and found.name in _OF_THE_SIMULATOR:
            continue
        if found.is_dir(follow_symlinks=False):
            yield None, parts
            if not _is_place_of_file(parts):
                continue
        reason = _reason(parts, is_link=found.is_symlink(), is_file=found.is_file(follow_symlinks=False))
        name, source = "/".join(parts), _source(parts[:-1])
        if reason is not None:
            yield Entry(name, source, reason), parts
            continue
        try:
            state = found.stat(follow_symlinks=False)
        except OSError:  # deleted meanwhile
            continue
        yield Entry(name, source, None, java_ms(state.st_mtime_ns), state.st_ctime), parts


def _source(folder: tuple[str, ...]) -> str:
    """Return the source to which the entries of a folder belong."""
    if not folder or folder[0] not in (*STREAMS, *_CSV_FOLDERS):
        return "landing"
    if len(folder) == 1 or folder[0] in _CSV_FOLDERS or not _REGION.fullmatch(folder[1]):
        return folder[0]
    return f"{folder[0]}/{folder[1]}"


def _list(folder: Path) -> list[os.DirEntry[str]] | None:
    """Return the entries of a folder, without hidden ones: none if it is missing or a link, None if it cannot be listed."""
    if folder.is_symlink():
        return []
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(_HIDDEN)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        return None


def _require_regular(state: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def plan_splits(files: Iterable[LandingFile], landing: Path | str, split_bytes: int) -> list[Split]:
    """Return the splits of a batch in the order of its records. A gzip file is one split."""
    splits: list[Split] = []
    for file in sorted(files):
        name, region = relative_name(file.path, landing), Path(file.path).parent.name
        starts = [0] if file.path.endswith(".gz") else list(range(0, max(file.size, 1), split_bytes))
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            splits.append(Split(len(splits), file.path, name, region, start, end, file.size))
    return splits


@dataclass(frozen=True)
class FileState:
    """A file at one moment, so that a batch notices another file under the same name.

    ``fingerprint`` is the size and a hash of the first and last 64 KiB, which are the same for a copy. Of an object it is the size
    and the tag. Empty: there is no such file.
    """

    fingerprint: str
    modified_ns: int = 0
    inode: int = 0


def file_states(files: Iterable[LandingFile]) -> list[FileState]:
    """Return the present states of files and objects. Raises StoreError if a store does not answer."""
    paths = [file.path for file in files]
    objects = find_objects(paths)
    return [_object_state(objects[path]) if path in objects else file_state(path) for path in paths]


def _object_state(found: PlacedFile | None) -> FileState:
    return FileState("") if found is None else FileState(f"{found.size}:{found.tag}")


def file_state(path: str) -> FileState:
    """Return the present state of a file of this machine."""
    # not blocking, because a pipe must not hang
    with suppress(OSError), open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if stat.S_ISREG(found.st_mode):
            edges = os.pread(file.fileno(), _EDGE_BYTES, 0)
            if found.st_size > _EDGE_BYTES:
                edges += os.pread(file.fileno(), _EDGE_BYTES, max(_EDGE_BYTES, found.st_size - _EDGE_BYTES))
            return FileState(f"{found.st_size}:{xxh3_64_hexdigest(edges)}", found.st_mtime_ns, found.st_ino)
    return FileState("")
