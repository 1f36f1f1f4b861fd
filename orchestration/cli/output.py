"""How the commands print: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from spark_jobs.texts import printable, printable_json

PLAIN_WIDTH = 10_000
"""Columns of what is not a terminal: a log or a pipe wraps nothing."""


class CleanConsole(Console):
    """Prints texts as they are: none is markup or an emoji's name, and none steers the terminal. ``Text`` has the styles."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Unstyled text. Control characters are replaced before layout, so that columns keep their width."""
        return super().render_str(printable(text, keep="\n"), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What is printed, part by part: the texts of objects of rich's are cleaned here."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text, keep="\n"), part.style)


def console(*, stderr: bool = False) -> Console:
    """A console that keeps whole lines when it is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return CleanConsole(stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False, markup=False, emoji=False)


def status_line(status: Status, width: int) -> Callable[[str], None]:
    """A progress callback that shows its line beside a spinner."""
    return lambda line: status.update(Text(line[: max(width - 4, 20)]))


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
    print(printable_json(json.dumps(value, default=_plain, ensure_ascii=False, indent=None if lines else 2)), flush=True)
