"""The raw copies of Kafka's topics: which offsets they have, and in which data files.

Offsets have gaps (transaction markers, compaction), so the rows alone do not show whether a range is complete. The checkpoint of
the query that writes the table shows it: the table has every record from where the query began to what it has committed. For an
earlier query, whose checkpoint was lost, the table counts as complete between that query's first and last row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from math import inf
from urllib.parse import unquote

import pyarrow as pa

from spark_jobs.audit.checkpoints import PREFIX, query_key, read_topic_queries
from spark_jobs.audit.store import RawChunk
from spark_jobs.config import Settings
from spark_jobs.lake.lake import Snapshot
from spark_jobs.lake.retirements import retired_spans
from spark_jobs.lake.tables import RAW_TABLES

NO_END = 2**62
_PARTITION = ("cluster", "source_topic", "source_partition")
CHUNK_OFFSETS = 1 << 16  # parsed at a time: about 20 MB

Span = tuple[int, int]
"""Offsets [start, end)."""


# --- spans


def subtract(span: Span, taken: Iterable[Span]) -> list[Span]:
    """Return the parts of ``span`` outside ``taken``, which is in ascending order and may overlap."""
    left, at = [], span[0]
    for start, end in taken:
        if end <= at or start >= span[1]:
            continue
        if start > at:
            left.append((at, start))
        at = max(at, end)
    return [*left, (at, span[1])] if at < span[1] else left


def intersect(span: Span, others: Iterable[Span]) -> list[Span]:
    """Return the parts of ``span`` inside ``others``, which is in ascending order and does not overlap."""
    cut = ((max(span[0], start), min(span[1], end)) for start, end in others)
    return [part for part in cut if part[0] < part[1]]


# --- the table


class RawTable:
    """The raw copy of a stream's topics, pinned at its newest version, and which offsets of each partition it has in full."""

    def __init__(self, settings: Settings, stream: str, snapshot: Snapshot) -> None:
        # The queries first: the pinned version has all rows that they have committed.
        self._queries = read_topic_queries(settings, RAW_TABLES[stream].name)
        self._table = RAW_TABLES[stream]
        self.snapshot = snapshot.and_pin(self._table)
        self._retired = retired_spans(snapshot.lake, stream)
        self._table_id = snapshot.lake.log(self._table).table_id() if self._table in self.snapshot else ""

    def complete_spans(self, name: str, *, from_offset: int) -> list[Span]:
        """Return the offsets of a partition that are there in full, ascending; ``from_offset`` is the lowest that matters."""
        retired = self._retired.get(name, [])
        return [part for span in self._written_spans(name, from_offset) for part in subtract(span, retired)]

    def _written_spans(self, name: str, from_offset: int) -> list[Span]:
        """Return the offsets of a partition that were written in full, ascending."""
        query = self._queries.get(query_key(name))
        own = [(query.start.get(name, 0), query.end[name])] if query is not None and name in query.end else []
        if own and own[0][0] <= from_offset:
            return [span for span in own if span[0] < span[1]]
        later = [(own[0][0], NO_END)] if own else []
        earlier = [part for span in self._row_spans.get(name, ()) for part in subtract(span, later)]
        return [span for span in (*earlier, *own) if span[0] < span[1]]

    def will_reach(self, name: str, offset: int) -> bool:
        """Return whether the query that writes the table has yet to reach ``offset``; False if there is no query."""
        query = self._queries.get(query_key(name))
        return query is not None and offset >= query.end.get(name, query.start.get(name, 0))

    @cached_property
    def _row_spans(self) -> dict[str, list[Span]]:
        """For each partition: from its first row to its last one, without the rows that the running query has written."""
        if self._table not in self.snapshot:
            return {}
        starts = [{"name": name, "began": query.start.get(name, 0)} for query in self._queries.values() for name in query.end]
        began = pa.Table.from_pylist(starts, pa.schema({"name": pa.string(), "began": pa.int64()}))
        with self.snapshot.lake.database() as database:
            database.register("starts", began)
            found = database.execute(
                f"""
                with raw as (
                    select '{PREFIX}' || cluster || '/' || source_topic || '/' || source_partition as name, source_offset
                    from {self.snapshot.scan(self._table)}
                )
                select name, min(source_offset), max(source_offset) + 1 from raw left join starts using (name)
                where began is null or source_offset < began group by name
                """
            ).fetchall()
        return {name: [(low, high)] for name, low, high in found}

    def chunks(self, name: str, wanted: Iterable[Span], complete: list[Span]) -> Iterator[RawChunk]:
        """Yield the chunks of ``complete`` that have an offset of ``wanted`` (ascending), each once."""
        last = -1
        for start, end in wanted:
            for number in range(max(start // CHUNK_OFFSETS, last + 1), -(-end // CHUNK_OFFSETS)):
                last = number
                for low, high in intersect((number * CHUNK_OFFSETS, (number + 1) * CHUNK_OFFSETS), complete):
                    yield RawChunk(name, low, high, self._table_id, partial(self._paths, name, low, high))

    def _paths(self, name: str, low: int, high: int) -> list[str]:
        """Return the data files that may have a record of offsets [low, high)."""
        _, cluster, topic, partition = name.split("/")
        candidates = [*self._files.get((cluster, topic, int(partition)), ()), *self._files.get((), ())]
        return [path for least, most, path in candidates if least < high and most >= low]

    @cached_property
    def _files(self) -> dict[tuple[object, ...], list[tuple[float, float, str]]]:
        """(lowest offset, highest, path) of the data files by partition; under () files with several, or without statistics."""
        found: dict[tuple[object, ...], list[tuple[float, float, str]]] = {}
        uri = self.snapshot.lake.uri(self._table)
        for file in self.snapshot.files(self._table) if self._table in self.snapshot else ():
            bounds = [[side.get(name) for name in _PARTITION] for side in (file.low, file.high)]
            low, high = (side.get("source_offset") for side in (file.low, file.high))
            key = tuple(bounds[0]) if bounds[0] == bounds[1] and None not in bounds[0] else ()
            path = f"{uri}/{unquote(file.path)}"
            found.setdefault(key, []).append((-inf if low is None else low, inf if high is None else high, path))
        return found
