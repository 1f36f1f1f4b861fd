"""The landing protocol: write under a hidden name, set the mtime, rename. A reader never sees half a file."""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from services.simulator.truth import CampaignRow, rfc3339

CAMPAIGN_COLUMNS = "campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to"


def write_file(path: Path, content: bytes, mtime_ms: int | None = None) -> None:
    """Put a file in place with its mtime (milliseconds since the epoch); names ending in .gz are compressed.

    The same content gives the same bytes: the gzip header carries neither a name nor a time.
    """
    if path.suffix == ".gz":
        content = compress(content)
    put_file(path, content, mtime_ms)


def put_file(path: Path, content: bytes, mtime_ms: int | None = None) -> None:
    """As `write_file`, but the content is stored as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    hidden.write_bytes(content)
    if mtime_ms is not None:
        os.utime(hidden, ns=(mtime_ms * 1_000_000, mtime_ms * 1_000_000))
    hidden.replace(path)


def compress(content: bytes, level: int = 1) -> bytes:
    """Gzip without a name and with time 0."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=buffer, mtime=0) as stream:
        stream.write(content)
    return buffer.getvalue()


def increasing_mtimes(slice_ends_us: Sequence[int]) -> list[int]:
    """An mtime in whole milliseconds for each slice end (microseconds, ascending): not before it, all different."""
    result: list[int] = []
    for end_us in slice_ends_us:
        mtime_ms = -(-end_us // 1000)
        result.append(max(mtime_ms, result[-1] + 1) if result else mtime_ms)
    return result


def campaigns_csv(rows: Iterable[CampaignRow]) -> bytes:
    """The campaigns CSV of the input contract."""
    lines = [CAMPAIGN_COLUMNS]
    for row in rows:
        valid_to = "" if row.valid_to_us is None else rfc3339(row.valid_to_us)
        lines.append(
            f"{row.campaign_id},{row.store_id},{row.billing_model},{row.daily_budget_micros},{row.currency},"
            f"{rfc3339(row.valid_from_us)},{valid_to}"
        )
    return ("\n".join(lines) + "\n").encode()


def names_csv(names: Iterable[tuple[str, str, str]]) -> bytes:
    """The CSV of names for people to read, from (kind, id, name)."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("kind", "id", "name"))
    writer.writerows(names)
    return buffer.getvalue().encode()
