"""Writes landing files: under a hidden name, with the mtime set, then renamed. A reader never sees half a file."""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from services.simulator.truth import CampaignRow, rfc3339

CAMPAIGN_COLUMNS = "campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to"


def write_file(path: Path, content: bytes, mtime_ms: int | None = None) -> None:
    """Write a file with its mtime (milliseconds since the epoch); compress it if its name ends in .gz."""
    put_file(path, compress(content) if path.suffix == ".gz" else content, mtime_ms)


def put_file(path: Path, content: bytes, mtime_ms: int | None = None) -> None:
    """Write a file as `write_file` does, but never compress it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    hidden.write_bytes(content)
    if mtime_ms is not None:
        os.utime(hidden, ns=(mtime_ms * 1_000_000, mtime_ms * 1_000_000))
    hidden.replace(path)


def compress(content: bytes, level: int = 1) -> bytes:
    """Compress with gzip; the header has neither a name nor a time, so the same content gives the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=buffer, mtime=0) as stream:
        stream.write(content)
    return buffer.getvalue()


def increasing_mtimes(slice_ends_us: Sequence[int]) -> list[int]:
    """Return an mtime in whole milliseconds for each slice end (microseconds, ascending): not before it, all different."""
    return list(accumulate((-(-end_us // 1000) for end_us in slice_ends_us), lambda before, mtime_ms: max(mtime_ms, before + 1)))


def campaigns_csv(rows: Iterable[CampaignRow]) -> bytes:
    """Return the campaigns CSV of the input contract."""
    lines = [CAMPAIGN_COLUMNS]
    for row in rows:
        valid_to = "" if row.valid_to_us is None else rfc3339(row.valid_to_us)
        lines.append(
            f"{row.campaign_id},{row.store_id},{row.billing_model},{row.daily_budget_micros},{row.currency},"
            f"{rfc3339(row.valid_from_us)},{valid_to}"
        )
    return ("\n".join(lines) + "\n").encode()


def names_csv(names: Iterable[tuple[str, str, str]]) -> bytes:
    """Return the CSV of names, from (kind, id, name)."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("kind", "id", "name"))
    writer.writerows(names)
    return buffer.getvalue().encode()
