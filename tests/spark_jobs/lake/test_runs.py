"""Indexes of sorted runs against a dict: after any append, cut, merge, kill, loss or damage they hold what they say they cover."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from spark_jobs.attribution.index import KEY_FIELDS, RowCodec, RowIndex
from spark_jobs.ingest.dedupe import index as key_module
from spark_jobs.ingest.dedupe.filters import ARRAYS, words_of
from spark_jobs.ingest.dedupe.index import KeyCodec, KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.lake import runs as module
from spark_jobs.lake.checked import DamagedError, Words, manifest_text, read_manifest
from spark_jobs.lake.runs import Codec, SortedRuns, check_runs

Id = tuple[int, int]  # low, high
Index = SortedRuns[Any, Any]
ENDS = (0, 1, 2**63, 2**64 - 1)


class Kind(ABC):
    """One index: how its rows are made of an id (low, high) and a value, and how they are looked up."""

    codec: type[Codec[Any, Any]]
    unread_tail = 0
    """The last bytes of a run whose damage no look-up reports: it does not read them, or can do without."""

    @abstractmethod
    def open(self, folder: Path) -> Index:
        """The index in ``folder``."""

    @abstractmethod
    def rows(self, low: Words, high: Words, value: Words) -> Any:
        """Rows to append."""

    @abstractmethod
    def find(self, index: Any, low: Words, high: Words) -> tuple[npt.NDArray[np.bool_], Words]:
        """For sorted ids: is each one held, and its value, or 0."""

    def of(self, held: dict[Id, int]) -> Any:
        """The rows of a dict."""
        rows = [(low, high, value) for (low, high), value in held.items()]
        return self.rows(*(np.array([row[at] for row in rows], dtype=np.uint64) for at in range(3)))

    def look_up(self, index: Index, ids: list[Id]) -> dict[Id, int]:
        """Those of ``ids`` that the index holds, with their values."""
        ids = sorted(set(ids))
        low, high = (np.array([key[at] for key in ids], dtype=np.uint64) for at in range(2))
        found, value = self.find(index, low, high)
        assert not value[~found].any()
        return {key: int(one) for key, hit, one in zip(ids, found, value, strict=True) if hit}

    def filled(self, folder: Path, versions: int = 4, rows: int = 20) -> dict[Id, int]:
        """Make an index of table t in ``folder``. Returns what it holds."""
        index = self.open(folder)
        index.reset("t")
        held: dict[Id, int] = {}
        for version in range(versions):
            new = many(rows, version * rows)
            index.append(self.of(new), version)
            held |= new
        return held


class KeysKind(Kind):
    """The key index: the value is the fingerprint."""

    codec = KeyCodec
    unread_tail = 8 * ARRAYS * words_of(3000)  # the filter

    def open(self, folder: Path) -> KeyIndex:
        return KeyIndex(folder)

    def rows(self, low: Words, high: Words, value: Words) -> Keys:
        return Keys(low, high, value)

    def find(self, index: KeyIndex, low: Words, high: Words) -> tuple[npt.NDArray[np.bool_], Words]:
        found, fingerprint = index.lookup(low, high)
        assert found.dtype == np.bool_ and fingerprint.dtype == np.uint64
        return found, fingerprint


class RowsKind(Kind):
    """The index of attribution: the value, as text, is the payload. Times differ, and queries ask for all of them."""

    codec = RowCodec
    unread_tail = 4096

    def open(self, folder: Path) -> RowIndex:
        return RowIndex(folder, pa.schema([("name", pa.string())]), "shape")

    def rows(self, low: Words, high: Words, value: Words) -> pa.Table:
        columns = [low, high, (high % 7).astype(np.int64), high % 3, np.ones(len(low), bool)]
        fields = {field.name: pa.array(column) for field, column in zip(KEY_FIELDS, columns, strict=True)}
        return pa.table({**fields, "name": pa.array(value).cast(pa.string())})

    def find(self, index: RowIndex, low: Words, high: Words) -> tuple[npt.NDArray[np.bool_], Words]:
        number, rows = index.between(low, high, np.zeros(len(low), np.int64), np.full(len(low), 7))
        assert (np.diff(number) > 0).all(), "one row an id, in the order of the queries"
        found, value = np.zeros(len(low), bool), np.zeros(len(low), np.uint64)
        found[number] = True
        value[number] = rows["name"].cast(pa.uint64()).to_numpy()
        return found, value


KINDS = {"keys": KeysKind(), "rows": RowsKind()}


def many(count: int, start: int = 0) -> dict[Id, int]:
    """Ids that are spread out, as hashes are."""
    source = random.Random(start)
    return {(source.getrandbits(64), at): source.getrandbits(64) for at in range(start, start + count)}


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


# few words, so that low halves agree; at the ends of 64 bits, so that a search goes wrong if it can
IDS = st.tuples(st.sampled_from([*ENDS, 7, 8]), st.sampled_from([*ENDS, *range(5, 25)]))
ROWS = st.dictionaries(IDS, st.integers(0, 2**64 - 1), max_size=10)


class KeysMachine(RuleBasedStateMachine):
    """Random work on an index; the model is what each version added."""

    kind: ClassVar[Kind] = KINDS["keys"]
    MAX_RUN_ROWS = 12
    QUICK_MERGE_ROWS = 12

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="adtally-index-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "FANOUT", 2)
        self.patch.setattr(self.kind.codec, "max_run_rows", self.MAX_RUN_ROWS)
        self.patch.setattr(self.kind.codec, "quick_merge_rows", self.QUICK_MERGE_ROWS)
        self.patch.setattr(self.kind.codec, "small_run_rows", 2)
        self.patch.setattr(key_module, "MERGE_ROWS", 3)
        self.index = self.kind.open(self.folder / "index")
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

    @rule(rows=ROWS, step=st.sampled_from([1, 1, 1, 1, 0, 3]))
    def append(self, rows: dict[Id, int], step: int) -> None:
        """The next version; at times several at once, or more of the same (a rebuild in groups)."""
        new = {key: value for key, value in rows.items() if key not in self.held}
        before, self.version = self.version, max(self.version + step, 0)
        self.index.append(self.kind.of(new), self.version)
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
        self.index = self.kind.open(self.folder / "index")

    @invariant()
    def covers_what_it_says(self) -> None:
        assert (self.index.table_id, self.index.version, self.index.problem) == (self.table_id, self.version, None)
        assert self.index.rows == len(self.held)

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        around = [(low, (high + step) % 2**64) for low, high in self.held for step in (-1, 0, 1)]
        asked = [*around, *((low, 6) for low in (*ENDS, 7, 8))]
        assert self.kind.look_up(self.index, asked) == {key: self.held[key] for key in asked if key in self.held}

    @invariant()
    def runs_follow_one_another(self) -> None:
        runs = self.index.runs
        assert all(run.first_version <= run.last_version for run in runs)
        assert all(earlier.last_version <= later.first_version for earlier, later in pairwise(runs))
        assert all(run.rows <= max(self.MAX_RUN_ROWS, 10) for run in runs)  # 10: a batch's own run is as large as it is

    @invariant()
    def no_file_is_left_behind(self) -> None:
        if (self.folder / "index").exists() and self.index._merging is None:
            assert files_of(self.folder / "index") == {"manifest.json", *(run.name for run in self.index.runs)}

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder)


class RowsMachine(KeysMachine):
    """The same work on the index of attribution."""

    kind = KINDS["rows"]


class ThreadsMachine(KeysMachine):
    """The same work with most merges in threads, which end at any time, are cut or reset meanwhile, or are killed."""

    QUICK_MERGE_ROWS = 3

    @rule()
    def finish_merges(self) -> None:
        self.index.finish_merges()

    @rule()
    def wait(self) -> None:
        """Let the thread end before the next append."""
        if self.index._merging is not None:
            self.index._merging.task.result()

    @precondition(lambda self: self.version >= 0)
    @rule()
    def reopen(self) -> None:
        """A killed thread leaves a file; the next write removes it."""
        self.wait()
        super().reopen()
        self.index.cut(self.version)


QUICK = set(Phase) - {Phase.explain}  # a failure is found and shrunk in seconds; to explain it takes a minute
TestKeysMachine = KeysMachine.TestCase
TestKeysMachine.settings = settings(max_examples=80, stateful_step_count=25, deadline=None, phases=QUICK)
TestThreadsMachine = ThreadsMachine.TestCase
TestThreadsMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, phases=QUICK)
TestRowsMachine = RowsMachine.TestCase
TestRowsMachine.settings = settings(max_examples=20, stateful_step_count=25, deadline=None, phases=QUICK)


def test_an_empty_index_and_an_empty_question(kind: Kind, folder: Path) -> None:
    index = kind.open(folder)
    assert (index.table_id, index.version, index.rows) == (None, -1, 0)
    assert kind.look_up(index, [(1, 1)]) == {}
    held = kind.filled(folder)
    assert kind.look_up(kind.open(folder), []) == {}
    assert kind.look_up(kind.open(folder), list(held)) == held


def test_a_version_without_rows_is_covered(kind: Kind, folder: Path) -> None:
    held = kind.filled(folder, versions=2)
    index = kind.open(folder)
    index.append(kind.of({}), 2)
    assert len(index.runs) == 2
    reopened = kind.open(folder)
    assert (reopened.version, kind.look_up(reopened, list(held))) == (2, held)


def test_a_rebuild_skips_parts_without_rows(kind: Kind, folder: Path) -> None:
    index = kind.open(folder)
    index.rebuild("t", [kind.of({})], 3, "commit")
    assert (index.table_id, index.version, index.commit, index.runs) == ("t", 3, "commit", [])
    assert kind.look_up(index, [(1, 1)]) == {}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("keys", [50], id="like sizes"),
        pytest.param("keys", [5000], id="like sizes, larger"),
        pytest.param("keys", [5000, 10], id="large and small in turn"),
        pytest.param("keys", [10, 20_000, 300, 5000], id="all sizes in turn"),
        pytest.param("keys", [20_000, 0, 1, 0], id="empty ones between"),
        pytest.param("rows", [2000, 10, 0], id="rows, large and small in turn"),
    ],
)
def test_few_runs_and_few_rewrites_whatever_the_sizes_of_the_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, sizes: list[int]
) -> None:
    kind = KINDS[name]
    index = kind.open(folder)
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
        index.append(kind.rows(*words[:, total : total + size]), version)
        total += size
        most = max(most, len(index.runs))
    assert index.rows == total
    assert most <= 20
    assert written <= 9 * total + 100 * kind.codec.small_run_rows  # runs of a few rows are cheap to write again
    order = np.lexsort((words[1, :total], words[0, :total]))
    low, high, value = (word[:total][order] for word in words)
    found, values = kind.find(index, low, high)
    assert found.all()
    assert (values == value).all()


def test_no_run_grows_beyond_its_limit(kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind.codec, "max_run_rows", 300)
    monkeypatch.setattr(key_module, "MERGE_ROWS", 40)
    held = kind.filled(folder, versions=60)
    index = kind.open(folder)
    assert max(run.rows for run in index.runs) in range(80, 301)
    assert kind.look_up(index, list(held)) == held


def test_the_newest_version_can_always_be_cut(kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed batch that runs again is judged against the version before its own."""
    monkeypatch.setattr(module, "FANOUT", 2)
    index = kind.open(folder)
    index.reset("t")
    held: dict[Id, int] = {}
    for version in range(12):
        new = many(10, version * 10)
        index.append(kind.of(new), version)
        assert index.can_cut(version - 1)
        again = kind.open(folder)
        again.cut(version - 1)
        assert kind.look_up(again, [*held, *new]) == held
        index = kind.open(folder)  # the cut one, on disk
        assert (index.table_id, index.version) == ("t", version - 1)
        index.append(kind.of(new), version)
        held |= new
    assert kind.look_up(index, list(held)) == held


def test_a_merged_run_cannot_be_cut_within(kind: Kind, folder: Path) -> None:
    kind.filled(folder, versions=module.FANOUT)
    index = kind.open(folder)
    assert all(index.can_cut(version) for version in range(-1, 10))
    index.append(kind.of(many(1, 999)), module.FANOUT)
    spans = [(run.first_version, run.last_version) for run in index.runs]
    assert spans == [(0, module.FANOUT - 1), (module.FANOUT, module.FANOUT)]
    cuts = [version for version in range(-1, module.FANOUT + 1) if index.can_cut(version)]
    assert cuts == [-1, module.FANOUT - 1, module.FANOUT]


def test_a_rebuilt_index_cannot_be_cut_before_the_version_it_was_rebuilt_at(kind: Kind, folder: Path) -> None:
    """Its runs hold the rows of every version up to there, not of that one: to forget them all would accept them again."""
    index = kind.open(folder)
    index.reset("t")
    index.append(kind.of(many(10)), 7)
    index.append(kind.of(many(10, 10)), 7)
    index.append(kind.of(many(10, 20)), 8)
    assert [index.can_cut(version) for version in (5, 6, 7, 8)] == [False, False, True, True]
    index.cut(7, "commit")
    assert (index.version, index.commit, index.rows) == (7, "commit", 20)
    index.rebuild("t", [kind.of(many(10)), kind.of(many(10, 10))], 7)
    assert [index.can_cut(version) for version in (6, 7)] == [False, True]


def test_cut_to_a_version_ahead_changes_nothing(kind: Kind, folder: Path) -> None:
    held = kind.filled(folder)
    index = kind.open(folder)
    index.cut(10, "ahead")
    assert (index.version, index.commit, kind.look_up(index, list(held))) == (3, "", held)


def test_reset_forgets_on_disk_too(kind: Kind, folder: Path) -> None:
    held = kind.filled(folder)
    index = kind.open(folder)
    index.reset("other")
    assert (index.table_id, index.version, index.rows) == ("other", -1, 0)
    assert kind.look_up(index, list(held)) == {}
    killed = kind.open(folder)
    assert (killed.table_id, killed.version, killed.rows) == (None, -1, 0)
    index.append(kind.of({(1, 1): 1}), 0)
    reopened = kind.open(folder)
    assert (reopened.table_id, reopened.version, reopened.rows) == ("other", 0, 1)


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def _bytes(change: Callable[[bytes], bytes], name: str = "run-*") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = sorted(folder.glob(name))[0]
        path.write_bytes(change(path.read_bytes()))

    return damage


def _swap(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("run-*"))
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
    "manifest with a strange run": _manifest(lambda held: {**held, "runs": [{"name": "x"}]}),
    "rows miscounted": _manifest(lambda held: {**held, "runs": [{**run, "rows": run["rows"] - 1} for run in held["runs"]]}),
    "run gone": _remove("run-*"),
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
def test_a_damaged_index_is_as_if_it_were_not_there(kind: Kind, folder: Path, damage: Callable[[Path], None]) -> None:
    held = kind.filled(folder)
    damage(folder)
    index = kind.open(folder)
    assert (index.table_id, index.version, index.rows) == (None, -1, 0)
    assert (index.problem is None) == (not (folder / "manifest.json").exists())
    assert kind.look_up(index, list(held)) == {}
    index.reset("t")
    index.append(kind.of(held), 3)
    reopened = kind.open(folder)
    assert (reopened.table_id, reopened.version, kind.look_up(reopened, list(held))) == ("t", 3, held)
    assert files_of(folder) == {"manifest.json", index.runs[0].name}


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda held: {**held, "format": held["format"] - 1},
    "no shape": lambda held: {k: v for k, v in held.items() if k != "shape"},
    "no version": lambda held: {k: v for k, v in held.items() if k != "version"},
    "strange runs": lambda held: {**held, "runs": [{"name": "x"}]},
    "rows of another number": lambda held: {**held, "runs": [{**run, "size": run["size"] - 8} for run in held["runs"]]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_manifest_with_a_right_checksum_is_not_enough(kind: Kind, folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest of another release: its checksum holds, and what it says is of no use."""
    kind.filled(folder)
    path = folder / "manifest.json"
    path.write_text(manifest_text(change(read_manifest(path) or {})))
    index = kind.open(folder)
    assert (index.table_id, index.version, index.rows) == (None, -1, 0)
    assert index.problem is not None


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path, dict[Id, int]]:
    """An index of two runs, of several blocks each."""
    folder = tmp_path_factory.mktemp("large") / "index"
    kind: Kind = request.param
    return kind, folder, kind.filled(folder, versions=2, rows=3000)


@pytest.mark.parametrize("share", range(50))
@pytest.mark.parametrize("damage", ["bit", "page"])
def test_no_damaged_byte_is_believed(large: tuple[Kind, Path, dict[Id, int]], tmp_path: Path, share: int, damage: str) -> None:
    """Whatever byte is damaged: the index is discarded, or a look-up that could meet the byte says so. It never answers wrong."""
    kind, folder, held = large
    shutil.copytree(folder, tmp_path / "index")
    path = sorted((tmp_path / "index").glob("run-*"))[0]
    whole = path.read_bytes()
    data = bytearray(whole)
    at = share * len(data) // 50
    if damage == "bit":
        data[at] ^= 1 << share % 8
    else:
        at -= at % 4096
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    assert bytes(data) != whole
    path.write_bytes(data)
    with pytest.raises(DamagedError):
        check_runs(tmp_path / "index")
    index = kind.open(tmp_path / "index")
    if index.problem is not None:
        assert index.version == -1
        return
    for some in (list(held), [key for key in held if key[1] % 100 == 0]):  # the whole run is searched, and single blocks
        try:
            assert kind.look_up(kind.open(tmp_path / "index"), some) == {key: held[key] for key in some}
        except DamagedError:
            continue
        is_unread = at >= index.runs[0].size - kind.unread_tail
        assert len(some) < len(held) or is_unread, "all keys were asked for, so one lies where the damage is"
    if isinstance(index, KeyIndex):
        with pytest.raises(DamagedError):
            list(index.parts())


def test_a_whole_index_passes_the_check(kind: Kind, folder: Path) -> None:
    check_runs(folder)  # there is none
    kind.filled(folder)
    check_runs(folder)
    path = folder / "manifest.json"
    path.write_text(manifest_text({**(read_manifest(path) or {}), "format": 1}))
    with pytest.raises(DamagedError, match="different format"):
        check_runs(folder)


def test_a_damaged_run_is_not_merged(kind: Kind, folder: Path) -> None:
    kind.filled(folder, versions=module.FANOUT, rows=200)
    path = sorted(folder.glob("run-*"))[1]
    data = bytearray(path.read_bytes())
    data[4100] ^= 4
    path.write_bytes(data)
    index = kind.open(folder)
    assert index.problem is None
    with pytest.raises(DamagedError, match="damaged at byte 4096"):
        index.append(kind.of(many(1, 9999)), module.FANOUT)


def test_an_older_manifest_with_newer_runs(kind: Kind, folder: Path) -> None:
    kind.filled(folder, versions=module.FANOUT)
    older = (folder / "manifest.json").read_bytes()
    kind.open(folder).append(kind.of(many(1, 9999)), module.FANOUT)  # merges the runs that the older one names
    (folder / "manifest.json").write_bytes(older)
    index = kind.open(folder)
    assert index.version == -1
    assert "cannot be read" in str(index.problem)


def test_what_was_checked_once_is_not_checked_again(kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = kind.filled(folder, versions=2, rows=3000)
    index = kind.open(folder)
    assert kind.look_up(index, list(held)) == held
    monkeypatch.setattr("spark_jobs.lake.checked.xxh3_64_intdigest", None)
    assert kind.look_up(index, list(held)) == held


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
def test_killed_while_it_appends(kind: Kind, folder: Path, nth: int) -> None:
    """The merged run, the new run and the manifest are three files; before the last the old state stands."""
    held = kind.filled(folder, versions=module.FANOUT)
    new = many(30, 1000)
    index = kind.open(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_before_file(patch, nth)
        index.append(kind.of(new), module.FANOUT)
    (folder / ".run-killed.tmp").touch()  # a kill that let no code run leaves such
    again = kind.open(folder)
    assert (again.table_id, again.version) == ("t", module.FANOUT - 1)
    assert kind.look_up(again, [*held, *new]) == held
    again.append(kind.of(new), module.FANOUT)
    assert kind.look_up(kind.open(folder), [*held, *new]) == held | new
    assert files_of(folder) == {"manifest.json", *(run.name for run in again.runs)}


def test_an_index_that_was_killed_while_it_was_rebuilt_covers_nothing(kind: Kind, folder: Path) -> None:
    index = kind.open(folder)
    index.append(kind.of(many(3)), 4)
    index.problem = "damaged"

    def parts() -> Iterator[Any]:
        yield kind.of(many(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.rebuild("other", parts(), 9)
    assert kind.open(folder).version == -1
    index.rebuild("other", iter([kind.of(many(1)), kind.of(many(2, 1))]), 9, "commit")
    again = kind.open(folder)
    assert not index.problem
    assert (again.version, again.commit, again.table_id, again.rows) == (9, "commit", "other", 3)
