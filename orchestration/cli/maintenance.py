"""Commands that keep the lakehouse right and small: reconcile, backfill, compact, vacuum, fsck, hours."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.options import examples, hour_range, moment, seconds
from spark_jobs.errors import UsageError

if TYPE_CHECKING:
    from spark_jobs.config import Settings

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
From = Annotated[str | None, typer.Option("--from", metavar="T", help="First hour, as 2025-06-02 or 2025-06-02T08:00:00Z.")]
To = Annotated[str | None, typer.Option("--to", metavar="T", help="End of the range, which is not in it any more.")]

hours_app = typer.Typer(
    help="Closed hours: what is closed, which sources hold it up, closing by hand.",
    no_args_is_help=True,
    epilog=examples("adtally hours list", "adtally hours close --through 2025-06-02T09:00:00Z --reason 'eu-west is down'"),
)


def add_commands(app: typer.Typer, settings: Callable[[], Settings]) -> None:
    """Put the commands into ``app``; ``settings`` gives those of the installation that the user named."""

    @app.command(
        epilog=examples(
            "adtally reconcile                                         all that the ledger holds",
            "adtally reconcile --from 2025-06-02T08:00:00Z --to 2025-06-02T12:00:00Z",
            "adtally reconcile --repair                                and put right what differs",
        )
    )
    def reconcile(
        start: From = None,
        end: To = None,
        repair: Annotated[bool, typer.Option("--repair", help="Write what is missing and compensate what is wrong.")] = False,
        as_json: Json = False,
    ) -> None:
        """Recount the raw input by independent code and compare it with the tables and the marts, to the row and the micro.

        Without a range everything that the ledger holds is recounted, open hours included. Exit status 1 where a difference
        remains: without --repair any, with it what could not be repaired.
        """
        from orchestration.cli.maintenance_tables import reconciliation_table
        from orchestration.cli.output import console, print_json, status_line
        from orchestration.reconciliation import run_reconciliation

        chosen = hour_range(start, end)
        shown = console(stderr=True)
        with shown.status("recounting") as status:
            report = run_reconciliation(settings(), chosen, repair=repair, progress=status_line(status, shown.width))
        if as_json:
            print_json(report)
        else:
            for part in reconciliation_table(report):
                console().print(part, soft_wrap=True)
        if report.remaining:
            raise typer.Exit(1)

    @app.command(
        epilog=examples(
            "adtally backfill --from 2025-06-02 --to 2025-06-03 --dry-run",
            "adtally backfill --from 2025-06-02 --to 2025-06-03 --reason 'price of c-7 corrected'",
        )
    )
    def backfill(
        start: Annotated[str, typer.Option("--from", metavar="T", help="First hour, as 2025-06-02 or 2025-06-02T08:00:00Z.")],
        end: Annotated[str, typer.Option("--to", metavar="T", help="End of the range, which is not in it any more.")],
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
        reason: Annotated[str, typer.Option(help="Why; it stands in the restatements.")] = "backfill",
        as_json: Json = False,
    ) -> None:
        """Recompute closed hours from the raw input with today's rules and restate what differs.

        Nothing published is rewritten: the difference is added as compensating increments. Run again it changes nothing.
        """
        from orchestration.cli.maintenance_tables import backfill_table
        from orchestration.cli.output import console, print_json, status_line
        from spark_jobs.corrections.backfill import backfill as run

        chosen = hour_range(start, end)
        assert chosen is not None  # both are required
        shown = console(stderr=True)
        with shown.status("recomputing") as status:
            report = run(settings(), chosen, dry_run=dry_run, reason=reason, progress=status_line(status, shown.width))
        if as_json:
            print_json(report)
            return
        for part in backfill_table(report):
            console().print(part, soft_wrap=True)

    @app.command(epilog=examples("adtally compact", "adtally compact --from 2025-06-02 --to 2025-06-03"))
    def compact(start: From = None, end: To = None, as_json: Json = False) -> None:
        """Rewrite the small files of closed hours into few sorted ones; an ingest may go on meanwhile.

        Without a range: all closed hours that need it. Rows and content are proved to be the same before and after.
        """
        from orchestration.cli.maintenance_tables import compaction_table
        from orchestration.cli.output import console, print_json, status_line
        from spark_jobs.operate.compact import compact as run

        chosen = hour_range(start, end)
        shown = console(stderr=True)
        with shown.status("compacting") as status:
            report = run(settings(), chosen, progress=status_line(status, shown.width))
        if as_json:
            print_json(report)
            return
        console().print(compaction_table(report))

    @app.command(epilog=examples("adtally vacuum --dry-run", "adtally vacuum", "adtally vacuum --retention 336h"))
    def vacuum(
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
        retention: Annotated[
            str | None, typer.Option(help="Keep files at least this long. Default: ADTALLY_VACUUM_RETENTION.")
        ] = None,
        as_json: Json = False,
    ) -> None:
        """Delete data files that no version needs which a running stream, the published marts or time travel may still read."""
        from orchestration.cli.maintenance_tables import vacuum_table
        from orchestration.cli.output import console, print_json, status_line
        from spark_jobs.operate.vacuum import vacuum as run

        keep = None if retention is None else timedelta(seconds=seconds(retention, "--retention", longest=10 * 366 * 86_400))
        shown = console(stderr=True)
        with shown.status("looking for files") as status:
            report = run(settings(), dry_run=dry_run, retention=keep, progress=status_line(status, shown.width))
        if as_json:
            print_json(report)
            return
        console().print(vacuum_table(report))

    @app.command(epilog=examples("adtally fsck", "adtally fsck --repair", "adtally fsck --json | jq .findings"))
    def fsck(
        repair: Annotated[
            bool, typer.Option("--repair", help="Put right what can be put right; without it nothing changes.")
        ] = False,
        as_json: Json = False,
    ) -> None:
        """Check every byte that adtally keeps: logs, data files, indexes, corrections, books; and repair from the raw input.

        For --repair no ingest may run. Exit status 1 where something is left that is not whole; docs/runbooks/fsck.md explains it.
        """
        from orchestration.cli.maintenance_tables import fsck_table
        from orchestration.cli.output import console, print_json, status_line
        from spark_jobs.operate.fsck import fsck as run

        shown = console(stderr=True)
        with shown.status("checking") as status:
            report = run(settings(), repair=repair, progress=status_line(status, shown.width))
        if as_json:
            print_json(report)
        else:
            for part in fsck_table(report):
                console().print(part, soft_wrap=True)
        if report.remaining:
            raise typer.Exit(1)

    @hours_app.command("list", epilog=examples("adtally hours list", "adtally hours list --json | jq .closed_through"))
    def hours_list(as_json: Json = False) -> None:
        """Show up to where hours are closed, and how far each source has come."""
        from orchestration.cli.maintenance_tables import closing_tables
        from orchestration.cli.output import console, print_json
        from spark_jobs.operate.watermark import read_closing

        closing = read_closing(settings())
        if as_json:
            print_json(closing)
            return
        for part in closing_tables(closing):
            console().print(part)

    @hours_app.command("close", epilog=examples("adtally hours close --through 2025-06-02T09:00:00Z --reason 'eu-west is down'"))
    def hours_close(
        through: Annotated[str, typer.Option(metavar="T", help="Hours that end at or before this whole hour are closed.")],
        reason: Annotated[str, typer.Option(help="Why; it is kept.")],
        as_json: Json = False,
    ) -> None:
        """Close hours by hand, whatever a silent source says. Its events are accepted all the same when they come, as late."""
        from orchestration.cli.maintenance_tables import closing_tables
        from orchestration.cli.output import console, print_json
        from spark_jobs.operate.watermark import close_by_hand

        if not reason.strip():
            raise UsageError("--reason is empty", hint="say why the hours are closed by hand")
        closing = close_by_hand(settings(), moment(through, "--through"), reason=reason, closed_by=getpass.getuser())
        if as_json:
            print_json(closing)
            return
        for part in closing_tables(closing):
            console().print(part)

    app.add_typer(hours_app, name="hours")
