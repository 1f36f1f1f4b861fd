"""Reads a Delta table's log without a Spark job: versions, commits, transactions, files.

After a power cut a commit may be empty or truncated. delta-rs and DuckDB read an empty commit as a version without changes, so a
reader would silently miss rows. ``DeltaLog`` raises TableCorruptionError instead. A *torn tail* is unreadable commits that no
readable one follows: the next command that writes sets them aside (``lake/torn.py``). ``adtally fsck`` names any other damage.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from xxhash import xxh3_64_hexdigest

from spark_jobs.errors import TableCorruptionError
from spark_jobs.failure import one_line
from spark_jobs.lake.locations import is_local
from spark_jobs.lake.places import PlacedFile, open_place
from spark_jobs.lake.reading import open_table

RETYPED_KEY = "adtallyRetyped"  # in the commitInfo of a commit that only rewrote the rows with other types
RUN_KEY = "adtallyCompaction"  # in the commitInfo of a compaction, with the id of its run
FENCE = "fence:"  # the app ids of the leases under which a commit was made (`fencing.py`)
TOKENS_KEY = "erased"  # in the userMetadata of a commit that replaced ids of people: their tokens
NONCE_KEY = "adtallyNonce"  # in the commitInfo of each of our commits
_FOLDER = "_delta_log"
_COMMIT = re.compile(r"(\d{20})\.json")
# a single file, one of several parts, or named by a UUID
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint(?:\.(\d{10})\.(\d{10})|\.[0-9a-f-]{36})?\.(?:parquet|json)")
_readable: dict[str, int] = {}  # table -> the newest version that this process has read
_own: dict[str, int] = {}  # table in a store -> the newest commit that this process has made
_listed: dict[str, PlacedFile] = {}  # table -> the newest commit that this process has listed
_KEPT_BYTES = 32 * 1024 * 1024
_MOST_AT_ONCE = 32  # commits read ahead of their use


@dataclass(frozen=True)
class Commit:
    """One version: its transaction (app id, version), user metadata, added and removed data files, and its commitInfo.

    ``transactions`` are all, by app id: also the fences of leases, which ``txn`` leaves out.
    """

    version: int
    txn: tuple[str, int] | None = None
    user_metadata: str | None = None
    added: tuple[dict[str, Any], ...] = field(default=())
    removed: tuple[dict[str, Any], ...] = field(default=())
    table_id: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    transactions: dict[str, int] = field(default_factory=dict)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The user metadata of our writers, a JSON object. Empty if the commit has none, or another tool's."""
        try:
            found = json.loads(self.user_metadata or "{}")
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def committed_ms(self) -> int:
        """The time of the commit in milliseconds since the epoch; 0 if it has none."""
        found = self.info.get("timestamp")
        return found if isinstance(found, int) else 0

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
    """Parse the text of a commit's JSON file. Raises ValueError if the text is incomplete, or no commit."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    try:
        for line in filter(None, text.split("\n")):  # not splitlines: strings may contain U+2028 and the like
            action = json.loads(line)
            if not isinstance(action, dict):
                raise ValueError("a line of it is not an action")
            kind, content = next(iter(action.items()), ("", {}))
            if isinstance(content, dict):
                by_kind[kind].append(content)
            elif kind != "commitInfo":  # which may be anything
                raise ValueError(f"its action {kind} is no object")
        if not by_kind:
            raise ValueError("it is empty")
        transactions = {str(one["appId"]): int(one["version"]) for one in by_kind["txn"]}
        table_id = [str(one["id"]) for one in by_kind["metaData"]]
        if not all(isinstance(one["path"], str) for one in (*by_kind["add"], *by_kind["remove"])):
            raise ValueError("it names a file that is no text")
    except KeyError as error:
        raise ValueError(f"an action of it has no {error}") from None
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(one_line(error, 200)) from None
    txn = [found for found in transactions.items() if not found[0].startswith(FENCE)]
    info = (by_kind["commitInfo"] or [{}])[-1]
    added, removed, user_metadata = tuple(by_kind["add"]), tuple(by_kind["remove"]), info.get("userMetadata")
    last, table = txn[-1] if txn else None, table_id[-1] if table_id else None
    known = user_metadata if isinstance(user_metadata, str) else None
    return Commit(version, last, known, added, removed, table, info, transactions)


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


class _Kept:
    """Commits of tables in stores, which never change: the last used ones, up to _KEPT_BYTES of text."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[str, int], tuple[Commit, int]] = {}
        self._bytes = 0

    def get(self, uri: str, version: int) -> Commit | None:
        with self._lock:
            found = self._found.pop((uri, version), None)
            if found is None:
                return None
            self._found[uri, version] = found  # the last in the dict was used last
            return found[0]

    def put(self, uri: str, commit: Commit, size: int) -> None:
        with self._lock:
            if (uri, commit.version) not in self._found:
                self._found[uri, commit.version] = commit, size
                self._bytes += size
            while self._bytes > _KEPT_BYTES and len(self._found) > 1:
                self._bytes -= self._found.pop(next(iter(self._found)))[1]

    def clear(self) -> None:
        with self._lock:
            self._found.clear()
            self._bytes = 0


_kept = _Kept()


def note_commit(uri: str, version: int) -> None:
    """Remember a commit to a table in a store that this process has made: from now on no older version is the newest."""
    _own[uri] = max(version, _own.get(uri, -1))


def _match(pattern: re.Pattern[str], file: PlacedFile) -> re.Match[str] | None:
    return pattern.fullmatch(file.name.removeprefix(f"{_FOLDER}/"))


def _sizes_of_commits(entries: list[PlacedFile]) -> dict[int, int]:
    return {int(match[1]): entry.size for entry in entries if (match := _match(_COMMIT, entry))}


def _newest(entries: list[PlacedFile]) -> int | None:
    """Return the newest version that has a commit, or a checkpoint with all of its parts."""
    parts = Counter(
        (int(match[1]), int(match[3] or 1)) for entry in entries if entry.size and (match := _match(_CHECKPOINT, entry))
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
        self._place = open_place(uri)

    @property
    def poll_seconds(self) -> float:
        """Return how long to wait between two looks for a new version: a look at a store costs a request."""
        return 1.0 if self._place.is_remote else 0.05

    def exists(self) -> bool:
        """Return whether the table has been created. Reads no commit."""
        return _newest(self._new_entries()) is not None

    def latest_version(self) -> int | None:
        """Return the newest version, None if there is no table. A checkpoint may have replaced old commits.

        Raises TableCorruptionError if a commit is empty, or the newest one cannot be read.
        """
        entries = self._new_entries()
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
        return first.table_id if first and first.table_id else str(open_table(self.uri).metadata().id)

    def commits(self, after: int, until: int) -> list[Commit] | None:
        """Return the commits after version ``after`` up to ``until``; None if the log no longer has one of them."""
        found: list[Commit] = []
        for commit in self._ahead(range(after + 1, until + 1)):
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

    def _entries(self) -> list[PlacedFile]:
        return list(self._place.list(_FOLDER))

    def _recent_entries(self) -> list[PlacedFile]:
        """List the log from its last checkpoint on, which no reader goes behind; all of it if there is none, or it is damaged.

        In a store this would be one more request.
        """
        if self._place.is_remote:
            return self._entries()
        try:
            version = int(json.loads(self._place.read(f"{_FOLDER}/_last_checkpoint"))["version"])
        except (OSError, ValueError, KeyError, TypeError):
            return self._entries()
        entries = list(self._place.list(_FOLDER, after=f"{_FOLDER}/{version:020d}"))
        return entries if _sizes_of_commits(entries) else self._entries()

    def _new_entries(self) -> list[PlacedFile]:
        """List the log from the newest commit on that this process has listed, or do as `_recent_entries` if that one is gone."""
        last = _listed.get(self.uri)
        entries = [] if last is None else list(self._place.list(_FOLDER, after=last.name.removesuffix(".json")))
        if last is not None and last not in entries:
            found = self._place.find(last.name)
            if found is not None and found.tag and found.tag == last.tag:  # the store's list lags
                entries.append(last)
            else:  # the log was cleaned up, or the table was created again
                _listed.pop(self.uri, None)
                _kept.clear()
                last = None
        if last is None:
            entries = self._recent_entries()
        entries += self._own_commit(entries)
        commits = [entry for entry in entries if entry.size and _match(_COMMIT, entry)]
        if commits:
            _listed[self.uri] = commits[-1]
        return entries

    def _own_commit(self, entries: list[PlacedFile]) -> list[PlacedFile]:
        """Return the newest commit that this process made, if a list that lags does not have it."""
        own = _own.pop(self.uri, None)
        if own is None or own <= max(_sizes_of_commits(entries), default=-1):
            return []
        found = self._place.find(self.commit_file(own))  # None: nothing was to commit, or the table was created again
        return [] if found is None else [found]

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
        for entries in (self._recent_entries, self._entries):
            found: list[CommitFault] = []
            for version in sorted(_sizes_of_commits(entries()), reverse=True):
                problem = self._problem(version)
                if problem is None:
                    return found[::-1]
                found.append(CommitFault(version, self.commit_path(version), problem, is_tail=True))
        return found[::-1]

    def commit_path(self, version: int) -> str:
        """Return the location of a version's commit."""
        return f"{self.uri}/{self.commit_file(version)}"

    def commit(self, version: int) -> Commit | None:
        """Read a version's commit, None if the log no longer has it. Raises TableCorruptionError if it cannot be read."""
        return next(self._ahead([version]))

    def _ahead(self, versions: Sequence[int]) -> Iterator[Commit | None]:
        """Yield the commits of versions, None for one that the log does not have.

        On a disk reads each when it is wanted. From a store reads ahead of that, more and more commits at once.
        """
        if not self._place.is_remote:
            for version, text in zip(versions, self._place.read_many(map(self.commit_file, versions)), strict=True):
                yield None if text is None else self._parse(version, text)
            return
        at, count = 0, 1
        while at < len(versions):
            yield from self._at_once(versions[at : at + count])
            at, count = at + count, min(2 * count, _MOST_AT_ONCE)

    def _at_once(self, versions: Sequence[int]) -> Iterator[Commit | None]:
        found = {version: _kept.get(self.uri, version) for version in versions}
        missing = [version for version in versions if found[version] is None]
        texts = dict(zip(missing, self._place.read_many(list(map(self.commit_file, missing))), strict=True))
        for version in versions:
            text = texts.get(version)
            yield found[version] if text is None else self._parse(version, text)

    def _parse(self, version: int, text: bytes) -> Commit:
        try:
            commit = parse_commit(version, text.decode("utf-8"))
        except ValueError:
            self._raise_fault(version)
            raise
        if self._place.is_remote:
            _kept.put(self.uri, commit, len(text))
        return commit

    def commit_file(self, version: int) -> str:
        """Return the file of a version's commit, relative to the table."""
        return f"{_FOLDER}/{version:020d}.json"

    def _problem(self, version: int) -> str | None:
        """Return what is wrong with an existing commit; None if nothing is."""
        try:
            parse_commit(version, self._place.read(self.commit_file(version)).decode("utf-8"))
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
        for commit in self._ahead(range(-1 if version is None else version, -1, -1)):
            if commit is None:
                return
            yield commit

    def find_transaction(self, app_id: str, txn_version: int) -> Commit | None:
        """Return the commit that wrote transaction ``txn_version`` of ``app_id``, if there is one."""
        for commit in self.commits_backwards():
            if commit.txn is not None and commit.txn[0] == app_id and commit.txn[1] <= txn_version:
                return commit if commit.txn[1] == txn_version else None
        return None
