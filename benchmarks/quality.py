"""What the expectations of an hour cost, beside the ingest of that hour.

    python -m benchmarks.quality                                                  an hour of two million events, three rounds
    python -m benchmarks.quality --batch 6000 --rounds 1                          does it work at all?

A round ingests an hour of two batches into a fresh home and validates its tables in processes of their own. Compared are the
commands from start to end (cold: imports and one validation), and what a running process takes (warm: the median of five
validations after a first one, beside twice the second batch, which is a steady one). The limit is on CPU time, imports apart: warm
beside the ingest. The validations must find all rows and nothing wrong. Results go to benchmarks/results/quality-<events>.json.
Exit status 1: a validation found something, or, with --check, a target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import CONTESTANTS, Job, adtally_environment, event_batches
from benchmarks.make_input import START_MICROS, InputSpec, make_input, prefix_view
from benchmarks.measure import BenchmarkError, machine, note, only_one, run_measured, verdict, write_result
from benchmarks.run import Target, common_options, show_targets
from spark_jobs.config import load_settings
from spark_jobs.lake.duck import delta_cursor
from spark_jobs.lake.log import DeltaLog

HERE = Path(__file__).parent
HOUR = datetime.fromtimestamp(START_MICROS / 1e6, UTC)
TABLES = ("batch_ledger", "events", "minute_metrics", "orders")  # the ledger is pinned first
BATCHES = 2
LIMIT = 0.20
LABELS = {
    "ingest": "adtally ingest, a fresh home",
    "cold": "the four tables validated, a process of its own",
    "steady": "ingest of the hour, steady batches",
    "warm": "the four tables validated, a running process",
}


class Bench:
    """The input, and the commands on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Path(args.work).absolute() / "quality"
        self.spec = InputSpec(args.batch, args.files, args.seed)
        self.events = args.batch * BATCHES
        source, self.landing = self.work / f"input-{args.batch}-{args.files}-{args.seed}", self.work / "landing"
        note(f"input: {self.events} events in {BATCHES} batches")
        self.expected = make_input(source, self.events, self.spec)["after_batch"][BATCHES - 1]
        shutil.rmtree(self.landing, ignore_errors=True)
        prefix_view(source, self.landing, BATCHES, self.spec)
        for file in self.landing.glob("events/*/*"):  # every command finds it in the page cache
            file.read_bytes()

    def job(self, number: int) -> Job:
        """The run of a round's ingest."""
        return Job(self.landing, self.work / "runs" / str(number), self.work, self.args.files, self.args.adtally_env)

    def round(self, number: int) -> list[dict[str, Any]]:
        """Ingest, then validate in processes of their own."""
        job = self.job(number)
        shutil.rmtree(job.home, ignore_errors=True)
        command, env = CONTESTANTS["c"].start(job)
        ingest = run_measured(command, env, self.work / f"ingest-{number}.log", self.args.timeout)
        wrong = CONTESTANTS["c"].check(job, ingest, self.expected)
        steady = event_batches(ingest.batches)[-1]["seconds"] * BATCHES
        runs = [self._run("ingest", ingest.wall_seconds, ingest.cpu_seconds, wrong), self._run("steady", steady, None, [])]
        validate = [sys.executable, "-m", "benchmarks.quality", "--validate", str(job.home)]
        cold = run_measured([*validate, "--times", "1"], adtally_environment(job), self.work / f"cold-{number}.log")
        runs.append(self._run("cold", cold.wall_seconds, cold.cpu_seconds, self._wrong(cold.batches)))
        warm = run_measured([*validate, "--times", "6"], adtally_environment(job), self.work / f"warm-{number}.log")
        later = warm.batches[1:]
        seconds, cpu = (statistics.median(batch[name] for batch in later) for name in ("seconds", "cpu_seconds"))
        runs.append(self._run("warm", seconds, cpu, self._wrong(warm.batches)))
        return [{"round": number + 1, **run} for run in runs]

    @staticmethod
    def _run(what: str, seconds: float, cpu: float | None, wrong: list[str]) -> dict[str, Any]:
        note(f"{what}: {seconds:.2f} s")
        return {"what": what, "seconds": round(seconds, 3), "cpu_seconds": None if cpu is None else round(cpu, 3), "wrong": wrong}

    def _wrong(self, validations: list[dict[str, Any]]) -> list[str]:
        unique = self.expected["unique"]
        found = [(each["events"], each["failed"]) for each in validations]
        return [
            f"validated {events} events of {unique}, failed: {failed}" for events, failed in found if failed or events != unique
        ]


def validate(home: Path, times: int) -> None:
    """Validate the hour's tables ``times`` times; a JSON line each. Told to stdout, for the benchmark's own process."""
    from expectations import validate_hour

    settings = load_settings(home=home)
    for _ in range(times):
        started, cpu = time.perf_counter(), time.process_time()
        pins = {
            name: (settings.table_uri(name), DeltaLog(settings.table_uri(name)).latest_version()) for name in (*TABLES, "campaigns")
        }
        found = []
        for name in TABLES:
            with delta_cursor(settings.lakehouse_uri) as cursor:
                found.append(validate_hour(cursor, name, *pins[name], HOUR, related=pins, docs=settings.quality_path))
        failed = [f"{each.table}: {result.name}" for each in found for result in each.failed]
        tell(started, cpu, next(each.rows for each in found if each.table == "events"), failed)


def tell(started: float, cpu: float, events: int, failed: list[str]) -> None:
    """One validation, as a JSON line."""
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "events": events, "failed": failed}), flush=True)


def figures_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Medians over the rounds."""
    found: dict[str, dict[str, float | None]] = {}
    for what in LABELS:
        of_it = [run for run in runs if run["what"] == what]
        cpu = [run["cpu_seconds"] for run in of_it if run["cpu_seconds"] is not None]
        seconds = statistics.median(run["seconds"] for run in of_it)
        found[what] = {"seconds": round(seconds, 3), "cpu_seconds": round(statistics.median(cpu), 3) if cpu else None}
    return found


def targets_of(figures: dict[str, dict[str, Any]]) -> list[Target]:
    """What the expectations may cost."""
    return [
        Target("warm validation / ingest, CPU", figures["warm"]["cpu_seconds"] / figures["ingest"]["cpu_seconds"], LIMIT),
    ]


def show(document: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table("what", "s", "CPU s", title=f"an hour of {document['parameters']['events']:,} events")
    for what, figures in document["summary"].items():
        cpu = "-" if figures["cpu_seconds"] is None else f"{figures['cpu_seconds']:.2f}"
        table.add_row(LABELS[what], f"{figures['seconds']:.2f}", cpu)
    console.print(table)
    show_targets(document, console)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--batch", type=int, default=1_000_000, help="events a batch; the hour has two batches")
    made.add_argument("--files", type=int, default=8, help="landing files a batch")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seed", type=int, default=7)
    common_options(made)
    made.add_argument("--validate", type=Path, help=argparse.SUPPRESS)  # what a round starts as a process of its own
    made.add_argument("--times", type=int, default=1, help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it and write the result."""
    args = parser().parse_args(argv)
    if args.validate is not None:
        validate(args.validate, args.times)
        return 0
    args.adtally_env = dict(args.adtally_env)
    work = Path(args.work).absolute() / "quality"
    work.mkdir(parents=True, exist_ok=True)
    host = machine()
    try:
        with only_one(work):
            bench = Bench(args)
            runs = [run for number in range(args.rounds) for run in bench.round(number)]
    except (BenchmarkError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work / "runs", ignore_errors=True)
    figures = figures_of(runs)
    targets = targets_of(figures)
    document = {
        "scenario": "quality",
        "machine": host | {"load_average_at_end": round(os.getloadavg()[0], 2)},
        "parameters": {"events": bench.events, "batch": args.batch, "files": args.files, "rounds": args.rounds, "seed": args.seed},
        "summary": figures,
        "targets": [asdict(target) | {"met": target.met} for target in targets],
        "runs": runs,
    }
    write_result(args.results, args.name or f"quality-{bench.events}", document)
    show(document, Console())
    wrong = [f"{run['what']}, round {run['round']}: {problem}" for run in runs for problem in run["wrong"]]
    return verdict(wrong, is_missed=args.check and not all(target.met for target in targets))


if __name__ == "__main__":
    raise SystemExit(main())
