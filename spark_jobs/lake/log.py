"""Reads a Delta table's log without a Spark job: versions, commits, transactions, files.

After a power cut a commit may be empty or truncated. delta-rs and DuckDB read an empty commit as a version without changes, so a
reader would silently miss rows. ``DeltaLog`` raises TableCorruptionError instead. A *torn tail* is unreadable commits that no
readable one follows: the next command that writes sets them aside (``lake/torn.py``). ``adtally fsck`` names any other damage.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from deltalake import DeltaTable
from pyarrow import fs
from xxhash import xxh3_64_hexdigest

from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.roots import is_local, open_root

RETYPED_KEY = "adtallyRetyped"  # in the commitInfo of a commit that only rewrote the rows with other types
RUN_KEY = "adtallyCompaction"  # in the commitInfo of a compaction, with the id of its run
_COMMIT = re.compile(r"(\d{20})\.json")
# a single file, one of several parts, or named by a UUID
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint(?:\.(\d{10})\.(\d{10})|\.[0-9a-f-]{36})?\.(?:parquet|json)")
_readable: dict[str, int] = {}  # table -> the newest version that this process has read


@dataclass(frozen=True)
class Commit:
    """One version: its transaction (app id, version), user metadata, added and removed data files, and its commitInfo."""

    version: int
    txn: tuple[str, int] | None = None
    user_metadata: str | None = None
    added: tuple[dict[str, Any], ...] = field(default=())
    removed: tuple[dict[str, Any], ...] = field(default=())
    table_id: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The user metadata of our writers, a JSON object. Empty if the commit has none, or another tool's."""
        try:
            found = json.loads(self.user_metadata or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def committed_ms(self) -> int:
        """The time of the commit in milliseconds since the epoch; 0 if it has none."""
        return int(self.info.get("timestamp", 0))

    @property
    def changes_rows(self) -> bool:
        """False for a commit that only rearranges rows (compaction) or adds none."""
        return bool(self.data_added or self.data_removed)

    @property
    def data_added(self) -> tuple[dict[str, Any], ...]:
        """The added files with new rows, not rearranged ones."""
        return self._changes(self.added)

    @property
    def data_removed(self) -> tuple[dict[str, Any], ...]:
        """The removed files whose rows were deleted or changed."""
        return self._changes(self.removed)

    @property
    def added_paths(self) -> list[str]:
        """The paths of the files in ``data_added``, as the log writes them."""
        return [action["path"] for action in self.data_added]

    @property
    def removed_paths(self) -> list[str]:
        """The paths of the files in ``data_removed``, as the log writes them."""
        return [action["path"] for action in self.data_removed]

    def _changes(self, actions: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return () if RETYPED_KEY in self.info else tuple(action for action in actions if action.get("dataChange", True))


def parse_commit(version: int, text: str) -> Commit:
    """Parse the text of a commit's JSON file. Raises ValueError if the text is incomplete."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in filter(None, text.split("\n")):  # not splitlines: strings may contain U+2028 and the like
        action = json.loads(line)
        if not isinstance(action, dict):
            raise ValueError("a line of it is not an action")
        by_kind[next(iter(action), "")].append(next(iter(action.values()), {}))
    if not by_kind:
        raise ValueError("it is empty")
    txn = [(str(one["appId"]), int(one["version"])) for one in by_kind["txn"]]
    table_id = [str(one["id"]) for one in by_kind["metaData"]]
    info = (by_kind["commitInfo"] or [{}])[-1]
    added, removed, user_metadata = tuple(by_kind["add"]), tuple(by_kind["remove"]), info.get("userMetadata")
    return Commit(version, txn[-1] if txn else None, user_metadata, added, removed, table_id[-1] if table_id else None, info)


@dataclass(frozen=True)
class CommitFault:
    """A commit that cannot be read: its version, its file, and what is wrong with it.

    ``is_tail``: no readable commit follows, so nobody can have built on it once the writes are synced in their order.
    """

    version: int
    path: str
    problem: str
    is_tail: bool

    def error(self) -> TableCorruptionError:
        """Return the fault as an error that says what to do."""
        hint = (
            "the last write before a power cut; `adtally ingest` sets it aside and does its work again"
            if self.is_tail and is_local(self.path)
            else "`adtally fsck` says what is lost and repairs it; docs/runbooks/power-cut.md"
        )
        return TableCorruptionError(f"{self.path} is not a whole commit: {self.problem}", hint=hint)


def _sizes_of_commits(entries: list[fs.FileInfo]) -> dict[int, int]:
    found = ((_COMMIT.fullmatch(entry.base_name), entry.size) for entry in entries)
    return {int(match[1]): int(size or 0) for match, size in found if match}


def _newest(entries: list[fs.FileInfo]) -> int | None:
    """Return the newest version that has a commit, or a checkpoint with all of its parts."""
    parts = Counter(
        (int(match[1]), int(match[3] or 1)) for entry in entries if entry.size and (match := _CHECKPOINT.fullmatch(entry.base_name))
    )
    checkpoints = [version for (version, wanted), found in parts.items() if found >= wanted]
    return max([*_sizes_of_commits(entries), *checkpoints], default=None)


def commit_identity(commit: Commit | None) -> str:
    """Return a hash of a commit's data file names, which differs between two commits of one version. Empty for None."""
    if commit is None:
        return ""
    paths = [action["path"] for action in (*commit.added, *commit.removed)]
    return xxh3_64_hexdigest(json.dumps([commit.version, commit.info, paths], sort_keys=True).encode())


class DeltaLog:
    """The log of one table."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files, root = open_root(uri)
        self._folder = f"{root}/_delta_log"

    def exists(self) -> bool:
        """Return whether the table has been created. Reads no commit."""
        return _newest(self._entries()) is not None

    def latest_version(self) -> int | None:
        """Return the newest version, None if there is no table. A checkpoint may have replaced old commits.

        Raises TableCorruptionError if a commit is empty, or the newest one cannot be read.
        """
        entries = self._entries()
        newest = _newest(entries)
        sizes = _sizes_of_commits(entries)
        for version, size in sizes.items():
            if not size:
                self._raise_fault(version)
        if newest is not None and newest in sizes and _readable.get(self.uri) != newest:
            self._raise_fault(newest)
            _readable[self.uri] = newest
        return newest

    def table_id(self) -> str:
        """Return the table's id, which differs between two tables of one name, from its first commit or a checkpoint."""
        first = self.commit(0)
        return first.table_id if first and first.table_id else str(DeltaTable(self.uri).metadata().id)

    def commits(self, after: int, until: int) -> list[Commit] | None:
        """Return the commits after version ``after`` up to ``until``; None if the log no longer has one of them."""
        found: list[Commit] = []
        for version in range(after + 1, until + 1):
            commit = self.commit(version)
            if commit is None:
                return None
            found.append(commit)
        return found

    def newest_metadata(self) -> dict[str, Any] | None:
        """Return the metadata of the newest commit that has some; None if no commit of the log has."""
        return next((commit.metadata for commit in self.commits_backwards() if commit.metadata), None)

    def commit_sizes(self) -> dict[int, int]:
        """Return the size in bytes of each commit of the log, by version."""
        return _sizes_of_commits(self._entries())

    def _entries(self) -> list[fs.FileInfo]:
        return list(self._files.get_file_info(fs.FileSelector(self._folder, allow_not_found=True)))

    def faults(self) -> list[CommitFault]:
        """Return every unreadable commit and every version missing between two commits; reads the whole log."""
        versions = sorted(self.commit_sizes())
        bad = {version: problem for version in versions if (problem := self._problem(version))}
        good = max((version for version in versions if version not in bad), default=-1)
        if versions:
            bad |= dict.fromkeys(set(range(versions[0], versions[-1])) - set(versions), "it is missing")
        return [CommitFault(version, self.commit_path(version), bad[version], version > good) for version in sorted(bad)]

    def tail_faults(self) -> list[CommitFault]:
        """Return the unreadable commits after the last readable one, oldest first; reads only these."""
        found: list[CommitFault] = []
        for version in sorted(self.commit_sizes(), reverse=True):
            problem = self._problem(version)
            if problem is None:
                break
            found.append(CommitFault(version, self.commit_path(version), problem, is_tail=True))
        return found[::-1]

    def commit_path(self, version: int) -> str:
        """Return the file of a version's commit."""
        return f"{self._folder}/{version:020d}.json"

    def commit(self, version: int) -> Commit | None:
        """Read a version's commit, None if the log no longer has it. Raises TableCorruptionError if it cannot be read."""
        try:
            return self._read(version)
        except FileNotFoundError:
            return None
        except ValueError:
            self._raise_fault(version)
            raise

    def _read(self, version: int) -> Commit:
        with self._files.open_input_stream(self.commit_path(version)) as stream:
            return parse_commit(version, stream.read().decode("utf-8"))

    def _problem(self, version: int) -> str | None:
        """Return what is wrong with an existing commit; None if nothing is."""
        try:
            self._read(version)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return str(error)[:200]
        return None

    def _raise_fault(self, version: int) -> None:
        """Raise the error of a version that cannot be read."""
        problem = self._problem(version)
        if problem is not None:
            tail = {fault.version for fault in self.tail_faults()}
            raise CommitFault(version, self.commit_path(version), problem, version in tail).error()

    def commits_backwards(self, start: int | None = None) -> Iterator[Commit]:
        """Yield commits from ``start`` (default: the newest) back to the oldest that the log still has."""
        version = self.latest_version() if start is None else start
        while version is not None and version >= 0:
            commit = self.commit(version)
            if commit is None:
                return
            yield commit
            version -= 1

    def find_transaction(self, app_id: str, txn_version: int) -> Commit | None:
        """Return the commit that wrote transaction ``txn_version`` of ``app_id``, if there is one."""
        for commit in self.commits_backwards():
            if commit.txn is not None and commit.txn[0] == app_id and commit.txn[1] <= txn_version:
                return commit if commit.txn[1] == txn_version else None
        return None
