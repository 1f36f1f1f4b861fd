"""The key index of a cluster: executors of this process and a real store. `tests/services/test_cluster.py` has the cluster."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lake
import numpy as np
import pytest
from local import LocalEvents
from store import MachineLost

from benchmarks.in_process import LocalExecutor
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import ConservationError, LeaseLostError
from spark_jobs.ingest.copying import open_key_index
from spark_jobs.ingest.dedupe import shards
from spark_jobs.ingest.dedupe.classify import Outcome, accepted_keys, classify
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.dedupe.shards import SHARDS, ShardedIndex, ShardedKeys, ShardOutcome, blocks_of
from spark_jobs.ingest.job import Scattered
from spark_jobs.lake.places import StorePlace, state_copies
from spark_jobs.lake.runs import MANIFEST
from spark_jobs.lake.runs_copy import copied_version
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.fsck import fsck

CLUSTER = "spark://master:7077"


@pytest.fixture(autouse=True)
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which an executor keeps its copies."""
    folder = tmp_path / "executor"
    folder.mkdir()
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(folder))
    return folder / "adtally"


@pytest.fixture
def place(prefix: str) -> StorePlace:
    return StorePlace(f"{prefix}/index")


def scattered(splits: list[Keys]) -> tuple[Scattered, dict[int, int]]:
    """Keys as the tasks that stage splits leave them. Split 7 was set aside after it was read: it does not count."""
    staged = [*enumerate(splits), (7, drawn(50, 99))]
    values = LocalExecutor().scatter(
        lambda some: (pair for split, keys in some for pair in blocks_of(split, keys)), staged, 1, SHARDS
    )
    return values, {number: len(keys) for number, keys in enumerate(splits) if len(keys)}


def drawn(count: int, seed: int, ids: int = 3_000) -> Keys:
    """Records of few ids, some of them with another payload than the others of their id."""
    generator = np.random.default_rng(seed)
    pool = np.random.default_rng(0).integers(0, 2**64, (2, ids), dtype=np.uint64)
    chosen = generator.integers(0, ids, count)
    return Keys(pool[0][chosen], pool[1][chosen], chosen.astype(np.uint64) + (generator.random(count) < 0.1))


@pytest.mark.parametrize("loses", ["nothing", "the executor", "the driver"])
def test_records_are_classified_as_on_one_machine(
    loses: str, place: StorePlace, executor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SMALL_MERGE_ROWS", 0)  # here all merges are large
    local, index = KeyIndex(tmp_path / "local"), ShardedIndex(place)
    local.reset("t")
    index.rebuild("t", [], 0)
    outcomes: set[int] = set()
    merged = []
    for version in range(1, 9):
        splits = [drawn(count, 10 * version + at) for at, count in enumerate((90, 0, 41))]
        keys = Keys.concatenate(splits)
        expected = classify(keys, local.lookup)
        made, new = index.classify(*scattered(splits))
        assert made.outcome.tolist() == expected.outcome.tolist()
        conflicts = made.outcome == Outcome.CONFLICT
        assert made.accepted_fingerprint[conflicts].tolist() == expected.accepted_fingerprint[conflicts].tolist()
        accepted = accepted_keys(keys, expected)
        assert len(new) == len(accepted)
        assert new.are(accepted)
        assert not new.are(replace(accepted, fingerprint=accepted.fingerprint + np.uint64(1)))
        merged.append([at for at, runs in enumerate(new.shards) if runs[: len(index.shards[at])] != index.shards[at]])
        local.append(accepted, version)
        index.append(new, version, f"commit {version}")
        outcomes |= set(made.outcome.tolist())
        if loses == "the executor":
            shutil.rmtree(executor)
        elif loses == "the driver":
            index = ShardedIndex(place)
        assert (index.table_id, index.version, index.commit) == ("t", version, f"commit {version}")
    assert outcomes == {0, 1, 2}
    assert [found for found in merged if found] == [[4], [5], [6], [7]]  # of a batch one shard, and each in its turn
    names = {run.name for runs in index.shards for run in runs} | {MANIFEST}
    assert {found.name for found in place.list()} == names
    assert sum(len(keys) for keys in index.parts(tmp_path)) == local.rows


def test_what_no_manifest_names_counts_for_nothing_and_is_deleted(place: StorePlace) -> None:
    index = ShardedIndex(place)
    index.rebuild("t", [drawn(200, 1)], 0)
    first, lost = index.classify(*scattered([drawn(200, 2)]))
    second, new = index.classify(*scattered([drawn(200, 2)]))  # the batch failed, and runs again
    assert first.outcome.tolist() == second.outcome.tolist()
    assert lost.are(accepted_keys(drawn(200, 2), second))
    left = {run.name for runs in lost.shards for run in runs} - {run.name for runs in new.shards for run in runs}
    assert left
    index.append(new, 1)
    assert not left & {found.name for found in place.list()}
    _, lost = index.classify(*scattered([drawn(200, 3)]))
    index = ShardedIndex(place)  # of another driver, which does not know these files
    index.append(Keys.concatenate([]), 2)
    assert {found.name for found in place.list()} == {run.name for runs in new.shards for run in runs} | {MANIFEST}


def test_a_driver_that_was_taken_over_replaces_nothing(place: StorePlace) -> None:
    stopped = ShardedIndex(place)
    stopped.rebuild("t", [drawn(200, 1)], 0)
    _, new = stopped.classify(*scattered([drawn(100, 2)]))
    taking_over = ShardedIndex(place)
    taking_over.append(drawn(10, 4), 1)
    with pytest.raises(LeaseLostError, match="another machine has replaced"):
        stopped.append(new, 1)
    assert ShardedIndex(place).shards == taking_over.shards


def test_a_shard_that_loses_a_record_ends_the_batch(place: StorePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shards.classify_shard

    def without_one(number: int, blocks: Any, work: shards.ShardWork) -> ShardOutcome:
        return whole(number, list(blocks)[: -1 if number == 3 else None], work)

    monkeypatch.setattr(shards, "classify_shard", without_one)
    index = ShardedIndex(place)
    index.rebuild("t", [], 0)
    with pytest.raises(ConservationError, match="valid records, but the shards of the key index classified"):
        index.classify(*scattered([drawn(200, 2)]))


# --- a home


@pytest.fixture
def machine(prefix: str, tmp_path: Path) -> Callable[[], Settings]:
    """Settings of a machine on one lakehouse in the store."""
    return lambda: load_settings(home=tmp_path / "home", lakehouse=f"{prefix}/lakehouse")


def on_cluster(settings: Settings, notices: list[str]) -> LocalEvents:
    """The stream of events of a new driver. Its tasks run here."""
    job = LocalEvents(settings)
    job._notice = notices.append
    index, copy = open_key_index(settings, CLUSTER)
    assert copy is not None
    job.index = index
    return job


FILES = [
    [lake.event(f"e{number}") for number in range(60)],
    [*(lake.event(f"e{number}", received_at="2025-06-02T10:00:09Z") for number in range(40, 90)), lake.event("e3", user_id="u-2")],
    [{"event_id": "no time"}, lake.event("e70", user_id="u-3"), *(lake.event(f"f{number}") for number in range(30))],
]


def take_all(job: LocalEvents) -> None:
    for name, file in enumerate(FILES):
        job.take_landed([lake.land(job.settings, f"events/eu-west/{name}.jsonl", file)])


def test_tables_are_as_on_one_machine(machine: Callable[[], Settings], tmp_path: Path) -> None:
    alone, many = load_settings(home=tmp_path / "alone"), machine()
    for settings in (alone, many):
        lake.campaigns(settings)
        ensure_tables(settings)
    take_all(LocalEvents(alone))
    notices: list[str] = []
    take_all(on_cluster(many, notices))
    assert notices == []
    assert lake.everything(None, many) == lake.everything(None, alone)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_driver_lost_when_it_names_the_new_keys(
    moment: str, machine: Callable[[], Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = machine()
    ensure_tables(settings)
    notices: list[str] = []
    whole = ShardedIndex.append

    def lost(index: ShardedIndex, keys: Keys | ShardedKeys, version: int, commit: str = "") -> None:
        if moment == "after":
            whole(index, keys, version, commit)
        raise MachineLost

    job = on_cluster(settings, notices)
    job.take(FILES[0])
    with monkeypatch.context() as patch, pytest.raises(MachineLost):
        patch.setattr(ShardedIndex, "append", lost)
        job.take(FILES[1])
    again = on_cluster(settings, notices)
    again._files.paths = job._files.paths
    again.run_batch(1, LocalExecutor())
    report = again._reports[-1]
    assert (report.accepted, report.duplicate, report.conflict) == (30, 20, 1)
    job = on_cluster(settings, notices)
    job._reports += again._reports * 2
    report = job.take([*FILES[1], lake.event("new")])
    assert (report.accepted, report.duplicate, report.conflict) == (1, 50, 1)
    assert notices == []


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:64] = bytes(64)
    path.write_bytes(data)


def test_a_damaged_copy_of_an_executor_is_fetched_again(machine: Callable[[], Settings], executor: Path) -> None:
    settings = machine()
    ensure_tables(settings)
    notices: list[str] = []
    job = on_cluster(settings, notices)
    job.take(FILES[0])
    for path in executor.rglob("run-*"):
        damaged(path)
    report = job.take(FILES[1])
    assert (report.accepted, report.duplicate, report.conflict) == (30, 20, 1)
    assert notices == []


@pytest.mark.parametrize("loss", ["damaged", "missing"])
def test_an_index_that_is_damaged_in_the_store_lets_nothing_count_twice(
    loss: str, machine: Callable[[], Settings], executor: Path
) -> None:
    settings = machine()
    ensure_tables(settings)
    notices: list[str] = []
    job = on_cluster(settings, notices)
    job.take(FILES[0])
    lose_runs(index_of(job), loss)
    shutil.rmtree(executor)
    report = job.take(FILES[1])
    assert (report.accepted, report.duplicate, report.conflict) == (30, 20, 1)
    assert len(notices) == 1 and "the key index is rebuilt" in notices[0]
    report = job.take(FILES[1])
    assert (report.accepted, report.duplicate, report.conflict, len(notices)) == (0, 50, 1, 1)


def lose_runs(index: ShardedIndex, loss: str) -> None:
    """Damage or delete all runs in the store."""
    for name in [found.name for found in index.place.list() if found.name != MANIFEST]:
        if loss == "missing":
            index.place.delete([name])
        else:
            data = bytearray(index.place.read(name))
            data[:64] = bytes(64)
            index.place.write(name, bytes(data))


def test_fsck_compares_the_shards_with_the_table(machine: Callable[[], Settings]) -> None:
    settings = machine()
    ensure_tables(settings)
    job = on_cluster(settings, [])
    job.take(FILES[0])
    assert fsck(settings).findings == []
    index = index_of(job)
    for loss in ("damaged", "missing", "a key"):
        if loss == "a key":
            index.rebuild(str(index.table_id), [next(index.parts(settings.home_path))], index.version, index.commit)
        else:
            lose_runs(index, loss)
        assert [(found.kind, found.place) for found in fsck(settings).findings] == [("key_index", "key_index")]
        assert [found.is_repaired for found in fsck(settings, repair=True).findings] == [True]
        assert fsck(settings).findings == []
        index = ShardedIndex(index.place)
    assert not settings.key_index_path.exists()


def index_of(job: LocalEvents) -> ShardedIndex:
    assert isinstance(job.index, ShardedIndex)
    return job.index


def test_a_cluster_and_one_machine_take_turns(machine: Callable[[], Settings]) -> None:
    settings = machine()
    ensure_tables(settings)
    notices: list[str] = []
    expected = [(60, 0, 0), (30, 20, 1), (30, 0, 1), (1, 0, 0)]
    numbers: Iterator[int] = iter(range(4))

    def take(job: LocalEvents, file: list[dict[str, Any]]) -> None:
        job._reports += [None] * (number := next(numbers))  # type: ignore[list-item]
        report = job.take(file)
        assert (report.accepted, report.duplicate, report.conflict) == expected[number]

    def alone() -> tuple[LocalEvents, Callable[[], None]]:
        job = LocalEvents(settings)
        index, copy = open_key_index(settings, "local[*]")
        assert copy is not None
        job.index = index
        return job, copy

    take(on_cluster(settings, notices), FILES[0])
    job, copy = alone()
    take(job, FILES[1])
    copy()
    version = job.index.version
    assert copied_version(settings, settings.key_index_path) == version  # vacuum keeps what it lacks
    take(on_cluster(settings, notices), FILES[2])
    assert not settings.key_index_path.exists()
    job, copy = alone()
    take(job, [lake.event("last")])
    copy()
    place = state_copies(settings, "key_index")
    assert place is not None
    assert {found.name for found in place.list()} == {path.name for path in settings.key_index_path.iterdir()}
    assert notices == []


def test_keys_of_a_shard_are_all_in_its_task() -> None:
    keys = drawn(500, 5)
    found = dict(blocks_of(3, keys))
    assert sorted(np.concatenate([block.places for block in found.values()]).tolist()) == list(range(500))
    for number, block in found.items():
        assert set(shards.shards_of(block.keys).tolist()) == {number}
        assert np.array_equal(block.keys.low, keys.low[block.places])
