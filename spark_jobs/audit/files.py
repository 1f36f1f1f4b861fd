"""Read a landing file: open it safely, unpack gzip as far as it goes, cut it into blocks of whole lines."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from spark_jobs.audit.contract import LONGEST_LINE
from spark_jobs.audit.decode import parse_block, rejected
from spark_jobs.audit.suppressed import NOBODY, State
from spark_jobs.lake.landing_view import landed_object

UNREADABLE = "unreadable_file"
READ_BYTES = 2 * 1024 * 1024  # the records of a block fit into the processor's cache
_STORED_BYTES = 16 * 1024  # of a gzip file, per read: zlib copies what a member leaves over when it ends


class _Broken(Exception):
    """A gzip file ends wrongly. The message is the reason."""


def _stored(handle: BinaryIO, size: int, on_read: Callable[[int], None]) -> Iterator[bytes]:
    while block := handle.read(size):
        on_read(len(block))
        yield block


def _unpack_before_fault(state: zlib._Decompress, stored: bytes) -> bytes:
    """Return what can be unpacked of ``stored`` before its first wrong byte, found by halving."""
    made = []
    while stored:
        half = stored[: (len(stored) + 1) // 2]
        before = state.copy()
        try:
            made.append(state.decompress(half))
            stored = stored[len(half) :]
        except zlib.error:
            if len(half) == 1:
                break
            state, stored = before, half
    return b"".join(made)


def _unpack(state: zlib._Decompress, stored: bytes) -> Iterator[bytes]:
    """Yield what ``stored`` adds to a gzip member, at most READ_BYTES at a time."""
    while True:
        before = state.copy()
        try:
            data = state.decompress(stored, READ_BYTES)
        except zlib.error:
            yield _unpack_before_fault(before, stored)
            raise _Broken("corrupt_gzip") from None
        if data:
            yield data
        stored = state.unconsumed_tail
        if state.eof or (not stored and len(data) < READ_BYTES):
            return


def _unpacked(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the content of a gzip file: members, with zeros between and after them. Raises _Broken where the file ends wrongly."""
    state = zlib.decompressobj(wbits=31)
    is_begun = False
    for block in blocks:
        left = block
        while left:
            if state.eof:
                left = left.lstrip(b"\0")
                if not left:
                    break
                state = zlib.decompressobj(wbits=31)
            is_begun = True
            yield from _unpack(state, left)
            left = state.unused_data
    if not is_begun:
        raise _Broken("empty_gzip")
    if not state.eof:
        raise _Broken("truncated_gzip")


def _open(location: str | Path) -> BinaryIO:
    """Open an object or a regular file. A pipe does not block. Raises OSError for anything else, including a symbolic link."""
    stored = landed_object(location)
    if stored is not None:
        return stored.open()
    path = Path(location)
    if path.parent.is_symlink():
        raise OSError(f"{path.parent} is a symbolic link")
    handle = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError(f"{path} is not a regular file")
    return handle


def _join_small(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join small pieces: a gzip file may have a million members of a few bytes each."""
    small: list[bytes] = []
    size = 0
    fault: _Broken | OSError | None = None
    try:
        for piece in pieces:
            if small and size + len(piece) > READ_BYTES // 2:
                yield b"".join(small)
                small, size = [], 0
            if len(piece) > READ_BYTES // 2:
                yield piece
            else:
                small.append(piece)
                size += len(piece)
    except (_Broken, OSError) as found:
        fault = found
    if small:
        yield b"".join(small)
    if fault is not None:
        raise fault


def parse_file(
    path: str | Path, stream: str, folder: str, on_read: Callable[[int], None], suppressed: State = NOBODY
) -> Iterator[pa.Table]:
    """Yield the records of a landing file, block by block. Calls ``on_read`` with the number of stored bytes of each read.

    Needs memory of a few times READ_BYTES, whatever the length of a line. Raises StoreError if a store does not answer.
    """
    line = 1  # the number of the next one
    rest = b""
    is_in_long_line = False
    try:
        with _open(path) as handle:
            is_packed = str(path).endswith(".gz")
            stored = _stored(handle, _STORED_BYTES if is_packed else READ_BYTES, on_read)
            for block in _join_small(_unpacked(stored)) if is_packed else stored:
                if is_in_long_line:
                    at = block.find(b"\n")
                    if at < 0:
                        continue
                    yield rejected("line_too_long", line, stream)
                    line, block, is_in_long_line = line + 1, block[at + 1 :], False
                data = rest + block
                cut = data.rfind(b"\n") + 1
                rest = data[cut:]
                if cut:
                    table = parse_block(data[:cut], line, stream, folder, suppressed)
                    line += table.num_rows
                    yield table
                if len(rest) > LONGEST_LINE:
                    rest, is_in_long_line = b"", True
    except (_Broken, OSError) as fault:
        nothing_read = line == 1 and not rest and not is_in_long_line
        yield rejected(str(fault) if isinstance(fault, _Broken) else UNREADABLE, 0 if nothing_read else line, stream)
        return
    if is_in_long_line:
        yield rejected("line_too_long", line, stream)
    elif rest:
        yield parse_block(rest, line, stream, folder, suppressed)
