"""Shares small files that several machines write and read, such as the profiles of checked hours, through a remote lakehouse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from spark_jobs.config import Settings
from spark_jobs.lake.places import PlacedFile, StorePlace, state_copies

_THREADS = 16


@contextmanager
def shared_folder(settings: Settings, name: str) -> Iterator[None]:
    """Share ``HOME/<name>`` during the block: first bring what other machines wrote, at the end copy what the block wrote.

    The newer file of a name wins. A block that raises copies nothing. With a local lakehouse this does nothing.
    """
    place, folder = state_copies(settings, name), settings.home_path / name
    if place is None:
        yield
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="share") as pool:
        list(pool.map(lambda found: _bring(place, found, folder / found.name), place.list()))
        before = _times(folder)
        yield
        changed = [path for path, at in _times(folder).items() if before.get(path) != at]
        list(pool.map(lambda path: place.upload(path, path.relative_to(folder).as_posix()), changed))


def _bring(place: StorePlace, found: PlacedFile, path: Path) -> None:
    """Download a file, unless the local one is as new. A local file that was downloaded has the object's time."""
    if path.exists() and path.stat().st_mtime_ns >= found.modified_ns:
        return
    with suppress(FileNotFoundError):
        place.download(found.name, path)
        os.utime(path, ns=(found.modified_ns, found.modified_ns))


def _times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}
