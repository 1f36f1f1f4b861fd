"""The commands ``adtally marts build`` and ``adtally marts docs``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, examples
from orchestration.cli.output import show, with_spinner
from spark_jobs.texts import counted

if TYPE_CHECKING:
    from orchestration.marts import MartBuild

app = typer.Typer(
    help="The marts: DuckDB tables built from the lakehouse.",
    no_args_is_help=True,
    epilog=examples("adtally marts build", "adtally marts docs"),
)


@app.command(epilog=examples("adtally marts build", "adtally marts build --json"))
def build(context: typer.Context, as_json: Json = False) -> None:
    """Build the marts from pinned Delta versions into a new file, test them, and replace the published file.

    After a failed model or test the published marts stay as they are. Readers of the old file keep it.
    """
    from orchestration.marts import build_marts

    built = with_spinner("building the marts", partial(build_marts, settings_of(context)))
    show(built, build_lines(built), as_json=as_json)


def build_lines(built: MartBuild) -> Iterator[str]:
    """Return lines that say what was built, and where it is."""
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
