"""Filters of runs: they deny no key of their run, whatever the keys and however they come, and nearly every other key."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jobs.ingest.dedupe import filters as module
from spark_jobs.ingest.dedupe.filters import ARRAYS, FilterBuilder, Probe, words_of
from spark_jobs.lake.checked import Ints, Words

WORDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]))


def built(low: Words, high: Words, cuts: list[int]) -> Words:
    """The filter of keys that come in parts, put together from what the builder returns."""
    builder = FilterBuilder(len(low))
    filled = np.zeros((ARRAYS, words_of(len(low))), dtype=np.uint64)
    expected = 0
    bounds = [0, *sorted(set(cuts) - {0, len(low)}), len(low)]
    made = [builder.add(low[a:b], high[a:b]) for a, b in pairwise(bounds) if a < b]
    for at, words in (*made, builder.finish()):
        assert at == expected, "each word is returned once, in order"
        filled[:, at : at + words.shape[1]] = words
        expected += words.shape[1]
    assert expected == words_of(len(low))
    return filled


def candidates(arrays: Words, low: Words, high: Words) -> Ints:
    asked: list[int] = []

    def check(number: int, places: Ints) -> None:
        assert (places < arrays.shape[1]).all()
        asked.append(number)

    found = Probe(low, high).candidates(arrays, check)
    assert set(asked) <= set(range(ARRAYS))
    return found


@given(keys=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=60, unique=True), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_no_key_of_the_run_is_denied(keys: list[tuple[int, int]], cuts: list[int]) -> None:
    low, high = np.array(sorted(keys), dtype=np.uint64).T.copy()
    made = built(low, high, [min(cut, len(keys)) for cut in cuts])
    assert (made == built(low, high, [])).all(), "the parts do not matter"
    assert candidates(made, low, high).tolist() == list(range(len(keys)))


@pytest.fixture(scope="module")
def words() -> npt.NDArray[np.uint64]:
    drawn = np.random.default_rng(4).integers(0, 2**64, (2, 400_000), dtype=np.uint64)
    return drawn[:, np.argsort(drawn[0])]


def test_few_other_keys_pass(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    run, others = words[:, ::2], words[:, 1::2]
    made = built(run[0], run[1], [70_000, 140_000])
    assert len(candidates(made, *run)) == run.shape[1]
    passing = [len(candidates(made[:number], *others)) / others.shape[1] for number in range(1, ARRAYS + 1)]
    assert passing[0] < 0.025 and passing[-1] < 1e-4, "the look-ups that are left at a billion keys depend on it"
    monkeypatch.setattr(module, "_CHUNK_ROWS", 1000)
    assert len(candidates(made, *run)) == run.shape[1]


def test_a_missing_bit_denies_a_key(words: Words) -> None:
    """Each bit that is set is needed, in each array: so a test of all keys finds any bit that is missing."""
    low, high = words[:, ::1000]
    made = built(low, high, [])
    for number in range(ARRAYS):
        for place in np.flatnonzero(made[number])[:20]:
            lacking = made.copy()
            lacking[number, place] &= lacking[number, place] - np.uint64(1)
            assert len(candidates(lacking, low, high)) < len(low)
