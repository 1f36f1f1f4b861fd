"""Batches of keys against a dict: first accepted wins, whatever the batches, and the history is all that counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jobs.ingest.dedupe.classify import Classification, Outcome, classify
from spark_jobs.ingest.dedupe.keys import Keys, Words

PROPERTY = settings(max_examples=200, deadline=None)

# (low, high) of an id and the fingerprint: few, so that ids meet again, halves agree and the ends of 64 bits occur
Record = tuple[int, int, int]
WORD = st.sampled_from([0, 1, 2**63, 2**64 - 1])
RECORD = st.tuples(WORD, WORD, st.sampled_from([0, 5, 2**64 - 1]))
BATCHES = st.lists(st.lists(RECORD, max_size=14), max_size=5)


def keys_of(batch: list[Record]) -> Keys:
    return Keys(*(np.array([record[at] for record in batch], dtype=np.uint64) for at in range(3)))


@dataclass
class History:
    """Accepted ids and their fingerprints in a dict. Checks that it is asked as promised: each id once, in order."""

    held: dict[tuple[int, int], int] = field(default_factory=dict)
    asked: int = 0

    def __call__(self, low: Words, high: Words) -> tuple[npt.NDArray[np.bool_], Words]:
        ids = list(zip(low.tolist(), high.tolist(), strict=True))
        assert ids == sorted(set(ids))
        self.asked += 1
        found = np.array([key in self.held for key in ids], dtype=bool)
        return found, np.array([self.held.get(key, 0) for key in ids], dtype=np.uint64)

    def add(self, batch: list[Record], made: Classification) -> None:
        for (low, high, fingerprint), outcome in zip(batch, made.outcome, strict=True):
            if outcome == Outcome.ACCEPTED:
                assert (low, high) not in self.held
                self.held[low, high] = fingerprint


def expected(batch: list[Record], held: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """The oracle: record by record. Adds what is accepted to ``held``."""
    made = []
    for low, high, fingerprint in batch:
        if (low, high) not in held:
            held[low, high] = fingerprint
            made.append((int(Outcome.ACCEPTED), fingerprint))
        else:
            holder = held[low, high]
            made.append((int(Outcome.DUPLICATE if holder == fingerprint else Outcome.CONFLICT), holder))
    return made


def as_pairs(made: Classification) -> list[tuple[Any, Any]]:
    return list(zip(made.outcome.tolist(), made.accepted_fingerprint.tolist(), strict=True))


@PROPERTY
@given(BATCHES)
def test_batches_in_sequence_give_what_a_dict_gives(batches: list[list[Record]]) -> None:
    history = History()
    held: dict[tuple[int, int], int] = {}
    for batch in batches:
        made = classify(keys_of(batch), history)
        assert made.outcome.dtype == np.int8
        assert made.accepted_fingerprint.dtype == np.uint64
        assert as_pairs(made) == expected(batch, held)
        history.add(batch, made)
    assert history.held == held


@PROPERTY
@given(BATCHES)
def test_where_batches_are_cut_changes_nothing(batches: list[list[Record]]) -> None:
    records = [record for batch in batches for record in batch]
    whole = classify(keys_of(records), History())
    history, parts = History(), []
    for batch in batches:
        made = classify(keys_of(batch), history)
        history.add(batch, made)
        parts += as_pairs(made)
    assert parts == as_pairs(whole)


@PROPERTY
@given(BATCHES)
def test_a_replay_accepts_nothing(batches: list[list[Record]]) -> None:
    history = History()
    first = []
    for batch in batches:
        made = classify(keys_of(batch), history)
        history.add(batch, made)
        first += made.outcome.tolist()
    records = [record for batch in batches for record in batch]
    again = classify(keys_of(records), history)
    turned = {Outcome.ACCEPTED: Outcome.DUPLICATE}
    assert again.outcome.tolist() == [turned.get(outcome, outcome) for outcome in first]
    assert again.accepted_fingerprint.tolist() == [history.held[low, high] for low, high, _ in records]


@pytest.mark.parametrize(
    ("batches", "outcomes", "holders"),
    [
        pytest.param([[(1, 1, 7), (1, 1, 7)]], [0, 1], [7, 7], id="resent within the batch"),
        pytest.param(
            [[(1, 1, 7), (1, 1, 8), (1, 1, 7), (1, 1, 9)]], [0, 2, 1, 2], [7] * 4, id="the first of the batch holds the id"
        ),
        pytest.param([[(1, 1, 7)], [(1, 1, 8), (1, 1, 8)], [(1, 1, 8)]], [0, 2, 2, 2], [7] * 4, id="a conflict never takes the id"),
        pytest.param([[(1, 1, 7)], [(1, 1, 7)], [(1, 1, 7)]], [0, 1, 1], [7] * 3, id="resent in later batches"),
        pytest.param([[(1, 1, 7), (1, 2, 7), (2, 1, 7)]], [0, 0, 0], [7] * 3, id="half of an id is no id"),
        pytest.param([[(2, 9, 7), (2, 1, 8), (2, 9, 8), (2, 1, 8)]], [0, 0, 2, 1], [7, 8, 7, 8], id="ids of one low half"),
        pytest.param([[(1, 1, 0)], [(1, 1, 0)], [(1, 1, 1)]], [0, 1, 2], [0] * 3, id="a fingerprint may be 0"),
        pytest.param([[], [(1, 1, 7)], []], [0], [7], id="empty batches"),
    ],
)
def test_case(batches: list[list[Record]], outcomes: list[int], holders: list[int]) -> None:
    history = History()
    made = []
    for batch in batches:
        classified = classify(keys_of(batch), history)
        history.add(batch, classified)
        made += as_pairs(classified)
    assert made == list(zip(outcomes, holders, strict=True))


def test_an_empty_batch_does_not_ask_the_history() -> None:
    history = History()
    assert as_pairs(classify(keys_of([]), history)) == []
    assert history.asked == 0


def test_outcomes_are_told_apart_by_zero() -> None:
    """The writers drop every row whose outcome is not zero."""
    assert [outcome.value for outcome in Outcome] == [0, 1, 2]
    assert not Outcome.ACCEPTED
