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
"""The width where standard output is a log or a pipe, which must not wrap lines."""


class CleanConsole(Console):
    """A console that prints texts as they are: no markup, no emoji by name, no control of the terminal. ``Text`` has the styles."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return unstyled text. Control characters are replaced before layout, so that columns keep their width."""
        return super().render_str(printable(text, keep="\n"), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the printed segments; replace the control characters in the texts of rich's own objects too."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text, keep="\n"), part.style)


def console(*, stderr: bool = False) -> Console:
    """Return a console, which does not wrap lines where it is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return CleanConsole(stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False, markup=False, emoji=False)


def say(line: str, *, stderr: bool = False) -> None:
    """Print a line without wrapping it."""
    console(stderr=stderr).print(line, soft_wrap=True)


def with_spinner(text: str, work: Callable[[Progress], Result]) -> Result:
    """Run ``work`` beside a spinner on standard error, which shows ``text``, then each line of progress. Return its result."""
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
    """Run ``work`` as `with_spinner` does, `show` its result, and return it: a command may choose its exit status by it."""
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
    """Print plain values, dataclasses, times and paths as JSON; with ``lines`` on one line, for a stream of objects."""
    print(printable_json(json.dumps(value, default=_plain, ensure_ascii=False, indent=None if lines else 2)), flush=True)
