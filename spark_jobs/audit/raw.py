"""What there is of Kafka's records: how far the queries have come, by offsets, and what the table of raw records holds of them.

Offsets have holes (markers of transactions, compaction), so rows alone do not tell whether a range is whole. The query that writes
the table tells: all that it has committed past is there. Its checkpoint says where it began and what it has committed; what an
earlier query wrote, whose checkpoint was lost, is taken to be whole between its first and its last row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
from deltalake import DeltaTable

from spark_jobs.audit.store import RawChunk
from spark_jobs.config import Settings
from spark_jobs.lake.duck import connect_delta
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import Table

PREFIX = "kafka/"
_PARTITION = ("cluster", "source_topic", "source_partition")
CHUNK_OFFSETS = 1 << 16  # what is parsed at a time: about 20 MB

Span = tuple[int, int]
"""Offsets [start, end)."""


@dataclass(frozen=True)
class TopicQuery:
    """A query that reads a topic, as its checkpoint says. Offsets are by name, kafka/<cluster>/<topic>/<partition>.

    ``done`` are the batches that have ended; it began at ``start`` (a partition that came later: at 0) and has come to ``end``.
    """

    query_id: str
    done: frozenset[int]
    start: dict[str, int] = field(default_factory=dict)
    end: dict[str, int] = field(default_factory=dict)


def is_of_kafka(name: str) -> bool:
    """Whether a name is that of a partition, not of a landing file."""
    return name.startswith(PREFIX)


def cluster_of(name: str) -> str:
    """The cluster that a partition's name has in it."""
    return name.split("/")[1]


def read_queries(settings: Settings, stream: str) -> dict[str, TopicQuery]:
    """The queries with checkpoints ``<stream>-<cluster>``, by what comes then. One that cannot be read is none.

    A topic that was deleted and made anew is another one, ``<topic>~2``, whose checkpoint is ``<stream>-<cluster>~2``.
    """
    found = {}
    for folder in sorted(settings.checkpoints_path.glob(f"{stream}-*")):
        key = folder.name.removeprefix(f"{stream}-")
        try:
            query_id = str(json.loads((folder / "metadata").read_text("utf-8"))["id"])
            done = frozenset(int(path.name) for path in (folder / "commits").glob("*") if path.name.isdecimal())
            end = _named(key, (folder / "offsets" / str(max(done))).read_text("utf-8").splitlines()[2]) if done else {}
            found[key] = TopicQuery(query_id, done, _began(key, folder), end)
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
    return found


def _key(name: str) -> str:
    """The key of the query that reads a partition."""
    _, cluster, topic, _ = name.split("/")
    return cluster + "".join(topic.partition("~")[1:])


def _began(key: str, folder: Path) -> dict[str, int]:
    """Where the query began: Spark writes a zero byte, a line with a version, then the offsets."""
    try:
        text = (folder / "sources" / "0" / "0").read_bytes().lstrip(b"\0").decode("utf-8")
    except OSError:
        return {}
    return _named(key, text.split("\n", 1)[1])


def _named(key: str, text: str) -> dict[str, int]:
    cluster, mark, number = key.partition("~")
    return {
        f"{PREFIX}{cluster}/{topic}{mark}{number}/{partition}": int(offset)
        for topic, partitions in json.loads(text).items()
        for partition, offset in partitions.items()
    }


# --- spans


def minus(span: Span, taken: Iterable[Span]) -> list[Span]:
    """What is left of ``span`` without ``taken`` (in ascending order; they may overlap)."""
    left, at = [], span[0]
    for start, end in taken:
        if end <= at or start >= span[1]:
            continue
        if start > at:
            left.append((at, start))
        at = max(at, end)
    return [*left, (at, span[1])] if at < span[1] else left


def both(span: Span, others: Iterable[Span]) -> list[Span]:
    """The parts of ``span`` that lie in ``others`` (ascending, apart from each other)."""
    cut = ((max(span[0], start), min(span[1], end)) for start, end in others)
    return [part for part in cut if part[0] < part[1]]


# --- the table


class RawTable:
    """A table of raw records at its newest version, and what it has of each partition."""

    def __init__(self, settings: Settings, table: Table) -> None:
        # first how far the queries are: their rows are in the table before
        self._queries = read_queries(settings, table.name)
        uri = settings.table_uri(table.name)
        self.version = DeltaLog(uri).latest_version()
        self._table = None if self.version is None else DeltaTable(uri, version=self.version)
        self.table_id = "" if self._table is None else str(self._table.metadata().id)
        self._uri = uri
        self._files: dict[tuple[object, ...], list[tuple[float, float, str]]] | None = None
        self._rows: dict[str, Span] | None = None

    def held(self, name: str, *, from_offset: int) -> list[Span]:
        """The offsets of a partition of which all records are there, ascending; ``from_offset`` is the lowest that matters."""
        query = self._queries.get(_key(name))
        own = None
        if query is not None and name in query.end:
            own = (query.start.get(name, 0), query.end[name])
        if own is not None and own[0] <= from_offset:
            return [own] if own[0] < own[1] else []
        earlier = self._of_rows().get(name)  # up to where the query began, or of all where there is none
        spans = [] if earlier is None else minus((earlier[0], earlier[1]), [] if own is None else [(own[0], 2**62)])
        return [span for span in (*spans, *([] if own is None else [own])) if span[0] < span[1]]

    def is_behind(self, name: str, offset: int) -> bool:
        """Whether the query that writes the table will come to ``offset``; False where there is no query."""
        query = self._queries.get(_key(name))
        return query is not None and offset >= query.end.get(name, query.start.get(name, 0))

    def _of_rows(self) -> dict[str, Span]:
        """By partition: from the first row, to behind the last one that the running query has not written."""
        if self._rows is None:
            self._rows = {}
            if self._table is not None:
                starts = pa.table(
                    {
                        "name": pa.array([name for query in self._queries.values() for name in query.end], pa.string()),
                        "began": pa.array(
                            [query.start.get(name, 0) for query in self._queries.values() for name in query.end], pa.int64()
                        ),
                    }
                )
                with connect_delta() as lake:
                    lake.register("starts", starts)
                    found = lake.execute(
                        f"""
                        with raw as (
                            select '{PREFIX}' || cluster || '/' || source_topic || '/' || source_partition as name, source_offset
                            from delta_scan('{self._uri.replace("'", "''")}', version = {self.version})
                        )
                        select name, min(source_offset), max(source_offset) + 1 from raw left join starts using (name)
                        where began is null or source_offset < began group by name
                        """
                    ).fetchall()
                self._rows = {name: (low, high) for name, low, high in found}
        return self._rows

    def chunks(self, name: str, wanted: Iterable[Span], held: list[Span]) -> Iterator[RawChunk]:
        """The chunks of ``held`` that have an offset of ``wanted`` (ascending), each once."""
        last = -1
        for start, end in wanted:
            for number in range(max(start // CHUNK_OFFSETS, last + 1), -(-end // CHUNK_OFFSETS)):
                last = number
                for low, high in both((number * CHUNK_OFFSETS, (number + 1) * CHUNK_OFFSETS), held):
                    yield RawChunk(name, low, high, self.table_id, partial(self._paths, name, low, high))

    def _paths(self, name: str, low: int, high: int) -> list[str]:
        """The data files that may hold a record of offsets [low, high)."""
        if self._files is None:
            self._files = self._data_files()
        _, cluster, topic, partition = name.split("/")
        candidates = [*self._files.get((cluster, topic, int(partition)), ()), *self._files.get((), ())]
        return [path for least, most, path in candidates if least < high and most >= low]

    def _data_files(self) -> dict[tuple[object, ...], list[tuple[float, float, str]]]:
        """(lowest offset, highest, path) of the data files by partition; under () those of several, or without statistics."""
        found: dict[tuple[object, ...], list[tuple[float, float, str]]] = {}
        actions = [] if self._table is None else pa.table(self._table.get_add_actions(flatten=True)).to_pylist()
        for action in actions:
            bounds = [[action.get(f"{side}.{name}") for name in _PARTITION] for side in ("min", "max")]
            low, high = (action.get(f"{side}.source_offset") for side in ("min", "max"))
            key = tuple(bounds[0]) if bounds[0] == bounds[1] and None not in bounds[0] else ()
            path = f"{self._uri}/{unquote(action['path'])}"
            found.setdefault(key, []).append((-inf if low is None else low, inf if high is None else high, path))
        return found
