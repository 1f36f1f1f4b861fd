"""The commands ``adtally marts build`` and ``adtally marts docs``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, examples
from orchestration.cli.output import run_and_show
from spark_jobs.texts import counted

if TYPE_CHECKING:
    from orchestration.marts import MartBuild
    from orchestration.marts.docs_site import MartDocs

app = typer.Typer(
    help="The marts: DuckDB tables built from the lakehouse.",
    no_args_is_help=True,
    epilog=examples("adtally marts build", "adtally marts docs"),
)


@app.command(epilog=examples("adtally marts build", "adtally marts build --json"))
def build(context: typer.Context, as_json: Json = False) -> None:
    """Build the marts from pinned Delta versions beside the published ones, test them, and swap them in.

    A failed model or test leaves the published marts as they are; readers of the old file are not disturbed.
    """
    from orchestration.marts import build_marts

    run_and_show(
        "building the marts",
        lambda progress: build_marts(settings_of(context), progress=progress),
        build_lines,
        as_json=as_json,
    )


def build_lines(built: MartBuild) -> Iterator[str]:
    """Say what was built, and where it is."""
    yield (
        f"build {built.build_id}: {counted(len(built.rows), 'table')}, {counted(sum(built.rows.values()), 'row')}, "
        f"{built.nodes_passed} models and tests passed in {built.seconds:.1f} s"
    )
    yield str(built.path)


@app.command(epilog=examples("adtally marts docs"))
def docs(context: typer.Context, as_json: Json = False) -> None:
    """Write the documentation of the marts, their columns, tests and metrics as one HTML page that needs no network."""
    from orchestration.marts.docs_site import build_docs

    run_and_show(
        "writing the documentation of the marts",
        lambda progress: build_docs(settings_of(context), progress=progress),
        docs_lines,
        as_json=as_json,
    )


def docs_lines(written: MartDocs) -> Iterator[str]:
    """Say where the page is."""
    yield str(written.path)
