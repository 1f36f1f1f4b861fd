"""Files that survive a power cut: written beside, synced, renamed, and the folder that names them synced too.

A rename or a new name is on the disk only when its folder was synced; a file's bytes only when the file was. Every file that must
last, or that is believed when it is read again, is written by these functions. Paths are local: what an object store has answered
for, it keeps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_THREADS = 8  # the disk orders concurrent syncs better than one thread could
TEMPORARY_ENDING = ".tmp"


def sync_file(path: Path | str) -> None:
    """Write a file's bytes through to the disk. Raises FileNotFoundError if there is none."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path | str) -> None:
    """Write a folder's entries (new names, renames, removals) through to the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_files(paths: Iterable[Path | str]) -> None:
    """Write many files through to the disk, several at a time."""
    several = list(paths)
    if len(several) < 2:
        for path in several:
            sync_file(path)
        return
    with ThreadPoolExecutor(min(_THREADS, len(several)), thread_name_prefix="sync") as pool:
        list(pool.map(sync_file, several))


def sync_new_folders(folders: Iterable[Path | str], root: Path | str) -> None:
    """Sync folders and all folders between them and ``root`` (inclusive), each once. For folders that may be new themselves."""
    top = Path(root)
    wanted: set[Path] = {top}
    for folder in map(Path, folders):
        wanted.update((folder, *(parent for parent in folder.parents if parent.is_relative_to(top))))
    for folder in sorted(wanted, key=lambda one: len(one.parts), reverse=True):
        sync_folder(folder)


def make_folder(path: Path | str) -> Path:
    """Create a folder and its missing parents so that they survive a power cut. Returns it."""
    folder = Path(path)
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync_folder(one.parent)
    return folder


def write_file(path: Path | str, data: bytes) -> None:
    """Replace a file: whoever reads it, even after a power cut, sees the old bytes or the new ones, whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path in the same folder; what was written there becomes ``path``, as by ``write_file``.

    The folder is created if it is missing. If the block raises, the temporary file is removed and ``path`` stays as it was.
    """
    target = Path(path)
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY_ENDING}")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def replace(source: Path | str, target: Path | str) -> None:
    """Rename a file or folder within a file system so that the rename survives a power cut. Its contents must be synced already."""
    os.replace(source, target)
    sync_folder(Path(target).parent)
    if Path(source).parent != Path(target).parent:
        sync_folder(Path(source).parent)


def _sync(path: Path | str, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
