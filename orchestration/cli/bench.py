"""The commands ``adtally bench``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import typer

from orchestration.cli.options import examples
from spark_jobs.errors import UsageError

app = typer.Typer(
    help="Measurements against other ways to do the same.",
    no_args_is_help=True,
    epilog=examples("adtally bench ingest"),
)

_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(
    "ingest",
    context_settings=_FORWARD,
    epilog=examples("adtally bench ingest", "adtally bench ingest -- --help            what the benchmark can be told"),
)
def bench_ingest(context: typer.Context) -> None:
    """Measure the ingest against its contestants, interleaved on this machine. Needs a checkout of the repository."""
    _bench("run", "ingest", *context.args)


@app.command("recount", context_settings=_FORWARD, epilog=examples("adtally bench recount"))
def bench_recount(context: typer.Context) -> None:
    """Measure the recount of an hour beside its ingest. Needs a checkout of the repository."""
    _bench("recount", *context.args)


@app.command("compaction", context_settings=_FORWARD, epilog=examples("adtally bench compaction"))
def bench_compaction(context: typer.Context) -> None:
    """Measure scans of an hour and the build of the marts before and after compaction. Needs a checkout of the repository."""
    _bench("compaction", *context.args)


@app.command("quality", context_settings=_FORWARD, epilog=examples("adtally bench quality"))
def bench_quality(context: typer.Context) -> None:
    """Measure what the expectations of an hour cost beside its ingest. Needs a checkout of the repository."""
    _bench("quality", *context.args)


@app.command("console", context_settings=_FORWARD, epilog=examples("adtally bench console", "adtally bench console --viewers 10"))
def bench_console(context: typer.Context) -> None:
    """Measure the console with many viewers while the ingest runs. Needs a checkout of the repository."""
    _bench("run", "console", *context.args)


def _bench(module: str, *arguments: str) -> None:
    """Run a module of the benchmarks and end with its exit status."""
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks").is_dir() or find_spec("benchmarks") is None:
        raise UsageError("the benchmarks are not part of the installed package", hint="run it in a checkout")
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments], cwd=root, check=False)
    raise typer.Exit(done.returncode if done.returncode in (0, 1, 2) else 1)
