"""The programs that are compared: how each is started, and how its output is checked against the expected counts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import delta_log
from benchmarks.environments import environment
from benchmarks.flink_env import flink_environment, flink_python
from benchmarks.measure import Measured

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CHDB = (
    "chdb-core==26.9.0"  # the engine and its Python module; package chdb adds DataFrames to it
    " --hash=sha256:707e2ec3fe0f7953bac97942eaeb7a1ed1d66b1e56ecef3f0aa2130f61f6e735"  # Linux, x86-64
    " --hash=sha256:46148d3fc1edd6d6f701922be0f18e2aa6e60349e418b430e69bbb87ab6b95a9"  # Linux, ARM
    " --hash=sha256:0d24d78969f7ab41d5303c148b7cf64880fa017507bbed9c9b8799b29c26723f"  # macOS, x86-64
    " --hash=sha256:bc2d2baedc038ba04be59d97d9ded4f87a3fbe05c3820f93d90e508b1e541ad0"  # macOS, ARM
)


@dataclass(frozen=True)
class Job:
    """One run to be made: where the input is, where the output goes, how large a batch is."""

    landing: Path
    home: Path
    work: Path
    files_per_batch: int
    adtally_env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """``start`` gives the command and its environment, ``check`` the differences from the expected counts."""

    key: str
    label: str
    start: Callable[[Job], tuple[list[str], dict[str, str]]]
    check: Callable[[Job, Measured, Mapping[str, int]], list[str]]


def base_environment() -> dict[str, str]:
    """The caller's environment without settings of the project, so that a run depends on its own alone."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("ADTALLY_") or k == "ADTALLY_CACHE_DIR"}
    return env | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


def adtally_environment(job: Job) -> dict[str, str]:
    """Settings of the project for a run on two cores, with batches counted in files."""
    return (
        base_environment()
        | {
            "ADTALLY_HOME": str(job.home),
            "ADTALLY_LANDING": str(job.landing),
            "ADTALLY_SPARK_MASTER": "local[2]",
            "ADTALLY_SHUFFLE_PARTITIONS": "2",
            "ADTALLY_MAX_FILES_PER_BATCH": str(job.files_per_batch),
            "ADTALLY_MAX_BYTES_PER_BATCH": str(1 << 40),
        }
        | job.adtally_env
    )


def adtally_command(*options: str) -> list[str]:
    """The project's own ingestion, as a cluster would run it, printing a JSON line a batch."""
    return [sys.executable, "-m", "spark_jobs", "ingest", "--json", *options]


def event_batches(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that report a batch of events with something in it."""
    events = [b for b in batches if "seconds" in b and "event" in str(b.get("stream", "events"))]
    return [b for b in events if b.get("offered", 1)]


def _differences(found: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    return [f"{name}: {found[name]}, expected {expected[name]}" for name in found if found[name] != expected[name]]


def _start_spark(dedupe: bool) -> Callable[[Job], tuple[list[str], dict[str, str]]]:
    def start(job: Job) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-m", "benchmarks.contestants.spark_append", "--landing", str(job.landing)]
        command += ["--home", str(job.home), "--files-per-batch", str(job.files_per_batch)]
        return command + (["--dedupe"] if dedupe else []), base_environment()

    return start


def _check_delta(counted: str) -> Callable[[Job, Measured, Mapping[str, int]], list[str]]:
    def check(job: Job, measured: Measured, expected: Mapping[str, int]) -> list[str]:
        return _differences({counted: delta_log.row_count(delta_log.active_files(job.home / "events"))}, expected)

    return check


def _start_adtally(job: Job) -> tuple[list[str], dict[str, str]]:
    return adtally_command(), adtally_environment(job)


def _check_adtally(job: Job, measured: Measured, expected: Mapping[str, int]) -> list[str]:
    lines = event_batches(measured.batches)
    reported = {
        "offered": sum(b["offered"] for b in lines),
        "unique": sum(b["accepted"] for b in lines),
        "duplicates": sum(b["duplicate"] for b in lines),
    }
    lakehouse = job.home / "lakehouse"
    stored = {"unique": delta_log.row_count(delta_log.active_files(lakehouse / "events"))}
    metrics = delta_log.column_sums(delta_log.active_files(lakehouse / "minute_metrics"), ["impressions", "clicks", "spend_nanos"])
    return (
        [f"reported {d}" for d in _differences(reported, expected)]
        + [f"events {d}" for d in _differences(stored, expected)]
        + [f"minute_metrics {d}" for d in _differences(metrics, expected)]
    )


def _start_flink(state: str) -> Callable[[Job], tuple[list[str], dict[str, str]]]:
    def start(job: Job) -> tuple[list[str], dict[str, str]]:
        command = [str(flink_python(job.work)), str(HERE / "flink_keep_first.py"), "--landing", str(job.landing)]
        return [*command, "--home", str(job.home), "--state", state], flink_environment(job.work)

    return start


def _check_flink(job: Job, measured: Measured, expected: Mapping[str, int]) -> list[str]:
    # Files still being written have a name that starts with a dot.
    files = [f for f in (job.home / "events").iterdir() if not f.name.startswith((".", "_"))]
    return _differences({"unique": delta_log.row_count(files)}, expected)


def _start_duckdb(job: Job) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "benchmarks.contestants.duckdb_once", "--landing", str(job.landing)]
    return [*command, "--home", str(job.home)], base_environment()


def _check_duckdb(job: Job, measured: Measured, expected: Mapping[str, int]) -> list[str]:
    found = {"unique": delta_log.row_count([job.home / "events.parquet"])}
    found |= delta_log.column_sums([job.home / "minute_metrics.parquet"], ["impressions", "clicks"])
    return _differences(found, expected)


def _start_clickhouse(job: Job) -> tuple[list[str], dict[str, str]]:
    python = environment(job.work / "chdb-venv", [CHDB], alone=True)
    command = [str(python), str(HERE / "clickhouse_replacing.py"), "--landing", str(job.landing), "--home", str(job.home)]
    return [*command, "--files-per-batch", str(job.files_per_batch)], {"PATH": os.environ.get("PATH", "")}


def _check_clickhouse(job: Job, measured: Measured, expected: Mapping[str, int]) -> list[str]:
    found = delta_log.column_sums([job.home / "minute_metrics.parquet"], ["unique", "impressions", "clicks"])
    return _differences(found, expected)


CONTESTANTS = {
    c.key: c
    for c in (
        Contestant("a", "Spark read and append", _start_spark(False), _check_delta("offered")),
        Contestant("b", "Spark dropDuplicatesWithinWatermark", _start_spark(True), _check_delta("unique")),
        Contestant("c", "adtally, the whole hot path", _start_adtally, _check_adtally),
        Contestant("d-hashmap", "PyFlink keep first, hashmap", _start_flink("hashmap"), _check_flink),
        Contestant("d-rocksdb", "PyFlink keep first, RocksDB", _start_flink("rocksdb"), _check_flink),
        Contestant("e", "DuckDB in one pass (limit)", _start_duckdb, _check_duckdb),
        Contestant("f", "ClickHouse ReplacingMergeTree (chDB)", _start_clickhouse, _check_clickhouse),
    )
}
