"""Encodes columns as JSON lines, a block at a time: a field is a matrix of bytes padded with NUL, which is dropped at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
"""One row a line, padded with NUL."""
Integers = npt.NDArray[np.integer[Any]]

_DAY_US = 86_400_000_000
_ZERO = np.uint8(ord("0"))


def table(texts: Sequence[str]) -> Bytes:
    """Return a lookup table: row i has texts[i] in UTF-8."""
    encoded = [text.encode() for text in texts]
    width = max(1, max(len(text) for text in encoded))
    return np.frombuffer(b"".join(text.ljust(width, b"\0") for text in encoded), np.uint8).reshape(len(encoded), width)


_HEX_PAIRS = table([f"{value:02x}" for value in range(256)])
_SECONDS = table([f"{s // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d}" for s in range(86_400)])
_MILLIS = table([f"{value:03d}" for value in range(1000)])
_ZONES = table(["Z", "+02:00"])


def whole(values: Integers, *, width: int) -> Bytes:
    """Encode non-negative integers in decimal, with leading NULs in place of zeros."""
    result = np.empty((len(values), width), np.uint8)
    rest = values.astype(np.int64)
    for position in range(width - 1, -1, -1):
        higher = rest // 10
        digit = (rest - higher * 10).astype(np.uint8) + _ZERO
        result[:, position] = digit if position == width - 1 else np.where(rest > 0, digit, 0)
        rest = higher
    return result


def padded(values: Integers, *, width: int) -> Bytes:
    """Encode non-negative integers in decimal with leading zeros."""
    result = whole(values, width=width)
    result[result == 0] = _ZERO
    return result


def timestamps(us: Integers, digits: Integers, offset: npt.NDArray[np.bool_] | None = None) -> Bytes:
    """Encode microseconds since the epoch as RFC 3339 with ``digits`` digits of fraction; in UTC, or at +02:00 by ``offset``."""
    local = us if offset is None else us + np.where(offset, 7_200_000_000, 0)
    day = local // _DAY_US
    in_day = local - day * _DAY_US
    second = in_day // 1_000_000
    fraction = in_day - second * 1_000_000
    milli = fraction // 1000
    first_day = int(day.min()) if len(day) else 0
    span = int(day.max()) - first_day + 1 if len(day) else 1
    dates = table([f"{np.datetime64(first_day + number, 'D')}T" for number in range(span)])
    result = np.empty((len(us), 32), np.uint8)
    result[:, :11] = dates[day - first_day]
    result[:, 11:19] = _SECONDS[second]
    result[:, 19] = ord(".")
    result[:, 20:23] = _MILLIS[milli]
    result[:, 23:26] = _MILLIS[fraction - milli * 1000]
    result[:, 26:] = _ZONES[0 if offset is None else offset.astype(np.intp)]
    for position in range(6):
        result[digits <= position, 20 + position] = 0
    result[digits == 0, 19] = 0
    return result


def version_4(raw: Bytes) -> Bytes:
    """Return the bytes of the UUIDs that `uuids` writes for (n, 16) random bytes."""
    result = raw.copy()
    result[:, 6] = result[:, 6] & 0x0F | 0x40
    return result


def uuids(raw: Bytes) -> Bytes:
    """Encode (n, 16) random bytes as the text of version 4 UUIDs, 36 characters."""
    pairs = _HEX_PAIRS[raw].reshape(len(raw), 32)
    result = np.empty((len(raw), 36), np.uint8)
    for begin, end, at in ((0, 8, 0), (8, 12, 9), (12, 16, 14), (16, 20, 19), (20, 32, 24)):
        result[:, at : at + end - begin] = pairs[:, begin:end]
    result[:, [8, 13, 18, 23]] = ord("-")
    result[:, 14] = ord("4")
    return result


def where(mask: npt.NDArray[np.bool_], field: Bytes) -> Bytes:
    """Keep the field where the mask is true, and nothing elsewhere."""
    return field * mask[:, None]


def join(fields: Sequence[str | Bytes], rows: int) -> bytes:
    """Join constants and fields side by side, row after row."""
    blocks = [table([field]) if isinstance(field, str) else field for field in fields]
    ends = np.cumsum([block.shape[1] for block in blocks])
    matrix = np.empty((rows, int(ends[-1])), np.uint8)
    for block, end in zip(blocks, ends, strict=True):
        matrix[:, end - block.shape[1] : end] = block
    return bytes(matrix[matrix != 0])
