"""Run a command from outside: wall time, CPU time and peak memory of its whole process tree, and its JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

SAMPLE_SECONDS = 0.5


class BenchmarkError(RuntimeError):
    """A contestant failed or gave wrong numbers; the message says which and where its log is."""


@dataclass
class Sample:
    """Memory of the tree at one moment, bytes. PSS counts a page that k processes share as 1/k in each."""

    seconds: float
    pss: int
    rss: int


@dataclass
class Measured:
    """One run. ``batches`` are the JSON lines the command printed, each with ``at``: seconds from the start.

    Each also has ``cpu``: the CPU seconds until then of the command's own process (driver), of Java, and of all others (workers).
    """

    wall_seconds: float
    cpu_seconds: float
    peak_pss_bytes: int
    peak_rss_bytes: int
    batches: list[dict[str, Any]]
    samples: list[Sample] = field(default_factory=list)


class TreeSampler(threading.Thread):
    """Samples a process and all its descendants every half second until stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.samples: list[Sample] = []
        self._cpu: dict[tuple[int, float], tuple[str, float]] = {}
        self._ended = threading.Event()
        self._from = time.perf_counter()

    def run(self) -> None:
        while not self._ended.is_set():
            self._sample()
            self._ended.wait(SAMPLE_SECONDS)

    def stop(self) -> None:
        self._ended.set()
        self.join()

    @property
    def cpu_seconds(self) -> float:
        """User and system time up to the last sample of each process."""
        return sum(self.cpu_by_program().values())

    def cpu_by_program(self) -> dict[str, float]:
        """User and system time of the command's own process, of Java and of the workers, up to the last sample of each process."""
        sums = {"driver": 0.0, "java": 0.0, "workers": 0.0}
        for program, seconds in list(self._cpu.values()):
            sums[program] += seconds
        return sums

    def look_at_cpu(self) -> dict[str, float]:
        """Return ``cpu_by_program`` of this moment."""
        with contextlib.suppress(psutil.Error):
            for process in [self.root, *self.root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    self._note_cpu(process)
        return self.cpu_by_program()

    def _note_cpu(self, process: psutil.Process) -> None:
        cpu = process.cpu_times()
        program = "driver" if process.pid == self.root.pid else "java" if process.name() == "java" else "workers"
        self._cpu[(process.pid, process.create_time())] = (program, cpu.user + cpu.system)

    def _sample(self) -> None:
        pss = rss = 0
        try:
            tree = [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                self._note_cpu(process)
                pss += _pss(process.pid)
                rss += process.memory_info().rss
            except (psutil.Error, OSError):
                continue  # it ended between the listing and the look
        self.samples.append(Sample(round(time.perf_counter() - self._from, 2), pss, rss))


def _pss(pid: int) -> int:
    """Proportional set size from the kernel's own sum over the mappings: far cheaper than walking each mapping."""
    with Path(f"/proc/{pid}/smaps_rollup").open("rb") as rollup:
        for line in rollup:
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def run_measured(
    command: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    timeout: float = 7200.0,
    seen: Callable[[dict[str, Any]], None] | None = None,
) -> Measured:
    """Run to the end. Lines of stdout that are JSON objects are kept, and given to ``seen``; the rest and stderr go to ``log``.

    Raises BenchmarkError on a non-zero exit status or after ``timeout`` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    batches: list[dict[str, Any]] = []
    with log.open("w") as sink:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command), env=dict(env), stdout=subprocess.PIPE, stderr=sink, text=True, start_new_session=True
        )
        sampler = TreeSampler(process.pid)
        alarm = threading.Timer(timeout, end_tree, [process])
        sampler.start()
        alarm.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                record = json_object(line)
                if record is None:
                    sink.write(line)
                else:
                    cpu = {name: round(seconds, 2) for name, seconds in sampler.look_at_cpu().items()}
                    batches.append(record | {"at": round(time.perf_counter() - started, 3), "cpu": cpu})
                    if seen is not None:
                        seen(record)
            status = process.wait()
            wall = time.perf_counter() - started
        finally:
            alarm.cancel()
            sampler.stop()
            end_tree(process)
    if status:
        raise BenchmarkError(f"{' '.join(command[:4])} … ended with status {status}; its log: {log}\n{tail(log)}")
    return Measured(
        wall_seconds=wall,
        cpu_seconds=sampler.cpu_seconds,
        peak_pss_bytes=max((s.pss for s in sampler.samples), default=0),
        peak_rss_bytes=max((s.rss for s in sampler.samples), default=0),
        batches=batches,
        samples=sampler.samples,
    )


def end_tree(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the process group that ``run_measured`` started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def json_object(line: str) -> dict[str, Any] | None:
    """The object a line holds, or None if the line is something else."""
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def quantiles(values: list[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile and the highest value, rounded to milliseconds; empty without values."""
    if not values:
        return {}
    found = {f"p{share}": quantile(values, share / 100) for share in (50, 95, 99)}
    return {name: round(value, 3) for name, value in {**found, "max": max(values)}.items()}


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "revision": revision.stdout.strip() or None,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@contextlib.contextmanager
def only_one(work: Path) -> Iterator[None]:
    """Keep other benchmarks out of ``work``: two would disturb each other's figures. Raises BenchmarkError if another one runs."""
    try:
        with FileLock(work / "lock", timeout=0):
            yield
    except Timeout:
        raise BenchmarkError(f"another one is running in {work}") from None


def note(text: str) -> None:
    """Progress for the person who waits, on stderr."""
    print(text, file=sys.stderr, flush=True)


def write_result(results: str | Path, name: str, document: dict[str, Any]) -> Path:
    """Write what a benchmark found as ``<results>/<name>.json``; returns the path."""
    path = Path(results) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def verdict(wrong: list[str], *, is_missed: bool) -> int:
    """The exit status of a benchmark: 1 where a number was wrong, which is said, or a target that counts was missed."""
    for problem in wrong:
        print(f"wrong numbers: {problem}", file=sys.stderr)
    return 1 if wrong or is_missed else 0
