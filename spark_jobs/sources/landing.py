"""Splits of landing files: what one task parses at a time.

Writers follow one protocol: write elsewhere, or under a name that starts with ``.`` or ``_``, on the same file system, then
rename into ``<landing>/<stream>/<region>/``. A file is read once, whole, after it appears under its final name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse


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


def follows_protocol(path: str, stream_folder: Path) -> bool:
    """Whether a file lies at ``<region>/<name>.jsonl[.gz]`` of its stream's folder, under no hidden name. Others are left alone."""
    try:
        parts = Path(path).relative_to(stream_folder).parts
    except ValueError:
        return False
    return len(parts) == 2 and parts[1].endswith((".jsonl", ".jsonl.gz")) and not any(part.startswith((".", "_")) for part in parts)


def region_folders(stream_folder: Path) -> list[str]:
    """What lies in the folder of a stream by name; not all of it need be regions."""
    return sorted(_names(stream_folder))


def oldest_file_ms(stream_folder: Path, region: str) -> int | None:
    """When the oldest file of a region was modified, in milliseconds since the epoch: it is read first. None: there is none."""
    found = []
    for path in _files(stream_folder, region):
        with contextlib.suppress(OSError):  # gone meanwhile
            found.append(path.stat().st_mtime_ns // 1_000_000)
    return min(found, default=None)


def _files(stream_folder: Path, region: str) -> Iterator[Path]:
    paths = (stream_folder / region / name for name in _names(stream_folder / region))
    return (path for path in paths if follows_protocol(str(path), stream_folder))


def _names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)
    except OSError:  # none, or a file
        return


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
