"""The checker of what readers saw: a prefix of the batches, never less than before."""

from __future__ import annotations

import pytest

from services.simulator.chaos.checks import Violation
from services.simulator.chaos.prefixes import Prefixes, Total

LEDGER = Prefixes([(3, 10), (2, 5), (0, 0), (4, 1)])


def test_each_reading_is_a_prefix_and_none_is_shorter_than_the_one_before() -> None:
    assert LEDGER.check("reader", [(0, 0), (3, 10), (3, 10), (5, 15), (9, 16)]) == [0, 1, 1, 2, 4]
    assert LEDGER.check("reader", []) == []
    assert Prefixes([]).check("reader", []) == []


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param((2, 5), id="a batch without the one before it"),
        pytest.param((6, 20), id="a batch twice"),
        pytest.param((5, 10), id="rows of a batch without its money"),
        pytest.param((9, 17), id="one too many"),
    ],
)
def test_a_wrong_total_is_refused(wrong: Total) -> None:
    with pytest.raises(Violation, match=r"reader saw .* in reading 1: no prefix of the committed batches gives it"):
        LEDGER.check("reader", [(3, 10), wrong])


def test_a_reader_that_goes_back_is_refused() -> None:
    with pytest.raises(Violation, match="went back behind batch 2"):
        LEDGER.check("reader", [(5, 15), (3, 10)])
