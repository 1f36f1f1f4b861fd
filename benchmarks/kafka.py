"""Kafka beside files, and how fast a backlog is caught up with.

    python -m benchmarks.kafka throughput                    4 M events from files and from a topic, three rounds
    python -m benchmarks.kafka catch-up                      a backlog of an hour at 1,000 events/s, while more arrive
    python -m benchmarks.kafka throughput --events 48000 --batch 12000 --rounds 1      does it work at all?

A real broker of its own runs on the same machine; its CPU time is not in the figures of the ingest. The events are in the topic
before the clock starts. Results go to benchmarks/results/kafka-<scenario>-<size>.json. Exit status 1: a
contestant failed or gave wrong numbers, or, with --check, a target was missed.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from benchmarks.contestants import (
    CONTESTANTS,
    Job,
    adtally_command,
    adtally_environment,
    event_batches,
)
from benchmarks.kafka_topics import SteadyFeed, broker, feed_files, kafka_toml, wait_for
from benchmarks.make_input import InputSpec, input_file
from benchmarks.measure import (
    BenchmarkError,
    TreeSampler,
    end_tree,
    json_object,
    machine,
    note,
    run_measured,
    tail,
    verdict,
    write_result,
)
from benchmarks.run import GIB, Bench, Outcome, Target, common_options, median_or_none, show_targets, whole_batches
from services.launcher.kafka import Kafka

TOPIC = "ad-events"
WAYS = {"files": "landing files", "kafka": "a topic, raw copy included", "kafka-no-raw": "a topic, without the raw copy"}
_LIMIT = 1.3
_FIGURES = ("wall_seconds", "cpu_seconds", "peak_pss_bytes", "steady_batch_seconds")


def throughput(bench: Bench) -> Outcome:
    """The same events from files, from a topic, and from a topic without the raw copy; the rounds take turns in who starts."""
    args = bench.args
    batches = whole_batches(args.events, bench.spec)
    ways = [way.strip() for way in args.only.split(",")] if args.only else list(WAYS)
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise BenchmarkError(f"no such way: {', '.join(unknown)}; there are {', '.join(WAYS)}")
    landing, expected = bench.landing(batches)
    runs: list[dict[str, Any]] = []
    with broker(bench.work / "brokers", partitions=args.partitions, heap=args.heap) as kafka:
        files = [input_file(landing, index) for index in range(batches * bench.spec.files_per_batch)]
        started = time.perf_counter()
        sent = feed_files(kafka.bootstrap_servers, TOPIC, files)
        note(f"{sent} records in the topic, {sent / (time.perf_counter() - started):,.0f} a second")
        for number in range(args.rounds):
            shift = number % len(ways)
            for way in ways[shift:] + ways[:shift]:
                runs.append(_ingest(bench, way, kafka, landing, expected) | {"round": number + 1})
    medians = {
        way: {figure: median_or_none([run[figure] for run in runs if run["way"] == way]) for figure in _FIGURES} for way in ways
    }
    ratios: dict[str, float] = {}
    for way in ways:
        for figure in ("wall_seconds", "steady_batch_seconds", "cpu_seconds"):
            above, below = medians[way][figure], medians.get("files", {}).get(figure)
            if way != "files" and above and below:
                ratios[f"{way}/files {figure.removesuffix('_seconds').replace('_', ' ')}"] = round(above / below, 3)
    targets = [Target(name, value, _LIMIT) for name, value in ratios.items() if "cpu" not in name]
    return runs, {"by_way": medians, "ratios": ratios}, targets


def _ingest(bench: Bench, way: str, kafka: Kafka, landing: Path, expected: dict[str, int]) -> dict[str, Any]:
    """One run of one way; its figures, checked against the expected counts."""
    args = bench.args
    root = bench.work / "runs" / way
    shutil.rmtree(root, ignore_errors=True)
    home = root / "home"
    home.mkdir(parents=True)
    job = Job(landing, home, bench.work, bench.spec.files_per_batch, args.adtally_env)
    env = adtally_environment(job)
    command = adtally_command()
    if way != "files":
        only_campaigns = root / "landing"
        shutil.copytree(landing / "campaigns", only_campaigns / "campaigns")
        env["ADTALLY_LANDING"] = str(only_campaigns)
        env["ADTALLY_KAFKA"] = str(kafka_toml(root / "kafka.toml", {"eu": kafka.bootstrap_servers}, max_offsets=bench.spec.batch))
    if way == "kafka-no-raw":
        command = [sys.executable, "-m", "benchmarks.contestants.without_raw", *command[command.index("ingest") :]]
    note(f"{way} ({WAYS[way]}): {expected['offered']} events")
    measured = run_measured(command, env, bench.work / "logs" / f"kafka-{way}.log", args.timeout)
    problems = CONTESTANTS["c"].check(job, measured, expected)
    seconds = [round(float(b["seconds"]), 3) for b in event_batches(measured.batches)]
    steady = statistics.median(seconds[1:]) if len(seconds) > 1 else None
    wall = round(measured.wall_seconds, 2)
    wrong = f", WRONG: {'; '.join(problems)}" if problems else ""
    note(f"    {wall} s, steady batch {steady} s, CPU {measured.cpu_seconds:.1f} s{wrong}")
    if not args.keep:
        shutil.rmtree(root, ignore_errors=True)
    return {
        "way": way,
        "wall_seconds": wall,
        "cpu_seconds": round(measured.cpu_seconds, 2),
        "peak_pss_bytes": measured.peak_pss_bytes,
        "batch_seconds": seconds,
        "steady_batch_seconds": steady,
        "wrong": problems,
    }


def catch_up(bench: Bench) -> Outcome:
    """Two regions. One comes back with the backlog of its outage, while new events arrive in both at the usual rate.

    Caught up: less is missing than arrives in ``--lag`` seconds. Counted is what the ingest reports, batch by batch.
    """
    args = bench.args
    batches = whole_batches(args.backlog, bench.spec)
    landing, expected = bench.landing(batches)
    root = bench.work / "runs" / "catch-up"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(landing / "campaigns", root / "landing" / "campaigns")
    job = Job(root / "landing", root / "home", bench.work, 8, args.adtally_env)
    job.home.mkdir(parents=True)
    log = bench.work / "logs" / "kafka-catch-up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        broker(bench.work / "brokers", partitions=args.partitions, heap=args.heap) as eu,
        broker(bench.work / "brokers", partitions=args.partitions, heap=args.heap) as us,
        log.open("w") as err,
    ):
        files = [input_file(landing, index) for index in range(batches * bench.spec.files_per_batch)]
        backlog = feed_files(us.bootstrap_servers, TOPIC, files)
        servers = {"eu": eu.bootstrap_servers, "us": us.bootstrap_servers}
        env = adtally_environment(job)
        env["ADTALLY_KAFKA"] = str(kafka_toml(root / "kafka.toml", servers, max_offsets=args.batch))
        feeds = [
            SteadyFeed(at, TOPIC, rate=args.rate, interval=0.2, seed=seed, region=name)
            for seed, (name, at) in enumerate(servers.items(), 100)
        ]
        note(f"backlog of {backlog} events, {args.rate:.0f} more a second in each region")
        command = adtally_command("--continuous", *(["--trigger", args.trigger] if args.trigger else []))
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True)
        sampler = TreeSampler(process.pid)
        sampler.start()
        counted = _Counted(process)
        started = time.monotonic()
        try:
            for feed in feeds:
                feed.start()
            counted.start()

            def caught_up() -> bool:
                sent = backlog + sum(feed.sent for feed in feeds)
                return bool(sent - counted.totals["offered"] <= args.lag * args.rate * len(feeds))

            wait_for(caught_up, args.timeout, "the backlog was caught up with", lambda: process.poll() is None)
            seconds, at_then = time.monotonic() - started, dict(counted.totals)
            for feed in feeds:
                feed.stop()
            sent = backlog + sum(feed.sent for feed in feeds)
            wait_for(lambda: counted.totals["offered"] >= sent, 120, "the rest was ingested", lambda: process.poll() is None)
            process.send_signal(signal.SIGTERM)
            status = process.wait(120)
        finally:
            for feed in feeds:
                feed._ended.set()
            sampler.stop()
            end_tree(process)
        counted.join(10)
    arrived = args.rate * len(feeds)
    wrong = [] if status == 0 else [f"SIGTERM led to exit status {status}: {tail(log)}"]
    new = sum(feed.sent for feed in feeds)
    for name, wanted in (("offered", sent), ("accepted", expected["unique"] + new), ("duplicate", expected["duplicates"])):
        if counted.totals[name] != wanted:
            wrong.append(f"{name}: {counted.totals[name]}, expected {wanted}")
    rate = at_then["offered"] / seconds
    summary = {
        "backlog_events": backlog,
        "arriving_a_second": arrived,
        "caught_up_after_seconds": round(seconds, 1),
        "first_batch_after_seconds": round(counted.first_at - started, 1),
        "ingested_a_second": round(rate),
        "ingested/arriving": round(rate / arrived, 2),
        "outage_seconds/catch_up_seconds": round(backlog / args.rate / seconds, 1),
        "cpu_seconds": round(sampler.cpu_seconds, 1),
        "peak_pss_bytes": max((sample.pss for sample in sampler.samples), default=0),
        "steady_batch_seconds": median_or_none([b["seconds"] for b in counted.batches if b["offered"] > args.batch / 2]),
    }
    if not args.keep:
        shutil.rmtree(root, ignore_errors=True)
    # as a share of real time, so that less is better here too
    return [{"wrong": wrong}], summary, [Target("arriving/ingested", arrived / rate, 1.0, strict=True)]


class _Counted(threading.Thread):
    """Adds up the batches of events that an ingest reports."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.totals = dict.fromkeys(("offered", "accepted", "duplicate"), 0)
        self.batches: list[dict[str, Any]] = []
        self.first_at = time.monotonic()
        self._process = process

    def run(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            record = json_object(line)
            for batch in event_batches([record] if record else []):
                if not self.batches:
                    self.first_at = time.monotonic()
                self.batches.append(batch)
                for name in self.totals:
                    self.totals[name] += batch[name]


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(
        prog="benchmarks.kafka", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="scenario", required=True)
    made = commands.add_parser("throughput", help="files beside a topic")
    made.add_argument("--events", type=int, default=4_000_000)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--only", help=f"some of {', '.join(WAYS)}")
    caught = commands.add_parser("catch-up", help="a backlog, while more arrives")
    caught.add_argument("--backlog", type=int, default=3_600_000, help="events of the region that was away")
    caught.add_argument("--rate", type=float, default=1_000.0, help="events a second that arrive in each region meanwhile")
    caught.add_argument("--lag", type=float, default=10.0, help="seconds of arrivals that may be missing when it is caught up with")
    caught.add_argument("--trigger", help="seconds between two batches, passed on")
    for one in (made, caught):
        one.add_argument("--batch", type=int, default=1_000_000 if one is made else 600_000, help="events of a micro-batch")
        one.add_argument("--files-per-batch", type=int, default=8)
        one.add_argument("--seed", type=int, default=7)
        one.add_argument("--partitions", type=int, default=2)
        one.add_argument("--heap", default="512m", help="largest heap of a broker")
        one.add_argument("--keep", action="store_true", help="keep what the last run wrote")
        common_options(one)
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    console = Console()
    args.adtally_env = dict(args.adtally_env)
    runner = {"throughput": throughput, "catch-up": catch_up}[args.scenario]
    try:
        bench = Bench(args, InputSpec(args.batch, args.files_per_batch, args.seed))
        bench.work.mkdir(parents=True, exist_ok=True)
        host = machine()
        with FileLock(bench.work / "lock", timeout=0):
            runs, summary, targets = runner(bench)
    except Timeout:
        print(f"benchmark: another one is running in {bench.work}", file=sys.stderr)
        return 1
    except (BenchmarkError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    document = {
        "scenario": args.scenario,
        "machine": host,
        "parameters": {k: v for k, v in vars(args).items() if k not in ("work", "results", "keep", "name")},
        "summary": summary,
        "targets": [asdict(target) | {"met": target.met} for target in targets],
        "runs": runs,
    }
    size = args.events if args.scenario == "throughput" else args.backlog
    path = write_result(args.results, args.name or f"kafka-{args.scenario}-{size}", document)
    for way, figures in summary.get("by_way", {}).items():
        shown = {name: f"{value / GIB:.2f} GiB" if name.endswith("bytes") else value for name, value in figures.items() if value}
        console.print(f"{way}: {shown}")
    for name, value in summary.items():
        if name != "by_way":
            console.print(f"{name}: {value}")
    show_targets(document, console)
    console.print(f"written: {path}")
    wrong = [f"{run.get('way', args.scenario)}: {problem}" for run in runs for problem in run["wrong"]]
    return verdict(wrong, is_missed=args.check and not all(target.met for target in targets))


if __name__ == "__main__":
    raise SystemExit(main())
