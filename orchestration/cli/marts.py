"""The commands ``adtally marts build`` and ``adtally marts docs``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, examples
from orchestration.cli.output import print_json, say, show, with_spinner
from orchestration.cli.stopping import stop_on_signals
from spark_jobs.errors import UsageError
from spark_jobs.texts import counted

if TYPE_CHECKING:
    from orchestration.marts import MartBuild

app = typer.Typer(
    help="The marts: DuckDB tables built from the lakehouse.",
    no_args_is_help=True,
    epilog=examples("adtally marts build", "adtally marts docs"),
)


@app.command(
    epilog=examples(
        "adtally marts build",
        "adtally marts build --full",
        "adtally marts build --continuous              the near-real-time marts after each batch, until SIGTERM",
        "adtally marts build --json",
    )
)
def build(
    context: typer.Context,
    is_full: Annotated[bool, typer.Option("--full", help="Build all days again, not only those that changed.")] = False,
    continuous: Annotated[
        bool, typer.Option("--continuous", help="Build the near-real-time marts after each batch until stopped.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build the marts from pinned Delta versions into a new file, test them, and replace the published file.

    Builds the days that changed since the last build and takes the others from it. After a failed model or test the published marts
    stay as they are. Readers of the old file keep it. With --continuous it ends after a failed one; `adtally up` starts it again.
    """
    settings = settings_of(context)
    if continuous:
        if is_full:
            raise UsageError("--continuous and --full are for different runs", hint="use one of them")
        from orchestration.marts.follow import build_after_batches

        def on_build(built: MartBuild) -> None:
            if as_json:
                print_json({name: value for name, value in asdict(built).items() if name not in ("nodes", "rows")}, lines=True)
            else:
                days = "all days" if built.full_because is not None else counted(built.days, "day")
                say(f"build {built.build_id}: {days} in {built.seconds:.1f} s", stderr=True)

        with stop_on_signals() as stop:
            build_after_batches(settings, stop, on_build)
        return
    from orchestration.marts import build_marts

    built = with_spinner("building the marts", partial(build_marts, settings, is_full=is_full))
    show(built, build_lines(built), as_json=as_json)


def build_lines(built: MartBuild) -> Iterator[str]:
    """Return lines that say what was built, and where it is."""
    if built.full_because is not None:
        yield f"built all days: {built.full_because}"
    yield (
        f"build {built.build_id}: {counted(len(built.rows), 'table')}, {counted(sum(built.rows.values()), 'row')}, "
        f"{built.nodes_passed} models and tests passed in {built.seconds:.1f} s"
    )
    yield str(built.path)


@app.command(epilog=examples("adtally marts docs"))
def docs(context: typer.Context, as_json: Json = False) -> None:
    """Write the documentation of the marts, their columns, tests and metrics as one HTML page that needs no network."""
    from orchestration.marts.docs_site import build_docs

    settings = settings_of(context)
    written = with_spinner("writing the documentation of the marts", lambda progress: build_docs(settings))
    show(written, [str(written.path)], as_json=as_json)
