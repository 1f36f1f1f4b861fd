"""The look-up of the key index. What it shares with other indexes is tested in tests/spark_jobs/lake/test_runs.py."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spark_jobs.ingest.dedupe import index as module
from spark_jobs.ingest.dedupe.filters import ARRAYS, FilterBuilder, words_of
from spark_jobs.ingest.dedupe.index import KeyCodec, KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.lake.checked import DamagedError
from spark_jobs.lake.runs import FANOUT, check_runs

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
    stored = np.fromfile(tmp_path / index.runs[0].name, dtype="<u8", count=3 * len(held)).reshape(-1, 3)
    assert [(int(low), int(high)) for low, high, _ in stored] == sorted(held)


def test_parts_are_the_keys_of_each_run_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MERGE_ROWS", 7)
    words = np.random.default_rng(3).integers(0, 2**64, (3, 60), dtype=np.uint64)
    index = KeyIndex(tmp_path)
    for version in range(6):
        index.append(Keys(*words[:, 10 * version : 10 * version + 10]), version)
    some = [np.array([part.low, part.high, part.fingerprint]) for part in index.parts()]
    assert [part.shape[1] for part in some] == [7, 7, 7, 7, 7, 5, 7, 3, 7, 3]
    parts = [np.concatenate(group, axis=1) for group in (some[:6], some[6:8], some[8:])]
    for part, expected in zip(parts, np.split(words, [40, 50], axis=1), strict=True):
        assert (part == expected[:, np.argsort(expected[0])]).all()


def drawn(rows: int, seed: int = 3) -> Keys:
    return Keys(*np.random.default_rng(seed).integers(0, 2**64, (3, rows), dtype=np.uint64))


def expect(index: KeyIndex, keys: Keys) -> None:
    """The index has these keys with their fingerprints, and none of as many others."""
    keys = keys.take(keys.order)
    found, fingerprint = index.lookup(keys.low, keys.high)
    assert found.all() and (fingerprint == keys.fingerprint).all()
    assert not index.lookup(keys.low, keys.high ^ np.uint64(1))[0].any()


@pytest.mark.parametrize("number", range(ARRAYS))
def test_a_damaged_filter_costs_time_and_no_key(tmp_path: Path, number: int) -> None:
    keys = drawn(3000)
    index = KeyIndex(tmp_path)
    index.rebuild("t", [keys], 0)
    path = tmp_path / index.runs[0].name
    data = bytearray(path.read_bytes())
    start = index.runs[0].size - 8 * words_of(3000) * (ARRAYS - number)
    data[start : start + 8 * words_of(3000)] = bytes(8 * words_of(3000))
    path.write_bytes(data)
    index = KeyIndex(tmp_path)
    if number:  # the first array shares a block with the last rows
        expect(index, keys)
    with pytest.raises(DamagedError):
        check_runs(tmp_path)
    with pytest.raises(DamagedError):
        index.append(drawn(1, 9), 1)
        for version in range(2, 2 + FANOUT):
            index.append(drawn(3000, version), version)


def test_a_filter_that_was_written_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksums hold. What finds it is the comparison of each key with the filter, which fsck makes."""
    add = FilterBuilder.add

    def forgetting(self: FilterBuilder, low: Any, high: Any) -> Any:
        return add(self, low[:-1], high[:-1])

    with monkeypatch.context() as patch:
        patch.setattr(FilterBuilder, "add", forgetting)
        KeyIndex(tmp_path).rebuild("t", [drawn(100)], 0)
    check_runs(tmp_path)
    with pytest.raises(DamagedError, match="denies a key"):
        list(KeyIndex(tmp_path).parts())


def test_a_batch_does_not_wait_for_a_large_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyCodec, "quick_merge_rows", 100)
    merge, started, allowed = KeyCodec.merge, threading.Event(), threading.Event()

    def waiting(self: KeyCodec, path: Path, runs: Any) -> Any:
        path.touch()
        started.set()
        allowed.wait(60)
        assert path.exists(), "no append took it for a file that a kill left behind"
        return merge(self, path, runs)

    monkeypatch.setattr(KeyCodec, "merge", waiting)
    index = KeyIndex(tmp_path)
    index.reset("t")
    parts = [drawn(50, version) for version in range(2 * FANOUT + 2)]
    for version, keys in enumerate(parts):  # these cannot end while a merge is waited for
        index.append(keys, version)
        assert index._merging is None or started.wait(60)
    assert len(index.runs) == len(parts)
    expect(index, Keys.concatenate(parts))
    expect(KeyIndex(tmp_path), Keys.concatenate(parts))  # killed here, nothing is missing
    allowed.set()
    assert index._merging is not None
    index._merging.task.result()
    index.finish_merges()
    assert len(index.runs) <= FANOUT
    assert index.can_cut(len(parts) - 2), "the newest batch may have to run again"
    for one in (index, KeyIndex(tmp_path)):
        expect(one, Keys.concatenate(parts))
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", *(run.name for run in index.runs)}


def test_a_merge_of_runs_that_are_cut_meanwhile_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches after a cut may hold other keys: what a thread has merged of the old ones must not come back."""
    monkeypatch.setattr(KeyCodec, "quick_merge_rows", 100)
    index = KeyIndex(tmp_path)
    index.reset("t")
    parts = [drawn(50, version) for version in range(FANOUT + 1)]
    for version, keys in enumerate(parts):
        index.append(keys, version)
    assert index._merging is not None
    index._merging.task.result()
    index.cut(FANOUT - 2)
    assert index.version == FANOUT - 2
    new = drawn(50, 99)
    index.append(new, FANOUT - 1)
    index.finish_merges()
    for one in (index, KeyIndex(tmp_path)):
        expect(one, Keys.concatenate([*parts[: FANOUT - 1], new]))
        for old in parts[FANOUT - 1 :]:
            assert not look_up(one, list(zip(old.low.tolist(), old.high.tolist(), strict=True)))
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", *(run.name for run in index.runs)}


def test_damage_that_a_thread_finds_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyCodec, "quick_merge_rows", 100)
    index = KeyIndex(tmp_path)
    index.reset("t")
    for version in range(FANOUT):
        index.append(drawn(300, version), version)
    path = tmp_path / index.runs[1].name
    data = bytearray(path.read_bytes())
    data[4100] ^= 4
    path.write_bytes(data)
    index = KeyIndex(tmp_path)
    index.append(drawn(300, 50), FANOUT)
    with pytest.raises(DamagedError, match="damaged at byte 4096"):
        index.finish_merges()


def test_a_rebuild_leaves_few_runs(tmp_path: Path) -> None:
    index = KeyIndex(tmp_path)
    parts = [drawn(2000, seed) for seed in range(40)]
    index.rebuild("t", iter(parts), 5, "commit")
    assert len(index.runs) <= 2 * FANOUT
    expect(KeyIndex(tmp_path), Keys.concatenate(parts))
