"""Lines of a landing file, read by byte range, plain or gzip, whatever is in them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from spark_jobs.ingest.contract.spec import MAX_RAW_BYTES
from spark_jobs.ingest.files.landing import open_regular
from spark_jobs.ingest.quarantine import GZIP_BOMB, QuarantineLimits

BLOCK_BYTES = 16 * 1024 * 1024
MOST_LINES = 128 * 1024  # of a chunk: a block of line feeds has sixteen million lines
_GZIP_READ_BYTES = 16 * 1024  # small: with each member that ends, zlib copies what it did not need


@dataclass(frozen=True)
class Lines:
    """Consecutive lines: ``ends[i]`` is the offset in ``data`` just behind line i, its line feed included.

    ``first`` is the number (from 0) of the first line within the split. Only the last line may lack its line feed. ``numbers`` are
    those of the lines (ascending, as int64) where they have gaps, as offsets of a topic have.
    """

    data: bytes
    ends: npt.NDArray[np.int64]
    first: int
    numbers: npt.NDArray[np.int64] | None = None

    def number(self, index: int) -> int:
        """The number of line ``index`` of this chunk within the split."""
        return self.first + index if self.numbers is None else int(self.numbers[index])

    def find(self, wanted: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """(number, index) of those of the lines ``wanted`` (ascending numbers) that are in this chunk."""
        if self.numbers is None:
            here = wanted[(wanted >= self.first) & (wanted < self.first + len(self.ends))]
            return [(number, number - self.first) for number in here.tolist()]
        found = np.flatnonzero(np.isin(self.numbers, wanted))
        return list(zip(self.numbers[found].tolist(), found.tolist(), strict=True))

    @property
    def terminated(self) -> bool:
        """Whether the last line has its line feed."""
        return self.data.endswith(b"\n")

    def raw(self, index: int) -> bytes:
        """Line ``index`` of this chunk without its line feed."""
        start = int(self.ends[index - 1]) if index else 0
        line = self.data[start : int(self.ends[index])]
        return line[:-1] if line.endswith(b"\n") else line


@dataclass(frozen=True)
class LongLine:
    """A line too long to keep in memory: its first bytes and its size in bytes."""

    head: bytes
    size: int
    number: int


@dataclass(frozen=True)
class FileFault:
    """The file ends wrongly or cannot be read. ``rest`` is what stood behind the last whole line, on line ``number``.

    ``nothing_read`` says that not one line came before: the whole file is unreadable.
    """

    reason: str
    rest: bytes
    number: int
    nothing_read: bool


class _Fault(Exception):
    pass


def _until_wrong(state: zlib._Decompress, chunk: bytes) -> bytes:
    """What can be made of ``chunk`` before the byte at which it is wrong.

    A call of zlib's that raises loses the output that it has made. So each call here takes one byte of input and returns one
    byte of output, and the first calls take out what ``state`` still has. The result is the same whatever the earlier reads were.
    """
    made = []
    try:
        for given in (b"", *(chunk[at : at + 1] for at in range(len(chunk)))):
            while (data := state.decompress(given, 1)) or state.unconsumed_tail:
                made.append(data)
                given = state.unconsumed_tail
    except zlib.error:
        pass
    return b"".join(made)


def _unpacked(handle: BinaryIO, limits: QuarantineLimits | None) -> Iterator[bytes]:
    """What a gzip file holds, in pieces; raises _Fault(reason) where it is wrong."""
    state = zlib.decompressobj(31)
    room = max(1, BLOCK_BYTES // 16)
    stored = unpacked = 0
    while piece := handle.read(_GZIP_READ_BYTES):
        stored += len(piece)
        is_full = False
        while piece or is_full:
            if state.eof:
                piece = piece.lstrip(b"\0")
                if not piece:
                    break
                state = zlib.decompressobj(31)
            before = state.copy()
            try:
                data = state.decompress(piece, room)
            except zlib.error:
                if data := _until_wrong(before, piece):
                    yield data
                raise _Fault("corrupt_gzip") from None
            if data:
                yield data
            unpacked += len(data)
            if limits and unpacked > max(limits.unpacked_bytes, limits.gzip_ratio * stored):
                raise _Fault(GZIP_BOMB)
            is_full = len(data) == room and not state.eof  # zlib may hold back what there was no room for
            piece = state.unused_data if state.eof else state.unconsumed_tail
    if not state.eof:
        raise _Fault("truncated_gzip" if stored else "empty_gzip")


def _gzip_reader(handle: BinaryIO, limits: QuarantineLimits | None) -> Callable[[], bytes]:
    """A function that returns the next block of what is unpacked, b"" at a proper end; raises _Fault(reason) at a wrong one.

    Blocks are filled: a file may consist of a million members of a few bytes each.
    """
    pieces = _unpacked(handle, limits)
    fault: Exception | None = None

    def read() -> bytes:
        nonlocal fault
        made: list[bytes] = []
        size = 0
        try:
            while fault is None and size < BLOCK_BYTES and (data := next(pieces, b"")):
                made.append(data)
                size += len(data)
        except (_Fault, OSError) as error:
            fault = error
        if fault is not None and not size:
            raise fault
        return b"".join(made)

    return read


def _line_ends(data: bytes) -> npt.NDArray[np.int64]:
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 10).astype(np.int64) + 1
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    return ends


def _cut(data: bytes, first: int) -> Iterator[Lines]:
    """Whole lines in chunks of at most MOST_LINES lines; ``first`` is the number of the first line."""
    if data.count(b"\n") < MOST_LINES:
        yield Lines(data, _line_ends(data), first)
        return
    at = 0
    while at < len(data):  # a piece of MOST_LINES bytes has no more lines than that
        cut = data.rfind(b"\n", at, at + MOST_LINES) + 1 or data.find(b"\n", at + MOST_LINES) + 1 or len(data)
        piece = data[at:cut]
        lines = Lines(piece, _line_ends(piece), first)
        yield lines
        first += len(lines.ends)
        at = cut


def read_lines(
    path: str | Path, start: int = 0, end: int | None = None, limits: QuarantineLimits | None = None
) -> Iterator[Lines | LongLine | FileFault]:
    """The lines that begin in bytes [start, end) of a plain file, or all lines of a gzip file (name ends in .gz).

    Memory is bounded by BLOCK_BYTES plus MAX_RAW_BYTES whatever the file holds. With ``limits`` a gzip file ends in a fault
    GZIP_BOMB where it unpacks to more than they allow.
    """
    try:
        with open_regular(path) as handle:
            if str(path).endswith(".gz"):
                yield from _chunks(_gzip_reader(handle, limits), 0, None)
                return
            position = start
            if start:
                handle.seek(start - 1)
                position = start - 1
                while True:
                    block = handle.read(MAX_RAW_BYTES)
                    found = block.find(b"\n")
                    if found >= 0:
                        position += found + 1
                        break
                    position += len(block)
                    if not block or (end is not None and position >= end):
                        return
                handle.seek(position)
            if end is None or position < end:
                yield from _chunks(lambda: handle.read(BLOCK_BYTES), position, end)
    except OSError:
        yield FileFault("unreadable_file", b"", 0, nothing_read=True)


def _chunks(read: Callable[[], bytes], position: int, end: int | None) -> Iterator[Lines | LongLine | FileFault]:
    number = 0
    rest = b""
    long_head = b""
    long_size = 0  # > 0: within a line that is too long to keep
    while True:
        try:
            block = read()
        except (_Fault, OSError) as fault:
            reason = str(fault) if isinstance(fault, _Fault) else "unreadable_file"
            left = long_head or rest
            yield FileFault(reason, left, number, nothing_read=number == 0 and not left)
            return
        if long_size:
            found = block.find(b"\n")
            long_size += found if found >= 0 else len(block)
            if found < 0 and block:
                position += len(block)
                continue
            yield LongLine(long_head, long_size, number)
            number += 1
            long_head, long_size = b"", 0
            position += found + 1
            block = block[found + 1 :] if found >= 0 else b""
            if end is not None and position >= end:
                return
            if not block and found < 0:
                return
            if not block:
                continue
        data = rest + block
        if not block:
            if rest:
                yield from _cut(rest, number)
            return
        cut = len(data)
        last = False
        if end is not None and position + len(data) >= end:
            found = data.find(b"\n", max(0, end - 1 - position))
            if found >= 0:
                cut, last = found + 1, True
        if not last:
            cut = data.rfind(b"\n") + 1
        if cut:
            for lines in _cut(data[:cut], number):
                yield lines
                number += len(lines.ends)
            position += cut
        if last:
            return
        rest = data[cut:]
        if len(rest) > MAX_RAW_BYTES:
            long_head, long_size, rest = rest[:MAX_RAW_BYTES], len(rest), b""
            position += long_size
