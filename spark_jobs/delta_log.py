"""Reading a Delta table's log without a Spark job: versions, commits, transactions, files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pyarrow import fs

from spark_jobs.storage import open_root

_COMMIT = re.compile(r"(\d{20})\.json")


@dataclass(frozen=True)
class Commit:
    """One version: its transaction (app id, version), user metadata, and the data files it added and removed.

    ``info`` is all of its commitInfo.
    """

    version: int
    txn: tuple[str, int] | None = None
    user_metadata: str | None = None
    added: tuple[dict[str, Any], ...] = field(default=())
    removed: tuple[dict[str, Any], ...] = field(default=())
    table_id: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def changes_rows(self) -> bool:
        """False for a commit that only rearranges rows (compaction) or adds none."""
        return bool(self.data_added or self.data_removed)

    @property
    def data_added(self) -> tuple[dict[str, Any], ...]:
        """Added files that bring rows, not rearrange them."""
        return tuple(action for action in self.added if action.get("dataChange", True))

    @property
    def data_removed(self) -> tuple[dict[str, Any], ...]:
        """Removed files whose rows went or changed."""
        return tuple(action for action in self.removed if action.get("dataChange", True))


def parse_commit(version: int, text: str) -> Commit:
    """A commit from the text of its JSON file."""
    txn: tuple[str, int] | None = None
    user_metadata: str | None = None
    table_id: str | None = None
    info: dict[str, Any] = {}
    added: list[dict[str, Any]] = []
    removed: list[dict[str, Any]] = []
    for line in filter(None, text.split("\n")):  # not splitlines: strings in it may hold U+2028 and the like as they are
        action = json.loads(line)
        if "txn" in action:
            txn = (action["txn"]["appId"], int(action["txn"]["version"]))
        elif "commitInfo" in action:
            info = action["commitInfo"]
            user_metadata = info.get("userMetadata")
        elif "add" in action:
            added.append(action["add"])
        elif "remove" in action:
            removed.append(action["remove"])
        elif "metaData" in action:
            table_id = action["metaData"]["id"]
    return Commit(version, txn, user_metadata, tuple(added), tuple(removed), table_id, info)


class DeltaLog:
    """The log of one table."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files, root = open_root(uri)
        self._folder = f"{root}/_delta_log"

    def exists(self) -> bool:
        """Whether the table has been created."""
        return self.latest_version() is not None

    def latest_version(self) -> int | None:
        """The newest version, None if there is no table."""
        entries = self._files.get_file_info(fs.FileSelector(self._folder, allow_not_found=True))
        names = (_COMMIT.fullmatch(entry.base_name) for entry in entries)
        return max((int(match[1]) for match in names if match), default=None)

    def commit(self, version: int) -> Commit | None:
        """A version's commit, None if the log no longer has it."""
        try:
            with self._files.open_input_stream(f"{self._folder}/{version:020d}.json") as stream:
                return parse_commit(version, stream.read().decode("utf-8"))
        except FileNotFoundError:
            return None

    def commits_backwards(self, start: int | None = None) -> Iterator[Commit]:
        """Commits from ``start`` (default: the newest) back to the oldest that the log still has."""
        version = self.latest_version() if start is None else start
        while version is not None and version >= 0:
            commit = self.commit(version)
            if commit is None:
                return
            yield commit
            version -= 1

    def find_transaction(self, app_id: str, txn_version: int) -> Commit | None:
        """The commit that wrote transaction ``txn_version`` of ``app_id``, if there is one."""
        for commit in self.commits_backwards():
            if commit.txn is not None and commit.txn[0] == app_id:
                if commit.txn[1] == txn_version:
                    return commit
                if commit.txn[1] < txn_version:
                    return None
        return None
