"""A batch against a key index of many keys, beside the same batch against one of few: `python -m benchmarks.run index`.

One real batch makes a home. Copies of it get an index in which random keys stand for accepted events, written by the index's own
code. Then `spark_jobs ingest` takes the same batches into both, in turn. A third copy gets the index whose runs are all about to be
merged, which is the most that merges can cost a batch. The runs of random keys stay in benchmarks/.work/ for the next call.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contestants import Job, adtally_command, adtally_environment, event_batches
from benchmarks.make_input import InputSpec, input_file, make_input
from benchmarks.measure import BenchmarkError, machine, note, only_one, run_measured, verdict, write_result
from benchmarks.run import GIB, Target
from spark_jobs.ingest.dedupe.index import KeyCodec, KeyIndex, write_keys
from spark_jobs.ingest.dedupe.keys import Keys, Words
from spark_jobs.lake.checked import BLOCK_BYTES, DamagedError
from spark_jobs.lake.runs import FANOUT, RunFile

RATIO_LIMIT, PEAK_GIB_LIMIT, LONGEST_LIMIT = 1.2, 4.0, 3.0
_SLICE_ROWS = 262_144
_LOOK_UPS = 5


class PlantedIndex(KeyIndex):
    """A key index that also takes runs of random keys."""

    def add_random(self, rows: int, seed: int) -> RunFile:
        """Write a run of ``rows`` random keys, as if version 0 of the table had them."""
        run = self._write(self._new_name(0, 0), lambda path: (rows, write_keys(path, random_keys(rows, seed), rows)), 0, 0)
        self.runs.append(run)
        self._save()
        return run

    def plant(self, source: Path, runs: list[RunFile]) -> None:
        """Put the runs of another folder before the runs of this index, which keeps the version that it covers."""
        for run in runs:
            os.link(source / run.name, self._folder / run.name)
        self.runs = [*runs, *self.runs]
        self._save()

    def merge_seconds(self, rows: int) -> float:
        """Return the CPU seconds of one merge of FANOUT new runs of random keys."""
        for seed in range(FANOUT):
            self.add_random(rows, seed)
        started = time.process_time()
        self._merge(self._codec.max_run_rows)
        return time.process_time() - started


def random_keys(rows: int, seed: int) -> Iterator[Words]:
    """Yield the rows (low, high, fingerprint) of a run, in order."""
    bits = max(0, math.ceil(math.log2(rows / _SLICE_ROWS)))
    slices = 2**bits
    generator = np.random.default_rng([seed, rows])
    for number in range(slices):
        count = (number + 1) * rows // slices - number * rows // slices
        table = generator.integers(0, 2**64, (count, 3), dtype=np.uint64)
        low = np.sort(table[:, 0])
        table[:, 0] = low >> np.uint64(bits) | np.uint64(number << 64 - bits if bits else 0)
        yield table


def run_sizes(keys: int, unit: int) -> list[int]:
    """Return the sizes of the runs of an index that has grown by batches of ``unit`` keys, the largest first."""
    sizes: list[int] = []
    size = unit
    while size * FANOUT <= min(keys, KeyCodec.max_run_rows):
        size *= FANOUT
    while size >= unit:
        sizes += [size] * ((keys - sum(sizes)) // size)
        size //= FANOUT
    rest = keys - sum(sizes)
    return [*sizes, rest] if rest else sizes


def sizes_before_a_merge_of_all(sizes: list[int], unit: int) -> list[int]:
    """Return sizes for which the next batch starts merges one after another, up to the largest that there can be."""
    size = unit
    before: list[int] = []
    while size * FANOUT <= KeyCodec.max_run_rows and size <= max(sizes):
        before = [*[size] * (FANOUT - 1), *before]
        size *= FANOUT
    return [*(one for one in sizes if one >= size), *before]


@dataclass
class Homes:
    """The working folder of one call: its landing folder, which all homes read, and the homes."""

    work: Path
    spec: InputSpec
    adtally_env: dict[str, str]
    timeout: float
    landed: int = 0

    def __post_init__(self) -> None:
        self.root = self.work / "runs" / "index"
        shutil.rmtree(self.root, ignore_errors=True)
        self.landing = self.root / "landing"

    def land(self, batches: int) -> dict[str, int]:
        """Bring the landing folder to so many batches. Returns the counts expected of them."""
        source = self.work / f"input-{self.spec.batch}-{self.spec.files_per_batch}-{self.spec.seed}"
        note(f"input: {batches} batches of {self.spec.batch} events")
        expected = make_input(source, batches * self.spec.batch, self.spec)
        for index in range(self.landed * self.spec.files_per_batch, batches * self.spec.files_per_batch):
            target = input_file(self.landing, index)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(input_file(source, index), target)
        campaigns = self.landing / "campaigns" / "campaigns.csv"
        if not campaigns.exists():
            campaigns.parent.mkdir()
            shutil.copy2(source / "campaigns" / "campaigns.csv", campaigns)
        self.landed = batches
        counts: dict[str, int] = expected["after_batch"][batches - 1]
        return counts

    def ingest(self, name: str, expected: dict[str, int]) -> dict[str, Any]:
        """Ingest what has landed. ``expected`` are the counts of the batches that the home lacks."""
        job = Job(self.landing, self.root / name, self.work, self.spec.files_per_batch, self.adtally_env)
        log = self.work / "logs" / f"index-{name}.log"
        measured = run_measured(adtally_command(), adtally_environment(job), log, self.timeout)
        lines = event_batches(measured.batches)
        found = {"offered": sum(b["offered"] for b in lines), "unique": sum(b["accepted"] for b in lines)}
        found["duplicates"] = sum(b["duplicate"] for b in lines)
        run = {
            "home": name,
            "batch_seconds": [round(float(b["seconds"]), 3) for b in lines],
            "wall_seconds": round(measured.wall_seconds, 2),
            "cpu_seconds": round(measured.cpu_seconds, 2),
            "peak_pss_bytes": measured.peak_pss_bytes,
            "wrong": [f"{key}: {value}, expected {expected[key]}" for key, value in found.items() if value != expected[key]],
        }
        note(f"    {name}: {run['batch_seconds']} s, {measured.peak_pss_bytes / GIB:.2f} GiB")
        return run

    def copy(self, name: str, source: Path, runs: list[RunFile]) -> None:
        """Make a home from the first one, with these runs in its index."""
        shutil.copytree(self.root / "first", self.root / name)
        PlantedIndex(self.root / name / "key_index").plant(source, runs)


def random_runs(work: Path, sizes: list[int]) -> tuple[Path, list[RunFile]]:
    """Return runs of these sizes and their folder; makes those that no earlier call has left there."""
    folder = work / "index-runs"
    index = PlantedIndex(folder)
    if index.table_id is None:
        index.reset("random")
        index.version = 0
    free = list(index.runs)
    chosen: list[RunFile] = []
    for size in sizes:
        run = next((one for one in free if one.rows == size), None)
        if run is None:
            started = time.monotonic()
            run = index.add_random(size, len(index.runs))
            note(f"index: {size:,} random keys in {time.monotonic() - started:.0f} s")
        else:
            free.remove(run)
        chosen.append(run)
    return folder, chosen


def parts(folder: Path, scratch: Path, keys: int, merged: int) -> dict[str, Any]:
    """Measure the parts of a batch that depend on the index, in this process: look-ups of ``keys`` keys, and a merge."""
    index = PlantedIndex(folder)
    generator = np.random.default_rng(1)

    def seconds(probe: Callable[[], Keys], expected: int) -> float:
        times = []
        for _ in range(_LOOK_UPS):
            asked = probe()
            asked = asked.take(asked.order)
            started = time.perf_counter()
            found, _fingerprint = index.lookup(asked.low, asked.high)
            times.append(time.perf_counter() - started)
            if int(found.sum()) != expected:
                raise BenchmarkError(f"{int(found.sum())} of {keys} keys found, expected {expected}")
        return round(statistics.median(times), 4)

    def new() -> Keys:
        return Keys(*generator.integers(0, 2**64, (3, keys), dtype=np.uint64))

    def resent() -> Keys:
        """New keys and 4 % that the runs have, at random places. The system reads these ahead: it would take minutes one by one."""
        known = []
        for run in index.open_runs():
            places = generator.integers(0, run.rows, keys // 20 * run.rows // index.rows)
            run.file.prefetch((places * 24 // BLOCK_BYTES * BLOCK_BYTES).tolist(), BLOCK_BYTES)
            known.append(run.table[places])
        unique = np.unique(np.concatenate(known), axis=0)[: keys // 25]
        for run in index.open_runs():
            run.file.release()
        return Keys.concatenate([Keys(*unique.T), new().take(np.arange(keys - len(unique)))])

    try:
        found = {
            "runs": len(index.runs),
            "keys": index.rows,
            "index_bytes_per_key": round(sum(run.size for run in index.runs) / index.rows, 2),
            "look_up_seconds": seconds(new, 0),
            "look_up_seconds_with_resent": seconds(resent, keys // 25),
            "merge_cpu_seconds_per_million": round(PlantedIndex(scratch).merge_seconds(merged) / (FANOUT * merged / 1e6), 4),
        }
    except DamagedError as damage:
        raise BenchmarkError(str(damage)) from damage
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def measure(args: argparse.Namespace, homes: Homes) -> tuple[list[dict[str, Any]], dict[str, Any], list[Target]]:
    """Run the rounds. Returns the runs, the summary and the targets."""
    unit = args.batch
    many = run_sizes(args.keys, unit)
    indexes = {"few": run_sizes(args.few, unit), "many": many, "merging": sizes_before_a_merge_of_all(many, unit)}
    before = homes.land(1)
    first = homes.ingest("first", before)
    for name, sizes in indexes.items():
        homes.copy(name, *random_runs(homes.work, sizes))
    runs = [first]
    start = before
    for number in range(args.rounds):
        after = homes.land(homes.landed + args.batches)
        missing = {key: after[key] - before[key] for key in after}
        before = after
        for name in ("few", "many") if number % 2 == 0 else ("many", "few"):
            runs.append(homes.ingest(name, missing) | {"round": number + 1})
    runs.append(homes.ingest("merging", {key: before[key] - start[key] for key in before}))
    steady = {name: [s for run in runs if run["home"] == name for s in run["batch_seconds"][1:]] for name in indexes}
    median = {name: statistics.median(seconds) for name, seconds in steady.items()}
    cpu = {name: sum(run["cpu_seconds"] for run in runs if run["home"] == name) for name in indexes}
    peak = max(run["peak_pss_bytes"] for run in runs) / GIB
    longest = max((*steady["many"], *steady["merging"])) / median["many"]
    summary = {
        "keys": args.keys,
        "ratio": round(median["many"] / median["few"], 3),
        "limit": RATIO_LIMIT,
        "peak_gib": round(peak, 3),
        "longest_over_median": round(longest, 3),
        "batch_seconds": {name: round(seconds, 3) for name, seconds in median.items()},
        "first_batch_seconds": {name: max(r["batch_seconds"][0] for r in runs if r["home"] == name) for name in indexes},
        "cpu_ratio": round(cpu["many"] / cpu["few"], 3),
        "parts": parts(homes.root / "many" / "key_index", homes.root / "scratch", args.batch, FANOUT * unit),
    }
    targets = [
        Target(f"batch at {args.keys} keys / at {args.few}", median["many"] / median["few"], RATIO_LIMIT),
        Target("peak memory, GiB", peak, PEAK_GIB_LIMIT),
        Target("longest batch / median", longest, LONGEST_LIMIT),
    ]
    return runs, summary, targets


def run_index(args: argparse.Namespace) -> int:
    """Build the indexes, compare, write the result; with ``--json`` print the summary as the last line."""
    work = Path(args.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    host = machine()
    with only_one(work):
        if args.only_build:
            sizes = run_sizes(args.keys, args.batch)
            for wanted in (sizes, sizes_before_a_merge_of_all(sizes, args.batch)):
                random_runs(work, wanted)
            return 0
        homes = Homes(work, InputSpec(args.batch, args.files_per_batch, args.seed), args.adtally_env, args.timeout)
        runs, summary, targets = measure(args, homes)
        if not args.keep:
            shutil.rmtree(homes.root, ignore_errors=True)
    names = ("keys", "few", "batch", "files_per_batch", "rounds", "batches", "seed", "adtally_env")
    document = {
        "scenario": "index",
        "machine": host,
        "parameters": {name: getattr(args, name) for name in names},
        "summary": summary,
        "targets": [asdict(t) | {"met": t.met} for t in targets],
        "runs": runs,
    }
    path = write_result(args.results, args.name or f"index-{args.keys}", document)
    note(f"written: {path}")
    print(json.dumps(summary) if args.as_json else json.dumps(summary, indent=1))
    return verdict([problem for run in runs for problem in run["wrong"]], is_missed=args.check and not all(t.met for t in targets))
