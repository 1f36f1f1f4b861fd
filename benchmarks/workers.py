"""One worker of a cluster beside two: the executors classify the keys of large batches against a key index in a store.

    python -m benchmarks.workers                                                  a history of 16 M keys, batches of 1 M, two rounds
    python -m benchmarks.workers --history 20000 --batch 4000 --rounds 1 --batches 2      does it work at all?

Each round starts a Spark standalone cluster of one worker with one core, then one of two, in the other order every second round.
Each has an index of the same random keys. A first batch brings the runs to the executors; it does not count. Of the others, only
the classification counts: from the shuffled keys of a batch to its outcome on the driver. Random keys stand for parsed events; one
in 25 is in the history.

Results go to benchmarks/results/workers-<history>.json. Exit status 1: a number was wrong, or, with --check, the target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.measure import machine, note, only_one, verdict, write_result
from benchmarks.run import HERE, Target, show_targets
from benchmarks.spark_cluster import standalone_cluster
from services.launcher.s3 import BUCKET
from services.launcher.trial import throwaway_s3
from spark_jobs.config import load_settings
from spark_jobs.ingest.dedupe.classify import Outcome
from spark_jobs.ingest.dedupe.keys import Keys
from spark_jobs.ingest.dedupe.shards import SHARDS, ShardedIndex, blocks_of
from spark_jobs.ingest.query import SparkExecutor
from spark_jobs.ingest.watchdog import Activity
from spark_jobs.java import require_java
from spark_jobs.lake.places import StorePlace
from spark_jobs.session import build_session

LIMIT = 1 / 1.7
SPLITS = 8
_SLICE = 1_000_000
_RESENT = 25  # one key in so many is in the history
_SLICES = 8


def random_keys(rows: int, *seed: int) -> Keys:
    """Return keys. Those of the same seed are the same, whatever their number."""
    return Keys(*np.random.default_rng(seed).integers(0, 2**64, (rows, 3), dtype=np.uint64).T)


def split_keys(batch: int, split: int, rows: int) -> Keys:
    """Return the keys of a split: new ones, and some that the history has, of all batches and splits others."""
    resent = rows // _RESENT
    old = random_keys((batch * SPLITS + split + 1) * resent, 0, 0).take(np.arange(-resent, 0) if resent else np.arange(0))
    return Keys.concatenate([old, random_keys(rows - resent, 1, batch, split)])


def history(keys: int) -> Iterator[Keys]:
    """Yield the keys of the index, some at a time."""
    for start in range(0, keys, _SLICE):
        yield random_keys(min(_SLICE, keys - start), 0, start // _SLICE)


def classify_batches(master: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Classify batches on a cluster, each once. Returns the seconds of each, and what was wrong."""
    lakehouse = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    spark = build_session(load_settings(home=folder, lakehouse=lakehouse, spark_master=master), "adtally-benchmark")
    try:
        executor = SparkExecutor(spark, Activity(folder / "workers"), folder / "results")
        index = ShardedIndex(StorePlace(f"{lakehouse}/index"))
        index.rebuild("t", history(args.history), 0)
        rows = args.batch // SPLITS
        seconds, wrong = [], []
        for batch in range(args.batches + 1):

            def made(splits: Iterable[int], batch: int = batch) -> Iterator[tuple[int, Any]]:
                for split in splits:
                    yield from blocks_of(split, split_keys(batch, split, rows))

            keys = executor.scatter(made, range(SPLITS), _SLICES, SHARDS + 1)
            keys.gather(lambda _, values: list(values), [SHARDS])  # makes and shuffles them
            started = time.perf_counter()
            found, new = index.classify(keys, dict.fromkeys(range(SPLITS), rows))
            seconds.append(round(time.perf_counter() - started, 3))
            known, expected = int((found.outcome != Outcome.ACCEPTED).sum()), rows // _RESENT * SPLITS
            if known != expected:
                wrong.append(f"batch {batch}: {known} keys are known, expected {expected}")
            index.append(new, batch + 1)
            keys.delete()
    finally:
        spark.stop()
    note(f"    {seconds} s")
    return {"first_seconds": seconds[0], "seconds": seconds[1:], "wrong": wrong}


def measure(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Run the rounds."""
    runs = []
    java = require_java().executable
    for number in range(args.rounds):
        for workers in (1, 2) if number % 2 == 0 else (2, 1):
            note(f"round {number + 1}: {workers} of one core")
            folder = work / f"{number}-{workers}"
            with standalone_cluster(java, folder / "cluster", workers=workers) as cluster:
                runs.append({"workers": workers, "round": number + 1, **classify_batches(cluster.url, args, folder / "home")})
    return runs


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="benchmarks.workers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--history", type=int, default=16_000_000, help="keys of the index before the first batch")
    made.add_argument("--batch", type=int, default=1_000_000, help="keys of a batch")
    made.add_argument("--batches", type=int, default=5, help="batches that count")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--name", help="name of the result")
    made.add_argument("--work", default=str(HERE / ".work"), help="may be deleted")
    made.add_argument("--results", default=str(HERE / "results"))
    made.add_argument("--check", action="store_true", help="exit status 1 if the target is missed")
    made.add_argument("--json", action="store_true", dest="as_json", help="print the summary as the last line")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it and write the result."""
    args = parser().parse_args(argv)
    work = Path(args.work).absolute() / "workers"
    work.mkdir(parents=True, exist_ok=True)
    host = machine()
    runs_folder = work / "runs"
    try:
        with only_one(work), throwaway_s3() as store:
            os.environ.update(store.environment())
            runs = measure(args, runs_folder)
    finally:
        shutil.rmtree(runs_folder, ignore_errors=True)
    seconds = {workers: [float(s) for run in runs if run["workers"] == workers for s in run["seconds"]] for workers in (1, 2)}
    median = {workers: statistics.median(found) for workers, found in seconds.items()}
    summary: dict[str, Any] = {"seconds": {str(workers): round(found, 3) for workers, found in median.items()}}
    target = Target("classification, two workers / one", median[2] / median[1], LIMIT)
    summary |= {"ratio": round(target.value, 3), "limit": round(LIMIT, 3)}
    document = {
        "scenario": "workers",
        "machine": host,
        "parameters": {name: getattr(args, name) for name in ("history", "batch", "batches", "rounds")},
        "summary": summary,
        "targets": [asdict(target) | {"met": target.met}],
        "runs": runs,
    }
    write_result(args.results, args.name or f"workers-{args.history}", document)
    if args.as_json:
        print(json.dumps(summary))
    else:
        show_targets(document, Console())
    return verdict([problem for run in runs for problem in run["wrong"]], is_missed=args.check and not target.met)


if __name__ == "__main__":
    raise SystemExit(main())
