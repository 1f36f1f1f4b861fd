"""Options that several commands share, and functions that read their values."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from spark_jobs.errors import UsageError
from spark_jobs.units import HourRange

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
From = Annotated[str | None, typer.Option("--from", metavar="T", help="First hour, as 2025-06-02 or 2025-06-02T08:00:00Z.")]
To = Annotated[str | None, typer.Option("--to", metavar="T", help="End of the range: the first hour after it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would happen, and change nothing.")]
Repair = Annotated[bool, typer.Option("--repair", help="Repair what can be repaired; without it only report.")]
Reason = Annotated[str, typer.Option(help="Why. adtally keeps the reason.")]
Trigger = Annotated[
    str | None,
    typer.Option(
        help="Time between the small batches of a continuous ingest, as 500ms, 5s, 2m. A backlog is read without pauses. "
        "Default: 1s, or 5s if the lakehouse or the landing folder is in an object store."
    ),
]
OnlyStatus = Annotated[bool, typer.Option("--status", help="Only show the progress: publish or consume nothing.")]


class Panel(StrEnum):
    """Groups the commands in the help, by what a person wants to do."""

    TRY = "Try it"
    TAKE_IN = "Take in and settle"
    ASK = "Ask and look"
    CHECK = "Check and put right"
    KEEP_SMALL = "Keep it small and measure"


_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h)?\s*$")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


def examples(*lines: str) -> str:
    """Return the epilog of a command's help, with a line for each example."""
    return "\n\n".join(["Examples:", *(line.replace("[", "\\[") for line in lines)])


def seconds(text: str, option: str, *, longest: float = 86_400) -> float:
    """Parse ``500ms``, ``5s``, ``2m``, ``1h`` or a bare number of seconds. Raises UsageError that names the option."""
    match = _DURATION.match(text)
    value = float(match.group(1)) * _SECONDS[match.group(2)] if match else math.nan
    if not 0 < value <= longest:
        raise UsageError(f"{option} {text!r} is not a time above 0", hint=f"as in 500ms, 5s or 2m, up to {longest / 3600:.0f}h")
    return value


def moment(text: str, option: str) -> datetime:
    """Parse RFC 3339 text into a UTC time; a date alone is its midnight. Raises UsageError that names the option."""
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a time", hint="as in 2025-06-02 or 2025-06-02T08:00:00Z") from None
    if value.tzinfo is None:
        if len(text) > len("2025-06-02"):
            raise UsageError(f"{option} {text!r} has no zone", hint="as in 2025-06-02T08:00:00Z")
        return value.replace(tzinfo=UTC)
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise UsageError(f"{option} {text!r} is out of range") from None


def hour_range(start: str | None, end: str | None) -> HourRange | None:
    """Return the range of --from and --to, or None without both. Raises UsageError if one is missing or is not a whole hour."""
    if start is None and end is None:
        return None
    if start is None or end is None:
        raise UsageError("--from and --to go together", hint="the range ends before --to")
    return HourRange(moment(start, "--from"), moment(end, "--to"))
