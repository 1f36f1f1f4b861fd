"""The command ``adtally compare``: our counts beside those of an ad server or advertiser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, Panel, examples
from orchestration.cli.output import show
from orchestration.cli.tables import RecordTable, rest_line

if TYPE_CHECKING:
    from orchestration.compare import Comparison

app = typer.Typer()

SHOWN = 60
_COLUMNS = ("date", "campaign", "measure", "ours", "theirs", "difference", "discrepancy", "explained by")


@app.command(
    rich_help_panel=Panel.ASK,
    epilog=examples("adtally compare adserver.csv", "adtally compare adserver.csv --tolerance 0.05 --json"),
)
def compare(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="CSV with the columns date, campaign, impressions, clicks.", show_default=False)],
    tolerance: Annotated[float, typer.Option(min=0, max=1, help="Allowed discrepancy, as a part of ours.")] = 0.10,
    as_json: Json = False,
) -> None:
    """Compare the marts with a third party's report: the discrepancy of each line, and what explains it.

    The discrepancy is (ours - theirs) / ours, of net counts. Exit status 1 if one is over the tolerance.
    """
    from orchestration.compare import compare_report

    found = compare_report(settings_of(context), file, tolerance=tolerance)
    show(found.as_dict(), comparison_tables(found), as_json=as_json)
    if found.over:
        raise typer.Exit(1)


def comparison_tables(found: Comparison) -> Iterator[RenderableType]:
    """Make the table of figures with what explains the differences, and the verdict."""
    lines = RecordTable(f"Ours and theirs, tolerance {found.tolerance:.1%}", *_COLUMNS, left=3, texts=["explained by"])
    cells = [cell for line in found.lines for cell in line.cells]
    for line in found.lines[:SHOWN]:
        for cell in line.cells:
            causes = ", ".join(f"{name} {count:+,}" for name, count in cell.causes.items() if count)
            share = None if cell.discrepancy is None else f"{cell.discrepancy:+.2%}"
            figures = (cell.ours, cell.theirs, f"{cell.ours - cell.theirs:+,}", share)
            style = "" if cell.is_within else "red"
            lines.add_row(line.date, line.campaign, cell.measure, *figures, causes or None, style=style)
    yield lines
    yield from rest_line(len(found.lines), SHOWN, "line")
    if found.utc_offset_minutes:
        yield Text(f"their days seem to be cut at {found.utc_offset}, ours at UTC")
    over = sum(not cell.is_within for cell in cells)
    if over:
        yield Text(f"{over:,} of {len(cells):,} figures are over the tolerance", style="bold red")
    else:
        yield Text(f"all {len(cells):,} figures are within the tolerance", style="green")
