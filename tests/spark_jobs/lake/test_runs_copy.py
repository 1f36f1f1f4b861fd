"""Copies of an index in a store: fetched by another machine, replaced by one machine at a time, and whole after any kill."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store import lost_after

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import LeaseLostError
from spark_jobs.ingest.copying import open_key_index
from spark_jobs.ingest.dedupe.index import KeyCodec, KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.lake.places import open_place, state_copies
from spark_jobs.lake.runs import check_runs
from spark_jobs.lake.runs_copy import RunsCopy, copied_version


@pytest.fixture
def machine(prefix: str, tmp_path: Path) -> Callable[[str], Settings]:
    return lambda name: load_settings(home=tmp_path / name, lakehouse=prefix, lease_seconds=2)


def opened(settings: Settings) -> RunsCopy:
    place = state_copies(settings, "key_index")
    assert place is not None
    return RunsCopy(place, settings.key_index_path, KeyCodec.shape)


def keys(*numbers: int) -> Keys:
    words = np.array(numbers, dtype=np.uint64)
    return Keys(words, words, words)


def grow(settings: Settings, *versions: int) -> KeyIndex:
    index = KeyIndex(settings.key_index_path)
    if index.table_id is None:
        index.reset("table")
    for version in versions:
        index.append(keys(*range(10 * version, 10 * version + 10)), version, f"commit {version}")
    return index


def test_a_local_lakehouse_has_no_copy(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    assert open_key_index(settings, "local[*]")[1] is None
    assert copied_version(settings, settings.key_index_path) is None


def test_another_machine_fetches_it(machine: Callable[[str], Settings]) -> None:
    one, two = machine("one"), machine("two")
    copy = opened(one)
    assert not copy.fetch()
    for version in range(7):  # with a merge
        grow(one, version)
        copy.update()
    assert copied_version(two, two.key_index_path) == 6
    other = opened(two)
    assert other.fetch()
    index = KeyIndex(two.key_index_path)
    assert (index.version, index.commit, index.rows) == (6, "commit 6", 70)
    check_runs(two.key_index_path)
    assert not other.fetch()  # it has it
    place = open_place(f"{two.state_uri}/key_index")
    assert {found.name for found in place.list()} == {path.name for path in two.key_index_path.iterdir()}  # no file of a merge
    grow(two, 7, 8)
    other.update()
    assert opened(one).fetch()
    assert KeyIndex(one.key_index_path).version == 8


def test_a_local_index_that_covers_more_is_kept(machine: Callable[[str], Settings]) -> None:
    one = machine("one")
    grow(one, 0)
    opened(one).update()
    grow(one, 1)
    assert not opened(one).fetch()
    assert KeyIndex(one.key_index_path).version == 1
    (one.key_index_path / "manifest.json").write_text("{}")  # damaged: the copy is better
    assert opened(one).fetch()
    assert KeyIndex(one.key_index_path).version == 0


def test_a_machine_that_was_taken_over_replaces_nothing(machine: Callable[[str], Settings]) -> None:
    one, two = machine("one"), machine("two")
    stopped, taking_over = opened(one), opened(two)
    grow(one, 0)
    stopped.update()
    taking_over.fetch()
    grow(two, 1)
    taking_over.update()
    grow(one, 1, 2)
    with pytest.raises(LeaseLostError, match="another machine has replaced"):
        stopped.update()
    fresh = machine("three")
    assert opened(fresh).fetch()
    assert KeyIndex(fresh.key_index_path).version == 1
    check_runs(fresh.key_index_path)


def test_a_damaged_copy_counts_as_none(machine: Callable[[str], Settings]) -> None:
    one, two = machine("one"), machine("two")
    grow(one, 0)
    opened(one).update()
    open_place(f"{one.state_uri}/key_index").write("manifest.json", b"{")
    assert not opened(two).fetch()
    assert KeyIndex(two.key_index_path).table_id is None


@pytest.mark.parametrize("requests", range(7))
def test_a_machine_lost_after_any_request(requests: int, machine: Callable[[str], Settings]) -> None:
    one, two = machine("one"), machine("two")
    copy = opened(one)
    with lost_after(requests, "upload", "create", "swap", "delete"):
        for version in range(7):
            grow(one, version)
            copy.update()
    shutil.rmtree(one.home_path)
    assert opened(two).fetch() == (requests >= 2)  # a file, then the manifest
    index = KeyIndex(two.key_index_path)
    assert index.problem is None
    assert index.rows == 10 * (index.version + 1)
    check_runs(two.key_index_path)
