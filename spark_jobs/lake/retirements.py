"""Reads which raw input is gone because it was retired: archived or dropped after its retention (`operate/retire.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import pyarrow.compute as pc

from spark_jobs.config import Settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import RAW_RETIREMENTS
from spark_jobs.units import HOUR

Span = tuple[int, int]
"""Offsets [start, end)."""


@dataclass(frozen=True)
class Retirements:
    """The retired raw input of a stream: landing files with their states (milliseconds, size), and offsets by partition."""

    files: dict[str, set[tuple[int, int]]]
    spans: dict[str, list[Span]]

    def covers(self, name: str, start: int, end: int) -> bool:
        """Return whether a landing file, or offsets [start, end) of a partition, are retired."""
        return name in self.files or any(low <= start and end <= high for low, high in self.spans.get(name, ()))


def read_retirements(lake: Lake, stream: str) -> Retirements:
    """Return the retired raw input of a stream."""
    names = ("stream", "source_file", "first_offset", "end_offset", "modified_at", "size_bytes")
    files: dict[str, set[tuple[int, int]]] = {}
    spans: dict[str, list[Span]] = {}
    for row in lake.rows(RAW_RETIREMENTS, *names).to_pylist():
        if row["stream"] == stream and row["first_offset"] is None:
            state = round(row["modified_at"].timestamp() * 1000), row["size_bytes"]
            files.setdefault(row["source_file"], set()).add(state)
        elif row["stream"] == stream:
            spans.setdefault(row["source_file"], []).append((row["first_offset"], row["end_offset"]))
    return Retirements(files, {name: sorted(found) for name, found in spans.items()})


def retired_spans(lake: Lake, stream: str) -> dict[str, list[Span]]:
    """Return the retired offsets of each partition of a stream, ascending."""
    return read_retirements(lake, stream).spans


def recountable_from(settings: Settings) -> datetime | None:
    """Return the first hour of which all raw input is still there; None: nothing is retired, all hours can be recounted."""
    newest = pc.max(Lake(settings).rows(RAW_RETIREMENTS, "newest_hour")["newest_hour"]).as_py()
    return None if newest is None else newest + HOUR
