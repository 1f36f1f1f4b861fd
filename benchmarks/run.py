"""Run the benchmarks and say what came out.

    python -m benchmarks.run ingest                          throughput: the contestants, interleaved, three rounds
    python -m benchmarks.run ingest --only a,c --rounds 1    some of them
    python -m benchmarks.run ingest --scenario history       a batch after 2 M and after 40 M accepted events
    python -m benchmarks.run ingest --scenario batch10       one batch of 1 M against one of 10 M
    python -m benchmarks.run ingest --scenario memory        peak memory at 4 M and at 40 M
    python -m benchmarks.run ingest --scenario freshness     continuous mode at 2,000 events/s
    python -m benchmarks.run index --keys 1000000000         a batch against a key index of a billion keys
    python -m benchmarks.run console                         the console with 50 viewers while the ingest runs
    python -m benchmarks.run flat                            each capability at 90 days of history, beside 2
    python -m benchmarks.run marts --days 90 --json          a build of the marts over 90 days against one over two
    python -m benchmarks.run report                          the results as Markdown

Results go to benchmarks/results/<name>.json. Exit status 1: a contestant failed or gave wrong numbers, or, with
--check, a target was missed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import flat, starts
from benchmarks.console import Load, run_console
from benchmarks.contestants import CONTESTANTS, Job, event_batches
from benchmarks.freshness import run_freshness
from benchmarks.make_input import RESENT_SHARE, InputSpec, make_input, prefix_view
from benchmarks.marts import Size, run_marts
from benchmarks.measure import BenchmarkError, Measured, machine, note, only_one, run_measured, verdict, write_result

HERE = Path(__file__).parent
GIB = 2**30
SCENARIOS = ("throughput", "history", "batch10", "memory", "freshness")


@dataclass(frozen=True)
class Target:
    """A figure and the limit it is held to: at most, or below if ``strict``."""

    name: str
    value: float
    limit: float
    strict: bool = False

    @property
    def met(self) -> bool:
        return self.value < self.limit if self.strict else self.value <= self.limit


@dataclass
class Bench:
    """The options of one call and what they lead to: input, runs, results."""

    args: argparse.Namespace
    spec: InputSpec

    @property
    def work(self) -> Path:
        return Path(self.args.work).absolute()

    def landing(self, batches: int) -> tuple[Path, dict[str, int]]:
        """A landing folder with so many batches of 1 M (or of ``--batch``), and the counts expected of it."""
        spec = self.spec
        source = self.work / f"input-{spec.batch}-{spec.files_per_batch}-{spec.seed}"
        note(f"input: {batches} batches of {spec.batch} events")
        expected = make_input(source, batches * spec.batch, spec)
        view = self.work / f"landing-{spec.batch}-{spec.seed}-{batches}"
        shutil.rmtree(view, ignore_errors=True)
        prefix_view(source, view, batches, spec)
        if sum(expected["bytes"][:batches]) < psutil.virtual_memory().available / 2:
            for file in sorted(view.glob("events/*/*")):  # every contestant finds it in the page cache
                file.read_bytes()
        return view, expected["after_batch"][batches - 1]

    def run(self, key: str, batches: int, per_batch: int = 1, *, tag: str = "") -> tuple[Measured, dict[str, Any]]:
        """One contestant once, on ``batches`` batches taken ``per_batch`` at a time; its figures, checked."""
        landing, expected = self.landing(batches)
        contestant = CONTESTANTS[key]
        home = self.work / "runs" / key
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        job = Job(landing, home, self.work, self.spec.files_per_batch * per_batch, self.args.adtally_env)
        command, env = contestant.start(job)
        note(f"{key} ({contestant.label}){tag}: {batches * self.spec.batch} events")
        measured = run_measured(command, env, self.work / "logs" / f"{key}.log", self.args.timeout)
        problems = contestant.check(job, measured, expected)
        seconds = [round(float(b["seconds"]), 3) for b in event_batches(measured.batches)]
        steady = statistics.median(seconds[1:]) if len(seconds) > 1 else None
        result = {
            "contestant": key,
            "events": batches * self.spec.batch,
            "wall_seconds": round(measured.wall_seconds, 2),
            "cpu_seconds": round(measured.cpu_seconds, 2),
            "peak_pss_bytes": measured.peak_pss_bytes,
            "peak_rss_bytes": measured.peak_rss_bytes,
            "batch_seconds": seconds,
            "steady_batch_seconds": steady,
            "steady_batch_cpu_seconds": steady_cpu(event_batches(measured.batches)),
            "wrong": problems,
        }
        note(
            f"    {result['wall_seconds']} s, steady batch {steady} s, {measured.peak_pss_bytes / GIB:.2f} GiB"
            + (f", WRONG: {'; '.join(problems)}" if problems else "")
        )
        if not self.args.keep:
            shutil.rmtree(home, ignore_errors=True)
        return measured, result


def steady_cpu(batches: list[dict[str, Any]]) -> dict[str, float]:
    """CPU seconds of a steady batch by program: medians of the differences between the lines of two batches."""
    pairs = list(pairwise(batch["cpu"] for batch in batches))
    return {name: round(statistics.median(b[name] - a[name] for a, b in pairs), 2) for name in pairs[0][0]} if pairs else {}


Outcome = tuple[list[dict[str, Any]], dict[str, Any], list[Target]]


def throughput(bench: Bench) -> Outcome:
    """The contestants in turn, each round starting with another one; medians over the rounds."""
    keys = chosen(bench.args.only)
    batches = whole_batches(bench.args.events, bench.spec)
    runs: list[dict[str, Any]] = []
    for number in range(bench.args.rounds):
        shift = number % len(keys)
        for key in keys[shift:] + keys[:shift]:
            runs.append(bench.run(key, batches, tag=f", round {number + 1}")[1] | {"round": number + 1})
    figures = ("wall_seconds", "cpu_seconds", "peak_pss_bytes", "peak_rss_bytes", "steady_batch_seconds")
    medians: dict[str, dict[str, float | None]] = {}
    for key in keys:
        mine = [r for r in runs if r["contestant"] == key]
        medians[key] = {f: median_or_none([r[f] for r in mine]) for f in figures}
    ratios = throughput_ratios(medians, batches)
    targets = []
    if "c/a steady batch" in ratios:
        targets.append(Target("c/a steady batch", ratios["c/a steady batch"], 0.5))
    if "c/b wall" in ratios:
        targets.append(Target("c/b wall", ratios["c/b wall"], 1.0, strict=True))
    if "c/better d wall" in ratios:
        targets.append(Target("c/better d wall", ratios["c/better d wall"], 0.5))
    if "c steady batch / e a batch" in ratios:
        targets.append(Target("c steady batch / e a batch", ratios["c steady batch / e a batch"], 1.3))
    if "c/e CPU" in ratios:
        targets.append(Target("c/e CPU", ratios["c/e CPU"], 1.5))
    if "c" in medians:
        targets.append(Target("c peak memory, GiB", (medians["c"]["peak_pss_bytes"] or 0) / GIB, 4.0))
    return runs, {"medians": medians, "ratios": ratios}, targets


def throughput_ratios(medians: dict[str, dict[str, float | None]], batches: int) -> dict[str, float]:
    """What (c) costs in terms of the others: of wall time, and of a steady batch where both have batches.

    (e) has no batches: its share of one is its wall time divided by their number.
    """
    ratios: dict[str, float] = {}
    own = medians.get("c", {})

    def put(name: str, above: float | None, below: float | None) -> None:
        if above and below:
            ratios[name] = round(above / below, 3)

    for key, other in medians.items():
        if key != "c":
            put(f"c/{key} wall", own.get("wall_seconds"), other["wall_seconds"])
            put(f"c/{key} steady batch", own.get("steady_batch_seconds"), other["steady_batch_seconds"])
    if once := medians.get("e"):
        share = (once["wall_seconds"] or 0) / batches
        put("c steady batch / e a batch", own.get("steady_batch_seconds"), share)
        put("c/e CPU", own.get("cpu_seconds"), once["cpu_seconds"])
    flink = [m["wall_seconds"] for k, m in medians.items() if k.startswith("d-") and m["wall_seconds"]]
    if flink:
        put("c/better d wall", own.get("wall_seconds"), min(flink))
    return ratios


def history(bench: Bench) -> Outcome:
    """One process over the whole history: three batches after ``--low`` accepted events, three after ``--high``."""
    per_batch = bench.spec.batch - int(bench.spec.batch * RESENT_SHARE)
    low, high = (math.ceil(limit / per_batch) for limit in (bench.args.low, bench.args.high))
    if low + 3 > high:
        raise BenchmarkError(f"--low {bench.args.low} and --high {bench.args.high} are less than three batches apart")
    measured, run = bench.run("c", high + 3)
    seconds = run["batch_seconds"]
    if len(seconds) != high + 3:
        raise BenchmarkError(f"{len(seconds)} batches were reported, {high + 3} were expected")
    after_low, after_high = (statistics.median(seconds[k : k + 3]) for k in (low, high))
    summary = {
        "after_low_seconds": after_low,
        "after_high_seconds": after_high,
        "accepted_before": {"low": low * per_batch, "high": high * per_batch},
        "ratio": round(after_high / after_low, 3),
        "peak_pss_bytes": run["peak_pss_bytes"],
        # The highest sample of each minute: does memory grow with history?
        "pss_gib_by_minute": pss_by_minute(measured),
    }
    return [run], summary, [Target("batch after high / after low", after_high / after_low, 1.2)]


def pss_by_minute(measured: Measured) -> list[float]:
    """Highest sample of every minute, GiB."""
    minutes: dict[int, int] = {}
    for sample in measured.samples:
        minutes[int(sample.seconds // 60)] = max(minutes.get(int(sample.seconds // 60), 0), sample.pss)
    return [round(minutes[m] / GIB, 3) for m in sorted(minutes)]


def batch10(bench: Bench) -> Outcome:
    """A steady batch of 1 M against one batch of 10 M that is the first of its process (so with its warm-up)."""
    _, small = bench.run("c", 4)
    _, large = bench.run("c", 10, 10)
    if len(large["batch_seconds"]) != 1 or len(small["batch_seconds"]) != 4:
        raise BenchmarkError(f"unexpected batches: {small['batch_seconds']}, {large['batch_seconds']}")
    first, steady, big = small["batch_seconds"][0], small["steady_batch_seconds"], large["batch_seconds"][0]
    summary = {
        "steady_seconds": steady,
        "first_seconds": first,
        "tenfold_seconds": big,
        "tenfold/steady": round(big / steady, 3),
        "tenfold/first": round(big / first, 3),
        "tenfold_peak_pss_bytes": large["peak_pss_bytes"],
    }
    return [small, large], summary, [Target("tenfold batch / batch", big / steady, 10.0)]


def memory(bench: Bench) -> Outcome:
    """Peak of the process tree at ``--events`` and at ten times as many, batches of the same size."""
    batches = whole_batches(bench.args.events, bench.spec)
    small, large = bench.run("c", batches)[1], bench.run("c", batches * 10)[1]
    summary = {"peak_pss_bytes": {str(r["events"]): r["peak_pss_bytes"] for r in (small, large)}}
    summary["peak_rss_bytes"] = {str(r["events"]): r["peak_rss_bytes"] for r in (small, large)}
    targets = [Target(f"peak at {r['events']}, GiB", r["peak_pss_bytes"] / GIB, 4.0) for r in (small, large)]
    return [small, large], summary, targets


def freshness(bench: Bench) -> Outcome:
    """Continuous mode under a steady rate; see freshness.py."""
    args = bench.args
    root = bench.work / "runs" / "freshness"
    shutil.rmtree(root, ignore_errors=True)
    job = Job(root / "landing", root / "home", bench.work, 2_000, args.adtally_env)
    run = run_freshness(
        job,
        seconds=args.seconds,
        warm_up=args.warm_up,
        rate=args.rate,
        lines=args.lines,
        seed=args.seed,
        trigger=args.trigger,
        to=args.to,
    )
    run["wrong"] = [f"{run['unread_files']} files never became readable"] if run["unread_files"] else []
    marts = run.get("marts")
    if marts and marts["unread_files"]:
        run["wrong"].append(f"{marts['unread_files']} files never came into the marts")
    if run["exit_status"] != 0:
        run["wrong"].append(f"SIGTERM led to exit status {run['exit_status']}")
    if not args.keep:
        shutil.rmtree(root, ignore_errors=True)
    targets = [
        Target("freshness p50, s", run["p50_seconds"], 1.5),
        Target("freshness p95, s", run["p95_seconds"], 3.0),
    ]
    if marts:
        targets.append(Target("freshness of the marts p95, s", marts["p95_seconds"], 10.0))
    return [run], {k: v for k, v in run.items() if k != "wrong"}, targets


def console_load(args: argparse.Namespace) -> Outcome:
    """The console with viewers while the ingest runs; see console.py."""
    root = Path(args.work).absolute() / "runs" / "console"
    shutil.rmtree(root, ignore_errors=True)
    job = Job(root / "landing", root / "home", Path(args.work).absolute(), 2_000, args.adtally_env)
    load = Load(args.viewers, args.think, args.seconds, args.warm_up, args.rate, args.lines, args.seed, args.trigger)
    run = run_console(job, load)
    if run["exit_status"] != 0:
        run["wrong"].append(f"SIGTERM led to exit status {run['exit_status']}")
    if not args.keep:
        shutil.rmtree(root, ignore_errors=True)
    targets = [
        Target("page p95, s", run["page_seconds"]["p95"], 0.3),
        Target("freshness p95 with viewers / without", run["freshness_p95_ratio"], 1.1),
        Target("console peak memory, GiB", run["console_peak_pss_bytes"] / GIB, 0.5),
    ]
    return [run], {name: value for name, value in run.items() if name != "wrong"}, targets


RUNNERS: dict[str, Callable[[Bench], Outcome]] = {
    "throughput": throughput,
    "history": history,
    "batch10": batch10,
    "memory": memory,
    "freshness": freshness,
}


def chosen(only: str | None) -> list[str]:
    """Keys of the contestants that ``--only`` names; `d` stands for both of Flink's."""
    if not only:
        return list(CONTESTANTS)
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    unknown = [w for w in wanted if not any(k == w or k.startswith(f"{w}-") for k in CONTESTANTS)]
    if unknown or not wanted:
        raise BenchmarkError(f"no such contestant: {', '.join(unknown) or only}; there are {', '.join(CONTESTANTS)}")
    return [k for k in CONTESTANTS if any(k == w or k.startswith(f"{w}-") for w in wanted)]


def whole_batches(events: int, spec: InputSpec) -> int:
    """The number of batches; raises BenchmarkError unless it is whole."""
    if events <= 0 or events % spec.batch:
        raise BenchmarkError(f"{events} events are not a whole number of batches of {spec.batch}; set --batch")
    return events // spec.batch


def median_or_none(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def show(document: dict[str, Any], console: Console) -> None:
    """The figures of one result as tables."""
    medians = document["summary"].get("medians")
    if medians:
        columns = ("", "contestant", "wall s", "steady batch s", "CPU s", "peak GiB (PSS)")
        table = Table(*columns, title="medians of the rounds")
        for key, m in medians.items():
            steady = m["steady_batch_seconds"]
            table.add_row(
                key,
                CONTESTANTS[key].label,
                f"{m['wall_seconds']:.1f}",
                "-" if steady is None else f"{steady:.2f}",
                f"{m['cpu_seconds']:.1f}",
                f"{m['peak_pss_bytes'] / GIB:.2f}",
            )
        console.print(table)
    for name, value in document["summary"].get("ratios", {}).items():
        console.print(f"{name}: {value}")
    if not medians:
        for name, value in document["summary"].items():
            shown = f"{value / GIB:.2f} GiB" if name.endswith("_bytes") and isinstance(value, int) else value
            console.print(f"{name}: {shown}")
    if document["targets"]:
        table = Table("target", "value", "limit", "met")
        for t in document["targets"]:
            limit = f"{'<' if t['strict'] else '≤'} {t['limit']}"
            table.add_row(t["name"], f"{t['value']:.3f}", limit, "yes" if t["met"] else "NO")
        console.print(table)


def report(results: Path) -> str:
    """All the results as Markdown, for the README."""
    parts = []
    for path in sorted(results.glob("*.json")):
        document = json.loads(path.read_text())
        host, summary = document["machine"], document["summary"]
        lines = [f"### {path.stem}", ""]
        lines.append(
            f"{host['started_at'][:10]}, revision {host['revision']}, {host['cpu']}, {host['cores']} cores, "
            f"{host['memory_gib']} GiB; load average at the start {host['load_average_at_start']}."
        )
        lines.append("")
        if "medians" in summary:
            lines += ["| | contestant | wall s | steady batch s | CPU s | peak GiB |", "|---|---|---|---|---|---|"]
            for key, m in summary["medians"].items():
                steady = "-" if m["steady_batch_seconds"] is None else f"{m['steady_batch_seconds']:.2f}"
                lines.append(
                    f"| {key} | {CONTESTANTS[key].label} | {m['wall_seconds']:.1f} | {steady} | {m['cpu_seconds']:.1f} "
                    f"| {m['peak_pss_bytes'] / GIB:.2f} |"
                )
            lines += ["", "; ".join(f"{name} {value}" for name, value in summary["ratios"].items()), ""]
        lines += ["| target | value | limit | met |", "|---|---|---|---|"]
        for t in document["targets"]:
            lines.append(f"| {t['name']} | {t['value']:.3f} | {t['limit']} | {'yes' if t['met'] else 'no'} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) if parts else "No results yet."


def show_targets(document: dict[str, Any], console: Console) -> None:
    """A line a target: what was found, and whether it is met."""
    for target in document["targets"]:
        console.print(f"{target['name']}: {target['value']:.3f}, at most {target['limit']}: {'yes' if target['met'] else 'NO'}")


def common_options(made: argparse.ArgumentParser) -> None:
    """The options that every benchmark of commands takes."""
    made.add_argument("--adtally-env", type=key_value, action="append", default=[], metavar="ADTALLY_NAME=VALUE")
    made.add_argument("--timeout", type=float, default=3600.0, help="seconds after which a command is given up")
    made.add_argument("--name", help="name of the result")
    made.add_argument("--work", default=str(HERE / ".work"), help="input, homes, logs; may be deleted")
    made.add_argument("--results", default=str(HERE / "results"))
    made.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")


def key_value(text: str) -> tuple[str, str]:
    """A setting of the project for all commands."""
    name, sign, value = text.partition("=")
    if not sign or not name.startswith("ADTALLY_"):
        raise argparse.ArgumentTypeError(f"{text!r} is not ADTALLY_NAME=VALUE")
    return name, value


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    ingest = commands.add_parser("ingest", help="ingestion: throughput and the other scenarios")
    ingest.add_argument("--scenario", choices=SCENARIOS, default="throughput")
    ingest.add_argument("--events", type=int, default=4_000_000, help="throughput, memory: events of the input")
    ingest.add_argument("--batch", type=int, default=1_000_000, help="events of a micro-batch")
    ingest.add_argument("--files-per-batch", type=int, default=8)
    ingest.add_argument("--seed", type=int, default=7)
    ingest.add_argument("--rounds", type=int, default=3, help="throughput: rounds over all the contestants")
    ingest.add_argument("--only", help="throughput: contestants by letter, as a,c,d")
    ingest.add_argument("--low", type=int, default=2_000_000, help="history: accepted events before the first batches")
    ingest.add_argument("--high", type=int, default=40_000_000, help="history: accepted events before the last batches")
    ingest.add_argument("--seconds", type=float, default=180.0, help="freshness: measured time")
    ingest.add_argument("--warm-up", type=float, default=60.0, help="freshness: time before it that is not counted")
    ingest.add_argument("--rate", type=float, default=2_000.0, help="freshness: events a second")
    ingest.add_argument("--lines", type=int, default=1_000, help="freshness: events of a landing file")
    ingest.add_argument("--to", choices=["delta", "marts"], default="delta", help="freshness: how far")
    ingest.add_argument("--trigger", help="freshness: seconds between two batches, passed on")
    ingest.add_argument("--adtally-env", type=key_value, action="append", default=[], metavar="ADTALLY_NAME=VALUE")
    ingest.add_argument("--timeout", type=float, default=7200.0, help="seconds after which a run is given up")
    ingest.add_argument("--name", help="name of the result; default: scenario and size")
    ingest.add_argument("--work", default=str(HERE / ".work"), help="inputs, environments, logs; may be deleted")
    ingest.add_argument("--results", default=str(HERE / "results"))
    ingest.add_argument("--keep", action="store_true", help="keep what the last run of each contestant wrote")
    ingest.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")
    viewers = commands.add_parser("console", help="the console with viewers while the ingest runs")
    viewers.add_argument("--viewers", type=int, default=50, help="each polls pages and holds a stream of events")
    viewers.add_argument("--think", type=float, default=2.0, help="seconds between two pages of a viewer")
    viewers.add_argument("--seconds", type=float, default=120.0, help="measured time with viewers, and again without")
    viewers.add_argument("--warm-up", type=float, default=60.0, help="time before it that is not counted")
    viewers.add_argument("--rate", type=float, default=2_000, help="events a second")
    viewers.add_argument("--lines", type=int, default=1_000, help="events of a landing file")
    viewers.add_argument("--seed", type=int, default=7)
    viewers.add_argument("--trigger", help="seconds between two batches, passed on")
    viewers.add_argument("--keep", action="store_true", help="keep what the run wrote")
    viewers.add_argument("--json", action="store_true", dest="as_json", help="print the result as JSON")
    common_options(viewers)
    index = commands.add_parser("index", help="a batch against a key index of many keys, and of few")
    index.add_argument("--keys", type=int, default=1_000_000_000, help="keys of the large index")
    index.add_argument("--few", type=int, default=2_000_000, help="keys of the small one")
    index.add_argument("--batch", type=int, default=1_000_000, help="events of a micro-batch")
    index.add_argument("--files-per-batch", type=int, default=8)
    index.add_argument("--rounds", type=int, default=2, help="runs of each index, in turn")
    index.add_argument("--batches", type=int, default=5, help="batches of a run; the first is not counted")
    index.add_argument("--seed", type=int, default=7)
    index.add_argument("--only-build", action="store_true", help="make the runs of random keys, which later calls use, and end")
    index.add_argument("--keep", action="store_true", help="keep the homes")
    index.add_argument("--json", action="store_true", dest="as_json", help="print the summary as one line of JSON, the last one")
    common_options(index)
    of_history = commands.add_parser("flat", help="each capability after a long history, beside a short one")
    flat.add_options(of_history)
    common_options(of_history)
    of_starts = commands.add_parser("starts", help="commands that have little to do, and an idle adtally up")
    starts.add_options(of_starts)
    common_options(of_starts)
    marts = commands.add_parser("marts", help="a build of the marts over a long history against one over two days")
    marts.add_argument("--days", type=int, default=90)
    marts.add_argument("--rows", type=int, default=10_000_000, help="increments of all days together")
    marts.add_argument("--batch", type=int, default=20_000, help="increments of the batch before each build")
    marts.add_argument("--ads", type=int, default=2_000)
    marts.add_argument("--rounds", type=int, default=5)
    marts.add_argument("--seed", type=int, default=7)
    marts.add_argument("--json", action="store_true", dest="as_json", help="print the figures as the last line, as JSON")
    common_options(marts)
    rep = commands.add_parser("report", help="print the results as Markdown")
    rep.add_argument("--results", default=str(HERE / "results"))
    return top


def marts_load(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any], list[Target]]:
    """The builds of the marts over a long history and over two days."""
    size = Size(args.days, args.rows, args.batch, args.ads)
    summary = run_marts(Path(args.work).absolute(), size, rounds=args.rounds, seed=args.seed)
    runs = [run | {"wrong": []} for run in summary.pop("runs")]
    targets = [
        Target(f"CPU of a build after a batch, {args.days} days over two", summary["cpu_ratio"], 1.2),
        Target(f"wall time of a build after a batch, {args.days} days over two", summary["wall_ratio"], 1.2),
        Target("CPU seconds of a build without a change", summary["fixed_cpu_seconds"], 5.0),
    ]
    return runs, summary, targets


def default_name(args: argparse.Namespace) -> str:
    """The name of a result: scenario and size."""
    if args.command == "marts":
        return f"marts-{args.days}"
    if args.command == "console":
        return f"console-{args.viewers}"
    size = {"throughput": args.events, "memory": args.events, "history": args.high, "batch10": args.batch * 10}
    return f"ingest-{args.scenario}-{size.get(args.scenario, int(args.rate))}"


def main(argv: list[str] | None = None) -> int:
    """Entry point, also of `adtally bench`."""
    args = parser().parse_args(argv)
    console = Console()
    if args.command == "report":
        print(report(Path(args.results)))
        return 0
    if args.command == "flat":
        return flat.main(args)
    if args.command == "starts":
        return starts.main(args)
    args.adtally_env = dict(args.adtally_env)
    if args.command == "index":
        from benchmarks.index import run_index  # it imports this module

        try:
            return run_index(args)
        except (BenchmarkError, ValueError) as error:
            print(f"benchmark: {error}", file=sys.stderr)
            return 1
    is_console = args.command == "console"
    scenario = args.command if args.command in ("console", "marts") else args.scenario
    work = Path(args.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    host = machine()
    try:
        # Two at once would disturb each other's figures and delete each other's tables.
        with only_one(work):
            if is_console:
                runs, summary, targets = console_load(args)
            elif scenario == "marts":
                runs, summary, targets = marts_load(args)
            else:
                bench = Bench(args, InputSpec(args.batch, args.files_per_batch, args.seed))
                runs, summary, targets = RUNNERS[scenario](bench)
    except (BenchmarkError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    document = {
        "scenario": scenario,
        "machine": host,
        "parameters": {k: v for k, v in vars(args).items() if k not in ("work", "results", "keep", "name", "command", "as_json")},
        "summary": summary,
        "targets": [asdict(t) | {"met": t.met} for t in targets],
        "runs": runs,
    }
    path = write_result(args.results, args.name or default_name(args), document)
    if is_console and args.as_json:
        print(json.dumps(document, indent=1))
    else:
        show(document, console)
        console.print(f"written: {path}")
    if scenario == "marts" and args.as_json:
        print(json.dumps(summary))
    wrong = [f"{r.get('contestant', scenario)}: {problem}" for r in runs for problem in r["wrong"]]
    return verdict(wrong, is_missed=args.check and not all(t.met for t in targets))


if __name__ == "__main__":
    raise SystemExit(main())
