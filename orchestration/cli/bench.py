"""The commands ``adtally bench``, which run the benchmarks of a checkout."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import typer

from orchestration.cli.options import examples
from spark_jobs.errors import UsageError

app = typer.Typer(
    help="Measurements against other ways to do the same.", no_args_is_help=True, epilog=examples("adtally bench ingest")
)

_BENCHMARKS = {
    "ingest": "Measure the ingest against its contestants, interleaved on this machine.",
    "recount": "Measure the recount of an hour beside its ingest.",
    "compaction": "Measure scans of an hour and the build of the marts before and after compaction.",
    "quality": "Measure what the expectations of an hour cost beside its ingest.",
    "store": "Measure ingest, mart build and recount on an object store beside a local disk, and what its requests cost.",
    "index": "Measure a batch against a key index of a billion keys beside one of two million.",
    "console": "Measure the console with many viewers while the ingest runs.",
}


def _bench(context: typer.Context) -> None:
    """Run the benchmark that the command names and end with its exit status."""
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks").is_dir() or find_spec("benchmarks") is None:
        raise UsageError("the benchmarks are not part of the installed package", hint="run it in a checkout")
    name = str(context.info_name)
    module = ["benchmarks.run", name] if name in ("ingest", "index", "console") else [f"benchmarks.{name}"]
    done = subprocess.run([sys.executable, "-m", *module, *context.args], cwd=root, check=False)
    raise typer.Exit(done.returncode if done.returncode in (0, 1, 2) else 1)


for _name, _help in _BENCHMARKS.items():
    app.command(
        _name,
        help=f"{_help} Needs a checkout of the repository. Arguments after -- go to the benchmark.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog=examples(f"adtally bench {_name}", f"adtally bench {_name} -- --help"),
    )(_bench)
