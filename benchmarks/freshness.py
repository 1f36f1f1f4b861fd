"""Freshness in continuous mode: from the rename of a landing file to its increments readable in `minute_metrics`.

    python -m benchmarks.run ingest --scenario freshness              that
    python -m benchmarks.freshness --from kafka --to pinot            from a topic to Delta and Pinot, at 1,000 and 5,000 events/s
    python -m benchmarks.freshness --from kafka --to marts            and on to the marts, built without a pause

Every file has a `placement` of its own. Placement is a dimension of the increments, so a file is readable at the moment
when the increments read with its placement add up to its lines; nothing else has to be trusted for that.
The reader follows the Delta log and reads the data files that each version adds, every tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console

from benchmarks import delta_log
from benchmarks.contestants import Job, adtally_command, adtally_environment
from benchmarks.make_input import REGIONS, World, uuid_text
from benchmarks.measure import BenchmarkError, TreeSampler, end_tree, machine, note, quantile, tail, verdict, write_result

POLL_SECONDS = 0.1
COUNTS = ["impressions", "clicks", "invalid_impressions", "invalid_clicks"]


class LandingWriter:
    """Puts a file of ``lines`` new events in place every ``lines / rate`` seconds: written elsewhere, then renamed."""

    def __init__(self, landing: Path, staging: Path, lines: int, rate: float, seed: int) -> None:
        self.landing, self.staging, self.lines, self.rate, self.seed = landing, staging, lines, rate, seed
        self.world = World(seed)
        self.renamed_at: dict[str, float] = {}
        for folder in (staging, landing / "campaigns", *(landing / "events" / region for region in REGIONS)):
            folder.mkdir(parents=True, exist_ok=True)
        (landing / "campaigns" / "campaigns.csv").write_text(self.world.campaigns_csv())

    def put(self, index: int) -> None:
        """Write and rename file ``index``, whose events happen now."""
        rng = np.random.default_rng([self.seed, index])
        first = index * self.lines
        ids = uuid_text(np.arange(first, first + self.lines, dtype=np.uint64), self.seed)
        ads = rng.integers(0, len(self.world.ad_fields), self.lines)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        region, placement = REGIONS[index % len(REGIONS)], f"file-{index:07d}"
        head = f'"event_type":"impression","event_time":"{now}","received_at":"{now}","region":"{region}"'
        rest = f'"placement":"{placement}","price_micros":1000000,"currency":"EUR","user_agent":"ShopWeb/41"'
        text = "".join(
            f'{{"event_id":"{ids[i].decode()}",{head},{self.world.ad_fields[ads[i]].decode()},"user_id":"u-{ads[i]:07d}",{rest}}}\n'
            for i in range(self.lines)
        )
        scratch = self.staging / f"{placement}.jsonl"
        scratch.write_text(text)
        scratch.rename(self.landing / "events" / region / scratch.name)
        self.renamed_at[placement] = time.monotonic()

    def run(self, seconds: float, ended: threading.Event | None = None) -> int:
        """Keep the rate for ``seconds``, or until ``ended``; the number of files put."""
        started, index = time.monotonic(), 0
        while (due := started + index * self.lines / self.rate) < started + seconds and not (ended and ended.is_set()):
            time.sleep(max(0.0, due - time.monotonic()))
            self.put(index)
            index += 1
        return index


class IncrementReader(threading.Thread):
    """Follows `minute_metrics`; ``readable_at`` says when all the lines of a placement had been read."""

    def __init__(self, table: Path, lines: int) -> None:
        super().__init__(daemon=True)
        self.table, self.lines = table, lines
        self.readable_at: dict[str, float] = {}
        self.versions = 0
        self._read: Counter[str] = Counter()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            while self._take_version():
                pass

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _take_version(self) -> bool:
        if not delta_log.version_file(self.table, self.versions).exists():
            return False
        try:
            files = delta_log.added_files(self.table, self.versions)
        except ValueError:
            return False  # the entry is just being written
        self.versions += 1
        if files:
            rows = delta_log.read_columns(files, ["placement", *COUNTS]).to_pydict()
            for placement, *counts in zip(rows["placement"], *(rows[c] for c in COUNTS), strict=True):
                self._read[placement] += sum(c or 0 for c in counts)
        now = time.monotonic()
        for placement, count in self._read.items():
            if count >= self.lines:
                self.readable_at.setdefault(placement, now)
        return True


@dataclass
class ContinuousIngest:
    """The project's own ingest in continuous mode, whose processes are sampled."""

    process: subprocess.Popen[str]
    sampler: TreeSampler
    log: Path
    output: Path
    status: int | None = None
    stop_seconds: float = 0.0

    def stop(self) -> None:
        """End it by SIGTERM and note its exit status. Raises BenchmarkError if it has ended before."""
        early = self.process.poll()
        if early is not None:
            raise BenchmarkError(f"continuous mode ended by itself with status {early}; its log: {self.log}\n{tail(self.log)}")
        sent = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            note("freshness: SIGTERM was not followed within 60 s")
        self.stop_seconds = time.monotonic() - sent


@contextmanager
def continuous_ingest(job: Job, trigger: str | None) -> Iterator[ContinuousIngest]:
    """Start the ingest of a job's landing folder; what is left of it in the end is killed."""
    log, output = job.work / "logs" / "freshness.log", job.work / "logs" / "freshness.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = adtally_command("--continuous", *(["--trigger", trigger] if trigger else []))
    with log.open("w") as err, output.open("w") as out:
        process = subprocess.Popen(command, env=adtally_environment(job), stdout=out, stderr=err, text=True, start_new_session=True)
        sampler = TreeSampler(process.pid)
        sampler.start()
        try:
            yield ContinuousIngest(process, sampler, log, output)
        finally:
            sampler.stop()
            end_tree(process)


def run_freshness(
    job: Job, *, seconds: float, warm_up: float, rate: float, lines: int, seed: int, trigger: str | None
) -> dict[str, Any]:
    """Start the project in continuous mode, feed it, measure. Files put during ``warm_up`` are not counted."""
    writer = LandingWriter(job.landing, job.home / "staging", lines, rate, seed)
    reader = IncrementReader(job.home / "lakehouse" / "minute_metrics", lines)
    with continuous_ingest(job, trigger) as ingest:
        reader.start()
        try:
            note(f"freshness: {rate:.0f} events/s for {warm_up + seconds:.0f} s")
            started = time.monotonic()
            put = writer.run(warm_up + seconds)
            behind = time.monotonic() - started - (warm_up + seconds)
            deadline = time.monotonic() + 60
            while len(reader.readable_at) < put and time.monotonic() < deadline and ingest.process.poll() is None:
                time.sleep(POLL_SECONDS)
            ingest.stop()
        finally:
            reader.stop()
    counted = {p: t for p, t in writer.renamed_at.items() if t - started >= warm_up}
    lags = [reader.readable_at[p] - t for p, t in counted.items() if p in reader.readable_at]
    if not lags:
        raise BenchmarkError(f"no file became readable in minute_metrics; its log: {ingest.log}\n{tail(ingest.log)}")
    batches = [json.loads(line) for line in ingest.output.read_text().splitlines() if line.startswith("{")]
    return {
        "files": len(counted),
        "unread_files": len(counted) - len(lags),
        "writer_behind_seconds": round(max(0.0, behind), 2),
        "p50_seconds": round(quantile(lags, 0.5), 3),
        "p95_seconds": round(quantile(lags, 0.95), 3),
        "max_seconds": round(max(lags), 3),
        "mean_seconds": round(statistics.fmean(lags), 3),
        "first_file_seconds": round(min(reader.readable_at.values()) - started, 3),
        "batches": len(batches),
        "peak_pss_bytes": max((s.pss for s in ingest.sampler.samples), default=0),
        "stop_seconds": round(ingest.stop_seconds, 2),
        "exit_status": ingest.status,
    }


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks.freshness`: from a topic; see freshness_kafka.py. From files it is a scenario of benchmarks.run."""
    from benchmarks import run
    from benchmarks.freshness_kafka import STAGES, run_kafka_freshness

    parser = argparse.ArgumentParser(prog="benchmarks.freshness", description=main.__doc__)
    parser.add_argument("--from", dest="source", choices=["kafka", "files"], default="kafka")
    parser.add_argument("--to", choices=STAGES, default="marts", help="how far; marts: through Delta and Pinot too")
    parser.add_argument("--rates", default="1000,5000", help="events a second, one run each")
    parser.add_argument("--seconds", type=float, default=120.0, help="measured time of a run")
    parser.add_argument("--warm-up", type=float, default=60.0, help="time before it that is not counted")
    parser.add_argument("--trigger", help="seconds between two batches, passed on")
    parser.add_argument("--keep", action="store_true", help="keep what the last run wrote")
    run.common_options(parser)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    if args.source == "files":
        return run.main(["ingest", "--scenario", "freshness", "--work", args.work, "--results", args.results])
    work = Path(args.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    host, runs, targets = machine(), [], []
    try:
        with FileLock(work / "lock", timeout=0):
            for rate in (float(text) for text in args.rates.split(",")):
                found = run_kafka_freshness(
                    work,
                    rate=rate,
                    seconds=args.seconds,
                    warm_up=args.warm_up,
                    to=args.to,
                    trigger=args.trigger,
                    adtally_env=dict(args.adtally_env),
                    keep=args.keep,
                )
                runs.append(found)
                for stage, figures in found["stages"].items():
                    note(f"{rate:.0f}/s to {stage}: {figures}")
                    if stage != "marts":
                        targets.append(run.Target(f"{rate:.0f}/s to {stage}, p95 s", float(figures["p95_seconds"]), 10.0))
    except Timeout:
        print(f"benchmark: another one is running in {work}", file=sys.stderr)
        return 1
    except BenchmarkError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    document = {
        "scenario": "freshness-kafka",
        "machine": host,
        "parameters": {k: v for k, v in vars(args).items() if k not in ("work", "results", "keep", "name")},
        "summary": {f"{found['rate']:.0f}": found["stages"] for found in runs},
        "targets": [asdict(target) | {"met": target.met} for target in targets],
        "runs": runs,
    }
    path = write_result(args.results, args.name or f"freshness-kafka-{args.to}", document)
    run.show_targets(document, Console())
    print(f"written: {path}")
    wrong = [problem for found in runs for problem in found["wrong"]]
    return verdict(wrong, is_missed=args.check and not all(target.met for target in targets))


if __name__ == "__main__":
    raise SystemExit(main())
