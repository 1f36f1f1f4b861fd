"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from spark_jobs.texts import counted, duration


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        *((0, "mark", "0 marks"), (1, "difference", "1 difference"), (2, "difference", "2 differences")),
        *((1, "batch", "1 batch"), (2, "batch", "2 batches"), (1_000, "touch", "1,000 touches"), (1, "closed day", "1 closed day")),
        *((2, "history", "2 histories"), (3, "closed day", "3 closed days")),
    ],
)
def test_a_number_with_its_noun(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((None, "-"), (0, "0.0 s"), (-251_606_474_273.8, "0.0 s"), (0.34, "0.3 s"), (59.9, "59.9 s"), (60, "1 min 0 s")),
        *((3_725, "1 h 2 min"), (90_000, "1 d 1 h"), (31_536_000, "1 y 0 d"), (251_606_474_273.8, "7,978 y 141 d")),
    ],
)
def test_a_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
