"""A real process, killed with SIGKILL before and after every durable step, restarted, and held to a run never killed.

The steps are those of `crash_points`. Each run is killed at one point of a batch that no earlier run has begun; the
next run first has to bring that batch to its end. So one chain of runs visits every point, each in a batch of its own.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lake
import pytest
from crash_points import CRASH_POINTS
from pyspark.sql import SparkSession
from store import EVERYWHERE, Location, fresh_prefix, variables

from services.simulator import simulate
from services.simulator.chaos import power
from services.simulator.chaos.checks import check_increments
from spark_jobs.config import Settings, load_settings
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import MINUTE_METRICS, STREAMS
from spark_jobs.steps import CRASH_VARIABLE, Step
from tests.spark_jobs.homes.held import Held

ROOT = Path(__file__).resolve().parents[3]
ORDER_STEPS = {Step.ORDERS, Step.REJECTED_ORDERS, Step.ORDERS_LEDGER}
QUICK = [("before", Step.EVENTS_LEDGER)]


def run(settings: Settings, crash_at: str = "", files_per_batch: int = 1) -> int:
    """Ingest in a process that kills itself at ``crash_at``; return its status."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **variables(settings),
        "ADTALLY_MAX_FILES_PER_BATCH": str(files_per_batch),
        CRASH_VARIABLE: crash_at,
    }
    settings.home_path.mkdir(parents=True, exist_ok=True)
    log = settings.home_path / "run.log"
    with log.open("ab") as output:
        return subprocess.run(
            [sys.executable, "-m", "spark_jobs", "ingest"], env=environment, cwd=ROOT, stdout=output, stderr=output, timeout=300
        ).returncode


def _land(settings: Settings, files: int) -> None:
    """At least ``files`` files of events and of orders, each with every kind of record."""
    simulate(settings.landing_path, 200 * files, seed=23, lines_per_file=200, conversion=0.0)
    shutil.rmtree(settings.landing_path / "orders", ignore_errors=True)
    for path in settings.landing_path.glob("events/*/*"):  # none is without a reject
        at, line = path.stat().st_mtime_ns, b"no event\n"
        path.write_bytes(path.read_bytes() + (gzip.compress(line) if path.suffix == ".gz" else line))
        os.utime(path, ns=(at, at))
    for number in range(files):
        day = f"2025-07-{number + 1:02d}T00:00:00Z"
        lake.land(
            settings,
            f"orders/eu-west/{number:02d}.jsonl",
            [
                lake.order(f"m{number}", order_time=day, received_at=day),
                lake.order(f"m{number}", order_time=day, received_at=day),
                lake.order(f"m{number - 1}", total_micros=number + 1),
                lake.order(f"m{number - 1}", order_time=f"2025-07-{max(number, 1):02d}T00:00:00Z", status="cancelled"),
                lake.order("bad", currency="none"),
            ],
        )


def _waiting(settings: Settings, stream: str) -> list[Path]:
    """The files of a stream in the order in which they are read, the last first."""
    found = (settings.landing_path / stream).glob("*/*")
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns // 10**6, str(path)), reverse=True)


def _move(files: list[Path], source: Settings, target: Settings, count: int) -> None:
    for _ in range(min(count, len(files))):
        path = files.pop()
        landed = target.landing_path / path.relative_to(source.landing_path)
        landed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, landed.with_name(f".{path.name}"))
        landed.with_name(f".{path.name}").rename(landed)


def _next_batch(settings: Settings, stream: str) -> int:
    commits = checkpoints_to_read(settings) / stream / "commits"
    done = [int(path.name) for path in commits.glob("[0-9]*")] if commits.exists() else []
    return max(done, default=-1) + 1


def kill_at_each(
    calm: Settings,
    killed: Settings,
    spark: SparkSession,
    points: list[tuple[str, Step]],
    files_each: int = 1,
    before_run: Callable[[], None] = lambda: None,
    after_kill: Callable[[], None] = lambda: None,
    next_machine: Callable[[Settings], Settings] = lambda killed: killed,
) -> None:
    """Kill an ingest at each of ``points`` in turn, run it to its end, and compare with one that was never killed.

    After each kill ``next_machine`` says where the next run is.
    """
    # the run that is never killed takes large batches: what comes out does not depend on how the files are cut
    calm = calm.model_copy(update={"max_files_per_batch": 1000})
    _land(calm, files=files_each * len(points) + 6)
    shutil.copytree(calm.landing_path / "campaigns", killed.landing_path / "campaigns")
    waiting = {stream: _waiting(calm, stream) for stream in ("events", "orders")}
    assert all(len(files) > len(points) for files in waiting.values())
    run_ingest(calm, spark=spark)
    written: set[str] = set()  # the increments that were there after a kill
    for moment, step in points:
        for files in waiting.values():  # so the batch of the kill has a file, however far the other stream came meanwhile
            _move(files, calm, killed, files_each)
        stream = "orders" if step in ORDER_STEPS else "events"
        # a batch that was begun and not ended is run to its end first; the kill comes in the batch behind it
        begun = settings_offsets(killed, stream)
        batch = 0 if step is Step.CAMPAIGNS else max(begun, _next_batch(killed, stream))
        if step is Step.CAMPAIGNS:
            prices = killed.landing_path / "campaigns" / "campaigns.csv"
            prices.write_text(prices.read_text() + f"c-{moment}-{batch},s,cpc,1,EUR,2030-01-01T00:00:00Z,\n")
        before_run()
        status = run(killed, f"{moment}:{step}:{batch}")
        said = (killed.home_path / "run.log").read_text("utf-8", "replace")[-5000:]  # before the machine is gone
        after_kill()
        assert status == -signal.SIGKILL, f"{moment} {step} of batch {batch} was never reached:\n{said}"
        written |= _increments(killed)
        killed = next_machine(killed)
    for files in waiting.values():
        _move(files, calm, killed, len(files))
    run_ingest(killed.model_copy(update={"max_files_per_batch": 1000}), spark=spark)
    expected, got = lake.everything(spark, calm), lake.everything(spark, killed)
    for table in expected:
        assert got[table] == expected[table], table
    # a batch that ran twice gave its increments the names that it would have given them the first time, and each name once
    assert written <= _increments(killed)
    with Held(killed) as held:
        check_increments(held)
        names = held.rows("minute_metrics", "distinct _query_id, _batch_id")
    query_id = json.loads((killed.checkpoints_path / "events" / "metadata").read_text("utf-8"))["id"]
    assert set(names) <= {(query_id, batch) for batch in range(settings_offsets(killed, "events"))}


def _increments(settings: Settings) -> set[str]:
    """The record_uuids that minute_metrics holds; none before the table is there."""
    if not Lake(settings).exists(MINUTE_METRICS):
        return set()
    with Held(settings) as held:
        return {uuid for (uuid,) in held.rows("minute_metrics", "record_uuid")}


def settings_offsets(settings: Settings, stream: str) -> int:
    """The number of batches that the stream has planned."""
    offsets = checkpoints_to_read(settings) / stream / "offsets"
    return max((int(path.name) for path in offsets.glob("[0-9]*")), default=-1) + 1 if offsets.exists() else 0


def _lose(home: Path) -> None:
    """Take a home away, at once: Java may not have noticed yet that its Python has ended."""
    home.rename(home.with_name(f"lost-{uuid.uuid4().hex}"))


@EVERYWHERE
def test_a_killed_batch_is_finished_exactly(place: Location, tmp_path: Path, spark: SparkSession) -> None:
    """A machine whose lakehouse is in a store is gone with all that it had, too."""
    killed = place.settings(tmp_path / "killed", landing=tmp_path / "landing")
    after_kill = partial(_lose, killed.home_path) if killed.lakehouse else lambda: None
    kill_at_each(load_settings(home=tmp_path / "calm"), killed, spark, QUICK, after_kill=after_kill)


@pytest.mark.crash
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("half", [0, 1])  # two chains, so that two cores have something to do
def test_killed_at_every_durable_step(half: int, place: Location, tmp_path: Path, spark: SparkSession) -> None:
    killed = place.settings(tmp_path / "killed")
    if killed.lakehouse is None and power.why_not(tmp_path / "try") is None:
        pytest.skip("test_power_cut kills at the same points")
    kill_at_each(load_settings(home=tmp_path / "calm"), killed, spark, list(CRASH_POINTS[half::2]))


@pytest.mark.crash
@pytest.mark.services
@pytest.mark.trial
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("half", [0, 1])
def test_the_machine_is_gone_at_every_durable_step(half: int, store: dict[str, str], tmp_path: Path, spark: SparkSession) -> None:
    killed = load_settings(home=tmp_path / "killed", landing=tmp_path / "landing", lakehouse=fresh_prefix())
    after_kill = partial(_lose, killed.home_path)
    kill_at_each(load_settings(home=tmp_path / "calm"), killed, spark, list(CRASH_POINTS[half::2]), after_kill=after_kill)


COMMITS = {
    *("create_write_transaction", "write_deltalake", "execute", "delete", "update", "restore", "save", "toTable"),
    *("compact", "z_order", "vacuum"),
}


def test_every_durable_write_is_a_named_step() -> None:
    """Every call that commits to a table stands in a ``with committing(..., Step...)``, which syncs it; every step is used."""
    used: set[str] = set()
    found: set[str] = set()
    for path in (ROOT / "spark_jobs").rglob("*.py"):
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        # delta-rs' execute() ends a merge; where there is none, it is DuckDB's
        commits = COMMITS if ".merge(" in source else COMMITS - {"execute"}
        commits -= {"delete"} if "open_place" in source else set()  # of files of a place
        deltas = any(
            isinstance(node, ast.ImportFrom)
            and (node.module == "deltalake" or any(alias.name == "open_table" for alias in node.names))
            for node in ast.walk(tree)
        )
        guarded: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Step":
                used.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Step" and isinstance(node.args[0], ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.args[0].values]
                used |= {Step("".join(parts).format(stream)).name for stream in STREAMS}
            if isinstance(node, ast.With) and any("committing(" in ast.unparse(item) for item in node.items):
                guarded.update(ast.walk(node))
        for node in ast.walk(tree):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else name
            if name in commits and deltas:
                found.add(name)
                assert node in guarded, f"{path.name}:{getattr(node, 'lineno', 0)} commits outside of a durable step"
            if name == "add_columns" or (name == "create" and ast.unparse(node).startswith("DeltaTable.")):
                found.add(name)
                functions = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) and node in ast.walk(one)]
                assert "sync_commits(" in ast.unparse(functions[-1]), f"{path.name}:{getattr(node, 'lineno', 0)} is not synced"
    assert found >= {"create", "add_columns", "create_write_transaction", "execute", "compact", "z_order", "vacuum"}
    assert used >= {step.name for step in Step}
