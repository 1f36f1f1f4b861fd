"""The look-up of the key index. What it shares with other indexes is tested in tests/spark_jobs/lake/test_runs.py."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from spark_jobs.ingest.dedupe import index as module
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys

Id = tuple[int, int]  # low, high
ENDS = (0, 1, 2**63, 2**64 - 1)


def keys_of(held: dict[Id, int]) -> Keys:
    rows = [(low, high, fingerprint) for (low, high), fingerprint in held.items()]
    return Keys(*(np.array([row[at] for row in rows], dtype=np.uint64) for at in range(3)))


def look_up(index: KeyIndex, ids: list[Id]) -> dict[Id, int]:
    """Those of ``ids`` that the index holds, with their fingerprints."""
    ids = sorted(set(ids))
    found, fingerprint = index.lookup(*(np.array([key[at] for key in ids], dtype=np.uint64) for at in range(2)))
    return {key: int(value) for key, hit, value in zip(ids, found, fingerprint, strict=True) if hit}


def test_ids_that_share_half_of_their_hash(tmp_path: Path) -> None:
    index = KeyIndex(tmp_path)
    index.reset("t")
    first = {(7, high): high + 1 for high in range(0, 40, 2)} | {(6, 2**64 - 1): 5, (8, 0): 6}
    second = {(7, high): high + 1 for high in range(1, 40, 4)}
    index.append(keys_of(first), 0)
    index.append(keys_of(second), 1)
    asked = [(low, high) for low in (6, 7, 8) for high in (*range(45), 2**64 - 1)]
    assert look_up(index, asked) == first | second
    assert look_up(index, [(7, 39)]) == {}
    assert look_up(index, [(5, 0), (9, 0)]) == {}


def test_order_of_the_appended_keys_does_not_matter(tmp_path: Path) -> None:
    held = {(low, high): low ^ high for low in ENDS for high in ENDS}
    rows = list(held.items())
    random.Random(1).shuffle(rows)
    index = KeyIndex(tmp_path)
    index.append(keys_of(dict(rows)), 0)
    assert look_up(index, list(held)) == held
    stored = np.fromfile(tmp_path / index.runs[0].name, dtype="<u8", count=3 * len(held)).reshape(3, -1)
    assert [(int(low), int(high)) for low, high in zip(stored[0], stored[1], strict=True)] == sorted(held)


def test_parts_are_the_keys_of_each_run_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MERGE_ROWS", 7)
    words = np.random.default_rng(3).integers(0, 2**64, (3, 60), dtype=np.uint64)
    index = KeyIndex(tmp_path)
    for version in range(6):
        index.append(Keys(*words[:, 10 * version : 10 * version + 10]), version)
    parts = [np.array([part.low, part.high, part.fingerprint]) for part in index.parts()]
    assert [part.shape[1] for part in parts] == [40, 10, 10]
    for part, expected in zip(parts, np.split(words, [40, 50], axis=1), strict=True):
        assert (part == expected[:, np.argsort(expected[0])]).all()
