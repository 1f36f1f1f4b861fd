"""Reads and writes whole files of a location: a folder of this machine, or a prefix of an object store.

A file appears whole or not at all, and lasts once a call that wrote it has returned. Names are relative to the place, with ``/``.
"""

from __future__ import annotations

import io
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, InvalidPathError, PreconditionError
from obstore.store import ObjectStore

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import MachineError, StoreError
from spark_jobs.lake.failures import read_again, translate_store_errors
from spark_jobs.lake.locations import is_local
from spark_jobs.lake.store import object_store, s3_pages

_PART_BYTES = 8 * 1024 * 1024
_BUFFER_BYTES = 1024 * 1024
_REQUESTS_AT_ONCE = 16
_DELETES_AT_ONCE = 1000  # what one request of S3 deletes
_UNSAFE = "adtally needs conditional puts and consistent lists, as S3 has; docs/object-store.md"


@dataclass(frozen=True)
class PlacedFile:
    """A file of a place. ``tag`` changes with the content; it is empty on a local disk."""

    name: str
    size: int
    modified: datetime
    tag: str

    @property
    def modified_ns(self) -> int:
        """``modified`` in nanoseconds since the epoch, of whole microseconds: what to give a local copy."""
        return round(self.modified.timestamp() * 1_000_000) * 1000


class Place(ABC):
    """The files below ``uri``. Each method raises StoreError if the store does not answer, or refuses."""

    is_remote = False
    """Whether each call is a request to a store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @abstractmethod
    def below(self, name: str) -> Place:
        """Return the place of a folder of this one."""

    @abstractmethod
    def list(self, folder: str = "", *, after: str | None = None) -> Iterator[PlacedFile]:
        """Yield the files in ``folder`` and all folders below it, sorted by name; with ``after`` those with larger names."""

    def every_name(self) -> Iterator[str]:
        """Yield the names of all files, hidden ones too."""
        yield from (file.name for file in self.list())

    @abstractmethod
    def find(self, name: str) -> PlacedFile | None:
        """Return a file; None if there is none."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError."""

    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Yield the content of each file, None for a missing one; on a disk each is read when it is wanted."""
        yield from map(self._read_if_there, names)

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; it can seek. Raises FileNotFoundError, of an object at the first read."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it."""

    def write_private(self, name: str, data: bytes) -> None:
        """Write a file that only its owner may read; in a store the bucket's policy decides who may."""
        self.write(name, data)

    @abstractmethod
    def upload(self, source: Path, name: str) -> None:
        """Write a file from a local one, or replace it."""

    @abstractmethod
    def rewrite(self, source: Path, found: PlacedFile) -> None:
        """Replace a file, which must still be as ``found``, from a local one. A disk keeps its time of modification and its mode.

        Raises StoreError if the object has changed. A store gives it a new time.
        """

    @abstractmethod
    def download(self, name: str, target: Path) -> None:
        """Copy a file to a local path, which appears whole. Raises FileNotFoundError."""

    @abstractmethod
    def local_files(self, names: Sequence[str]) -> AbstractContextManager[Sequence[Path]]:
        """Return local paths to read files from, within the block. Raises FileNotFoundError."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Delete files; a missing one is no error."""

    @abstractmethod
    def check(self) -> str:
        """Try whether tables can be written here; return what was found. Raises MachineError or StoreError if they cannot."""

    def delete_folder(self, folder: str) -> None:
        """Delete all files in and below a folder."""
        self.delete([found.name for found in self.list(folder)])


def open_place(uri: str) -> Place:
    """Return the place at a location, which need not exist."""
    return LocalPlace(uri) if is_local(uri) else StorePlace(uri)


def state_copies(settings: Settings, name: str) -> StorePlace | None:
    """Return where a remote lakehouse keeps copies of HOME/``name``; None for a local lakehouse, whose machine keeps its disk."""
    place = open_place(settings.state_uri).below(name)
    return place if isinstance(place, StorePlace) else None


class LocalPlace(Place):
    """A folder. Written files survive a power cut."""

    def _path(self, name: str) -> Path:
        return Path(self.uri) / name

    def below(self, name: str) -> LocalPlace:
        """See Place."""
        return LocalPlace(str(self._path(name)))

    def list(self, folder: str = "", *, after: str | None = None) -> Iterator[PlacedFile]:
        """See Place. Leaves out hidden files, which are being written."""
        start = len(self.uri) + 1
        found = (
            f"{parent[start:]}/{name}" if len(parent) > start else name
            for parent, _, names in os.walk(os.path.join(self.uri, folder).rstrip("/"))
            for name in names
            if not name.startswith(".")
        )
        for name in sorted(name for name in found if after is None or name > after):
            file = self.find(name)
            if file is not None:
                yield file

    def every_name(self) -> Iterator[str]:
        """See Place. Leaves out links, pipes and the like."""
        for parent, _, names in os.walk(self.uri):
            for name in sorted(names):
                path = os.path.join(parent, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    yield os.path.relpath(path, self.uri)

    def find(self, name: str) -> PlacedFile | None:
        """See Place."""
        with suppress(FileNotFoundError, NotADirectoryError):
            state = os.stat(f"{self.uri}/{name}")
            return PlacedFile(name, state.st_size, datetime.fromtimestamp(state.st_mtime, UTC), "")
        return None

    def read(self, name: str) -> bytes:
        """See Place."""
        with open(f"{self.uri}/{name}", "rb") as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        """See Place."""
        return self._path(name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        """See Place."""
        disk.write_file(self._path(name), data)

    def write_private(self, name: str, data: bytes) -> None:
        """See Place."""
        with disk.replacing(self._path(name)) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(data)

    def upload(self, source: Path, name: str) -> None:
        """See Place."""
        with disk.replacing(self._path(name)) as temporary:
            shutil.copyfile(source, temporary)

    def rewrite(self, source: Path, found: PlacedFile) -> None:
        """See Place."""
        path = self._path(found.name)
        state = path.stat()
        with disk.replacing(path) as temporary:
            shutil.copyfile(source, temporary)
            temporary.chmod(state.st_mode & 0o7777)
            os.utime(temporary, ns=(state.st_atime_ns, state.st_mtime_ns))

    def download(self, name: str, target: Path) -> None:
        """See Place."""
        with disk.replacing(target) as temporary:
            shutil.copyfile(self._path(name), temporary)

    def local_files(self, names: Sequence[str]) -> AbstractContextManager[Sequence[Path]]:
        """See Place."""
        return nullcontext([self._path(name) for name in names])

    def delete(self, names: Iterable[str]) -> None:
        """See Place. Also removes folders that it empties."""
        root = Path(self.uri)
        for name in names:
            path = root / name
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == root:
                    break
                with suppress(OSError):  # it is not empty, or another process has removed it
                    folder.rmdir()

    def check(self) -> str:
        """See Place. An earlier run by another user may have made some of the folders."""
        root = Path(self.uri)
        nearest = next(folder for folder in (root, *root.parents) if folder.exists())
        for folder in (nearest, *(root.iterdir() if root.is_dir() else ())):
            if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
                raise MachineError(f"{folder} cannot be written by this user", hint="give it to the user that ingests")
        return f"{self.uri} can be written" if root.exists() else f"{self.uri} will be made"


class StorePlace(Place):
    """A prefix of an object store. A store keeps what it has acknowledged."""

    is_remote = True

    def below(self, name: str) -> StorePlace:
        """See Place."""
        return StorePlace(f"{self.uri}/{name}")

    def list(self, folder: str = "", *, after: str | None = None) -> Iterator[PlacedFile]:
        """See Place."""
        pages: Iterator[Any] | None = None

        def next_page() -> Any:
            nonlocal pages
            try:
                with self.saying("list", folder):
                    if pages is None:
                        pages = iter(obstore.list(object_store(self.uri), folder or None, offset=after))
                    return next(pages, None)
            except StoreError:
                pages = None  # a repetition lists from the last name on
                raise

        while (page := read_again(next_page)) is not None:
            for found in page:
                after = found["path"]
                yield PlacedFile(found["path"], found["size"], found["last_modified"], found["e_tag"] or "")

    def list_folder(self, folder: str) -> tuple[Sequence[PlacedFile], Sequence[str]]:
        """Return the objects right in ``folder``, and the names of the folders there: one request for each thousand."""

        def listing() -> tuple[list[PlacedFile], list[str]]:
            with self.saying("list", folder):
                found = obstore.list_with_delimiter(object_store(self.uri), folder or None)
            files = [PlacedFile(one["path"], one["size"], one["last_modified"], one["e_tag"] or "") for one in found["objects"]]
            return files, list(found["common_prefixes"])

        return read_again(listing)

    def list_any(self, folder: str = "", *, after: str | None = None) -> Iterator[PlacedFile]:
        """Yield as ``list`` does; of S3 also objects whose keys obstore refuses: with empty, ``.`` and ``..`` segments."""
        last = after
        try:
            for found in self.list(folder, after=after):
                last = found.name
                yield found
        except StoreError as error:
            if not isinstance(error.__cause__, InvalidPathError):
                raise
            yield from self._list_by_botocore(folder, last)

    def _list_by_botocore(self, folder: str, after: str | None) -> Iterator[PlacedFile]:
        bucket, _, root = self.uri.partition("://")[2].partition("/")
        root = f"{root}/" if root else ""
        start = {} if after is None else {"StartAfter": root + after}
        prefix = root + (f"{folder}/" if folder else "")
        for page in s3_pages(Bucket=bucket, Prefix=prefix, **start):
            for found in page.get("Contents", ()):
                yield PlacedFile(found["Key"].removeprefix(root), found["Size"], found["LastModified"], found["ETag"])

    def find(self, name: str) -> PlacedFile | None:
        """See Place."""
        with suppress(FileNotFoundError), self.saying("head", name):
            found = obstore.head(object_store(self.uri), name)
            return PlacedFile(name, found["size"], found["last_modified"], found["e_tag"] or "")
        return None

    def read(self, name: str) -> bytes:
        """See Place."""
        return self.read_tagged(name)[0]

    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """See Place. Reads all of them at once, if there are several."""
        wanted = list(names)
        if len(wanted) < 2:
            yield from map(self._read_if_there, wanted)
            return
        with ThreadPoolExecutor(min(len(wanted), _REQUESTS_AT_ONCE)) as pool:
            yield from pool.map(self._read_if_there, wanted)

    def read_tagged(self, name: str) -> tuple[bytes, str]:
        """Return the content and the tag of an object, of one moment. Raises FileNotFoundError."""

        def reading() -> tuple[bytes, str]:
            with self.saying("get", name):
                found = obstore.get(object_store(self.uri), name)
                return bytes(found.bytes()), found.meta["e_tag"] or ""

        return read_again(reading)

    def open(self, name: str) -> BinaryIO:
        """See Place. One request reads on from where the reader is, so memory does not grow with the object."""
        return io.BufferedReader(_ObjectReader(self, name), _BUFFER_BYTES)

    def write(self, name: str, data: bytes) -> None:
        """See Place."""
        with self.saying("put", name):
            obstore.put(object_store(self.uri), name, data)

    def create(self, name: str, data: bytes) -> str:
        """Write an object that does not exist; return its tag. Raises FileExistsError, also if a first try of this call made it."""
        with self.saying("put", name):
            try:
                return obstore.put(object_store(self.uri), name, data, mode="create")["e_tag"] or ""
            except AlreadyExistsError:
                raise FileExistsError(f"{self.uri}/{name} exists") from None

    def swap(self, name: str, data: bytes, tag: str) -> str | None:
        """Replace an object if it still has ``tag``; return the new tag. None if it has another, also if this call changed it."""
        with self.saying("put", name):
            try:
                return obstore.put(object_store(self.uri), name, data, mode={"e_tag": tag})["e_tag"] or ""
            except (PreconditionError, FileNotFoundError):
                return None

    def upload(self, source: Path, name: str) -> None:
        """See Place."""
        with self.saying("put", name):
            obstore.put(object_store(self.uri), name, source, chunk_size=_PART_BYTES)  # one request, or one a part

    def rewrite(self, source: Path, found: PlacedFile) -> None:
        """See Place."""
        if self.swap(found.name, source.read_bytes(), found.tag) is None:
            raise StoreError(f"put {self.uri}/{found.name}: the object has changed meanwhile", hint="run the command again")

    def download(self, name: str, target: Path) -> None:
        """See Place. A part that was cut off is read again."""
        with disk.replacing(target) as temporary:
            self._fetch(name, temporary)

    def _fetch(self, name: str, target: Path) -> None:
        with target.open("wb") as file, self.open(name) as source:
            shutil.copyfileobj(source, file, _PART_BYTES)

    @contextmanager
    def local_files(self, names: Sequence[str]) -> Iterator[Sequence[Path]]:
        """See Place. Copies the objects into a temporary folder, several at a time."""
        with TemporaryDirectory(prefix="adtally-", dir=disk.scratch_folder()) as folder:
            paths = [Path(folder) / str(number) for number in range(len(names))]
            if len(names) == 1:
                self._fetch(names[0], paths[0])
            else:
                with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
                    list(pool.map(self._fetch, names, paths))
            yield paths

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the store; replaces the target. Raises FileNotFoundError."""
        with self.saying("copy", name):
            obstore.copy(object_store(self.uri), name, target)

    def delete(self, names: Iterable[str]) -> None:
        """See Place."""
        wanted = list(names)
        for start in range(0, len(wanted), _DELETES_AT_ONCE):
            some = wanted[start : start + _DELETES_AT_ONCE]
            with suppress(FileNotFoundError), self.saying("delete", some[0]):
                obstore.delete(object_store(self.uri), some)

    def check(self) -> str:
        """See Place. Tables and leases need conditional puts, and a list that has what was just written."""
        folder = "_adtally/doctor"
        name, data = f"{folder}/{uuid4().hex}", b"adtally doctor"
        tag = self.create(name, data)
        try:
            with suppress(FileExistsError):
                self.create(name, data)
                raise StoreError(f"put {self.uri}/{name}: the store replaced an object that a put must not replace", hint=_UNSAFE)
            if not tag or self.swap(name, data, f"{tag[:-1]}0x") is not None:
                raise StoreError(f"put {self.uri}/{name}: the store replaced an object that had another tag", hint=_UNSAFE)
            if self.read(name) != data or name not in (file.name for file in self.list(folder)):
                raise StoreError(f"list {self.uri}: the store does not list an object that it has", hint=_UNSAFE)
        finally:
            self.delete([name])
        return f"{self.uri} answers; conditional puts hold"

    def saying(self, operation: str, name: str) -> AbstractContextManager[None]:
        """Raise obstore's errors as StoreError with the operation and the key."""
        return translate_store_errors(operation, f"{self.uri}/{name}".rstrip("/"))


class _ObjectReader(io.RawIOBase):
    """Reads an object as a stream, from the position of the last ``seek``."""

    def __init__(self, place: StorePlace, name: str) -> None:
        self._place, self._name = place, name
        self._position = 0
        self._size: int | None = None  # known after the first request
        self._parts: Iterator[Any] | None = None
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = read_again(self._next_part)
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        self._rest = data[count:]
        self._position += count
        return count

    def _next_part(self) -> memoryview:
        """Return bytes from the position on. Empty at the end. After an error the next call asks for the rest of the object."""
        if self._rest or (self._size is not None and self._position >= self._size):
            return self._rest
        try:
            with self._place.saying("get", self._name):
                if self._parts is None:
                    self._parts = self._start()
                part = next(self._parts, None)
            if part is None and self._position < (self._size or 0):
                raise StoreError(f"get {self._place.uri}/{self._name} ended after {self._position} of {self._size} bytes")
        except StoreError:
            self._parts = None
            raise
        return memoryview(part or b"")

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            self._parts = self._start()
        position = offset + (0, self._position, self._size or 0)[whence]
        if position != self._position:
            self._position, self._parts, self._rest = position, None, memoryview(b"")
        return position

    def tell(self) -> int:
        return self._position

    def _start(self) -> Iterator[Any]:
        options: Any = {"range": {"offset": self._position}} if self._position else {}
        with self._place.saying("get", self._name):
            found = obstore.get(object_store(self._place.uri), self._name, options=options)
            self._size = found.meta["size"]
            return iter(found.stream(min_chunk_size=_BUFFER_BYTES))


class SharedObject:
    """One object of a store that several processes change by conditional puts. Each request is tried once, for ``seconds``.

    Raises StoreError if the store does not answer, or refuses.
    """

    def __init__(self, uri: str, name: str, seconds: float) -> None:
        self._place, self._name, self._seconds = StorePlace(uri), name, seconds

    def __str__(self) -> str:
        return f"{self._place.uri}/{self._name}"

    def read(self) -> tuple[bytes, str] | None:
        """Return the content and the tag of the object, of one moment; None if there is none."""
        with suppress(FileNotFoundError), self._place.saying("get", self._name):
            found = obstore.get(self._store(), self._name)
            return bytes(found.bytes()), found.meta["e_tag"] or ""
        return None

    def write(self, data: bytes, tag: str) -> str | None:
        """Write the object if it has ``tag``, empty: if there is none; return its new tag. None if it has another tag."""
        with self._place.saying("put", self._name):
            try:
                put = obstore.put(self._store(), self._name, data, mode={"e_tag": tag} if tag else "create")
                return put["e_tag"] or ""
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                return None

    def _store(self) -> ObjectStore:
        return object_store(self._place.uri, try_seconds=self._seconds)
