"""The key index of a cluster: shards of keys in the lakehouse's store, which executors look up, extend and merge.

A shard has the ids whose hash ends with its number. A task for a shard gets the keys of the batch that belong there, and the names
of the shard's runs. It keeps the runs in its executor's folder, classifies the keys, and writes the new ones as a run. The driver
sees no key. It names the new runs in the manifest once the batch's events are committed. Until then they count for nothing, so a
lost task may run again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import ConservationError
from spark_jobs.ingest.dedupe.classify import Classification, Outcome, accepted_keys, classify
from spark_jobs.ingest.dedupe.index import KeyCodec, KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys, Words
from spark_jobs.ingest.job import Scattered
from spark_jobs.lake.checked import DamagedError, Ints, manifest_text, parse_manifest
from spark_jobs.lake.places import StorePlace, state_copies
from spark_jobs.lake.runs import FORMAT, MANIFEST, RunFile
from spark_jobs.lake.runs_copy import replace_manifest

SHARDS = 16
_LARGEST_MERGE_ROWS = 8_000_000  # 0.6 s of a core
_SMALL_MERGE_ROWS = 400_000
_THREADS = 8
_LOCK_SECONDS = 120.0  # then the task fails, and Spark tries it elsewhere
_POSITION_BITS = np.int64(32)
_POSITION = np.int64(2**32 - 1)


class ShardCodec(KeyCodec):
    """Keys of a shard. A task waits for its merges: for small ones, or for all if it ``merges``."""

    def __init__(self, *, merges: bool = False) -> None:
        self.max_run_rows = self.quick_merge_rows = _LARGEST_MERGE_ROWS if merges else _SMALL_MERGE_ROWS


def shards_of(keys: Keys) -> Ints:
    """Return the shard of each key. These bits of the hash place a key neither in a run nor in the words of its filter."""
    return (keys.high & np.uint64(SHARDS - 1)).astype(np.int64)


def by_shard(keys: Keys) -> Iterator[tuple[int, Ints]]:
    """Yield each shard that has keys, and the places of its keys, ascending."""
    shards = shards_of(keys)
    order = np.argsort(shards.astype(np.uint8), kind="stable")
    bounds = np.searchsorted(shards[order], np.arange(SHARDS + 1))
    for number, (start, end) in enumerate(pairwise(bounds.tolist())):
        if start < end:
            yield number, order[start:end]


@dataclass(frozen=True, eq=False)
class KeyBlock:
    """The keys of one split and one shard. ``places`` are the rows of the split, ascending."""

    split: int
    places: npt.NDArray[np.int32]
    keys: Keys


def blocks_of(split: int, keys: Keys) -> Iterator[tuple[int, KeyBlock]]:
    """Yield the keys of a split by shard."""
    for number, places in by_shard(keys):
        yield number, KeyBlock(split, places.astype(np.int32), keys.take(places))


@dataclass(frozen=True)
class ShardedKeys:
    """The keys that a batch accepts. They are in the newest run of each of the ``shards``. ``checksums`` are by shard."""

    count: int
    checksums: list[str]
    shards: list[list[RunFile]]

    def __len__(self) -> int:
        return self.count

    def are(self, keys: Keys) -> bool:
        """Return whether these are the same keys and fingerprints, in any order."""
        checksums = [Keys.concatenate([]).checksum] * SHARDS
        for number, places in by_shard(keys):
            checksums[number] = keys.take(places).checksum
        return checksums == self.checksums


@dataclass(frozen=True)
class ShardWork:
    """What the tasks of a batch need: the runs of each shard, which cover ``version``, and the splits that count.

    Only the shard ``merging`` makes large merges. All shards grow alike, so all would make them in the same batch.
    """

    place: StorePlace
    table_id: str
    version: int
    shards: list[list[RunFile]]
    splits: frozenset[int]
    merging: int


@dataclass(frozen=True, eq=False)
class ShardOutcome:
    """The result of a shard: its runs with the new one, and the records that are not accepted.

    ``rows`` are these records (`_row_ids`), ``outcome`` and ``accepted_fingerprint`` parallel to them. With ``damage`` there is no
    result: a run of the shard is damaged in the store.
    """

    number: int
    records: int
    rows: Ints
    outcome: npt.NDArray[np.int8]
    accepted_fingerprint: Words
    accepted: int
    checksum: str
    runs: list[RunFile]
    damage: str | None = None


def classify_shard(number: int, blocks: Iterable[KeyBlock], work: ShardWork) -> ShardOutcome:
    """Classify the keys of a shard in an executor, and write the accepted ones as a run of the store."""
    own = sorted((block for block in blocks if block.split in work.splits), key=lambda block: block.split)
    keys = Keys.concatenate([block.keys for block in own])
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(_row_ids(block) for block in own)])
    folder = disk.scratch_folder() / "adtally" / "key_index" / f"{number:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock", timeout=_LOCK_SECONDS):  # an attempt that Spark has given up may still run
        try:
            return _classify(folder, number, keys, rows, work)
        except DamagedError:
            shutil.rmtree(folder)  # the executor's copy may be what is damaged
        try:
            return _classify(folder, number, keys, rows, work)
        except DamagedError as damage:
            nothing = np.empty(0, dtype=np.int64)
            return ShardOutcome(number, 0, nothing, nothing.astype(np.int8), nothing.view(np.uint64), 0, "", [], str(damage))


def _classify(folder: Path, number: int, keys: Keys, rows: Ints, work: ShardWork) -> ShardOutcome:
    index = open_shard(folder, work.place, work.table_id, work.shards[number], work.version, merges=number == work.merging)
    classified = classify(keys, index.lookup)
    accepted = accepted_keys(keys, classified)
    index.append(accepted, work.version + 1)
    _upload(work.place, folder, set(index.runs) - set(work.shards[number]))
    others = np.flatnonzero(classified.outcome != Outcome.ACCEPTED)
    return ShardOutcome(
        number,
        len(keys),
        rows[others],
        classified.outcome[others],
        classified.accepted_fingerprint[others],
        len(accepted),
        accepted.checksum,
        index.runs,
    )


def _row_ids(block: KeyBlock) -> Ints:
    """Return a number for each record, by which the records of a batch are in their order."""
    return np.int64(block.split) << _POSITION_BITS | block.places.astype(np.int64)


def open_shard(
    folder: Path, place: StorePlace, table_id: str, runs: Sequence[RunFile], version: int, *, merges: bool = False
) -> KeyIndex:
    """Open a shard whose runs are in a store, with copies of them in ``folder``. Raises DamagedError.

    ``merges``: whether an append makes large merges first.
    """
    missing = [run for run in runs if not (folder / run.name).exists()]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="shard") as pool:
        try:
            list(pool.map(lambda run: place.download(run.name, folder / run.name), missing))
        except FileNotFoundError as error:
            raise DamagedError(f"{place.uri} has no longer the file {error.filename}") from error
    index = KeyIndex(folder, ShardCodec(merges=merges))
    index.follow(table_id, runs, version)
    return index


def _upload(place: StorePlace, folder: Path, runs: Iterable[RunFile]) -> None:
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="shard") as pool:
        list(pool.map(lambda run: place.upload(folder / run.name, run.name), runs))


def _no_runs() -> list[list[RunFile]]:
    return [[] for _ in range(SHARDS)]


class ShardedIndex:
    """The driver's side of the index: which runs are valid. One driver writes at a time: it has a lease.

    It has the attributes and methods of `KeyIndex` by which an index follows its table. It replaces the manifest that it saw last;
    so two drivers cannot overwrite each other's.
    """

    shape = f"{KeyCodec.shape}, {SHARDS} shards"

    def __init__(self, place: StorePlace) -> None:
        """Read the manifest in the store. If there is none that can be used, the index is empty."""
        self.place = place
        self.problem: str | None = None
        self.table_id: str | None = None
        self.version, self.commit = -1, ""
        self.shards = _no_runs()
        self._batches = 0  # since the index began
        self._tag: str | None = None
        self._names = {found.name for found in place.list() if found.name != MANIFEST}
        self._load()

    def classify(self, keys: Scattered, rows_of_splits: dict[int, int]) -> tuple[Classification, ShardedKeys]:
        """Classify the scattered keys of the splits, number -> rows, in the order of the records. Raises DamagedError."""
        work = ShardWork(
            self.place, self.table_id or "", self.version, self.shards, frozenset(rows_of_splits), self._batches % SHARDS
        )
        parts = keys.gather(partial(classify_shard, work=work), range(SHARDS))
        self._names.update(run.name for part in parts for run in part.runs)  # the next manifest names them, or they are deleted
        for part in parts:
            if part.damage is not None:
                raise DamagedError(part.damage)
        total, found = sum(rows_of_splits.values()), sum(part.records for part in parts)
        if total != found:
            raise ConservationError(f"{total} valid records, but the shards of the key index classified {found}")
        starts = np.zeros(max(rows_of_splits, default=0) + 1, dtype=np.int64)
        starts[list(rows_of_splits)] = np.cumsum([0, *rows_of_splits.values()])[:-1]
        outcome = np.full(total, Outcome.ACCEPTED, dtype=np.int8)
        accepted_fingerprint = np.zeros(total, dtype=np.uint64)
        for part in parts:
            places = starts[part.rows >> _POSITION_BITS] + (part.rows & _POSITION)
            outcome[places] = part.outcome
            accepted_fingerprint[places] = part.accepted_fingerprint
        new = ShardedKeys(sum(part.accepted for part in parts), [part.checksum for part in parts], [part.runs for part in parts])
        return Classification(outcome, accepted_fingerprint), new

    def append(self, keys: Keys | ShardedKeys, version: int, commit: str = "") -> None:
        """Add the keys of the version after the covered one, and cover it. Keys that no task has written are written here."""
        if isinstance(keys, ShardedKeys):
            self.shards = keys.shards
            self._batches += 1
        else:
            self._write(keys, min(self.version + 1, version), version)
        self.version, self.commit = version, commit
        self._save()

    def rebuild(self, table_id: str, parts: Iterable[Keys], version: int, commit: str = "") -> None:
        """Replace all runs by ``parts``: the keys of ``version``."""
        self.table_id, self.version, self.commit, self.problem, self.shards = table_id, -1, "", None, _no_runs()
        for keys in parts:
            self._write(keys, 0, version)
        self.version, self.commit = version, commit
        self._save()

    def can_cut(self, version: int) -> bool:
        """See SortedRuns."""
        return all(run.last_version <= version or run.first_version > version for runs in self.shards for run in runs)

    def cut(self, version: int, commit: str = "") -> None:
        """See SortedRuns."""
        self.shards = [[run for run in runs if run.last_version <= version] for runs in self.shards]
        if version < self.version:
            self.version, self.commit = version, commit
        self._save()

    def parts(self, folder: Path) -> Iterator[Keys]:
        """Yield all keys, some at a time, with copies of one shard at a time in ``folder``. Raises DamagedError."""
        for runs in self.shards:
            with TemporaryDirectory(dir=folder) as own:
                yield from open_shard(Path(own), self.place, self.table_id or "", runs, self.version).parts()

    def _write(self, keys: Keys, first: int, last: int) -> None:
        """Write a run of each shard. Only for what no batch of a cluster has classified: few commits, or a rebuild."""
        with TemporaryDirectory() as folder:
            index = KeyIndex(Path(folder), ShardCodec())
            made = {number: index.write_run(keys.take(places), first, last) for number, places in by_shard(keys)}
            self._names.update(run.name for run in made.values())
            _upload(self.place, Path(folder), made.values())
        self.shards = [[*runs, *([made[number]] if number in made else [])] for number, runs in enumerate(self.shards)]

    def _save(self) -> None:
        """Replace the manifest, which makes the runs valid. Then delete files that it does not name."""
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "shape": self.shape,
            "table_id": self.table_id,
            "version": self.version,
            "commit": self.commit,
            "batches": self._batches,
            "shards": [[asdict(run) for run in runs] for runs in self.shards],
        }
        self._tag = replace_manifest(self.place, manifest_text(manifest).encode(), self._tag)
        named = {run.name for runs in self.shards for run in runs}
        self.place.delete(sorted(self._names - named))
        self._names = named

    def _load(self) -> None:
        try:
            data, self._tag = self.place.read_tagged(MANIFEST)
            manifest = parse_manifest(data, f"{self.place.uri}/{MANIFEST}")
            if (manifest["format"], manifest["shape"]) == (FORMAT, self.shape):
                shards = [[RunFile(**run) for run in runs] for runs in manifest["shards"]]
                self.table_id, self.version, self.commit = manifest["table_id"], manifest["version"], manifest["commit"]
                self.shards, self._batches = shards, manifest["batches"]
        except FileNotFoundError:
            return
        except (DamagedError, ValueError, KeyError, TypeError) as error:
            self.problem = str(error)


def latest_key_index(settings: Settings) -> KeyIndex | ShardedIndex:
    """Return the index that the last ingest used: the one in the store, if a cluster has made it, else the one in the home."""
    place = state_copies(settings, settings.key_index_path.name)
    shards = None if place is None else ShardedIndex(place)
    return KeyIndex(settings.key_index_path) if shards is None or shards.table_id is None else shards
