"""How the commands print: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from spark_jobs.texts import printable, printable_json

Result = TypeVar("Result")

PLAIN_WIDTH = 10_000
"""The width of a log or a pipe, whose lines must not wrap."""


class CleanConsole(Console):
    """Prints texts literally: no markup, no emoji names, no terminal control characters. Only ``Text`` objects carry styles."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return unstyled text, with control characters escaped before the layout so that columns keep their width."""
        return super().render_str(printable(text, keep="\n"), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the printed segments, with control characters escaped in the texts of rich's own objects too."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text, keep="\n"), part.style)


def console(*, stderr: bool = False) -> Console:
    """Return a console, which wraps lines only if it is a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return CleanConsole(stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False, markup=False, emoji=False)


def say(line: str, *, stderr: bool = False) -> None:
    """Print a line without wrapping it."""
    console(stderr=stderr).print(line, soft_wrap=True)


def with_spinner(text: str, work: Callable[..., Result]) -> Result:
    """Call ``work(progress=...)`` and return its result. A spinner on standard error shows ``text``, then each progress line."""
    shown = console(stderr=True)
    with shown.status(text) as status:
        return work(progress=lambda line: status.update(Text(line[: max(shown.width - 4, 20)])))


def show(value: object, parts: Iterable[RenderableType], *, as_json: bool) -> None:
    """Print ``value`` as JSON, or ``parts``: a terminal wraps tables and styled texts at words, and leaves plain lines whole."""
    if as_json:
        print_json(value)
        return
    for part in parts:
        console().print(part, soft_wrap=isinstance(part, str))


def _plain(value: object) -> object:
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def print_json(value: object, *, lines: bool = False) -> None:
    """Print plain values, dataclasses, times and paths as JSON; with ``lines`` on one line, for a stream of objects."""
    print(printable_json(json.dumps(value, default=_plain, ensure_ascii=False, indent=None if lines else 2)), flush=True)
