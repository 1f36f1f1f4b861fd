"""Tables for a person: aligned columns in a wide terminal, else one block for each row. No key or number is ever cut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from datetime import datetime

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from spark_jobs.texts import counted

_LEAST_TEXT = 16
"""The least width of a wrapped text column, in characters: a narrower one would have a word on each line."""


class RecordTable(Table):
    """A rich table that prints a block for each row if its columns do not fit.

    The first ``left`` columns are the key, which heads a block. They and the columns named in ``texts`` are text, which may wrap
    between words; the other columns are numbers and times, which never break.
    """

    def __init__(self, title: str, *columns: str, left: int = 1, texts: Collection[str] = ()) -> None:
        super().__init__(
            title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        self.keys = left
        self.texts = {index for index, name in enumerate(columns) if index < left or name in texts}
        for index, column in enumerate(columns):
            self.add_column(column, justify="left" if index in self.texts else "right", overflow="fold")

    def add_row(self, *cells: object, style: StyleType | None = None, end_section: bool = False) -> None:
        """Add a row. A whole number gets separators, a time the form 2025-06-02 08:00:00, and None is shown as ``-``."""
        super().add_row(*map(_cell, cells), style=style, end_section=end_section)

    def with_rows(self, rows: Iterable[Iterable[object]]) -> RecordTable:
        """Add all rows, and return the table."""
        for cells in rows:
            self.add_row(*cells)
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or its blocks."""
        cells = [
            [cell if isinstance(cell, Text) else console.render_str(str(cell)) for cell in column.cells] for column in self.columns
        ]
        widths = self._widths(cells, options.max_width)
        if widths is None:
            yield from self._blocks(cells, options.max_width)
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _widths(self, cells: list[list[Text]], room: int) -> list[int] | None:
        """Return the width of each column, or None if they do not fit into ``room``, which includes edges and gaps."""
        least, whole = [], []
        for index, (column, texts) in enumerate(zip(self.columns, cells, strict=True)):
            name = str(column.header)
            lengths = [text.cell_len for text in texts]
            words = [max(map(cell_len, name.split()), default=0)]
            if index in self.texts:
                longest = max((cell_len(word) for text in texts for word in text.plain.split()), default=0)
                words += [longest, min(_LEAST_TEXT, max(lengths, default=0))]
            else:
                words += lengths
            least.append(max(words))
            whole.append(max([cell_len(name), *lengths]))
        spare = room - 2 * len(least) - sum(least)
        if spare < 0:
            return None
        widths = []
        for low, high in zip(least, whole, strict=True):
            given = min(high - low, spare)
            spare -= given
            widths.append(low + given)
        return widths

    def _blocks(self, cells: list[list[Text]], width: int) -> Iterator[Padding | Text]:
        names = [str(column.header) for column in self.columns]
        yield Text(str(self.title), style="bold")
        for number, row in enumerate(self.rows):
            pairs = [(name, column[number]) for name, column in zip(names, cells, strict=True)]
            style = row.style or ""
            for part, indent, weight in ((pairs[: self.keys], 1, "bold"), (pairs[self.keys :], 3, "")):
                lines = Group(*_flow(part, weight, width - indent))
                yield Padding(lines, (0, 0, 0, indent), style=style, expand=False)
        yield Text(f"{self.caption}\n" if self.caption else "")


def _flow(pairs: list[tuple[str, Text]], style: str, width: int) -> Iterator[Text]:
    """Yield lines of names and values, with as many on a line as fit into ``width``."""
    line = Text(style=style, overflow="fold")
    for name, value in pairs:
        pair = Text.assemble((name, "dim"), " " if name else "", value)
        if line and line.cell_len + 3 + pair.cell_len > width:
            yield line
            line = Text(style=style, overflow="fold")
        if line:
            line.append("   ")
        line.append_text(pair)
    if line:
        yield line


def rest_line(total: int, shown: int, noun: str) -> Iterator[Text]:
    """Yield a line that counts the rows beyond the first ``shown``, if there are any."""
    if total > shown:
        yield Text(f"and {counted(total - shown, f'more {noun}')}; --json prints all")


def _cell(value: object) -> RenderableType:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return value if isinstance(value, Text) else str(value)
