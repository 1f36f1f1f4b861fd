"""The command ``adtally``: a person's way in. Heavy packages are imported by the command that needs them.

Exit status: 0 done, 1 the data or a check failed, 2 wrong use or a machine that lacks something, 130 interrupted.
Errors are one line on standard error.
"""

from __future__ import annotations

import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.cli import (
    compare,
    completion,
    explain,
    gaps,
    maintenance,
    publish,
    rejects,
    release,
    services,
    settlement,
    simulating,
)
from orchestration.cli.options import examples, seconds
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.failure import MESSAGE_LENGTH, failure_cause, one_line
from spark_jobs.private import keep_files_private
from spark_jobs.texts import counted

if TYPE_CHECKING:
    from spark_jobs.config import Settings
    from spark_jobs.ingest.batch import BatchReport
    from spark_jobs.operate.status import Status

# typer brings a click of its own since 0.2x; its public exceptions lead to the base class in every version.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="adtally",
    help="Exactly-once ad-event accounting on a lakehouse: impressions and clicks in, exact marts out.",
    epilog=examples(
        "adtally demo                                  the whole way, on samples and simulated traffic",
        "adtally simulate --out traffic --events 100000 --seed 1",
        "adtally ingest && adtally marts build && adtally status",
        "adtally query 'select * from fct_campaign_day limit 5'",
        "",
        "Everything lies under ADTALLY_HOME (default: .adtally in the working folder).",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
marts_app = typer.Typer(
    help="The marts: DuckDB tables built from the lakehouse.",
    no_args_is_help=True,
    epilog=examples("adtally marts build"),
)
bench_app = typer.Typer(
    help="Measurements against other ways to do the same.",
    no_args_is_help=True,
    epilog=examples("adtally bench ingest"),
)
app.add_typer(marts_app, name="marts")
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


class Format(StrEnum):
    """How a query's result is printed."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


class Engine(StrEnum):
    """Which store is asked."""

    duckdb = "duckdb"
    pinot = "pinot"


class _State:
    debug = False
    home: Path | None = None


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        print(f"adtally {installed('adtally')}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces of errors.")] = False,
    home: Annotated[
        Path | None,
        typer.Option("--home", help="Folder of the installation, in place of ADTALLY_HOME.", file_okay=False),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version of adtally.")
    ] = False,
) -> None:
    _State.debug = debug
    _State.home = home
    keep_files_private()


def _settings() -> Settings:
    from orchestration.cli.doctor import nearest
    from spark_jobs.config import load_settings

    settings = load_settings(home=_State.home)
    place = nearest(settings.home_path)
    if not place.is_dir():
        raise UsageError(f"{place} is not a folder", hint="set ADTALLY_HOME or --home to one, which may be new")
    return settings


@app.command(
    epilog=examples(
        "adtally demo",
        "adtally demo --events 20000                   quicker",
        "adtally --home /tmp/tally demo                in another folder, which must be new or a demo's",
    )
)
def demo(
    events: Annotated[int, typer.Option(min=1, help="Simulated event lines, beside the samples.")] = 200_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulated traffic.")] = 7,
) -> None:
    """Run the main job end to end in a folder of its own and compare it with the known truth.

    Lands the samples and simulated traffic, ingests them in several micro-batches, builds the marts, and prints the
    conservation law, the differences from the truth (all 0, or exit status 1) and the top campaigns. A second run
    starts clean.
    """
    from orchestration.cli.output import console
    from orchestration.demo import run_demo

    if not run_demo(_State.home, events=events, seed=seed, console=console()):
        raise typer.Exit(1)


simulating.add_commands(app, _settings)


@app.command(
    epilog=examples(
        "adtally ingest                                all that is there, then end",
        "adtally ingest --continuous --trigger 5s      until SIGTERM, which ends after the current batch",
        "adtally ingest --json | jq .accepted",
    )
)
def ingest(
    continuous: Annotated[bool, typer.Option("--continuous", help="Go on with new files until stopped.")] = False,
    trigger: Annotated[str, typer.Option(help="With --continuous: time between batches, as 500ms, 5s, 2m.")] = "5s",
    is_settled: Annotated[
        bool, typer.Option("--settle/--no-settle", help="At the end: find invalid traffic, credit orders, bill closed days.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Take events and orders into the Delta tables, each exactly once; then settle what follows from them, and publish it.

    They come from the landing folder and from the Kafka clusters of HOME/kafka.toml, which also says where to publish. With
    --continuous orders are credited while it runs, and Dagster reviews and bills hours that close. With --json one object at the
    end; with --continuous --json also a line for each batch.
    """
    from orchestration.cli.output import console, print_json
    from orchestration.cli.publish import publish_at_end
    from orchestration.cli.settlement import settle_at_end

    every = seconds(trigger, "--trigger")
    settings = _settings()
    named = _State.home is not None or "ADTALLY_HOME" in os.environ
    if named and not settings.home_path.exists() and not settings.landing_path.exists():
        raise UsageError(f"there is no home at {settings.home_path}", hint="mistyped? mkdir makes a new one")
    from spark_jobs.ingest.runner import run_ingest

    shown = console(stderr=True)
    waiting = shown.status("starting Spark")

    def on_batch(batch: BatchReport) -> None:
        waiting.update("ingesting")
        if as_json and continuous:
            print_json({"type": "batch", **_fields(batch)}, lines=True)
        else:
            shown.print(batch_line(batch), soft_wrap=True)

    def on_notice(line: str) -> None:
        shown.print(f"adtally: {line}", soft_wrap=True)

    with waiting:
        report = run_ingest(settings, continuous=continuous, trigger_seconds=every, progress=on_batch, notice=on_notice)
    if is_settled and not continuous:
        settle_at_end(settings)
    if not continuous:
        publish_at_end(settings)
    if as_json:
        print_json({"type": "end", **_fields(report)} if continuous else _fields(report), lines=continuous)
        return
    if report.batches == 0:
        console().print("nothing new to ingest", soft_wrap=True)
        return
    console().print(
        f"{counted(report.batches, 'batch')}: {report.offered:,} offered = {report.accepted:,} accepted + "
        f"{report.duplicate:,} duplicate + {report.conflict:,} conflict + {report.rejected:,} rejected; "
        f"{report.late:,} of the accepted late",
        soft_wrap=True,
    )


def batch_line(batch: BatchReport) -> str:
    """A batch on one line."""
    return (
        f"{batch.stream} batch {batch.batch_id}: {batch.offered:,} offered, {batch.accepted:,} accepted, "
        f"{batch.duplicate:,} duplicate, {batch.conflict:,} conflict, {batch.rejected:,} rejected, "
        f"{batch.late:,} late, {batch.seconds:.1f} s"
    )


def _fields(report: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(report)


@app.command(
    epilog=examples(
        "adtally up                                    the UI on http://127.0.0.1:3000, until Ctrl-C",
        "adtally up --port 0                           on a free port",
        "adtally up --no-ingest                        Dagster alone, which then ingests on a schedule",
    )
)
def up(
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the UI; 0 takes a free one. Default: ADTALLY_WEBSERVER_PORT or 3000."),
    ] = None,
    trigger: Annotated[str, typer.Option(help="Time between two batches of the ingest, as 500ms, 5s, 2m.")] = "5s",
    no_ingest: Annotated[bool, typer.Option("--no-ingest", help="Leave the continuous ingest out.")] = False,
) -> None:
    """Start Dagster (webserver, daemon, code server) and the continuous ingest on this machine, and keep them running.

    All of it listens on the loopback address only. What ends is started again, later each time. Ctrl-C or SIGTERM ends all of it
    in order, the ingest after its batch; a second Ctrl-C at once. The logs lie in ADTALLY_HOME/logs.
    """
    from orchestration.cli.up import run_up

    every = seconds(trigger, "--trigger")
    settings = _settings()
    run_up(settings, port=settings.webserver_port if port is None else port, trigger_seconds=every, ingest=not no_ingest)


@marts_app.command("build", epilog=examples("adtally marts build", "adtally marts build --json"))
def marts_build(as_json: Json = False) -> None:
    """Build the marts from pinned Delta versions beside the published ones, test them, and swap them in.

    A failed model or test leaves the published marts as they are; readers of the old file are not disturbed.
    """
    from orchestration.cli.output import console, print_json, status_line
    from orchestration.marts import build_marts

    shown = console(stderr=True)
    with shown.status("building the marts") as status:
        built = build_marts(_settings(), progress=status_line(status, shown.width))
    if as_json:
        print_json(built)
        return
    console().print(
        f"build {built.build_id}: {counted(len(built.rows), 'table')}, {counted(sum(built.rows.values()), 'row')}, "
        f"{built.nodes_passed} models and tests passed in {built.seconds:.1f} s",
        soft_wrap=True,
    )
    console().print(str(built.path), soft_wrap=True)


@app.command(
    epilog=examples(
        "adtally query \"from fct_campaign_day where currency = 'USD' order by spend_micros desc limit 5\"",
        "adtally query 'from fct_event_accounting' --format csv > accounting.csv",
        "echo 'show tables' | adtally query -",
        "adtally query --list",
        "adtally query --engine pinot --named budget_pacing --param day=2025-06-02 --param campaign_id=c-0001",
        "adtally query --engine pinot 'select region, count(*) from ads_metrics group by region limit 100'",
    )
)
def query(
    sql: Annotated[
        str | None,
        typer.Argument(metavar="SQL", help="One reading statement in the engine's SQL; - reads it from standard input."),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="The marts in DuckDB, or Pinot.")] = Engine.duckdb,
    named: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In place of SQL: a named query, see --list.", autocompletion=completion.named_queries),
    ] = None,
    param: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A parameter of a named query.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the named queries, their parameters and columns.")] = False,
    broker: Annotated[
        str | None, typer.Option(metavar="URL", help="Pinot's broker. Default: the one of `adtally services pinot`.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How the result is printed.")] = Format.table,
    limit: Annotated[
        int | None,
        typer.Option(min=0, help="Rows that are printed, 0 for all. Default: 100 of a table, all of other formats."),
    ] = None,
    as_json: Json = False,
    is_raw: Annotated[
        bool,
        typer.Option("--raw", help="With csv: texts as they are, which a spreadsheet or a terminal may take for commands."),
    ] = False,
    with_build: Annotated[
        bool, typer.Option("--build/--no-build", help="Not in a table, from the marts: a last column mart_build, their build.")
    ] = True,
) -> None:
    """Ask the published marts, or Pinot.

    In DuckDB the statement sees one whole build; it can only read. Pinot gives 10 rows unless the statement says LIMIT, and
    its sum() is a double: sumprecision() is exact.
    """
    from orchestration.cli.query import run_query, show_listing, show_rows

    chosen = Format.json.value if as_json else form.value
    if list_:
        show_listing(chosen)
        return
    text = sys.stdin.read() if sql == "-" else sql
    is_export = with_build and chosen != Format.table.value
    columns, rows = run_query(_settings, text, engine.value, named, param or [], broker, is_export=is_export)
    show_rows(columns, rows, chosen, limit, is_raw=is_raw)


@app.command(
    epilog=examples(
        "adtally status",
        "adtally status --json | jq .conservation_holds",
        "adtally status > /dev/null || echo 'the books do not balance'",
    )
)
def status(as_json: Json = False) -> None:
    """Show what each source offered and what became of it, the lag, the tables, and whether the conservation law holds.

    Exit status 1 where it does not hold. Reads the tables without starting Spark.
    """
    from orchestration.cli.output import console, print_json
    from orchestration.cli.status import status_tables
    from spark_jobs.operate.status import read_status

    found: Status = read_status(_settings())
    if as_json:
        print_json(found)
    else:
        out = console()
        for part in status_tables(found):
            out.print(part)
    if not found.conservation_holds:
        raise typer.Exit(1)


maintenance.add_commands(app, _settings)
rejects.add_commands(app, _settings)
gaps.add_commands(app, _settings)
release.add_commands(app, _settings)
settlement.add_commands(app, _settings)
explain.add_commands(app, _settings)
compare.add_commands(app, _settings)
publish.add_commands(app, _settings)
services.add_commands(app, _settings)


@app.command(epilog=examples("adtally doctor", "adtally doctor --fix", "adtally doctor --json"))
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Get what can be got: the jars, DuckDB's extension.")] = False,
    as_json: Json = False,
) -> None:
    """Check the machine: settings, Java, jars, DuckDB's extension, home, Spark, locale, ports, disk space, speed of fsync.

    Exit status 2 if one fails.
    """
    from rich.text import Text

    from orchestration.cli.doctor import examine
    from orchestration.cli.output import console, print_json

    checks = examine(_State.home, fix=fix)
    if as_json:
        print_json({"ok": all(check.ok for check in checks), "checks": [_fields(check) for check in checks]})
    else:
        out = console()
        for check in checks:
            mark = ("ok     ", "green") if check.ok else ("missing", "red")
            out.print(Text.assemble(mark, f" {check.name}: {check.detail}"), soft_wrap=True)
    if not all(check.ok for check in checks):
        raise typer.Exit(2)


_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}


@bench_app.command(
    "ingest",
    context_settings=_FORWARD,
    epilog=examples("adtally bench ingest", "adtally bench ingest -- --help            what the benchmark can be told"),
)
def bench_ingest(context: typer.Context) -> None:
    """Measure the ingest against its contestants, interleaved on this machine. Needs a checkout of the repository."""
    _bench("run", "ingest", *context.args)


@bench_app.command("recount", context_settings=_FORWARD, epilog=examples("adtally bench recount"))
def bench_recount(context: typer.Context) -> None:
    """Measure the recount of an hour beside its ingest. Needs a checkout of the repository."""
    _bench("recount", *context.args)


@bench_app.command("compaction", context_settings=_FORWARD, epilog=examples("adtally bench compaction"))
def bench_compaction(context: typer.Context) -> None:
    """Measure scans of an hour and the build of the marts before and after compaction. Needs a checkout of the repository."""
    _bench("compaction", *context.args)


@bench_app.command("quality", context_settings=_FORWARD, epilog=examples("adtally bench quality"))
def bench_quality(context: typer.Context) -> None:
    """Measure what the expectations of an hour cost beside its ingest. Needs a checkout of the repository."""
    _bench("quality", *context.args)


def _bench(module: str, *arguments: str) -> None:
    """Run a module of the benchmarks; its exit status is the command's."""
    import subprocess
    from importlib.util import find_spec

    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks").is_dir() or find_spec("benchmarks") is None:
        raise UsageError("the benchmarks are not part of the installed package", hint="run it in a checkout")
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments], cwd=root, check=False)
    raise typer.Exit(done.returncode if done.returncode in (0, 1, 2) else 1)


@app.command(epilog=examples("adtally version", "adtally version --json"))
def version(as_json: Json = False) -> None:
    """Show the versions of adtally and of what it stands on."""
    from importlib.metadata import version as installed

    from orchestration.cli.output import print_json

    names = ("adtally", "pyspark", "delta-spark", "duckdb", "dbt-core", "dbt-duckdb", "dagster", "great-expectations")
    found = {name: installed(name) for name in names} | {"python": sys.version.split()[0]}
    if as_json:
        print_json(found)
        return
    for name, number in found.items():
        print(f"{name} {number}")


_PANELS = {
    "Try it": ("demo", "simulate", "up", "doctor", "version"),
    "Take in and settle": ("ingest", "review", "attribute", "bill", "publish"),
    "Ask and look": ("status", "query", "explain", "compare", "rejects", "budget", "marts", "hours"),
    "Check and put right": ("reconcile", "backfill", "fsck", "release", "accept-gap"),
    "Keep it small and measure": ("compact", "vacuum", "services", "bench"),
}


def _group_commands() -> None:
    """Group the commands of the help by what a person wants to do."""
    panels = {name: panel for panel, names in _PANELS.items() for name in names}
    commands: list[Any] = [*app.registered_commands, *app.registered_groups]
    for command in commands:
        called = getattr(command, "callback", None)
        name = command.name or (called.__name__ if called is not None else "")
        command.rich_help_panel = panels[name]


_group_commands()


def main(arguments: list[str] | None = None) -> None:
    """Entry of the command. Ends the process with the exit status."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit status; every error is one line on standard error."""
    _State.debug, _State.home = False, None
    try:
        status = app(args=arguments, prog_name="adtally", standalone_mode=False)
        if status == 130:  # what typer makes of a KeyboardInterrupt
            return _fail("interrupted", 130)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except AdtallyError as error:
        return _fail(str(error), error.exit_code, error.excerpt)
    except typer.Abort:
        return _fail("interrupted", 130)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return _nobody_reads()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # typer ends the process itself
            return _nobody_reads()
        raise
    except _ClickException as error:
        return _fail(_usage(error), 2)
    except Exception as error:
        status = _fail(_unexpected(error), 1)
        try:
            sys.stdout.flush()
        except OSError:  # the disk is full: the interpreter would try again at its end
            _drop_output()
        return status


def _nobody_reads() -> int:
    """The reader, as `head`, has seen enough. Nothing more can be written, not even by the interpreter at its end."""
    _drop_output()
    return 0


def _drop_output() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)


def _usage(error: Any) -> str:
    """What click found wrong, with the command whose help says more. Without a message it has shown the help itself."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return ""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "adtally"
    return f"{message} (see `{path} --help`)"


def _unexpected(error: Exception) -> str:
    cause = failure_cause(error)
    debug = "" if _State.debug else "run again as `adtally --debug ...` for the stack trace"
    hints = "; ".join(filter(None, (cause.hint, debug)))
    return f"{cause} ({hints})" if hints else str(cause)


def _fail(message: str, status: int, excerpt: str = "") -> int:
    if _State.debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    line = one_line(message, MESSAGE_LENGTH)
    if line:
        print(f"adtally: error: {line}", file=sys.stderr)
    if excerpt:
        print(excerpt, file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
