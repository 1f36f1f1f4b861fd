"""Read from the checkpoints how far each query has come. A checkpoint that cannot be read counts as none."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from spark_jobs.audit.plans import landing_name
from spark_jobs.config import Settings
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read

PREFIX = "kafka/"
_DAMAGED = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class FileQuery:
    """The query that reads a stream's landing files (``query_id`` None: there is none).

    ``done`` are its finished batches, ``taken`` the names of their files.
    """

    query_id: str | None = None
    done: frozenset[int] = frozenset()
    taken: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TopicQuery:
    """A query that reads a topic. Offsets are by partition, kafka/<cluster>/<topic>/<partition>.

    ``done`` are its finished batches. It began at ``start`` (at 0 for a partition that was added later) and has committed up to
    ``end``.
    """

    query_id: str
    done: frozenset[int]
    start: dict[str, int] = field(default_factory=dict)
    end: dict[str, int] = field(default_factory=dict)


def is_of_kafka(name: str) -> bool:
    """Return whether a name is that of a partition, not of a landing file."""
    return name.startswith(PREFIX)


def cluster_of(name: str) -> str:
    """Return the cluster of a partition's name."""
    return name.split("/")[1]


def query_key(name: str) -> str:
    """Return the key, as in ``read_topic_queries``, of the query that reads a partition."""
    _, cluster, topic, _ = name.split("/")
    return cluster + "".join(topic.partition("~")[1:])


def read_file_query(settings: Settings, stream: str) -> FileQuery:
    """Read the query of a stream's landing files."""
    folder = checkpoints_to_read(settings) / stream
    try:
        query_id, done, offset = _read(folder)
        if offset is None:
            return FileQuery(query_id)
        return FileQuery(query_id, done, frozenset(_taken_files(folder / "sources" / "0", int(offset["logOffset"]))))
    except _DAMAGED:
        return FileQuery()


def read_topic_queries(settings: Settings, stream: str) -> dict[str, TopicQuery]:
    """Read the queries with checkpoints ``<stream>-<key>``, by key.

    The key is the cluster. A topic that was deleted and created again is another topic, ``<topic>~2``, with key ``<cluster>~2``.
    """
    found = {}
    for folder in sorted(checkpoints_to_read(settings).glob(f"{stream}-*")):
        key = folder.name.removeprefix(f"{stream}-")
        with suppress(*_DAMAGED):
            query_id, done, offset = _read(folder)
            found[key] = TopicQuery(query_id, done, _start(key, folder), _by_partition(key, offset or {}))
    return found


def _read(folder: Path) -> tuple[str, frozenset[int], Any]:
    """Read the id of a query, its finished batches, and the offset at the end of the last one (None: no batch has finished)."""
    query_id = str(json.loads((folder / "metadata").read_text("utf-8"))["id"])
    done = frozenset(int(path.name) for path in (folder / "commits").glob("*") if path.name.isdecimal())
    last = (folder / "offsets" / str(max(done))).read_text("utf-8").splitlines()[2] if done else "null"
    return query_id, done, json.loads(last)


def _taken_files(folder: Path, last: int) -> set[str]:
    names = set()
    logs = [path for path in folder.glob("*") if path.name.removesuffix(".compact").isdecimal()]
    for entry in (json.loads(line) for path in logs for line in path.read_text("utf-8").splitlines()[1:]):
        if entry["batchId"] <= last:
            uri = urlsplit(entry["path"])
            names.add(landing_name(unquote(uri.path) if uri.scheme == "file" else entry["path"]))
    return names


def _start(key: str, folder: Path) -> dict[str, int]:
    """Read where a query began. Spark writes a zero byte, a line with a version, then the offsets."""
    try:
        text = (folder / "sources" / "0" / "0").read_bytes().lstrip(b"\0").decode("utf-8")
    except OSError:
        return {}
    return _by_partition(key, json.loads(text.split("\n", 1)[1]))


def _by_partition(key: str, offsets: dict[str, dict[str, int]]) -> dict[str, int]:
    cluster, mark, number = key.partition("~")
    return {
        f"{PREFIX}{cluster}/{topic}{mark}{number}/{partition}": int(offset)
        for topic, partitions in offsets.items()
        for partition, offset in partitions.items()
    }
