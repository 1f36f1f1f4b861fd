"""The commands ``adtally verify`` and ``audit-log``: what was billed is what came in, and who changed what."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from orchestration.cli.context import settings_of
from orchestration.cli.maintenance_tables import recountable_line
from orchestration.cli.options import Json, Panel, examples
from orchestration.cli.output import say, show, with_spinner
from orchestration.cli.tables import RecordTable, rest_line
from spark_jobs.texts import counted, duration, money

if TYPE_CHECKING:
    from spark_jobs.audit.verify import VerifyFinding, VerifyReport

app = typer.Typer()
_SHOWN = 20


@app.command(
    rich_help_panel=Panel.CHECK,
    epilog=examples(
        "adtally verify",
        "adtally verify --statement statement-2025-06.csv",
        "adtally verify --head > heads.txt                         keep it where nobody here can write",
        "adtally verify --expect billing_lines:812:9f2c...",
    ),
)
def verify(
    context: typer.Context,
    statement: Annotated[Path | None, typer.Option(help="A statement as CSV, JSON or Parquet, compared with the lines.")] = None,
    head: Annotated[bool, typer.Option("--head", help="Only check the chains, and print the end of each, one a line.")] = False,
    expect: Annotated[list[str] | None, typer.Option(help="A head printed earlier, which the chain must contain.")] = None,
    recount: Annotated[bool, typer.Option(help="Recount the raw input of the billed days.")] = True,
    as_json: Json = False,
) -> None:
    """Check that billing lines, closings and the audit log are as they were written, and what was billed is what came in.

    Shares no code with the billing, writes no table and needs no network. Exit status 1 names the first row that breaks the chain,
    and what its amount should be by the recount; docs/tamper-evidence.md says how anyone can recompute it.
    """
    from spark_jobs.audit.verify import verify as run

    work = partial(
        run,
        settings_of(context),
        now=datetime.now(UTC),
        statement=statement,
        expect=expect or (),
        recounts=recount and not head,
    )
    report = with_spinner("verifying", work)
    if head and not report.findings and not as_json:
        for line in report.heads:
            say(line)
        return
    show(report, verify_table(report), as_json=as_json)
    if report.findings:
        raise typer.Exit(1)


@app.command(
    "audit-log",
    rich_help_panel=Panel.CHECK,
    epilog=examples("adtally audit-log", "adtally audit-log --act close --json | jq '.[].reason'"),
)
def audit_log(
    context: typer.Context,
    act: Annotated[str | None, typer.Option(help="Only one kind of act, as close or repair.")] = None,
    as_json: Json = False,
) -> None:
    """List who closed, repaired, released, accepted, erased, reviewed, restored or retired what, when and why."""
    from spark_jobs.errors import UsageError
    from spark_jobs.lake.acts import Act, read_audit_log

    if act is not None and act not in list(Act):
        raise UsageError(f"{act!r} is no act", hint=", ".join(Act))
    entries = [entry for entry in read_audit_log(settings_of(context)) if act in (None, entry.act)]
    shown = RecordTable("Audit log", "when", "act", "user", "host", "command", "run", "reason", "arguments", left=8)
    for entry in entries[-_SHOWN:]:
        who = (entry.user_name, entry.host, entry.command, entry.run_id)
        shown.add_row(entry.acted_at, entry.act, *who, entry.reason, entry.arguments)
    parts: list[RenderableType] = [shown, *rest_line(len(entries), _SHOWN, "act")] if entries else ["no act is recorded"]
    show(entries, parts, as_json=as_json)


def verify_table(report: VerifyReport) -> Iterator[RenderableType]:
    """Return a few lines for each finding, and the verdict."""
    for number, found in enumerate(report.findings[:_SHOWN]):
        yield Text(f"{'first: ' if not number else ''}{found.check}: {_place(found)} {found.kind}", style="bold red")
        yield Text(f"  {found.detail}")
        if found.amount_found is not None and found.amount_expected is not None:
            amounts = (money(micros * 1000, found.currency) for micros in (found.amount_found, found.amount_expected))
            yield Text("  amount {} {currency}, by the recount {} {currency}".format(*amounts, currency=found.currency))
    yield from rest_line(len(report.findings), _SHOWN, "finding")
    for day in report.pending[:_SHOWN]:
        yield Text(
            f"not compared with the recount: {day} has changed since the last posting; `adtally bill` settles it", style="yellow"
        )
    yield from recountable_line(report.recountable_from)
    rows = ", ".join(f"{number:,} of {table}" for table, number in report.rows.items())
    done = f"rows {rows}; recount of {counted(len(report.days), 'day')}"
    if report.statement_lines is not None:
        done += f"; {counted(report.statement_lines, 'line')} of the statement"
    yield Text(f"{done}; {duration(report.seconds)}")
    for head in report.heads:
        yield f"head {head}"
    verdict = (
        f"{counted(len(report.findings), 'finding')}: docs/tamper-evidence.md"
        if report.findings
        else "everything is as it was written"
    )
    yield Text(verdict, style="bold red" if report.findings else "green")


def _place(found: VerifyFinding) -> str:
    named = found.row_id or "a row"
    return f"{found.table} {named}" if found.position is None else f"{found.table} {named} at place {found.position}"
