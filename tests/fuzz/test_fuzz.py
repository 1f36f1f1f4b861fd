"""Each target of the fuzzer: its corpus, which has all that was ever found, and some changed inputs of a fixed seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.fuzz import check, run, run_for
from tests.fuzz.targets import CORPUS, TARGETS, Target


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str, tmp_path: Path) -> None:
    for path in TARGETS[name].corpus:
        check(TARGETS[name], path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_some_changed_inputs(name: str, tmp_path: Path) -> None:
    failure = run(TARGETS[name], tmp_path, examples=30, number=1)
    assert failure is None, failure


def test_each_folder_of_the_corpus_is_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} == set(TARGETS)


def test_a_fault_is_found_and_made_short(tmp_path: Path) -> None:
    def refuse_quotes(data: bytes, _: Path) -> None:
        assert b'"' not in data

    failure = run(Target("statement", refuse_quotes, (b'"',)), tmp_path, examples=200, number=1)
    assert failure is not None
    assert b'"' in failure.data
    ticks = iter(range(100))
    assert (
        run_for(Target("statement", lambda *_: None), tmp_path, minutes=0.05, number=1, clock=lambda: next(ticks), say=print)
        is None
    )
