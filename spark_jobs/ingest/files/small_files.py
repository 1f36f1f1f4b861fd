"""Parse many small files together: each statement costs milliseconds, whether it reads three rows or thousands.

A line's outcome depends only on the line and on the folder's region. So the outcome of a file is a slice of that of its group.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.erasure.suppression import Suppression
from spark_jobs.ingest.contract.parse import Parsed, Reject, parse_chunk
from spark_jobs.ingest.contract.spec import BatchLimits, Contract
from spark_jobs.ingest.event_columns import enrich
from spark_jobs.ingest.files.landing import Split
from spark_jobs.ingest.files.lines import Lines, read_whole
from spark_jobs.traffic.rules import InvalidTrafficRules

SMALL_BYTES = 64 * 1024  # of a plain file
_GROUP_BYTES = 4 * 1024 * 1024
_GROUP_FILES = 1000
_GROUP_LINES = 32 * 1024  # rejects are Python objects, and four megabytes may be four million lines


def _small_file(split: object) -> tuple[str, int] | None:
    """Return region and size of a split that is a whole, small, uncompressed file; None for any other split."""
    if not isinstance(split, Split) or split.start or split.end is not None or split.path.endswith(".gz"):
        return None
    return None if split.file_size is None or split.file_size > SMALL_BYTES else (split.region, split.file_size)


def groups(splits: Iterable[object]) -> Iterator[list[int]]:
    """Yield positions of consecutive splits that are parsed together: small ones of one region. Any other split is alone."""
    group: list[int] = []
    group_region, group_bytes = "", 0
    for position, split in enumerate(splits):
        small = _small_file(split)
        is_full = group_bytes >= _GROUP_BYTES or len(group) >= _GROUP_FILES
        if group and (small is None or is_full or small[0] != group_region):
            yield group
            group, group_bytes = [], 0
        if small is None:
            yield [position]
            continue
        group.append(position)
        group_region = small[0]
        group_bytes += small[1]
    if group:
        yield group


def parse_together(
    splits: list[Split],
    contract: Contract,
    limits: BatchLimits,
    campaigns: pa.Table,
    rules: InvalidTrafficRules,
    suppression: Suppression | None = None,
) -> dict[int, list[tuple[Parsed, pa.Table]]]:
    """Parse and enrich splits of one region; return the chunks by number of the split.

    Leaves out splits that are not whole lines, are unreadable, or have too many lines for the group: the caller parses them.
    """
    found: dict[int, list[tuple[Parsed, pa.Table]]] = {}
    taken: list[tuple[int, Lines]] = []
    count = 0
    for split, chunks in zip(splits, read_whole([split.path for split in splits]), strict=True):
        if not chunks:
            found[split.number] = []
        if len(chunks) != 1 or not isinstance(chunk := chunks[0], Lines) or not chunk.terminated:
            continue
        if count + len(chunk.ends) <= _GROUP_LINES:
            taken.append((split.number, chunk))
            count += len(chunk.ends)
    if not taken:
        return found
    starts = list(accumulate((len(chunk.ends) for _, chunk in taken), initial=0))  # the first line of each split, and the end
    sizes = accumulate((len(chunk.data) for _, chunk in taken), initial=0)
    ends = np.concatenate([chunk.ends + size for (_, chunk), size in zip(taken, sizes, strict=False)])
    each = replace(limits, rejects_kept=None)  # all rejects, repeated lines too: the repeats may be in other files
    data = b"".join(chunk.data for _, chunk in taken)
    whole = parse_chunk(Lines(data, ends, 0), contract, splits[0].region, each, suppression=suppression)
    enriched = enrich(whole.valid, contract, limits, campaigns, rules)
    rejects: list[list[Reject]] = [[] for _ in taken]
    for reject in whole.rejects:
        at = bisect_right(starts, reject.number) - 1
        rejects[at].append(replace(reject, number=reject.number - starts[at]))
    cuts = np.searchsorted(whole.valid["n"].to_numpy(), starts)
    for at, (number, _) in enumerate(taken):
        first, count = int(cuts[at]), int(cuts[at + 1] - cuts[at])
        valid, rows = (_renumbered(table.slice(first, count), starts[at]) for table in (whole.valid, enriched))
        found[number] = [(Parsed(starts[at + 1] - starts[at], valid, rejects[at]), rows)]
    return found


def _renumbered(rows: pa.Table, first: int) -> pa.Table:
    """Make line numbers count from the first line of the rows' own file."""
    at = rows.schema.get_field_index("n")
    return rows.set_column(at, "n", pc.subtract(rows["n"], first))
