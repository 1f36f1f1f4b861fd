"""Read the lines of a landing file by byte range. The file may be plain or gzip, and its lines may hold any bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from spark_jobs.ingest.contract.spec import MAX_RAW_BYTES
from spark_jobs.ingest.files.landing import open_regular
from spark_jobs.ingest.quarantine import GZIP_BOMB, QuarantineLimits
from spark_jobs.lake.landing_view import landed_object

BLOCK_BYTES = 16 * 1024 * 1024
MOST_LINES = 128 * 1024  # of a chunk: a block of line feeds has sixteen million lines
_AT_ONCE = 8  # small objects: the store takes longer to answer than to send
_GZIP_READ_BYTES = 16 * 1024  # small: with each member that ends, zlib copies what it did not need


@dataclass(frozen=True)
class Lines:
    """Consecutive lines: ``ends[i]`` is the offset in ``data`` after line i and its line feed.

    ``first`` is the number (from 0) of the first line within the split. Only the last line may lack its line feed. ``numbers``
    (ascending) are the numbers of all lines if they have gaps, as offsets of a topic have.
    """

    data: bytes
    ends: npt.NDArray[np.int64]
    first: int
    numbers: npt.NDArray[np.int64] | None = None

    def number(self, index: int) -> int:
        """Return the number within the split of line ``index`` of this chunk."""
        return self.first + index if self.numbers is None else int(self.numbers[index])

    def find(self, wanted: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return (number, index) of the lines of this chunk whose numbers are in ``wanted`` (ascending)."""
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
        """Return line ``index`` of this chunk without its line feed."""
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].removesuffix(b"\n")


@dataclass(frozen=True)
class LongLine:
    """A line too long to keep in memory: its first bytes and its size in bytes."""

    head: bytes
    size: int
    number: int


@dataclass(frozen=True)
class FileFault:
    """The file ends wrongly or cannot be read. ``rest`` are the bytes after the last whole line, on line ``number``.

    With ``nothing_read`` there is no line before: the whole file is unreadable.
    """

    reason: str
    rest: bytes
    number: int
    nothing_read: bool


class Fault(Exception):
    """A gzip file ends wrongly; the message is the reason."""


def _until_wrong(state: zlib._Decompress, chunk: bytes) -> bytes:
    """Return what ``chunk`` unpacks to before its first wrong byte.

    A call of zlib that raises loses its output. So each call here takes one byte and returns one byte, and the first calls take
    out what ``state`` still has. The result does not depend on the sizes of the earlier reads.
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


def unpacked(handle: BinaryIO, limits: QuarantineLimits | None) -> Iterator[bytes]:
    """Yield the content of a gzip file in pieces. Raises Fault(reason) at the first wrong byte, after all that came before it."""
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
                raise Fault("corrupt_gzip") from None
            if data:
                yield data
            unpacked += len(data)
            if limits and unpacked > max(limits.unpacked_bytes, limits.gzip_ratio * stored):
                raise Fault(GZIP_BOMB)
            is_full = len(data) == room and not state.eof  # zlib may hold back what there was no room for
            piece = state.unused_data if state.eof else state.unconsumed_tail
    if not state.eof:
        raise Fault("truncated_gzip" if stored else "empty_gzip")


def _gzip_reader(handle: BinaryIO, limits: QuarantineLimits | None) -> Callable[[], bytes]:
    """Return a function that returns the next unpacked block, b"" at the end, and raises Fault(reason) at a wrong end.

    It fills each block, because a file may consist of a million members of a few bytes each.
    """
    pieces = unpacked(handle, limits)
    fault: Exception | None = None

    def read() -> bytes:
        nonlocal fault
        made: list[bytes] = []
        size = 0
        try:
            while fault is None and size < BLOCK_BYTES and (data := next(pieces, b"")):
                made.append(data)
                size += len(data)
        except (Fault, OSError) as error:
            fault = error
        if fault is not None and not size:
            raise fault
        return b"".join(made)

    return read


def _line_feeds(data: bytes) -> npt.NDArray[np.bool_]:
    is_line_feed: npt.NDArray[np.bool_] = np.frombuffer(data, dtype=np.uint8) == ord("\n")
    return is_line_feed


def _line_ends(data: bytes, line_feeds: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    ends = np.flatnonzero(line_feeds) + 1
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    return ends


def _cut(data: bytes, first: int) -> Iterator[Lines]:
    """Yield whole lines in chunks of at most MOST_LINES lines; ``first`` is the number of the first line."""
    line_feeds = _line_feeds(data)
    if np.count_nonzero(line_feeds) < MOST_LINES:
        yield Lines(data, _line_ends(data, line_feeds), first)
        return
    at = 0
    while at < len(data):  # a piece of MOST_LINES bytes has no more lines than that
        cut = data.rfind(b"\n", at, at + MOST_LINES) + 1 or data.find(b"\n", at + MOST_LINES) + 1 or len(data)
        piece = data[at:cut]
        lines = Lines(piece, _line_ends(piece, _line_feeds(piece)), first)
        yield lines
        first += len(lines.ends)
        at = cut


def read_whole(paths: Sequence[str]) -> Iterator[list[Lines | LongLine | FileFault]]:
    """Yield the lines of small plain files, a list a file. Of a store, reads several objects at a time."""
    if not any(map(landed_object, paths)):
        yield from (list(read_lines(path)) for path in paths)
        return
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="get") as pool:
        yield from pool.map(lambda path: list(read_lines(path)), paths)


def read_lines(
    path: str | Path, start: int = 0, end: int | None = None, limits: QuarantineLimits | None = None
) -> Iterator[Lines | LongLine | FileFault]:
    """Yield the lines that begin in bytes [start, end) of a plain file, or all lines of a gzip file (name ends in .gz).

    Memory is bounded by BLOCK_BYTES plus MAX_RAW_BYTES. A gzip file that unpacks to more than ``limits`` allow ends in a fault
    GZIP_BOMB. A file that is missing or cannot be read ends in a fault; a store that does not answer raises StoreError.
    """
    try:
        with open_regular(path) as handle:
            if str(path).endswith(".gz"):
                yield from _chunks(_gzip_reader(handle, limits), 0, None)
                return
            position = start
            if start:
                handle.seek(start - 1)
                piece, position = b"", start - 1
                while not piece.endswith(b"\n"):
                    piece = handle.readline(MAX_RAW_BYTES)
                    position += len(piece)
                    if not piece or (end is not None and position >= end):
                        return
            if end is None or position < end:
                yield from _chunks(lambda: handle.read(BLOCK_BYTES), position, end)
    except OSError:
        yield FileFault("unreadable_file", b"", 0, nothing_read=True)


def _chunks(read: Callable[[], bytes], position: int, end: int | None) -> Iterator[Lines | LongLine | FileFault]:
    number = 0
    rest = b""
    long_head = b""
    long_size = 0  # > 0: inside a line that is too long to keep
    while True:
        try:
            block = read()
        except (Fault, OSError) as fault:
            reason = str(fault) if isinstance(fault, Fault) else "unreadable_file"
            left = long_head or rest
            yield FileFault(reason, left, number, nothing_read=number == 0 and not left)
            return
        if long_size:
            head, line_feed, after = block.partition(b"\n")
            long_size += len(head)
            position += len(head) + len(line_feed)
            if head and not line_feed:
                continue
            yield LongLine(long_head, long_size, number)
            number += 1
            long_head, long_size, block = b"", 0, after
            if not line_feed or (end is not None and position >= end):
                return
            if not block:
                continue
        if not block:
            if rest:
                yield from _cut(rest, number)
            return
        cut = block.rfind(b"\n") + 1  # the rest has no line feed
        last = False
        start = position + len(rest)  # of the block
        if end is not None and start + len(block) >= end and (found := block.find(b"\n", max(0, end - 1 - start)) + 1):
            cut, last = found, True
        if cut:
            whole = b"".join((rest, memoryview(block)[:cut]))
            for lines in _cut(whole, number):
                yield lines
                number += len(lines.ends)
            position += len(whole)
        if last:
            return
        rest = block[cut:] if cut else rest + block
        if len(rest) > MAX_RAW_BYTES:
            long_head, long_size, rest = rest[:MAX_RAW_BYTES], len(rest), b""
            position += long_size
