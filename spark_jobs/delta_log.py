"""Reading a Delta table's log without a Spark job: versions, commits, transactions, files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

_COMMIT = re.compile(r"(\d{20})\.json")


@dataclass(frozen=True)
class Commit:
    """One version: its transaction (app id, version), user metadata, and the data files it added and removed."""

    version: int
    txn: tuple[str, int] | None = None
    user_metadata: str | None = None
    added: tuple[dict[str, Any], ...] = field(default=())
    removed: tuple[dict[str, Any], ...] = field(default=())
    table_id: str | None = None

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
    added: list[dict[str, Any]] = []
    removed: list[dict[str, Any]] = []
    for line in text.rstrip("\n").split("\n"):  # not splitlines: strings in it may hold U+2028 and the like as they are
        action = json.loads(line)
        if "txn" in action:
            txn = (action["txn"]["appId"], int(action["txn"]["version"]))
        elif "commitInfo" in action:
            user_metadata = action["commitInfo"].get("userMetadata")
        elif "add" in action:
            added.append(action["add"])
        elif "remove" in action:
            removed.append(action["remove"])
        elif "metaData" in action:
            table_id = action["metaData"]["id"]
    return Commit(version, txn, user_metadata, tuple(added), tuple(removed), table_id)


class DeltaLog:
    """The log of one table. Local paths are read with the file system, others (s3a://...) through Spark's."""

    def __init__(self, uri: str, spark: SparkSession | None = None) -> None:
        self.uri = uri
        self._spark = spark
        self._local = None if "://" in uri else Path(uri) / "_delta_log"

    def exists(self) -> bool:
        """Whether the table has been created."""
        return self.latest_version() is not None

    def latest_version(self) -> int | None:
        """The newest version, None if there is no table."""
        if self._local is not None:
            try:
                names = (_COMMIT.fullmatch(entry.name) for entry in self._local.iterdir())
                return max((int(match[1]) for match in names if match), default=None)
            except FileNotFoundError:
                return None
        statuses = self._hadoop_list()
        return max((int(match[1]) for match in map(_COMMIT.fullmatch, statuses) if match), default=None)

    def commit(self, version: int) -> Commit | None:
        """A version's commit, None if the log no longer has it."""
        name = f"{version:020d}.json"
        if self._local is not None:
            try:
                return parse_commit(version, (self._local / name).read_text("utf-8"))
            except FileNotFoundError:
                return None
        text = self._hadoop_read(name)
        return None if text is None else parse_commit(version, text)

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

    def _hadoop_path(self, name: str = "") -> tuple[Any, Any]:
        if self._spark is None:
            raise ValueError(f"{self.uri} needs a Spark session to be read")
        jvm: Any = self._spark._jvm
        path = jvm.org.apache.hadoop.fs.Path(f"{self.uri}/_delta_log/{name}".rstrip("/"))
        return path.getFileSystem(self._spark._jsc.hadoopConfiguration()), path

    def _hadoop_list(self) -> list[str]:
        filesystem, path = self._hadoop_path()
        if not filesystem.exists(path):
            return []
        return [status.getPath().getName() for status in filesystem.listStatus(path)]

    def _hadoop_read(self, name: str) -> str | None:
        filesystem, path = self._hadoop_path(name)
        if not filesystem.exists(path):
            return None
        assert self._spark is not None
        jvm: Any = self._spark._jvm
        stream = filesystem.open(path)
        try:
            return str(jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
        finally:
            stream.close()
