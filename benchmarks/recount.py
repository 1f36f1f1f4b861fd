"""What the recount of an hour costs, beside the ingest of that hour: each a command of its own, from start to end.

    python -m benchmarks.recount                                                    an hour of a million events, three rounds
    python -m benchmarks.recount --events 12000 --files 4 --rounds 1                does it work at all?

A round ingests the hour into a fresh home and reconciles it twice: with an empty store of parsed files, and with what that run has
left there. Every second round the recounts come first, of the home of the round before. The figures are medians over the rounds.
The recount must find all events and no difference. Results go to benchmarks/results/recount-<events>.json. Exit status 1: it found
another number of events or a difference, or, with --check, a target was missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import CONTESTANTS, Job, adtally_environment
from benchmarks.make_input import START_MICROS, InputSpec, make_input, prefix_view
from benchmarks.measure import BenchmarkError, machine, note, only_one, run_measured, verdict, write_result
from benchmarks.run import GIB, Target, common_options, show_targets
from spark_jobs.config import load_settings
from spark_jobs.operate.watermark import close_by_hand

HERE = Path(__file__).parent
HOUR = datetime.fromtimestamp(START_MICROS / 1e6, UTC)
LABELS = {
    "ingest": "adtally ingest, a fresh home",
    "cold": "adtally reconcile, nothing parsed yet",
    "warm": "adtally reconcile, the files parsed before",
}
FIGURES = ("wall_seconds", "cpu_seconds", "peak_pss_bytes")


class Bench:
    """The input, and the commands on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Path(args.work).absolute() / "recount"
        self.spec = InputSpec(args.events, args.files, args.seed)
        source, self.landing = self.work / f"input-{args.events}-{args.files}-{args.seed}", self.work / "landing"
        note(f"input: {args.events} events in {args.files} files")
        self.expected = make_input(source, args.events, self.spec)["after_batch"][0]
        shutil.rmtree(self.landing, ignore_errors=True)
        prefix_view(source, self.landing, 1, self.spec)
        for file in self.landing.glob("events/*/*"):  # every command finds it in the page cache
            file.read_bytes()

    def job(self, number: int) -> Job:
        """The run of a round's ingest; the recounts are of its home."""
        return Job(self.landing, self.work / "runs" / str(number), self.work, self.args.files, self.args.adtally_env)

    def ingest(self, number: int) -> dict[str, Any]:
        """The hour into a fresh home; what it reports and writes is checked against what the input is known to hold."""
        job = self.job(number)
        shutil.rmtree(job.home, ignore_errors=True)
        command, env = CONTESTANTS["c"].start(job)
        measured = run_measured(command, env, self.work / f"ingest-{number}.log", self.args.timeout)
        wrong = CONTESTANTS["c"].check(job, measured, self.expected)
        close_by_hand(load_settings(home=job.home), HOUR + timedelta(hours=1), reason="benchmark", closed_by="benchmark")
        return {"what": "ingest", **{name: getattr(measured, name) for name in FIGURES}, "wrong": wrong}

    def reconcile(self, number: int, what: str) -> dict[str, Any]:
        """The hour of a home recounted; "cold" takes away what recounts before have parsed."""
        job = self.job(number)
        settings = load_settings(home=job.home)
        if what == "cold":
            shutil.rmtree(settings.recount_path, ignore_errors=True)
        hours = ["--from", f"{HOUR:%Y-%m-%dT%H:00:00Z}", "--to", f"{HOUR + timedelta(hours=1):%Y-%m-%dT%H:00:00Z}"]
        command = [sys.executable, "-m", "orchestration.cli", "reconcile", *hours, "--json"]
        measured = run_measured(command, adtally_environment(job), self.work / f"{what}-{number}.log", self.args.timeout)
        return {"what": what, **{name: getattr(measured, name) for name in FIGURES}, "wrong": self._wrong(job.home)}

    def _wrong(self, home: Path) -> list[str]:
        """What the latest reconciliation says that is not so. (Its exit status has said already that it found no difference.)"""
        table = DeltaTable(load_settings(home=home).table_uri("reconciliations")).to_pyarrow_table()
        latest = max(table["run_at"].to_pylist(), default=None)
        rows = [row for row in table.to_pylist() if row["run_at"] == latest]
        found = [(row["event_hour"], row["cause"], row["rows_expected"], row["rows_found"]) for row in rows]
        unique = self.expected["unique"]
        return (
            [] if found == [(HOUR, "none", unique, unique)] else [f"reconciliations: {found}, expected {unique} events of {HOUR}"]
        )

    def run(self) -> list[dict[str, Any]]:
        """All rounds."""
        runs: list[dict[str, Any]] = []
        for number in range(self.args.rounds):
            recounted = number - number % 2  # of two rounds the recounts are of the first one's home
            steps: list[Callable[[], dict[str, Any]]] = [
                partial(self.ingest, number),
                partial(self.reconcile, recounted, "cold"),
                partial(self.reconcile, recounted, "warm"),
            ]
            for step in steps if recounted == number else [*steps[1:], steps[0]]:
                runs.append({"round": number + 1, **step()})
                note(f"round {number + 1}, {runs[-1]['what']}: {runs[-1]['wall_seconds']:.2f} s")
        return runs


def figures_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds."""
    return {
        what: {name: round(statistics.median(run[name] for run in runs if run["what"] == what), 3) for name in FIGURES}
        for what in LABELS
    }


def show(document: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table("command", "wall s", "CPU s", "peak GiB", title=f"an hour of {document['parameters']['events']:,} events")
    for what, figures in document["summary"]["commands"].items():
        peak = figures["peak_pss_bytes"] / GIB
        table.add_row(LABELS[what], f"{figures['wall_seconds']:.1f}", f"{figures['cpu_seconds']:.1f}", f"{peak:.2f}")
    console.print(table)
    show_targets(document, console)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="benchmarks.recount", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--events", type=int, default=1_000_000)
    made.add_argument("--files", type=int, default=8, help="landing files that they lie in")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seed", type=int, default=7)
    common_options(made)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it and write the result."""
    args = parser().parse_args(argv)
    args.adtally_env = dict(args.adtally_env)
    work = Path(args.work).absolute() / "recount"
    work.mkdir(parents=True, exist_ok=True)
    host = machine()
    try:
        with only_one(work):
            runs = Bench(args).run()
    except (BenchmarkError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work / "runs", ignore_errors=True)
    figures = figures_of(runs)
    ratios = {what: figures[what]["wall_seconds"] / figures["ingest"]["wall_seconds"] for what in ("cold", "warm")}
    targets = [
        Target("recount, nothing parsed yet / ingest", ratios["cold"], 1.0),
        Target("recount, files parsed before / ingest", ratios["warm"], 1.0),
    ]
    document = {
        "scenario": "recount",
        "machine": host | {"load_average_at_end": round(os.getloadavg()[0], 2)},
        "parameters": {k: v for k, v in vars(args).items() if k not in ("work", "results", "name")},
        "summary": {"commands": figures},
        "targets": [asdict(target) | {"met": target.met} for target in targets],
        "runs": runs,
    }
    write_result(args.results, args.name or f"recount-{args.events}", document)
    show(document, Console())
    wrong = [f"{run['what']}, round {run['round']}: {problem}" for run in runs for problem in run["wrong"]]
    return verdict(wrong, is_missed=args.check and not all(target.met for target in targets))


if __name__ == "__main__":
    raise SystemExit(main())
