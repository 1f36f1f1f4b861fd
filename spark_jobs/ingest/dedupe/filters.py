"""The filter of a run of keys: it says of nearly every key that the run lacks that the run lacks it.

A filter is ARRAYS arrays of 64-bit words (blocked Bloom filters). A key sets a few bits in one word of each array. The place of the
word grows with the key's low half, so sorted keys walk through an array in order, and a sorted run makes its filter as it is
written. The bits come from the high half. A filter never denies a key of its run; it admits about one key in 20,000 of others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from spark_jobs.lake.checked import Ints, Words

ARRAYS = 3
_KEY_BITS = 10  # of an array, for each key
_CHUNK_ROWS = 32_768  # what is computed for so many keys stays in the processor's cache
_WORD_SHIFT = np.uint64(32)  # a place is computed from the upper half of ``low``, so that a product fits into 64 bits
_FACTORS = [np.uint64(odd) for odd in (1, 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)]  # give each array other bits of a key
_PAIRS = np.array([1 << (at & 63) | 1 << (at >> 6) for at in range(4096)], dtype=np.uint64)  # 12 bits -> a word with two bits set


def words_of(rows: int) -> int:
    """Return the words of one array of the filter of ``rows`` keys."""
    return rows * _KEY_BITS // 64 + 1


class Probe:
    """Keys to look up in many filters, sorted by ``low``. What does not depend on the filter is computed once."""

    def __init__(self, low: Words, high: Words) -> None:
        self.top = low >> _WORD_SHIFT
        self.high = high
        self._first = np.empty_like(high)
        for start in range(0, len(high), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            self._first[chunk] = _masks(high[chunk], 0)

    def __len__(self) -> int:
        return len(self.top)

    def candidates(self, arrays: npt.NDArray[np.uint64], check: Callable[[int, Ints], None]) -> Ints:
        """Return which keys pass a filter, ascending. Calls ``check`` with an array's number and places before it reads these."""
        found = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(self), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            places = _places(self.top[chunk], arrays.shape[1])
            check(0, places)
            found.append(np.flatnonzero(_passes(arrays[0], places, self._first[chunk])) + start)
        pending = np.concatenate(found)
        for number in range(1, len(arrays)):
            places = _places(self.top[pending], arrays.shape[1])
            check(number, places)
            pending = pending[_passes(arrays[number], places, _masks(self.high[pending], number))]
        return pending


class FilterBuilder:
    """Makes the filter of a run of ``rows`` keys, from its first key to its last."""

    def __init__(self, rows: int) -> None:
        self._words = words_of(rows)
        self._at = 0
        self._last = np.zeros((ARRAYS, 1), dtype=np.uint64)  # the words at place ``_at``, which more keys may change

    def add(self, low: Words, high: Words) -> tuple[int, Words]:
        """Add the next keys, sorted by ``low``. Returns finished words of each array, and the place of the first of them."""
        places = _places(low >> _WORD_SHIFT, self._words)
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        added = np.zeros((ARRAYS, int(places[-1]) - self._at + 1), dtype=np.uint64)
        for number in range(ARRAYS):
            added[number, places[starts] - self._at] = np.bitwise_or.reduceat(_masks(high, number), starts)
        return self._advance(added)

    def finish(self) -> tuple[int, Words]:
        """Return the words that are left, as `add` does."""
        return self._advance(np.zeros((ARRAYS, self._words - self._at + 1), dtype=np.uint64))

    def _advance(self, added: Words) -> tuple[int, Words]:
        added[:, :1] |= self._last
        at, self._at, self._last = self._at, self._at + added.shape[1] - 1, added[:, -1:].copy()
        return at, added[:, :-1]


def _places(top: Words, words: int) -> Ints:
    return (top * np.uint64(words) >> _WORD_SHIFT).view(np.int64)


def _masks(high: Words, number: int) -> Words:
    """Return a word with the bits that each key sets in an array: up to four."""
    mixed = high * _FACTORS[number]
    upper, lower = (mixed >> np.uint64(52)).view(np.int64), (mixed >> np.uint64(40)).view(np.int64) & 4095
    masks: Words = _PAIRS[upper] | _PAIRS[lower]
    return masks


def _passes(array: Words, places: Ints, masks: Words) -> npt.NDArray[np.bool_]:
    passes: npt.NDArray[np.bool_] = ~array.take(places) & masks == 0
    return passes
