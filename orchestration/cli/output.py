"""How the commands print: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import date, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

PLAIN_WIDTH = 140
"""Columns of what is not a terminal: a log or a pipe wraps nothing."""


def console(*, stderr: bool = False) -> Console:
    """A console that keeps whole lines when it is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def print_json(value: Any, *, lines: bool = False) -> None:
    """JSON of plain values, dataclasses, times and paths; with ``lines`` on one line, as a stream of them has it."""
    print(json.dumps(value, default=_plain, ensure_ascii=False, indent=None if lines else 2), flush=True)
