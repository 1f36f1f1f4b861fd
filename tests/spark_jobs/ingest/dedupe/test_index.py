"""The key index against a dict: whatever is appended, cut, merged, closed, lost or torn, it holds what it says it covers."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from spark_jobs.ingest.dedupe import index as module
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.lake.checked import DamagedError

Id = tuple[int, int]  # low, high
ENDS = (0, 1, 2**63, 2**64 - 1)


def keys_of(held: dict[Id, int]) -> Keys:
    rows = [(low, high, fingerprint) for (low, high), fingerprint in held.items()]
    return Keys(*(np.array([row[at] for row in rows], dtype=np.uint64) for at in range(3)))


def look_up(index: KeyIndex, ids: list[Id]) -> dict[Id, int]:
    """Those of ``ids`` that the index holds, with their fingerprints."""
    ids = sorted(set(ids))
    low, high = (np.array([key[at] for key in ids], dtype=np.uint64) for at in range(2))
    found, fingerprint = index.lookup(low, high)
    assert found.dtype == np.bool_ and fingerprint.dtype == np.uint64
    assert not fingerprint[~found].any()
    return {key: int(value) for key, hit, value in zip(ids, found, fingerprint, strict=True) if hit}


def many(count: int, start: int = 0) -> dict[Id, int]:
    """Keys that are spread out, as hashes are."""
    source = random.Random(start)
    return {(source.getrandbits(64), at): source.getrandbits(64) for at in range(start, start + count)}


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "key_index"


# few words, so that low halves agree; at the ends of 64 bits, so that a search goes wrong if it can
IDS = st.tuples(st.sampled_from([*ENDS, 7, 8]), st.sampled_from([*ENDS, *range(5, 25)]))
KEYS = st.dictionaries(IDS, st.integers(0, 2**64 - 1), max_size=10)


class IndexMachine(RuleBasedStateMachine):
    """Random work on an index; the model is what each version added."""

    FANOUT = 2
    MAX_RUN_ROWS = 12

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="adtally-index-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "FANOUT", self.FANOUT)
        self.patch.setattr(module, "MAX_RUN_ROWS", self.MAX_RUN_ROWS)
        self.patch.setattr(module, "MERGE_ROWS", 3)
        self.patch.setattr(module, "_tier", lambda rows: rows // 5)
        self.index = KeyIndex(self.folder / "index")
        self.table_id: str | None = None
        self.version = -1
        self.added: list[tuple[int, dict[Id, int]]] = []

    @property
    def held(self) -> dict[Id, int]:
        return {key: value for _, keys in self.added for key, value in keys.items()}

    @initialize(table_id=st.sampled_from(["t1", "t2"]))
    def begin(self, table_id: str) -> None:
        self.reset(table_id)

    @precondition(lambda self: self.version >= 5)
    @rule(table_id=st.sampled_from(["t1", "t2"]))
    def reset(self, table_id: str) -> None:
        self.index.reset(table_id)
        self.table_id, self.version, self.added = table_id, -1, []

    @rule(keys=KEYS, step=st.sampled_from([1, 1, 1, 1, 0, 3]))
    def append(self, keys: dict[Id, int], step: int) -> None:
        """The next version; at times several at once, or more of the same (a rebuild in groups)."""
        new = {key: value for key, value in keys.items() if key not in self.held}
        before, self.version = self.version, max(self.version + step, 0)
        self.index.append(keys_of(new), self.version)
        self.added.append((self.version, new))
        if step == 1:
            assert self.index.can_cut(before), "a batch that runs again forgets its own keys only"

    @rule(back=st.integers(0, 4))
    def cut(self, back: int) -> None:
        version = max(self.version - back, -1)
        if self.index.can_cut(version):
            self.index.cut(version)
            self.version = version
            self.added = [(number, keys) for number, keys in self.added if number <= version]

    @precondition(lambda self: self.version >= 0)  # a reset is not written down: what is read again covers nothing
    @rule()
    def reopen(self) -> None:
        self.index = KeyIndex(self.folder / "index")

    @invariant()
    def covers_what_it_says(self) -> None:
        assert (self.index.table_id, self.index.version) == (self.table_id, self.version)
        assert self.index.rows == len(self.held)

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        around = [(low, (high + step) % 2**64) for low, high in self.held for step in (-1, 0, 1)]
        asked = [*around, *((low, 6) for low in (*ENDS, 7, 8))]
        assert look_up(self.index, asked) == {key: self.held[key] for key in asked if key in self.held}

    @invariant()
    def runs_follow_one_another(self) -> None:
        runs = self.index.runs
        assert all(run.first <= run.last for run in runs)
        assert all(earlier.last <= later.first for earlier, later in pairwise(runs))
        assert all(run.rows <= max(self.MAX_RUN_ROWS, 10) for run in runs)  # 10: a batch's own run is as large as it is

    @invariant()
    def no_file_is_left_behind(self) -> None:
        if (self.folder / "index").exists():
            assert files_of(self.folder / "index") == {"manifest.json", *(run.file for run in self.index.runs)}

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder)


TestIndexMachine = IndexMachine.TestCase
QUICK = set(Phase) - {Phase.explain}  # a failure is found and shrunk in seconds; to explain it takes a minute
TestIndexMachine.settings = settings(max_examples=80, stateful_step_count=25, deadline=None, phases=QUICK)


def filled(folder: Path, versions: int = 4, rows: int = 20) -> dict[Id, int]:
    """An index of table t in ``folder``; returns what it holds."""
    index = KeyIndex(folder)
    index.reset("t")
    held: dict[Id, int] = {}
    for version in range(versions):
        new = many(rows, version * rows)
        index.append(keys_of(new), version)
        held |= new
    return held


def test_ids_that_share_half_of_their_hash(folder: Path) -> None:
    index = KeyIndex(folder)
    index.reset("t")
    first = {(7, high): high + 1 for high in range(0, 40, 2)} | {(6, 2**64 - 1): 5, (8, 0): 6}
    second = {(7, high): high + 1 for high in range(1, 40, 4)}
    index.append(keys_of(first), 0)
    index.append(keys_of(second), 1)
    asked = [(low, high) for low in (6, 7, 8) for high in (*range(45), 2**64 - 1)]
    assert look_up(index, asked) == first | second
    assert look_up(index, [(7, 39)]) == {}
    assert look_up(index, [(5, 0), (9, 0)]) == {}


def test_order_of_the_appended_keys_does_not_matter(folder: Path) -> None:
    held = {(low, high): low ^ high for low in ENDS for high in ENDS}
    rows = list(held.items())
    random.Random(1).shuffle(rows)
    index = KeyIndex(folder)
    index.append(keys_of(dict(rows)), 0)
    assert look_up(index, list(held)) == held
    stored = np.fromfile(folder / index.runs[0].file, dtype="<u8", count=3 * len(held)).reshape(3, -1)
    assert [(int(low), int(high)) for low, high in zip(stored[0], stored[1], strict=True)] == sorted(held)


def test_an_empty_index_and_an_empty_question(folder: Path) -> None:
    index = KeyIndex(folder)
    assert (index.table_id, index.version, index.rows) == (None, -1, 0)
    assert look_up(index, [(1, 1)]) == {}
    held = filled(folder)
    assert look_up(KeyIndex(folder), []) == {}
    assert look_up(KeyIndex(folder), list(held)) == held


def test_a_version_without_keys_is_covered(folder: Path) -> None:
    held = filled(folder, versions=2)
    index = KeyIndex(folder)
    index.append(keys_of({}), 2)
    assert len(index.runs) == 2
    reopened = KeyIndex(folder)
    assert (reopened.version, look_up(reopened, list(held))) == (2, held)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([50], id="like sizes"),
        pytest.param([5000], id="like sizes, larger"),
        pytest.param([5000, 10], id="large and small in turn"),
        pytest.param([10, 20_000, 300, 5000], id="all sizes in turn"),
        pytest.param([20_000, 0, 1, 0], id="empty ones between"),
    ],
)
def test_few_runs_and_few_rewrites_whatever_the_sizes_of_the_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    index = KeyIndex(folder)
    written = 0
    write = index._write

    def counted(*arguments: Any) -> Any:
        nonlocal written
        run = write(*arguments)
        written += run.rows
        return run

    monkeypatch.setattr(index, "_write", counted)
    words = np.random.default_rng(1).integers(0, 2**64, (3, 100 * max(sizes)), dtype=np.uint64)
    total = most = 0
    for version in range(100):
        size = sizes[version % len(sizes)]
        index.append(Keys(*words[:, total : total + size]), version)
        total += size
        most = max(most, len(index.runs))
    assert index.rows == total
    assert most <= 20
    assert written <= 9 * total + 100 * 1024  # runs of a few rows are cheap to write again
    found, fingerprint = index.lookup(words[0, :total], words[1, :total])
    assert found.all()
    assert (fingerprint == words[2, :total]).all()


def test_no_run_grows_beyond_its_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RUN_ROWS", 300)
    monkeypatch.setattr(module, "MERGE_ROWS", 40)
    held = filled(folder, versions=60)
    index = KeyIndex(folder)
    assert max(run.rows for run in index.runs) in range(80, 301)
    assert look_up(index, list(held)) == held


def test_the_newest_version_can_always_be_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed batch that runs again is judged against the version before its own."""
    monkeypatch.setattr(module, "FANOUT", 2)
    index = KeyIndex(folder)
    index.reset("t")
    held: dict[Id, int] = {}
    for version in range(12):
        new = many(10, version * 10)
        index.append(keys_of(new), version)
        assert index.can_cut(version - 1)
        again = KeyIndex(folder)
        again.cut(version - 1)
        assert look_up(again, [*held, *new]) == held
        index = KeyIndex(folder)  # the cut one, on disk
        assert (index.table_id, index.version) == ("t", version - 1)
        index.append(keys_of(new), version)
        held |= new
    assert look_up(index, list(held)) == held


def test_a_merged_run_cannot_be_cut_within(folder: Path) -> None:
    filled(folder, versions=module.FANOUT)
    index = KeyIndex(folder)
    assert all(index.can_cut(version) for version in range(-1, 10))
    index.append(keys_of(many(1, 999)), module.FANOUT)
    assert [(run.first, run.last) for run in index.runs] == [(0, module.FANOUT - 1), (module.FANOUT, module.FANOUT)]
    cuts = [version for version in range(-1, module.FANOUT + 1) if index.can_cut(version)]
    assert cuts == [-1, module.FANOUT - 1, module.FANOUT]


def test_a_rebuilt_index_cannot_be_cut_before_the_version_it_was_rebuilt_at(folder: Path) -> None:
    """Its runs hold the rows of every version up to there, not of that one: to forget them all would accept them again."""
    index = KeyIndex(folder)
    index.reset("t")
    index.append(keys_of(many(10)), 7)
    index.append(keys_of(many(10, 10)), 7)
    index.append(keys_of(many(10, 20)), 8)
    assert [index.can_cut(version) for version in (5, 6, 7, 8)] == [False, False, True, True]
    index.cut(7)
    assert (index.version, index.rows) == (7, 20)


def test_cut_to_a_version_ahead_changes_nothing(folder: Path) -> None:
    held = filled(folder)
    index = KeyIndex(folder)
    index.cut(10)
    assert (index.version, look_up(index, list(held))) == (3, held)


def test_reset_forgets_on_disk_too(folder: Path) -> None:
    held = filled(folder)
    index = KeyIndex(folder)
    index.reset("other")
    assert (index.table_id, index.version, index.rows) == ("other", -1, 0)
    assert look_up(index, list(held)) == {}
    killed = KeyIndex(folder)
    assert (killed.table_id, killed.version, killed.rows) == (None, -1, 0)
    index.append(keys_of({(1, 1): 1}), 0)
    reopened = KeyIndex(folder)
    assert (reopened.table_id, reopened.version, reopened.rows) == ("other", 0, 1)


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def _bytes(change: Callable[[bytes], bytes], name: str = "run-*.keys") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = sorted(folder.glob(name))[0]
        path.write_bytes(change(path.read_bytes()))

    return damage


def _swap(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("run-*.keys"))
    first.rename(folder / "kept")
    second.rename(first)
    (folder / "kept").rename(second)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: sorted(folder.glob(name))[0].unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "folder gone": shutil.rmtree,
    "manifest gone": _remove("manifest.json"),
    "manifest empty": _bytes(lambda _: b"", "manifest.json"),
    "manifest torn": _bytes(lambda data: data[: len(data) // 2], "manifest.json"),
    "manifest not text": _bytes(lambda _: b"\xff\xfe\0", "manifest.json"),
    "manifest a list": _manifest(lambda _: []),
    "manifest null": _manifest(lambda _: None),
    "manifest of another format": _manifest(lambda held: {**held, "format": held["format"] + 1}),
    "manifest without a version": _manifest(lambda held: {k: v for k, v in held.items() if k != "version"}),
    "manifest without runs": _manifest(lambda held: {k: v for k, v in held.items() if k != "runs"}),
    "manifest with a strange run": _manifest(lambda held: {**held, "runs": [{"file": "x"}]}),
    "rows miscounted": _manifest(lambda held: {**held, "runs": [{**run, "rows": run["rows"] - 1} for run in held["runs"]]}),
    "run gone": _remove("run-*.keys"),
    "run empty": _bytes(lambda _: b""),
    "run cut in its magic": _bytes(lambda data: data[:4]),
    "run cut in its header": _bytes(lambda data: data[:40]),
    "run cut behind its header": _bytes(lambda data: data[:128]),
    "run short of a byte": _bytes(lambda data: data[:-1]),
    "run of zeros": _bytes(lambda data: b"\0" * len(data)),
    "run of other text": _bytes(lambda data: b"PAR1" * (len(data) // 4)),
    "runs swapped": lambda folder: _swap(folder),
    "a bit of the manifest flipped": _bytes(lambda data: data.replace(b'"version": 3', b'"version": 2'), "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_as_if_it_were_not_there(folder: Path, damage: Callable[[Path], None]) -> None:
    held = filled(folder)
    damage(folder)
    index = KeyIndex(folder)
    assert (index.table_id, index.version, index.rows) == (None, -1, 0)
    assert look_up(index, list(held)) == {}
    index.reset("t")
    index.append(keys_of(held), 3)
    reopened = KeyIndex(folder)
    assert (reopened.table_id, reopened.version, look_up(reopened, list(held))) == ("t", 3, held)
    assert files_of(folder) == {"manifest.json", index.runs[0].file}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Id, int]]:
    """An index of two runs, of several blocks each."""
    folder = tmp_path_factory.mktemp("large") / "index"
    return folder, filled(folder, versions=2, rows=3000)


# where a byte is damaged: a share of the file, and how
FLIPS = [pytest.param(share / 40, kind, id=f"{kind} at {share}/40") for share in range(40) for kind in ("bit", "page")]


@pytest.mark.parametrize(("share", "kind"), FLIPS)
def test_no_damaged_byte_is_believed(large: tuple[Path, dict[Id, int]], tmp_path: Path, share: float, kind: str) -> None:
    """Whatever byte is damaged: the index is discarded, or a look-up that could meet the byte says so. It never answers wrong."""
    folder, held = large
    shutil.copytree(folder, tmp_path / "index")
    path = sorted((tmp_path / "index").glob("run-*.keys"))[0]
    data = bytearray(path.read_bytes())
    at = int(share * len(data))
    if kind == "bit":
        data[at] ^= 1 << at % 8
    else:
        at -= at % 4096
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)
    index = KeyIndex(tmp_path / "index")
    if index.problem is not None:
        assert index.version == -1
        return
    for some in (list(held), [key for key in held if key[1] % 100 == 0]):  # the whole run is searched, and single blocks
        try:
            assert look_up(KeyIndex(tmp_path / "index"), some) == {key: held[key] for key in some}
        except DamagedError:
            continue
        assert len(some) < len(held), "all keys were asked for, so one lies where the damage is"
    with pytest.raises(DamagedError):
        index.check()
    with pytest.raises(DamagedError):
        list(index.parts())


def test_a_damaged_run_is_not_merged(folder: Path) -> None:
    filled(folder, versions=module.FANOUT)
    path = sorted(folder.glob("run-*.keys"))[1]
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)
    index = KeyIndex(folder)
    assert index.problem is None
    with pytest.raises(DamagedError, match="damaged at byte 0"):
        index.append(keys_of(many(1, 9999)), module.FANOUT)


def test_an_older_manifest_with_newer_runs(folder: Path) -> None:
    filled(folder, versions=module.FANOUT)
    older = (folder / "manifest.json").read_bytes()
    KeyIndex(folder).append(keys_of(many(1, 9999)), module.FANOUT)  # merges the runs that the older one names
    (folder / "manifest.json").write_bytes(older)
    index = KeyIndex(folder)
    assert index.version == -1
    assert "cannot be read" in str(index.problem)


def test_what_was_checked_once_is_not_checked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = filled(folder, versions=2, rows=3000)
    index = KeyIndex(folder)
    assert look_up(index, list(held)) == held
    monkeypatch.setattr("spark_jobs.lake.checked.xxh3_64_intdigest", None)
    assert look_up(index, list(held)) == held


def kill_before_file(patch: pytest.MonkeyPatch, nth: int) -> None:
    """Order a kill right before the n-th file (from 0) appears under its name."""
    replace = os.replace
    names: list[Path] = []

    def killing(source: Path, target: Path) -> None:
        if len(names) == nth:
            raise KeyboardInterrupt
        names.append(target)
        replace(source, target)

    patch.setattr(os, "replace", killing)


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_killed_while_it_appends(folder: Path, nth: int) -> None:
    """The merged run, the new run and the manifest are three files; before the last the old state stands."""
    held = filled(folder, versions=module.FANOUT)
    new = many(30, 1000)
    index = KeyIndex(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_before_file(patch, nth)
        index.append(keys_of(new), module.FANOUT)
    again = KeyIndex(folder)
    assert (again.table_id, again.version) == ("t", module.FANOUT - 1)
    assert look_up(again, [*held, *new]) == held
    again.append(keys_of(new), module.FANOUT)
    assert look_up(KeyIndex(folder), [*held, *new]) == held | new
    assert files_of(folder) == {"manifest.json", *(run.file for run in again.runs)}


def test_an_index_that_was_killed_while_it_was_rebuilt_covers_nothing(folder: Path) -> None:
    index = KeyIndex(folder)
    index.append(keys_of(many(3)), 4)

    def parts() -> Iterator[Keys]:
        yield keys_of(many(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.rebuild("other", parts(), 9)
    assert KeyIndex(folder).version == -1
    index.rebuild("other", iter([keys_of(many(1)), keys_of(many(2, 1))]), 9)
    again = KeyIndex(folder)
    assert (again.version, again.table_id, again.rows) == (9, "other", 3)
