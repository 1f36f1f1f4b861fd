"""Commands that keep the lakehouse right and small: reconcile, backfill, compact, vacuum, fsck, hours."""

from __future__ import annotations

import getpass
from datetime import timedelta
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
from orchestration.cli.options import From, Json, Panel, To, examples, hour_range, moment, seconds
from orchestration.cli.output import run_and_show, show
from spark_jobs.errors import UsageError

app = typer.Typer()
hours_app = typer.Typer(
    help="Closed hours: what is closed, which sources hold it up, closing by hand.",
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
def reconcile(
    context: typer.Context,
    start: From = None,
    end: To = None,
    repair: Annotated[bool, typer.Option("--repair", help="Write what is missing and compensate what is wrong.")] = False,
    as_json: Json = False,
) -> None:
    """Recount the raw input by independent code and compare it with the tables and the marts, to the row and the micro.

    Without a range everything that the ledger holds is recounted, open hours included. Exit status 1 where a difference
    remains: without --repair any, with it what could not be repaired.
    """
    from orchestration.reconciliation import run_reconciliation

    chosen = hour_range(start, end)
    report = run_and_show(
        "recounting",
        lambda progress: run_reconciliation(settings_of(context), chosen, repair=repair, progress=progress),
        reconciliation_table,
        as_json=as_json,
    )
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
    context: typer.Context,
    start: Annotated[str, typer.Option("--from", metavar="T", help="First hour, as 2025-06-02 or 2025-06-02T08:00:00Z.")],
    end: Annotated[str, typer.Option("--to", metavar="T", help="End of the range, which is not in it any more.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    reason: Annotated[str, typer.Option(help="Why; it stands in the restatements.")] = "backfill",
    as_json: Json = False,
) -> None:
    """Recompute closed hours from the raw input with today's rules and restate what differs.

    Nothing published is rewritten: the difference is added as compensating increments. Run again it changes nothing.
    """
    from spark_jobs.corrections.backfill import backfill as run

    chosen = hour_range(start, end)
    assert chosen is not None  # both are required
    run_and_show(
        "recomputing",
        lambda progress: run(settings_of(context), chosen, dry_run=dry_run, reason=reason, progress=progress),
        backfill_table,
        as_json=as_json,
    )


@app.command(
    rich_help_panel=Panel.KEEP_SMALL, epilog=examples("adtally compact", "adtally compact --from 2025-06-02 --to 2025-06-03")
)
def compact(context: typer.Context, start: From = None, end: To = None, as_json: Json = False) -> None:
    """Rewrite the small files of closed hours into few sorted ones; an ingest may go on meanwhile.

    Without a range: all closed hours that need it. Rows and content are proved to be the same before and after.
    """
    from spark_jobs.operate.compact import compact as run

    chosen = hour_range(start, end)
    run_and_show(
        "compacting",
        lambda progress: run(settings_of(context), chosen, progress=progress),
        lambda found: [compaction_table(found)],
        as_json=as_json,
        wraps=True,
    )


@app.command(
    rich_help_panel=Panel.KEEP_SMALL,
    epilog=examples("adtally vacuum --dry-run", "adtally vacuum", "adtally vacuum --retention 336h"),
)
def vacuum(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    retention: Annotated[str | None, typer.Option(help="Keep files at least this long. Default: ADTALLY_VACUUM_RETENTION.")] = None,
    as_json: Json = False,
) -> None:
    """Delete data files that no version needs which a running stream, the published marts or time travel may still read."""
    from spark_jobs.operate.vacuum import vacuum as run

    keep = None if retention is None else timedelta(seconds=seconds(retention, "--retention", longest=10 * 366 * 86_400))
    run_and_show(
        "looking for files",
        lambda progress: run(settings_of(context), dry_run=dry_run, retention=keep, progress=progress),
        lambda found: [vacuum_table(found)],
        as_json=as_json,
        wraps=True,
    )


@app.command(
    rich_help_panel=Panel.CHECK, epilog=examples("adtally fsck", "adtally fsck --repair", "adtally fsck --json | jq .findings")
)
def fsck(
    context: typer.Context,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what can be put right; without it nothing changes.")] = False,
    as_json: Json = False,
) -> None:
    """Check every byte that adtally keeps: logs, data files, indexes, corrections, books; and repair from the raw input.

    For --repair no ingest may run. Exit status 1 where something is left that is not whole; docs/runbooks/fsck.md explains it.
    """
    from spark_jobs.operate.fsck import fsck as run

    report = run_and_show(
        "checking", lambda progress: run(settings_of(context), repair=repair, progress=progress), fsck_table, as_json=as_json
    )
    if report.remaining:
        raise typer.Exit(1)


@hours_app.command("list", epilog=examples("adtally hours list", "adtally hours list --json | jq .closed_through"))
def hours_list(context: typer.Context, as_json: Json = False) -> None:
    """Show up to where hours are closed, and how far each source has come."""
    from spark_jobs.operate.watermark import read_closing

    closing = read_closing(settings_of(context))
    show(closing, closing_tables, as_json=as_json, wraps=True)


@hours_app.command("close", epilog=examples("adtally hours close --through 2025-06-02T09:00:00Z --reason 'eu-west is down'"))
def hours_close(
    context: typer.Context,
    through: Annotated[str, typer.Option(metavar="T", help="Hours that end at or before this whole hour are closed.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
    as_json: Json = False,
) -> None:
    """Close hours by hand, whatever a silent source says. Its events are accepted all the same when they come, as late."""
    from spark_jobs.operate.watermark import close_by_hand

    if not reason.strip():
        raise UsageError("--reason is empty", hint="say why the hours are closed by hand")
    closing = close_by_hand(settings_of(context), moment(through, "--through"), reason=reason, closed_by=getpass.getuser())
    show(closing, closing_tables, as_json=as_json, wraps=True)
