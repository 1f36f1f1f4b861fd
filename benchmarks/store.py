"""What an object store costs against a local disk: ingest, mart build and recount, each on both, in turn.

    python -m benchmarks.store                                                      two million events, two rounds, five minutes
    python -m benchmarks.store --events 1600 --batch 400 --files-per-batch 4 --rounds 1      does it work at all?

Each round takes the same landing files into a fresh lakehouse on the disk and into one in the store, builds the marts of both and
recounts both; every second round begins with the store. The store is a SeaweedFS on loopback, which counts the requests that it
gets. At the end a machine that ingests is stopped and its home deleted, and another one takes over.

Results go to benchmarks/results/store-<events>.json. Exit status 1: a number was wrong, or, with --check, a target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import Job, adtally_command, adtally_environment, event_batches
from benchmarks.make_input import EVENTS_PER_SECOND, START_MICROS, InputSpec, make_input, prefix_view
from benchmarks.measure import (
    BenchmarkError,
    Measured,
    json_object,
    machine,
    note,
    only_one,
    run_measured,
    tail,
    verdict,
    write_result,
)
from benchmarks.run import Target, common_options, show_targets, whole_batches
from services.launcher.s3 import BUCKET, S3
from services.launcher.service import Role
from services.launcher.state import read_state
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.duck import connect_delta, delta_scan
from spark_jobs.operate.watermark import close_by_hand

HERE = Path(__file__).parent
DISK, STORE = "disk", "store"
STEPS = ("steady batch", "mart build", "recount, nothing parsed yet", "recount, files parsed before")
KINDS = ("LIST", "GET", "PUT", "POST", "DELETE")
"""The kinds of requests that SeaweedFS counts. It counts a HEAD as a GET; S3 charges the same for both."""

USD_PER_1000 = {"LIST": 0.005, "PUT": 0.005, "POST": 0.005, "GET": 0.0004, "DELETE": 0.0}
"""An assumption: the list price of S3 Standard in us-east-1, November 2026. A DELETE costs nothing."""
A_DAY = {"steady batch": 8_640, "mart build": 288, "recount, nothing parsed yet": 24}
"""An assumption: a batch every ten seconds (116,000 events of a billion), marts every five minutes, each hour recounted once."""


class CountingS3(S3):
    """A SeaweedFS that counts the requests of its S3 port."""

    port_uses = (*S3.port_uses, "metrics")

    def roles(self, ports: dict[str, int]) -> list[Role]:
        """See S3."""
        [role] = super().roles({use: port for use, port in ports.items() if use != "metrics"})
        end = role.main.index("--")
        counting = (f"-metricsPort={ports['metrics']}", "-metricsIp=127.0.0.1")
        return [Role(role.name, (*role.main[:end], *counting, *role.main[end:]), role.options, role.stop_seconds)]

    def requests(self) -> Counter[str]:
        """Return the number of requests so far, by kind."""
        state = read_state(self.folder / "state.json")
        assert state is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{state.ports['metrics']}/metrics", timeout=10) as answer:
            return count_requests(answer.read().decode())


def count_requests(metrics: str) -> Counter[str]:
    """Return the requests by kind from the text of SeaweedFS's counters."""
    found: Counter[str] = Counter()
    for kind, number in re.findall(r'^SeaweedFS_s3_request_total\{.*type="(\w+)"\} (\S+)$', metrics, re.MULTILINE):
        found[kind] += int(float(number))
    return found


@contextmanager
def counting_store(parent: Path) -> Iterator[CountingS3]:
    """Run a store within the context, whose variables this process then has."""
    store = CountingS3(Path(tempfile.mkdtemp(prefix="store-", dir=parent)), ends_with_parent=True)
    try:
        store.up()
        os.environ.update(store.environment())
        yield store
    finally:
        store.down()
        shutil.rmtree(store.folder.parent, ignore_errors=True)


@dataclass(frozen=True)
class Run:
    """One lakehouse: its place, and the job that fills it."""

    place: str
    job: Job

    @property
    def settings(self) -> Settings:
        env = self.job.adtally_env
        return load_settings(home=self.job.home, landing=self.job.landing, lakehouse=env.get("ADTALLY_LAKEHOUSE"))


class Bench:
    """The input, and the commands on it."""

    def __init__(self, args: argparse.Namespace, store: CountingS3) -> None:
        self.args, self.store = args, store
        self.work = Path(args.work).absolute() / "store"
        self.spec = InputSpec(args.batch, args.files_per_batch, args.seed)
        self.batches = whole_batches(args.events, self.spec)
        if self.batches < 3:
            raise BenchmarkError("a steady batch needs at least three; set --batch")
        source, self.landing = self.work / f"input-{args.batch}-{args.files_per_batch}-{args.seed}", self.work / "landing"
        note(f"input: {self.batches} batches of {args.batch} events")
        self.expected = make_input(source, args.events, self.spec)["after_batch"][self.batches - 1]
        shutil.rmtree(self.landing, ignore_errors=True)
        prefix_view(source, self.landing, self.batches, self.spec)
        for file in self.landing.glob("events/*/*"):  # every command finds it in the page cache
            file.read_bytes()

    def run(self, name: str, place: str) -> Run:
        """Ingest, build the marts and recount in a new home with a new lakehouse."""
        home = self.work / "runs" / name
        shutil.rmtree(home, ignore_errors=True)
        lakehouse = {"ADTALLY_LAKEHOUSE": f"s3://{BUCKET}/{name}"} if place == STORE else {}
        return Run(place, Job(self.landing, home, self.work, self.args.files_per_batch, {**self.args.adtally_env, **lakehouse}))

    def ingest(self, run: Run) -> dict[str, Any]:
        """Take in all files; a batch's requests are those between its line and the line before."""
        counts: list[Counter[str]] = []

        def count(line: dict[str, Any]) -> None:
            if event_batches([line]):
                counts.append(self.store.requests())

        measured = self._measure(run, "ingest", adtally_command(), count)
        lines = event_batches(measured.batches)
        seconds = [float(line["seconds"]) for line in lines]
        if len(seconds) != self.batches:
            raise BenchmarkError(f"{len(seconds)} batches were reported, {self.batches} were expected")
        each = [after - before for before, after in pairwise(counts)]
        return {
            "step": "steady batch",
            "seconds": statistics.median(seconds[1:]),
            "requests": {kind: statistics.median(one[kind] for one in each) for kind in KINDS},
            "batch_seconds": seconds,
            "wall_seconds": measured.wall_seconds,
            "wrong": self.wrong(run.settings),
        }

    def command(self, run: Run, step: str, *arguments: str) -> dict[str, Any]:
        """A command from its start to its end."""
        before = self.store.requests()
        measured = self._measure(run, arguments[0], [sys.executable, "-m", "orchestration.cli", *arguments])
        requests = self.store.requests() - before
        return {"step": step, "seconds": measured.wall_seconds, "requests": {kind: requests[kind] for kind in KINDS}, "wrong": []}

    def _measure(self, run: Run, name: str, command: list[str], seen: Any = None) -> Measured:
        log = self.work / f"{name}-{run.place}.log"
        return run_measured(command, adtally_environment(run.job), log, self.args.timeout, seen)

    def wrong(self, settings: Settings) -> list[str]:
        """What the tables hold that the input does not."""
        sums = ", ".join(f"sum({name})::bigint" for name in ("impressions", "clicks", "spend_nanos"))
        with connect_delta(lakehouse=settings.lakehouse_uri) as lake:
            ((unique,),) = lake.sql(f"select count(*) from {delta_scan(settings.table_uri('events'))}").fetchall()
            ((impressions, clicks, nanos),) = lake.sql(
                f"select {sums} from {delta_scan(settings.table_uri('minute_metrics'))}"
            ).fetchall()
        found = {"unique": unique, "impressions": impressions, "clicks": clicks, "spend_nanos": nanos}
        return [f"{name}: {found[name]}, expected {self.expected[name]}" for name in found if found[name] != self.expected[name]]

    def round(self, number: int, place: str) -> list[dict[str, Any]]:
        """All steps on one place."""
        run = self.run(f"{place}-{number}", place)
        steps = [self.ingest(run)]
        hours = -(-self.args.events // (EVENTS_PER_SECOND * 3600))
        end = datetime.fromtimestamp(START_MICROS / 1e6, UTC) + timedelta(hours=hours)
        close_by_hand(run.settings, end, reason="benchmark", closed_by="benchmark")
        steps.append(self.command(run, "mart build", "marts", "build"))
        for step in STEPS[2:]:  # its exit status says that it found no difference
            steps.append(self.command(run, step, "reconcile", "--json"))
        shutil.rmtree(run.job.home, ignore_errors=True)
        note(f"round {number + 1}, {place}: " + ", ".join(f"{step['step']} {step['seconds']:.2f} s" for step in steps))
        return [{"place": place, "round": number + 1, **step} for step in steps]

    def rounds(self) -> list[dict[str, Any]]:
        """All rounds; every second one begins with the store."""
        orders = [(DISK, STORE) if number % 2 == 0 else (STORE, DISK) for number in range(self.args.rounds)]
        return [step for number, order in enumerate(orders) for place in order for step in self.round(number, place)]

    def take_over(self) -> dict[str, Any]:
        """Seconds from the end of a machine that ingests, whose home goes with it, to the first batch of another one.

        Its processes are stopped, not killed: of one that was killed here, the next would see that it has ended, and not wait for
        its lease to run out, as it must for another machine's.
        """
        first, second = self.run("gone", STORE), self.run("successor", STORE)
        second.job.adtally_env.update(first.job.adtally_env)
        log = self.work / "gone.log"
        with log.open("wb") as sink:
            gone = subprocess.Popen(
                adtally_command("--continuous", "--trigger", "1"),
                env=adtally_environment(first.job),
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                start_new_session=True,
            )
            assert gone.stdout is not None
            complete = 0
            for line in gone.stdout:
                complete += len(event_batches([record for record in (json_object(line),) if record]))
                if complete == 2:
                    break
        tree = [psutil.Process(gone.pid), *psutil.Process(gone.pid).children(recursive=True)]
        for process in tree:
            process.suspend()
        stopped = time.perf_counter()
        try:
            if complete < 2:
                raise BenchmarkError(f"the ingest ended by itself; its log: {log}\n{tail(log)}")
            shutil.rmtree(first.job.home, ignore_errors=True)
            started = time.perf_counter() - stopped
            measured = self._measure(second, "successor", adtally_command())
        finally:
            for process in tree:
                process.kill()
            gone.wait()
        lines = event_batches(measured.batches)
        seconds = started + lines[0]["at"]
        note(f"take-over: {seconds:.1f} s")
        again = sum(line["duplicate"] for line in lines) > self.expected["duplicates"]
        wrong = self.wrong(second.settings) + (["records were read again"] if again else [])
        shutil.rmtree(second.job.home, ignore_errors=True)
        return {"step": "take-over", "place": STORE, "round": 1, "seconds": seconds, "wrong": wrong}


def seconds_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by step and place."""
    return {
        step: {
            place: round(statistics.median(run["seconds"] for run in runs if (run["step"], run["place"]) == (step, place)), 3)
            for place in (DISK, STORE)
        }
        for step in STEPS
    }


def requests_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians of the requests to the store, by step and kind."""
    return {
        step: {
            kind: statistics.median(run["requests"][kind] for run in runs if (run["step"], run["place"]) == (step, STORE))
            for kind in KINDS
        }
        for step in STEPS
    }


def usd_a_day(requests: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What the requests of a day cost, by step, in US dollars."""
    return {
        step: round(times * sum(number * USD_PER_1000[kind] / 1000 for kind, number in requests[step].items()), 2)
        for step, times in A_DAY.items()
    }


def show(document: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    summary = document["summary"]
    table = Table("step", "disk s", "store s", "store / disk", title=f"{document['parameters']['events']:,} events")
    for step, found in summary["seconds"].items():
        table.add_row(step, f"{found[DISK]:.2f}", f"{found[STORE]:.2f}", f"{found[STORE] / found[DISK]:.2f}")
    console.print(table)
    table = Table("requests", *KINDS, "USD a day")
    for step, kinds in summary["requests"].items():
        cost = summary["usd_a_day"].get(step)
        table.add_row(step, *(f"{kinds[kind]:g}" for kind in KINDS), "" if cost is None else f"{cost:.2f}")
    console.print(table)
    show_targets(document, console)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="benchmarks.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--events", type=int, default=2_000_000)
    made.add_argument("--batch", type=int, default=500_000, help="events of a micro-batch")
    made.add_argument("--files-per-batch", type=int, default=8)
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--seed", type=int, default=7)
    made.add_argument("--json", action="store_true", dest="as_json", help="print the result as JSON")
    common_options(made)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it and write the result."""
    args = parser().parse_args(argv)
    args.adtally_env = dict(args.adtally_env)
    work = Path(args.work).absolute() / "store"
    work.mkdir(parents=True, exist_ok=True)
    host = machine()
    try:
        with only_one(work), counting_store(work) as store:
            bench = Bench(args, store)
            runs = bench.rounds()
            taken = bench.take_over()
    except (BenchmarkError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work / "runs", ignore_errors=True)
    seconds, requests = seconds_of(runs), requests_of(runs)
    targets = [
        Target("steady batch, store / disk", seconds["steady batch"][STORE] / seconds["steady batch"][DISK], 1.3),
        Target("take-over of a machine that is gone, s", taken["seconds"], 60.0),
    ]
    document = {
        "scenario": "store",
        "machine": host | {"load_average_at_end": round(os.getloadavg()[0], 2)},
        "parameters": {k: v for k, v in vars(args).items() if k not in ("work", "results", "name", "as_json")},
        "summary": {
            "seconds": seconds,
            "requests": requests,
            "usd_per_1000": USD_PER_1000,
            "times_a_day": A_DAY,
            "usd_a_day": usd_a_day(requests),
            "take_over_seconds": round(taken["seconds"], 2),
        },
        "targets": [asdict(target) | {"met": target.met} for target in targets],
        "runs": [*runs, taken],
    }
    write_result(args.results, args.name or f"store-{args.events}", document)
    if args.as_json:
        print(json.dumps(document, indent=1))
    else:
        show(document, Console())
    everything = [*runs, taken]
    wrong = [f"{run['step']}, {run['place']}, round {run['round']}: {problem}" for run in everything for problem in run["wrong"]]
    return verdict(wrong, is_missed=args.check and not all(target.met for target in targets))


if __name__ == "__main__":
    raise SystemExit(main())
