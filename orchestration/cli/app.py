"""The command ``adtally``. Each command imports the heavy packages that it needs.

Exit status: 0 done, 1 the data or a check failed, 2 wrong use or a machine that lacks something, 130 interrupted.
Errors are one line on standard error.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestration.cli import (
    bench,
    chaos,
    compare,
    console,
    decisions,
    demo,
    doctor,
    erase,
    explain,
    ingest,
    maintenance,
    marts,
    publish,
    query,
    rejects,
    services,
    settlement,
    simulating,
    status,
    up,
    verifying,
)
from orchestration.cli.context import Call
from orchestration.cli.options import Panel, examples
from services.errors import HintedError
from spark_jobs.actor import Actor, acting_as
from spark_jobs.errors import AdtallyError
from spark_jobs.failure import MESSAGE_LENGTH, failure_cause, one_line
from spark_jobs.private import keep_files_private

# Newer versions of typer contain their own click. Its public exceptions lead to the base class in every version.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="adtally",
    help="Exactly-once ad-event accounting on a lakehouse: impressions and clicks in, exact marts out.",
    epilog=examples(
        "adtally demo                                  everything, on samples and simulated traffic",
        "adtally simulate --out traffic --events 100000 --seed 1",
        "adtally ingest && adtally marts build && adtally status",
        "adtally query 'select * from fct_campaign_day limit 5'",
        "",
        "Everything is in ADTALLY_HOME (default: .adtally in the working folder).",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# the order of the help: commands, then groups
_USE = (demo, simulating, chaos, ingest, up, console, query, status)
_KEEP_RIGHT = (maintenance, verifying, rejects, decisions, erase, settlement, compare, publish, doctor)
for module in _USE + _KEEP_RIGHT:
    app.add_typer(module.app)
app.add_typer(marts.app, name="marts", rich_help_panel=Panel.ASK)
app.add_typer(bench.app, name="bench", rich_help_panel=Panel.KEEP_SMALL)
app.add_typer(maintenance.hours_app, name="hours", rich_help_panel=Panel.ASK)
app.add_typer(explain.app, name="explain", rich_help_panel=Panel.ASK)
app.add_typer(services.app, name="services", rich_help_panel=Panel.KEEP_SMALL)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        print(f"adtally {installed('adtally')}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces of errors.")] = False,
    home: Annotated[
        Path | None, typer.Option("--home", help="Folder of the installation, in place of ADTALLY_HOME.", file_okay=False)
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version of adtally.")
    ] = False,
) -> None:
    call = context.ensure_object(Call)
    call.debug, call.home = debug, home
    context.with_resource(acting_as(Actor.of_process(f"adtally {context.invoked_subcommand}")))
    keep_files_private()


def main() -> None:
    """Run the command and end the process with its exit status."""
    sys.exit(run(owns_process=True))


def run(arguments: list[str] | None = None, *, owns_process: bool = False) -> int:
    """Run the command and return the exit status. Print every error as one line on standard error."""
    call = Call(owns_process=owns_process)
    try:
        result = app(args=arguments, prog_name="adtally", standalone_mode=False, obj=call)
        if result == 130:  # typer's result for a KeyboardInterrupt
            return _fail(call, "interrupted", 130)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except AdtallyError as error:
        return _fail(call, str(error), error.exit_code, error.excerpt)
    except HintedError as error:
        return _fail(call, str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _fail(call, "interrupted", 130)
    except BrokenPipeError:
        return _drop_output()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # typer ends the process itself
            return _drop_output()
        raise
    except _ClickException as error:
        return _fail(call, _usage_message(error), 2)
    except Exception as error:
        exit_status = _fail(call, _unexpected_message(call, error), 1)
        try:
            sys.stdout.flush()
        except OSError:  # the disk is full: the interpreter would try again at its end
            _drop_output()
        return exit_status


def _drop_output() -> int:
    """Make the interpreter's last write go nowhere, and return 0: a reader that closes the pipe (`head`, say) is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def _usage_message(error: Any) -> str:
    """Return what click found wrong and which help to read, or nothing if click has shown the help itself."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return ""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "adtally"
    return f"{message} (see `{path} --help`)"


def _unexpected_message(call: Call, error: Exception) -> str:
    cause = failure_cause(error)
    debug = "" if call.debug else "run again as `adtally --debug ...` for the stack trace"
    hints = "; ".join(filter(None, (cause.hint, debug)))
    return f"{cause} ({hints})" if hints else str(cause)


def _fail(call: Call, message: str, exit_status: int, excerpt: str = "") -> int:
    if call.debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    line = one_line(message, MESSAGE_LENGTH)
    if line:
        print(f"adtally: error: {line}", file=sys.stderr)
    if excerpt:
        print(excerpt, file=sys.stderr)
    return exit_status
