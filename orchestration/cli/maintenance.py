"""The commands ``adtally reconcile``, ``backfill``, ``compact``, ``vacuum``, ``fsck`` and ``hours``."""

from __future__ import annotations

import getpass
from datetime import timedelta
from functools import partial
from typing import Annotated

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.maintenance_tables import (
    backfill_table,
    closing_tables,
    compaction_table,
    fsck_table,
    reconciliation_table,
    vacuum_table,
)
from orchestration.cli.options import DryRun, From, Json, Panel, Reason, Repair, To, examples, hour_range, moment, seconds
from orchestration.cli.output import show, with_spinner
from spark_jobs.errors import UsageError

app = typer.Typer()
hours_app = typer.Typer(
    help="Closed hours: which are closed, which sources keep hours open, closing by hand.",
    no_args_is_help=True,
    epilog=examples("adtally hours list", "adtally hours close --through 2025-06-02T09:00:00Z --reason 'eu-west is down'"),
)


@app.command(
    rich_help_panel=Panel.CHECK,
    epilog=examples(
        "adtally reconcile                                         all that the ledger holds",
        "adtally reconcile --from 2025-06-02T08:00:00Z --to 2025-06-02T12:00:00Z",
        "adtally reconcile --repair                                and put right what differs",
    ),
)
def reconcile(context: typer.Context, start: From = None, end: To = None, repair: Repair = False, as_json: Json = False) -> None:
    """Recount the raw input by independent code and compare it with the tables and the marts, to the row and the micro.

    Without a range it recounts everything in the ledger, open hours included. --repair writes what is missing and compensates
    what is wrong. Exit status 1 if a difference remains.
    """
    from orchestration.reconciliation import run_reconciliation

    hours = hour_range(start, end)
    report = with_spinner("recounting", partial(run_reconciliation, settings_of(context), hours, repair=repair))
    show(report, reconciliation_table(report), as_json=as_json)
    if report.remaining:
        raise typer.Exit(1)


@app.command(
    rich_help_panel=Panel.CHECK,
    epilog=examples(
        "adtally backfill --from 2025-06-02 --to 2025-06-03 --dry-run",
        "adtally backfill --from 2025-06-02 --to 2025-06-03 --reason 'price of c-7 corrected'",
    ),
)
def backfill(
    context: typer.Context, start: From, end: To, dry_run: DryRun = False, reason: Reason = "backfill", as_json: Json = False
) -> None:
    """Recompute closed hours from the raw input with today's rules and restate what differs.

    Published rows stay as they are: compensating increments add the difference. A second run changes nothing.
    """
    from spark_jobs.corrections.backfill import backfill as run

    hours = hour_range(start, end)
    assert hours is not None  # both options are required
    report = with_spinner("recomputing", partial(run, settings_of(context), hours, dry_run=dry_run, reason=reason))
    show(report, backfill_table(report), as_json=as_json)


@app.command(
    rich_help_panel=Panel.KEEP_SMALL, epilog=examples("adtally compact", "adtally compact --from 2025-06-02 --to 2025-06-03")
)
def compact(context: typer.Context, start: From = None, end: To = None, as_json: Json = False) -> None:
    """Rewrite the small files of closed hours into few sorted ones. An ingest may run meanwhile.

    Without a range: all closed hours that need it. It proves that rows and content are the same before and after.
    """
    from spark_jobs.operate.compact import compact as run

    hours = hour_range(start, end)
    report = with_spinner("compacting", partial(run, settings_of(context), hours))
    show(report, compaction_table(report), as_json=as_json)


@app.command(
    rich_help_panel=Panel.KEEP_SMALL,
    epilog=examples("adtally vacuum --dry-run", "adtally vacuum", "adtally vacuum --retention 336h"),
)
def vacuum(
    context: typer.Context,
    dry_run: DryRun = False,
    retention: Annotated[str | None, typer.Option(help="Keep files at least this long. Default: ADTALLY_VACUUM_RETENTION.")] = None,
    as_json: Json = False,
) -> None:
    """Delete data files, except those that a running stream, the published marts or time travel may still read.

    With ADTALLY_RAW_RETENTION it first archives (ADTALLY_RAW_ARCHIVE) or drops older landing files and raw copies of topics that
    are recounted and billed.
    """
    from spark_jobs.operate.vacuum import vacuum as run

    keep = None if retention is None else timedelta(seconds=seconds(retention, "--retention", longest=10 * 366 * 86_400))
    report = with_spinner("looking for files", partial(run, settings_of(context), dry_run=dry_run, retention=keep))
    show(report, vacuum_table(report), as_json=as_json)


@app.command(
    rich_help_panel=Panel.CHECK, epilog=examples("adtally fsck", "adtally fsck --repair", "adtally fsck --json | jq .findings")
)
def fsck(context: typer.Context, repair: Repair = False, as_json: Json = False) -> None:
    """Check every byte that adtally keeps (logs, data files, indexes, corrections, books) and repair from the raw input.

    While --repair runs, no ingest may run. Exit status 1 if something damaged remains; docs/runbooks/fsck.md explains it.
    """
    from spark_jobs.operate.fsck import fsck as run

    report = with_spinner("checking", partial(run, settings_of(context), repair=repair))
    show(report, fsck_table(report), as_json=as_json)
    if report.remaining:
        raise typer.Exit(1)


@hours_app.command("list", epilog=examples("adtally hours list", "adtally hours list --json | jq .closed_through"))
def hours_list(context: typer.Context, as_json: Json = False) -> None:
    """Show up to which time hours are closed, and the progress of each source."""
    from spark_jobs.operate.watermark import read_closing

    closing = read_closing(settings_of(context))
    show(closing, closing_tables(closing), as_json=as_json)


@hours_app.command("close", epilog=examples("adtally hours close --through 2025-06-02T09:00:00Z --reason 'eu-west is down'"))
def hours_close(
    context: typer.Context,
    through: Annotated[str, typer.Option(metavar="T", help="Hours that end at or before this whole hour are closed.")],
    reason: Reason,
    as_json: Json = False,
) -> None:
    """Close hours by hand, without waiting for a silent source. adtally still accepts its later events, and marks them late."""
    from spark_jobs.operate.watermark import close_by_hand

    if not reason.strip():
        raise UsageError("--reason is empty", hint="say why the hours are closed by hand")
    closing = close_by_hand(settings_of(context), moment(through, "--through"), reason=reason, closed_by=getpass.getuser())
    show(closing, closing_tables(closing), as_json=as_json)
