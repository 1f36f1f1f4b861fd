"""Prints ``adtally demo``: a bar for each step, then the figures beside the known truth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from orchestration.cli.status import OUTCOMES
from orchestration.cli.tables import RecordTable
from orchestration.demo import TOP, DemoReport, Figures, Rows, run_demo
from spark_jobs.texts import money


class Steps(Progress):
    """Show a bar and a clock for each step of the demo, and a note on the next line, so that both fit a narrow terminal."""

    def __init__(self, console: Console) -> None:
        description = TextColumn("{task.description}", table_column=Column(min_width=34, no_wrap=True))
        super().__init__(description, BarColumn(bar_width=14), TimeElapsedColumn(), console=console)

    def get_renderables(self) -> Iterator[RenderableType]:
        """Return one or two lines for each step."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["note"]:
                yield Text(f"    {task.fields['note']}", style="dim")


def show_demo(home: Path | None, *, events: int, seed: int, console: Console, lakehouse: str | None = None) -> bool:
    """Run the demo and print its report. Return whether every figure equals the truth."""
    report = run_demo(home, events=events, seed=seed, progress=Steps(console), lakehouse=lakehouse)
    for shown in (
        conservation_table(report.conservation),
        figures_table("Against the known truth, per hour and region, per campaign, per bill of a day", report.counts),
        figures_table(
            "Credit of orders against the known truth, per campaign and lookback window, per order and touch", report.credit
        ),
        net_table(report.net),
        campaigns_table(report.top),
    ):
        console.print(shown)
    for line in place_lines(report):
        console.print(line, soft_wrap=True)
    console.print(verdict(report.counts | report.credit))
    return report.is_equal


def conservation_table(rows: Rows) -> RecordTable:
    """Make the table of what each region offered and what became of it. A row has the region and the OUTCOMES."""
    return RecordTable("Every record ends in exactly one place", "region", *OUTCOMES, "offered - all four").with_rows(
        (region, *counts, counts[0] - sum(counts[1:5])) for region, *counts in rows
    )


def figures_table(title: str, found: Figures) -> RecordTable:
    """Make the table of every figure beside the truth's, and the number of cells that differ."""
    shown = RecordTable(title, "measure", "truth", "marts", "cells that differ")
    for name, (truth, marts, cells) in found.items():
        measure, _, currency = name.partition(" ")
        unit = 1 if measure.endswith("_nanos") else 1000
        figures: list[int | str] = [truth, marts]
        if measure.endswith(("_nanos", "_micros")):
            figures = [money(figure * unit, currency) for figure in (truth, marts)]
            name = f"{measure.rpartition('_')[0]} {currency}"
        shown.add_row(name, *figures, cells, style="red" if cells else "")
    return shown


def verdict(found: Figures) -> Text:
    """Return the result of the whole comparison on one line."""
    differ = [name for name, (*_, cells) in found.items() if cells]
    if not differ:
        return Text(f"{len(found)} measures, 0 differ: the marts equal the known truth", style="bold green")
    return Text(f"{len(found)} measures, {len(differ)} differ: {', '.join(differ)}", style="bold red")


def net_table(rows: Rows) -> RecordTable:
    """Make the table of net and invalid traffic. A row has currency, impressions, clicks and micros, then the invalid ones."""
    names = ("impressions", "clicks", "spend")
    return RecordTable("Net and invalid", "currency", *names, *(f"invalid {name}" for name in names)).with_rows(
        (currency, *net, money(micros * 1000, currency), seen, clicks, money(invalid_micros * 1000, currency))
        for currency, *net, micros, seen, clicks, invalid_micros in rows
    )


def campaigns_table(rows: Rows) -> RecordTable:
    """Make the table of the highest spend by currency. A row has campaign, currency, impressions, clicks and micros."""
    columns = ("currency", "campaign", "impressions", "clicks", "spend")
    return RecordTable(f"Top {TOP} campaigns by spend, in each currency", *columns, left=2).with_rows(
        (currency, campaign, *counts, money(micros * 1000, currency)) for campaign, currency, *counts, micros in rows
    )


def place_lines(report: DemoReport) -> Iterator[str]:
    """Return lines that say where the demo's files are, and which commands to try next."""
    settings, (campaign, day) = report.settings, report.best
    days = f"{report.first_day:%Y-%m-%d} to {report.last_day:%Y-%m-%d}"
    yield f"days           {days}: the samples' week of 2019, {report.weeks} weeks later"
    yield f"landing files  {settings.landing_uri}"
    yield f"Delta tables   {settings.lakehouse_uri}"
    yield f"marts          {settings.marts_path}"
    where = f"ADTALLY_HOME={settings.home_path}"
    if settings.lakehouse_uri != str(settings.home_path / "lakehouse"):
        where += f" ADTALLY_LAKEHOUSE={settings.lakehouse_uri}"
    yield "\nLook at it in a browser, the console and Dagster (in the environment, or with `uv run` before it):"
    yield f"  {where} adtally up        then http://127.0.0.1:{settings.console_port}"
    yield "\nOr ask:"
    explain = f"explain fct_campaign_day --campaign {campaign} --date {day}"
    for command in ("status", 'query "select * from fct_campaign_day limit 10"', explain, "reconcile"):
        yield f"  {where} adtally {command}"
