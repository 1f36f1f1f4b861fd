"""Tables for a person: aligned where the terminal is wide enough, else a block a row. No key is dropped, no number cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_LEAST_TEXT = 16
"""Columns that a wrapped text keeps at least, so that it does not become a tower of words."""


class RecordTable(Table):
    """A rich table that prints a block for each row where its columns do not fit.

    Text columns may wrap between words; numbers, times and single words never break. In a block the key comes first, then every
    other cell behind the name of its column.
    """

    def __init__(self, title: str, columns: Sequence[str], keys: int, texts: Iterable[int]) -> None:
        super().__init__(
            title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        self.keys = keys
        self.texts = set(texts)
        for index, column in enumerate(columns):
            self.add_column(column, justify="left" if index in self.texts else "right", overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or its blocks."""
        cells = [[_text(console, cell) for cell in column.cells] for column in self.columns]
        widths = self._widths(cells, options.max_width)
        if widths is None:
            yield from self._blocks(console, cells)
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _widths(self, cells: list[list[Text]], room: int) -> list[int] | None:
        """Return the width of each column; None where they do not fit into ``room``, which includes edges and gaps."""
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

    def _blocks(self, console: Console, cells: list[list[Text]]) -> Iterator[Padding | Text]:
        names = [str(column.header) for column in self.columns]
        yield Text(str(self.title), style="bold")
        for number, row in enumerate(self.rows):
            pairs = [(name, column[number]) for name, column in zip(names, cells, strict=True)]
            style = row.style or ""
            yield Padding(_Flow(pairs[: self.keys], "bold"), (0, 0, 0, 1), style=style, expand=False)
            yield Padding(_Flow(pairs[self.keys :]), (0, 0, 0, 3), style=style, expand=False)
        yield Text(f"{self.caption}\n" if self.caption else "")


class _Flow:
    """Print names and values, as many on a line as fit."""

    def __init__(self, pairs: list[tuple[str, Text]], style: str = "") -> None:
        self.pairs = pairs
        self.style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text(style=self.style)
        for name, value in self.pairs:
            pair = Text.assemble((name, "dim"), " " if name else "", value)
            if line and line.cell_len + 3 + pair.cell_len > options.max_width:
                yield line
                line = Text(style=self.style)
            if line:
                line.append("   ")
            line.append_text(pair)
        if line:
            line.overflow = "fold"
            yield line


def table(title: str, *columns: str, left: int = 1, texts: Iterable[str] = ()) -> RecordTable:
    """Return an empty table. The first ``left`` columns and those named in ``texts`` are text, the others numbers.

    The first column, or with ``left`` all of the first columns, are the key that heads a block.
    """
    named = set(texts)
    return RecordTable(title, columns, left, {index for index, name in enumerate(columns) if index < left or name in named})


def _text(console: Console, cell: object) -> Text:
    return cell if isinstance(cell, Text) else console.render_str(str(cell))
