"""What a start costs: commands that have little to do, and an `adtally up` that has nothing to do.

    python -m benchmarks.run starts --json                                             the benchmark
    python -m benchmarks.run starts --events 2000 --rounds 1 --idle-seconds 0 --json   does it work at all?

A home of simulated traffic is ingested, settled, and has its marts. A round runs every command once, in turns, each as a person
would. The limits are on the medians of the wall time over the rounds; CPU time is that of the command and of all processes that it
started, Java's too. Before the last command of a round, a thousand new events land with their orders.

At the end `adtally up` runs on that home: first until it has caught up, which takes ``--settle-seconds``, then for
``--idle-seconds``, in which its processes' CPU time counts. Results go to benchmarks/results/starts.json. Exit status 1: a command
failed or its output is wrong, or, with --check, a limit is exceeded.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import base_environment
from benchmarks.measure import BenchmarkError, end_tree, machine, note, only_one, tail, write_result

NEW_EVENTS = 1_000
IDLE_LIMIT = 0.05  # of one core
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2): orphans of a command become our children, so that their CPU time counts
_TIMEOUT = 900.0
_END_SECONDS = 60.0


@dataclass(frozen=True)
class Command:
    """A command, the limit of its wall time in seconds, and what its output must match."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    output: str


COMMANDS = (
    Command("help", ("--help",), 0.3, "Usage: "),
    Command("version", ("version",), 0.3, "adtally [0-9]"),
    Command("query", ("query", "select count(*) as n from fct_campaign_day", "--format", "csv"), 0.5, "^n,mart_build\n[1-9]"),
    Command("status", ("status",), 1.0, "rejected: holds"),
    Command("ingest, nothing new", ("ingest",), 5.0, "^nothing new to ingest\n$"),
    Command("ingest, a thousand events", ("ingest",), 7.0, r"batch(es)?: [\d,]+ offered"),
)
WITH_INPUT = COMMANDS[-1].name


class Bench:
    """A home, and the commands on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Path(args.work).absolute() / "starts"
        self.home = self.work / "home"
        self.landing = self.home / "landing"
        self.env = base_environment() | {"ADTALLY_HOME": str(self.home)} | dict(args.adtally_env)

    def run(self) -> list[dict[str, Any]]:
        """Make the home, and run the rounds."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        if ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0):
            raise BenchmarkError("prctl does not make this process a subreaper: CPU times would lack those of orphans")
        note(f"a home with {self.args.events} events")
        self._land(self.args.events, seed=0)
        self._adtally("ingest")
        self._adtally("marts", "build")
        runs = []
        for number in range(1, self.args.rounds + 1):
            for command in COMMANDS:
                if command.name == WITH_INPUT:
                    self._land(NEW_EVENTS, seed=number)
                runs.append({"round": number, "command": command.name, **self._measure(command)})
                note(f"round {number}: {command.name} {runs[-1]['wall_seconds']:.2f} s, CPU {runs[-1]['cpu_seconds']:.2f} s")
        return runs

    def idle(self) -> dict[str, Any]:
        """Return the CPU time of the processes of an `adtally up` while nothing happens, as shares of one core."""
        note(f"adtally up: {self.args.settle_seconds:g} s to catch up, {self.args.idle_seconds:g} s idle")
        log = self.work / "up.log"
        env = self.env | {"ADTALLY_CONSOLE_PORT": "0"}
        with log.open("w") as output:
            up = subprocess.Popen(
                self._command("up", "--port", "0"),
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                time.sleep(self.args.settle_seconds)
                before, started = _cpu_by_role(up.pid), time.monotonic()
                time.sleep(self.args.idle_seconds)
                after, seconds = _cpu_by_role(up.pid), time.monotonic() - started
                if up.poll() is not None:
                    raise BenchmarkError(f"adtally up ended; its log: {log}\n{tail(log)}")
                up.send_signal(signal.SIGINT)
                up.wait(_END_SECONDS)
            finally:
                end_tree(up)
        shares = {role: round((cpu - before.get(role, 0.0)) / seconds, 4) for role, cpu in after.items()}
        return {"seconds": round(seconds, 1), "share": round(sum(shares.values()), 4), "shares": shares}

    def _land(self, events: int, seed: int) -> None:
        """Let simulated files appear in the landing folder under names of their own."""
        made = self.work / f"simulated-{seed}"
        self._adtally("simulate", "--out", str(made), "--events", str(events), "--seed", str(seed))
        for file in sorted(path for path in made.rglob("*") if path.is_file() and path.parent != made):
            target = self.landing / file.relative_to(made).with_name(f"{seed}-{file.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix != ".csv" or not any(target.parent.iterdir()):  # one list of campaigns
                file.rename(target)

    @staticmethod
    def _command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "orchestration.cli", *arguments]

    def _adtally(self, *arguments: str) -> str:
        """Run a command to its end; return its output. Raises BenchmarkError if it fails."""
        done = subprocess.run(
            self._command(*arguments), env=self.env, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
        if done.returncode:
            raise BenchmarkError(f"adtally {arguments[0]} ended with status {done.returncode}: {done.stderr[-400:]}")
        return done.stdout

    def _measure(self, command: Command) -> dict[str, Any]:
        _collect_orphans()
        cpu, started = _children_cpu(), time.perf_counter()
        output = self._adtally(*command.arguments)
        wall = time.perf_counter() - started
        _collect_orphans()
        if not re.search(command.output, output):
            raise BenchmarkError(f"adtally {command.name} printed {output[-200:]!r}")
        return {"wall_seconds": round(wall, 3), "cpu_seconds": round(_children_cpu() - cpu, 3)}


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _collect_orphans() -> None:
    """Wait for the processes that a command left: Java ends a moment after it."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
        except ChildProcessError:
            return
    raise BenchmarkError("a process that a command started does not end")


def _cpu_by_role(pid: int) -> dict[str, float]:
    """Return the CPU seconds of a process and its descendants, those that have ended included, by what they are."""
    found: dict[str, float] = {}
    for process in (root := psutil.Process(pid), *root.children(recursive=True)):
        try:
            used, role = process.cpu_times(), _role(process.cmdline())
        except psutil.Error:
            continue
        found[role] = found.get(role, 0.0) + used.user + used.system + used.children_user + used.children_system
    return found


_ROLES = (
    ("daemon", "orchestration.up.daemon"),
    ("webserver", "orchestration.up.webserver"),
    ("console", "orchestration.cli console"),
    ("code server", "orchestration.definitions"),
    ("code server", "orchestration.up.code_server"),
    ("java", "SparkSubmit"),
    ("ingest", "orchestration.cli ingest"),
    ("marts", "orchestration.cli marts"),
    ("runs", "multiprocessing"),
)


def _role(command: list[str]) -> str:
    text = " ".join(command)
    if "guard.py" in text:
        return "up"
    return next((role for role, part in _ROLES if part in text), "up")


def summary_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a command: the medians, and the limit."""
    rows = []
    for command in COMMANDS:
        of_command = [run for run in runs if run["command"] == command.name]
        wall, cpu = (round(statistics.median(run[name] for run in of_command), 3) for name in ("wall_seconds", "cpu_seconds"))
        row = {"command": command.name, "wall_seconds": wall, "cpu_seconds": cpu, "limit": command.limit}
        rows.append(row | {"met": wall <= command.limit})
    return rows


def add_options(made: argparse.ArgumentParser) -> None:
    """The options of `benchmarks.run starts`, besides the common ones."""
    made.add_argument("--events", type=int, default=50_000, help="of the home")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--settle-seconds", type=float, default=420.0, help="in which `adtally up` catches up")
    made.add_argument("--idle-seconds", type=float, default=180.0, help="in which its CPU time counts; 0: not measured")
    made.add_argument("--json", action="store_true", dest="as_json", help="the last line is a JSON object with the medians")


def main(args: argparse.Namespace) -> int:
    """Run it, write the result and print it; `benchmarks.run` calls this."""
    bench, host = Bench(args), machine()
    bench.work.parent.mkdir(parents=True, exist_ok=True)
    try:
        with only_one(bench.work.parent):
            runs = bench.run()
            idle = bench.idle() if args.idle_seconds else None
    except BenchmarkError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    rows = summary_of(runs)
    targets = [
        {"name": f"{row['command']}, s", "value": row["wall_seconds"], "limit": row["limit"], "met": row["met"]} for row in rows
    ]
    if idle is not None:
        share = idle["share"]
        targets.append({"name": "idle adtally up, of a core", "value": share, "limit": IDLE_LIMIT, "met": share <= IDLE_LIMIT})
    document = {
        "scenario": "starts",
        "machine": host | {"load_average_at_end": round(os.getloadavg()[0], 2)},
        "parameters": {name: getattr(args, name) for name in ("events", "rounds", "settle_seconds", "idle_seconds")},
        "summary": {"commands": rows, "idle": idle},
        "targets": targets,
        "runs": runs,
    }
    write_result(args.results, args.name or "starts", document)
    shown = Table("what", "median", "limit", "met", "CPU s")
    for target in targets:
        cpu = next((f"{row['cpu_seconds']:.2f}" for row in rows if target["name"].startswith(row["command"])), "")
        shown.add_row(target["name"], f"{target['value']:.3f}", str(target["limit"]), "yes" if target["met"] else "NO", cpu)
    Console(stderr=args.as_json).print(shown)
    if args.as_json:
        seconds = {row["command"]: row["wall_seconds"] for row in rows}
        print(json.dumps({"seconds": seconds, "idle_share": idle and idle["share"], "met": all(t["met"] for t in targets)}))
    return int(args.check and not all(target["met"] for target in targets))
