"""How the commands print: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from spark_jobs.texts import printable, printable_json

Result = TypeVar("Result")
Progress = Callable[[str], None]
Parts = Iterable[RenderableType]

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


def say(line: str, *, stderr: bool = False) -> None:
    """Print a line without wrapping it."""
    console(stderr=stderr).print(line, soft_wrap=True)


def with_spinner(text: str, work: Callable[[Progress], Result]) -> Result:
    """Return what ``work`` returns. Meanwhile a spinner turns on standard error, beside ``text`` or the newest line of progress."""
    shown = console(stderr=True)
    with shown.status(text) as status:
        return work(lambda line: status.update(Text(line[: max(shown.width - 4, 20)])))


def show(
    result: Result,
    parts: Callable[[Result], Parts],
    *,
    as_json: bool,
    wraps: bool = False,
    plain: Callable[[Result], Any] = lambda result: result,
) -> None:
    """Print a result as JSON, or the tables and lines that ``parts`` makes of it.

    ``wraps``: a terminal breaks lines at words. ``plain`` makes of the result what the JSON has, where that is not the result.
    """
    if as_json:
        print_json(plain(result))
        return
    for part in parts(result):
        console().print(part, soft_wrap=not wraps)


def run_and_show(
    text: str, work: Callable[[Progress], Result], parts: Callable[[Result], Parts], *, as_json: bool, wraps: bool = False
) -> Result:
    """Do both: `with_spinner`, then `show`. Return the result, by which a command chooses its exit status."""
    result = with_spinner(text, work)
    show(result, parts, as_json=as_json, wraps=wraps)
    return result


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
