"""Write files that survive a power cut: write a temporary file, sync it, rename it, and sync its folder.

A file's bytes are on the disk only after the file is synced; a new name or a rename only after its folder is synced. Use these
functions for every file that must last, and for every file whose content is trusted when it is read again. Paths are local: an
object store keeps what it has acknowledged.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_THREADS = 8  # a disk handles concurrent syncs faster than one after another
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
    """Sync folders that may be new, and all folders between them and ``root`` (inclusive), each once."""
    top = Path(root)
    wanted: set[Path] = {top}
    for folder in map(Path, folders):
        wanted.update((folder, *(parent for parent in folder.parents if parent.is_relative_to(top))))
    for folder in sorted(wanted, key=lambda one: len(one.parts), reverse=True):
        sync_folder(folder)


def scratch_folder() -> Path:
    """Return where this process may put temporary files: Spark names a place to its Python workers, and clears it."""
    return Path(os.environ.get("SPARK_LOCAL_DIRS", "").split(",")[0] or tempfile.gettempdir())


def make_folder(path: Path | str) -> Path:
    """Create a folder and its missing parents so that they survive a power cut. Returns it."""
    folder = Path(path)
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync_folder(one.parent)
    return folder


def write_file(path: Path | str, data: bytes) -> None:
    """Replace a file atomically: a reader, even after a power cut, sees either all old or all new bytes."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder; after the block, that file replaces ``path`` atomically.

    Creates the folder if it is missing. If the block raises, the temporary file is removed and ``path`` stays unchanged.
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
    """Rename a file or folder within a file system so that the rename survives a power cut. Sync its contents before."""
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
