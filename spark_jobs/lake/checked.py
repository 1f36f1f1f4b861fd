"""Reads files of derived data with checks, so that damage is never read as data.

A sealed file is data and a footer: an XXH3 checksum of each block of the data, then words that the owner adds. The owner's manifest
has the checksum of the footer and one of itself. This detects a flipped bit, a zeroed page, a truncated file and a swapped file. A
block is checked at its first read while the file is open, so that a look-up checks only what it reads.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64, xxh3_64_hexdigest, xxh3_64_intdigest

BLOCK_BYTES = 4096
_PIECE_BYTES = 4 * 1024 * 1024  # a file is read in pieces of this size, so that memory does not grow with it

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]


class DamagedError(Exception):
    """A file contradicts its checksums. Its owner discards and rebuilds it."""


def seal(path: Path, extra: Words | None = None) -> str:
    """Append the footer, with ``extra`` in it, to a file that was just written. Returns the footer's checksum."""
    sums: list[int] = []
    with open(path, "r+b") as file:
        while piece := file.read(_PIECE_BYTES):
            with memoryview(piece) as view:
                sums += [xxh3_64_intdigest(view[start : start + BLOCK_BYTES]) for start in range(0, len(piece), BLOCK_BYTES)]
        footer = np.array(sums, dtype="<u8").tobytes() + (b"" if extra is None else extra.astype("<u8").tobytes())
        file.write(footer)
    return xxh3_64_hexdigest(footer)


class CheckedFile:
    """A sealed file, memory-mapped. ``data`` are its bytes without the footer; ``extra`` are the words that `seal` added."""

    def __init__(self, path: Path, size: int, checksum: str) -> None:
        """``size``: bytes of data, ``checksum``: what `seal` returned. Raises DamagedError, also if the file does not exist."""
        self.path = path
        try:
            with open(path, "rb") as file:
                if file.seek(0, 2) < size + 8 * _count(size):
                    raise DamagedError(f"{path} is cut short")
                file.seek(size)
                footer = file.read()
                if xxh3_64_hexdigest(footer) != checksum:
                    raise DamagedError(f"the checksums of {path} are damaged, or it is another file")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from error
        words = np.frombuffer(footer, dtype="<u8")
        self.size = size
        self.data = memoryview(self._map)[:size]
        self._sums, self.extra = words[: _count(size)], words[_count(size) :]
        self._is_checked = np.zeros(len(self._sums), dtype=bool)

    def check(self, starts: Ints, ends: Ints) -> None:
        """Check the blocks of each byte range [start, end), except those that were checked before. Raises DamagedError."""
        first, last = starts // BLOCK_BYTES, (ends - 1) // BLOCK_BYTES
        differs = np.ones(len(first), dtype=bool)  # many neighbouring ranges lie in the same blocks
        differs[1:] = (first[1:] != first[:-1]) | (last[1:] != last[:-1])
        first, last = first[differs], last[differs]
        counts = last - first + 1
        blocks = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        self._check(np.unique(blocks[~self._is_checked[blocks]]))

    def check_rest(self) -> None:
        """Check all blocks, except those that were checked before. Unmaps them as it goes. Raises DamagedError."""
        blocks = np.flatnonzero(~self._is_checked)
        for start in range(0, len(blocks), _PIECE_BYTES // BLOCK_BYTES):
            self._check(blocks[start : start + _PIECE_BYTES // BLOCK_BYTES])
            self.release()

    def _check(self, blocks: npt.NDArray[Any]) -> None:
        data, sums = self.data, self._sums[blocks].tolist()
        for number, checksum in zip(blocks.tolist(), sums, strict=True):
            start = number * BLOCK_BYTES
            if xxh3_64_intdigest(data[start : start + BLOCK_BYTES]) != checksum:
                raise DamagedError(f"{self.path} is damaged at byte {start}")
        self._is_checked[blocks] = True

    def prefetch(self, starts: Iterable[int], size: int) -> None:
        """Ask the system to read ``size`` bytes from each start, a multiple of BLOCK_BYTES, all at once."""
        for start in starts:
            self._map.madvise(mmap.MADV_WILLNEED, start, size)

    def release(self) -> None:
        """Unmap the pages, so that the memory of this process does not grow. They stay in the system's page cache."""
        if self.size:
            self._map.madvise(mmap.MADV_DONTNEED)


def file_checksum(path: Path | str) -> str:
    """Return the XXH3 checksum of a whole file."""
    with open(path, "rb", buffering=0) as file:
        return stream_checksum(file)


def stream_checksum(file: BinaryIO) -> str:
    """Return the XXH3 checksum of what is left to read of an open file."""
    hasher = xxh3_64()
    while part := file.read(_PIECE_BYTES):
        hasher.update(part)
    return hasher.hexdigest()


def _count(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return a manifest as JSON, including its checksum."""
    return json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read what `manifest_text` wrote. Returns None if the file does not exist. Raises DamagedError."""
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedError(f"{path} is damaged: {type(error).__name__}") from error


def parse_manifest(data: bytes, name: str) -> dict[str, Any]:
    """Parse what `manifest_text` returned; ``name`` is for messages. Raises DamagedError."""
    try:
        manifest = json.loads(data)
        checksum = manifest.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{name} is damaged: {type(error).__name__}") from error
    if checksum != _checksum(manifest):
        raise DamagedError(f"{name} contradicts its checksum")
    return dict(manifest)


def _checksum(manifest: dict[str, Any]) -> str:
    return xxh3_64_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def bisect(values: npt.NDArray[Any], left: Ints, right: Ints, wanted: npt.NDArray[Any], *, after: bool = False) -> Ints:
    """Find in each slice [left, right) of sorted ``values`` the first value not smaller (``after``: larger) than ``wanted``.

    Returns its place, or ``right`` if there is none.
    """
    left, right = left.copy(), right.copy()
    open_ = np.flatnonzero(left < right)
    while len(open_):
        middle = (left[open_] + right[open_]) // 2
        found, target = values[middle], wanted[open_]
        below = found <= target if after else found < target
        left[open_] = np.where(below, middle + 1, left[open_])
        right[open_] = np.where(below, right[open_], middle)
        open_ = open_[left[open_] < right[open_]]
    return left
