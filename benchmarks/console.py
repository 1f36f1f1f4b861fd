"""The console under load: many viewers while the ingest runs, and what they cost the ingest.

    python -m benchmarks.run console --viewers 50 --seconds 120

One continuous ingest is fed at a steady rate all the time. Its freshness is measured in three phases: without the console, with the
console and its viewers, and without it again. Half of the time without comes before and half after, so that a slow drift of the
machine cancels out. The marts are built once before, so that the pages have figures.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants import REPOSITORY, Job, adtally_environment
from benchmarks.followers import IncrementReader
from benchmarks.freshness import LandingWriter, continuous_ingest
from benchmarks.measure import BenchmarkError, TreeSampler, end_tree, note, quantiles, tail

SETTLE_SECONDS = 5.0
"""What is left out at the begin of a phase: starts and ends of programs are not what is measured."""

_START_SECONDS = 60.0
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Load:
    """``viewers`` watch for ``seconds``. ``rate`` events a second arrive all the time, from ``warm_up`` seconds before."""

    viewers: int
    think: float
    seconds: float
    warm_up: float
    rate: float
    lines: int
    seed: int
    trigger: str | None


def cli_command(*arguments: str) -> list[str]:
    """A command of adtally's own."""
    return [sys.executable, "-m", "orchestration.cli", *arguments]


@contextmanager
def running_console(job: Job) -> Iterator[tuple[str, TreeSampler]]:
    """Start the console of a home; its address, and what samples its memory. Raises BenchmarkError if it does not start."""
    output = job.work / "logs" / "console.log"
    with output.open("w") as out:
        command = cli_command("console", "--port", "0")
        process = subprocess.Popen(
            command, env=adtally_environment(job), stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    sampler = TreeSampler(process.pid)
    sampler.start()
    try:
        deadline = time.monotonic() + _START_SECONDS
        while (found := re.search(r"http://127\.0\.0\.1:\d+", output.read_text())) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"the console did not start; its log: {output}\n{tail(output)}")
            time.sleep(0.05)
        yield found[0], sampler
        if process.poll() is not None:
            raise BenchmarkError(f"the console ended with status {process.returncode}; its log: {output}\n{tail(output)}")
    finally:
        sampler.stop()
        end_tree(process)


def watch_console(address: str, load: Load, log: Path) -> dict[str, Any]:
    """Let the viewers watch, in a process of their own; return what they report. Raises BenchmarkError if they fail."""
    options = ["--viewers", str(load.viewers), "--think", str(load.think)]
    options += ["--seconds", str(load.seconds + SETTLE_SECONDS), "--settle", str(SETTLE_SECONDS)]
    command = [sys.executable, "-m", "benchmarks.viewers", address, *options]
    with log.open("w") as err:
        done = subprocess.run(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=err, text=True, timeout=load.seconds + 180, check=False
        )
    if done.returncode:
        raise BenchmarkError(f"the viewers ended with status {done.returncode}; their log: {log}\n{tail(log)}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_console(job: Job, load: Load) -> dict[str, Any]:
    """Feed an ingest, build the marts, and measure with viewers and without; return the figures."""
    writer = LandingWriter(job.landing, job.home / "staging", load.lines, load.rate, load.seed)
    reader = IncrementReader(job.home / "lakehouse", load.lines)
    ended = threading.Event()
    feed = threading.Thread(target=writer.run, args=(float("inf"), ended), daemon=True)
    phases: list[tuple[str, float, float]] = []

    def without(seconds: float) -> None:
        time.sleep(SETTLE_SECONDS)
        begin = time.monotonic()
        time.sleep(seconds)
        phases.append(("without", begin, time.monotonic()))

    with continuous_ingest(job, load.trigger) as ingest:
        reader.start()
        feed.start()
        try:
            note(f"console: {load.rate:.0f} events/s; {load.warm_up:.0f} s of warm-up, then a build of the marts")
            time.sleep(load.warm_up)
            _build_marts(job)
            note(f"console: {load.seconds / 2:.0f} s without, {load.seconds:.0f} s with {load.viewers} viewers, as long without")
            without(load.seconds / 2)
            with running_console(job) as (address, sampler):
                begin = time.monotonic() + SETTLE_SECONDS
                seen = watch_console(address, load, job.work / "logs" / "viewers.log")
                phases.append(("with", begin, time.monotonic()))
            without(load.seconds / 2)
            ended.set()
            feed.join()
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while len(reader.readable_at) < len(writer.renamed_at) and time.monotonic() < deadline:
                time.sleep(0.1)
            ingest.stop()
        finally:
            ended.set()
            reader.stop()
    lags = {name: _lags(writer, reader, [(a, b) for which, a, b in phases if which == name]) for name in ("without", "with")}
    if not all(lags.values()):
        raise BenchmarkError("a phase has no file that became readable: take more --seconds")
    freshness = {name: {"files": len(found), **quantiles(found)} for name, found in lags.items()}
    unread = len(writer.renamed_at) - len(reader.readable_at)
    return {
        **seen,
        "freshness": freshness,
        "freshness_p95_ratio": round(freshness["with"]["p95"] / freshness["without"]["p95"], 3),
        "freshness_p50_ratio": round(freshness["with"]["p50"] / freshness["without"]["p50"], 3),
        "console_peak_pss_bytes": max((sample.pss for sample in sampler.samples), default=0),
        "console_peak_rss_bytes": max((sample.rss for sample in sampler.samples), default=0),
        "console_cpu_seconds": round(sampler.cpu_seconds, 2),
        "exit_status": ingest.status,
        "wrong": [*seen["wrong"], *([f"{unread} files never became readable"] if unread else [])],
    }


def _build_marts(job: Job) -> None:
    log = job.work / "logs" / "marts.log"
    with log.open("w") as out:
        command = cli_command("marts", "build")
        done = subprocess.run(command, env=adtally_environment(job), stdout=out, stderr=subprocess.STDOUT, timeout=600, check=False)
    if done.returncode:
        raise BenchmarkError(f"the marts were not built; the log: {log}\n{tail(log)}")


def _lags(writer: LandingWriter, reader: IncrementReader, spans: list[tuple[float, float]]) -> list[float]:
    """The seconds from landed to readable of the files that landed in one of the spans."""
    return [
        reader.readable_at[name] - at
        for name, at in writer.renamed_at.items()
        if name in reader.readable_at and any(begin <= at <= end for begin, end in spans)
    ]
