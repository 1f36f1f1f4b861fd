"""Freshness in continuous mode: from the rename of a landing file to its increments readable in `minute_metrics`.

    python -m benchmarks.run ingest --scenario freshness              that
    python -m benchmarks.freshness --from files --to marts            and on to the marts, built as `adtally up` does
    python -m benchmarks.freshness --from kafka --to pinot            from a topic to Delta and Pinot, at 1,000 and 5,000 events/s
    python -m benchmarks.freshness --from kafka --to marts            and on to the marts

followers.py says when a file is readable, and when it is in the marts.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.contestants import Job, adtally_command, adtally_environment, event_batches
from benchmarks.followers import POLL_SECONDS, IncrementReader, MartFollower
from benchmarks.make_input import REGIONS, World, uuid_text
from benchmarks.measure import BenchmarkError, TreeSampler, end_tree, machine, note, only_one, quantile, tail, verdict, write_result

_FIRST_BATCHES = 5  # they warm up


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


def small_batches(batches: list[dict[str, Any]]) -> dict[str, float]:
    """The median seconds of a batch of events: of all, of the first third after the first few, of the last third."""
    seconds = [float(batch["seconds"]) for batch in event_batches(batches)][_FIRST_BATCHES:]
    third = len(seconds) // 3
    if not third:
        return {}
    parts = {"all": seconds, "first_third": seconds[:third], "last_third": seconds[-third:]}
    return {name: round(statistics.median(part), 3) for name, part in parts.items()}


def run_freshness(
    job: Job, *, seconds: float, warm_up: float, rate: float, lines: int, seed: int, trigger: str | None, to: str
) -> dict[str, Any]:
    """Start the project in continuous mode, feed it, measure. Files put during ``warm_up`` are not counted.

    ``to``: delta, or marts, which are then built as `adtally up` builds them.
    """
    writer = LandingWriter(job.landing, job.home / "staging", lines, rate, seed)
    reader = IncrementReader(job.home / "lakehouse", lines)
    marts = None
    with continuous_ingest(job, trigger) as ingest, ExitStack() as ends:
        reader.start()
        ends.callback(reader.stop)
        if to == "marts":
            marts = MartFollower(adtally_environment(job), ingest.log.with_name("freshness-marts.log"))
            marts.start()
            ends.callback(marts.stop)

        def in_marts(placement: str) -> float | None:
            return marts.published_at(reader.ledger_version(placement)) if marts else None

        note(f"freshness: {rate:.0f} events/s for {warm_up + seconds:.0f} s, as far as {to}")
        started = time.monotonic()
        put = writer.run(warm_up + seconds)
        behind = time.monotonic() - started - (warm_up + seconds)
        deadline = time.monotonic() + 60

        def is_waiting() -> bool:
            return len(reader.readable_at) < put or bool(marts and any(in_marts(name) is None for name in writer.renamed_at))

        while is_waiting() and time.monotonic() < deadline and ingest.process.poll() is None:
            time.sleep(POLL_SECONDS)
        ingest.stop()
    counted = {p: t for p, t in writer.renamed_at.items() if t - started >= warm_up}
    lags = [reader.readable_at[p] - t for p, t in counted.items() if p in reader.readable_at]
    if not lags:
        raise BenchmarkError(f"no file became readable in minute_metrics; its log: {ingest.log}\n{tail(ingest.log)}")
    batches = [json.loads(line) for line in ingest.output.read_text().splitlines() if line.startswith("{")]
    found = {
        "files": len(counted),
        "unread_files": len(counted) - len(lags),
        "writer_behind_seconds": round(max(0.0, behind), 2),
        **_summary(lags),
        "first_file_seconds": round(min(reader.readable_at.values()) - started, 3),
        "batches": len(batches),
        "batch_seconds": small_batches(batches),
        "cpu_seconds": round(ingest.sampler.cpu_seconds, 1),
        "peak_pss_bytes": max((s.pss for s in ingest.sampler.samples), default=0),
        "stop_seconds": round(ingest.stop_seconds, 2),
        "exit_status": ingest.status,
    }
    if marts is None:
        return found
    to_marts = [at - t for p, t in counted.items() if (at := in_marts(p)) is not None]
    if not to_marts:
        raise BenchmarkError(f"no build of the marts has a file; its log: {job.work / 'logs' / 'freshness-marts.log'}")
    return found | {
        "marts": {
            "unread_files": len(counted) - len(to_marts),
            **_summary(to_marts),
            "builds": len(marts.builds),
            "build_seconds": round(statistics.median(build["seconds"] for build in marts.builds), 2),
            "cpu_seconds": round(marts.sampler.cpu_seconds, 1),
            "peak_pss_bytes": max((s.pss for s in marts.sampler.samples), default=0),
        }
    }


def _summary(lags: list[float]) -> dict[str, float]:
    return {
        "p50_seconds": round(quantile(lags, 0.5), 3),
        "p95_seconds": round(quantile(lags, 0.95), 3),
        "max_seconds": round(max(lags), 3),
        "mean_seconds": round(statistics.fmean(lags), 3),
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
        options = ["--seconds", str(args.seconds), "--warm-up", str(args.warm_up), "--to", args.to]
        return run.main(["ingest", "--scenario", "freshness", *options, "--work", args.work, "--results", args.results])
    work = Path(args.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    host, runs, targets = machine(), [], []
    try:
        with only_one(work):
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
