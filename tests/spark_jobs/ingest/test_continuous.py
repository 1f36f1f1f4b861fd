"""The continuous ingest as a real process: files that land while it runs, files that are not there yet, and SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lake
import psutil
import pytest
from pyspark.sql import SparkSession

from spark_jobs.config import Settings
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.locks import WRITE_EVENTS, exclusive
from tests.spark_jobs.homes.held import Held

pytestmark = pytest.mark.homes

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_SECONDS = 120
STOP_SECONDS = 30


class Ingest:
    """``python -m spark_jobs ingest --continuous`` on a home, in a session of its own, stopped at the end whatever happens."""

    def __init__(self, settings: Settings, trigger: str | None = None, *, code: str = "", **environment: str) -> None:
        """``trigger`` None: the default. ``code``: Python code that it runs first."""
        self._program = ["-m", "spark_jobs"] if not code else ["-c", f"{code}\nfrom spark_jobs.__main__ import main\nexit(main())"]
        self._settings = settings
        self._trigger = () if trigger is None else ("--trigger", trigger)
        self._environment = environment
        self._output = settings.home_path / "ingest.out"
        self._errors = settings.home_path / "ingest.err"

    def __enter__(self) -> Ingest:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ADTALLY_HOME": str(self._settings.home_path), **self._environment}
        command = [sys.executable, *self._program, "ingest", "--continuous", *self._trigger, "--json"]
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=output, stderr=errors, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def errors(self) -> str:
        return self._errors.read_text("utf-8", errors="replace")[-3000:]

    def batches(self) -> list[dict[str, Any]]:
        """The lines that it printed."""
        return [json.loads(line) for line in self._output.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]

    def wait_for(self, what: str, condition: Callable[[], bool], pause_seconds: float = 0.2) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self._process.poll() is None, f"it ended while {what} was awaited: {self.errors}"
            assert time.monotonic() < end, f"no {what} after {PATIENCE_SECONDS} s: {self.errors}"
            time.sleep(pause_seconds)

    def below(self) -> list[psutil.Process]:
        """Java and the Python workers."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def end(self, send: Callable[[int], None]) -> int:
        """Send a signal by ``send``, which gets the process; returns the exit status. All that it started ends as well."""
        below = self.below()
        send(self._process.pid)
        status = self._process.wait(STOP_SECONDS)
        _, left = psutil.wait_procs(below, 10)
        assert not left, f"left behind: {left}"
        return status

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE_SECONDS)


def _counted(settings: Settings) -> dict[str, int]:
    """Impressions by ad, from the increments."""
    with Held(settings) as held:
        totals: Counter[str] = Counter()
        for ad, impressions in held.rows("minute_metrics", "ad_id, impressions"):
            totals[ad] += impressions
    return dict(totals)


def _orders(settings: Settings) -> list[tuple[str, str]]:
    with Held(settings) as held:
        return held.rows("orders", "order_id, status")


def test_files_are_counted_as_they_land_and_sigterm_ends_after_the_batch(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    events = settings.landing_path / "events"
    checkpoint = settings.checkpoints_path / "events"
    lake.land(settings, "events/eu/1.jsonl", [lake.event("e1", ad_id="first")])
    with Ingest(settings) as ingest:
        ingest.wait_for("first file", lambda: _counted(settings) == {"first": 1})

        # not there yet: half a file under a hidden name, a folder that is no region, a place beside the streams
        whole = lake.lines([lake.event("e2", ad_id="hidden"), lake.event("e3", ad_id="hidden")])
        unfinished = events / "eu" / ".2.jsonl.tmp"
        unfinished.write_bytes(whole[:-20])
        aside = lake.land(settings, "staging/eu/3.jsonl", [lake.event("e4", ad_id="aside")])
        lake.land(settings, "events/us/4.jsonl.gz", [lake.event("e5", ad_id="second"), lake.event("e1", ad_id="first")])
        lake.land(settings, "orders/us/1.jsonl", [lake.order("o1")])
        ingest.wait_for("second file", lambda: "second" in _counted(settings))
        ingest.wait_for("order", lambda: _orders(settings) == [("o1", "placed")])
        assert _counted(settings) == {"first": 1, "second": 1}

        unfinished.write_bytes(whole)
        unfinished.rename(events / "eu" / "2.jsonl")
        aside.rename(events / "us" / "3.jsonl")
        ingest.wait_for("renamed files", lambda: {"hidden", "aside"} <= set(_counted(settings)))
        assert _counted(settings) == {"first": 1, "second": 1, "hidden": 2, "aside": 1}

        # a batch is planned and not done when the signal comes
        number = 1 + max(int(path.name) for path in (checkpoint / "offsets").glob("[0-9]*"))
        lake.land(settings, "events/eu/5.jsonl", [lake.event(f"m{i}", ad_id="last") for i in range(20_000)])
        ingest.wait_for("batch", (checkpoint / "offsets" / str(number)).exists, pause_seconds=0.002)
        assert not (checkpoint / "commits" / str(number)).exists()
        assert ingest.terminate() == 0, ingest.errors
        assert (checkpoint / "commits" / str(number)).exists(), "the batch was not brought to its end"
        batches = ingest.batches()
        assert "Traceback" not in ingest.errors

    assert _counted(settings) == {"first": 1, "second": 1, "hidden": 2, "aside": 1, "last": 20_000}
    total = lake.ledger(spark, settings)
    assert (total["offered"], total["accepted"], total["duplicate"]) == (20_006, 20_005, 1)
    assert lake.ledger(spark, settings, "orders")["accepted"] == 1
    for stream, accepted in (("events", 20_005), ("orders", 1)):
        assert sum(batch["accepted"] for batch in batches if batch["stream"] == stream) == accepted
    assert [batch["batch_id"] for batch in batches if batch["stream"] == "events"] == list(range(number + 1))

    assert run_ingest(settings, spark=spark).batches == 0
    lake.land(settings, "events/eu/6.jsonl", [lake.event("e6"), lake.event("m19999", ad_id="last")])
    report = run_ingest(settings, spark=spark)
    assert (report.batches, report.accepted, report.duplicate) == (1, 1, 1)


def test_a_backlog_is_read_without_pauses_and_a_signal_ends_the_pause_after_it(settings: Settings) -> None:
    for number in range(7):
        lake.land(settings, f"events/eu/{number}.jsonl", [lake.event(f"e{number}")])
    with Ingest(settings, trigger="36000", ADTALLY_MAX_FILES_PER_BATCH="2") as ingest:
        ingest.wait_for("backlog", lambda: sum(batch["offered"] for batch in ingest.batches()) == 7)
        assert [batch["offered"] for batch in ingest.batches()] == [2, 2, 2, 1]
        lake.land(settings, "events/eu/7.jsonl", [lake.event("e7")])
        ended = len(list((settings.checkpoints_path / "events" / "commits").glob("[0-9]*")))
        assert ended == 3, "the last batch was small, so the query pauses after it"
        assert ingest.end(lambda pid: os.kill(pid, signal.SIGTERM)) == 0, ingest.errors


def test_a_kill_in_a_pause_counts_nothing_twice(spark: SparkSession, settings: Settings) -> None:
    lake.land(settings, "events/eu/0.jsonl", [lake.event("e0", ad_id="ad")])
    with Ingest(settings, trigger="36000") as ingest:
        ingest.wait_for("batch", lambda: len(ingest.batches()) == 1)
        assert ingest.end(lambda pid: os.kill(pid, signal.SIGKILL)) == -signal.SIGKILL
    assert not (settings.checkpoints_path / "events" / "commits" / "0").exists(), "Spark notes the end after the pause"
    lake.land(settings, "events/eu/1.jsonl", [lake.event("e1", ad_id="ad"), lake.event("e0", ad_id="ad")])
    report = run_ingest(settings, spark=spark)
    assert (report.accepted, report.duplicate) == (1, 1)
    assert _counted(settings) == {"ad": 2}
    assert lake.ledger(spark, settings)["offered"] == 3


def test_what_lands_during_a_batch_is_one_batch(settings: Settings) -> None:
    lake.land(settings, "events/eu/0.jsonl", [lake.event("e0")])
    with Ingest(settings) as ingest:
        ingest.wait_for("first file", lambda: len(ingest.batches()) == 1)
        with exclusive(settings, WRITE_EVENTS):
            lake.land(settings, "events/eu/1.jsonl", [lake.event("e1")])
            ingest.wait_for("second batch", (settings.checkpoints_path / "events" / "offsets" / "1").exists)
            for number in range(2, 7):
                lake.land(settings, f"events/eu/{number}.jsonl", [lake.event(f"e{number}")])
        ingest.wait_for("the others", lambda: sum(batch["offered"] for batch in ingest.batches()) == 7)
        assert [batch["offered"] for batch in ingest.batches()] == [1, 1, 5]
        assert ingest.terminate() == 0, ingest.errors


# While HOME has a file `many`, listing the landing folder seems expensive. Prints a line each time that a query starts.
_PACED = """
import os, sys
from spark_jobs.ingest import pace, query, source
pace._COUNT_SECONDS = 0.0
source.FilesSource.look_seconds = lambda self: 0.1 if os.path.exists(os.environ["ADTALLY_HOME"] + "/many") else 0.0
start = query.SourceQuery.start
def told(self, *arguments, **options):
    stream = start(self, *arguments, **options)
    print("started", self._source.name, file=sys.stderr, flush=True)
    return stream
query.SourceQuery.start = told
"""


def test_a_query_whose_looks_cost_too_much_or_come_too_rarely_starts_again_and_counts_all_once(
    spark: SparkSession, settings: Settings
) -> None:
    many, landed = settings.home_path / "many", 0
    lake.land(settings, "events/eu/first.jsonl", [lake.event("first", ad_id="ad")])
    with Ingest(settings, trigger="0.2", code=_PACED) as ingest:
        ingest.wait_for("batch", lambda: len(ingest.batches()) == 1)
        for starts in range(2, 5):
            many.unlink() if many.exists() else many.touch()
            for _ in range(3):
                lake.land(settings, f"events/eu/{landed}.jsonl", [lake.event(f"e{landed}", ad_id="ad"), lake.event("first")])
                landed += 1
                time.sleep(0.1)

            def has_started(count: int = starts) -> bool:
                return all(ingest.errors.count(f"started {stream}") >= count for stream in ("events", "orders"))

            ingest.wait_for("another start", has_started)
        ingest.wait_for("all", lambda: sum(batch["offered"] for batch in ingest.batches()) == 2 * landed + 1)
        assert ingest.terminate() == 0, ingest.errors
    assert _counted(settings) == {"ad": landed + 1}
    assert lake.ledger(spark, settings)["offered"] == 2 * landed + 1


def _stop_a_worker(folder: Path) -> bool:
    """Stop a worker that is in the middle of a task; False: there is none."""
    for name in os.listdir(folder) if folder.is_dir() else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(name), signal.SIGSTOP)
            if (folder / name).exists():
                return True
            os.kill(int(name), signal.SIGCONT)
    return False


def test_a_stopped_worker_and_a_held_lock_hang_nothing_and_a_signal_to_the_group_ends_with_0(
    spark: SparkSession, settings: Settings
) -> None:
    lake.land(settings, "events/eu/1.jsonl", [lake.event("e1", ad_id="first")])
    with Ingest(settings, ADTALLY_BATCH_TIMEOUT="3") as ingest:
        ingest.wait_for("first file", lambda: _counted(settings) == {"first": 1})
        lake.land(settings, "events/eu/2.jsonl", [lake.event(f"m{i}", ad_id="second") for i in range(40_000)])
        ingest.wait_for("worker", lambda: _stop_a_worker(settings.scratch_path / "workers" / "events"), pause_seconds=0.002)
        ingest.wait_for("second file", lambda: "second" in _counted(settings))
        assert "a batch of events made no progress for 3 s and its workers were ended; it is made again" in ingest.errors

        with exclusive(settings, WRITE_EVENTS):  # as a correction does
            lake.land(settings, "events/eu/3.jsonl", [lake.event("e3", ad_id="third")])
            offsets = settings.checkpoints_path / "events" / "offsets"
            ingest.wait_for("third batch", (offsets / "2").exists)
            assert ingest.end(lambda pid: os.killpg(pid, signal.SIGTERM)) == 0, ingest.errors
        assert "Traceback" not in ingest.errors
    assert _counted(settings) == {"first": 1, "second": 40_000}
    assert run_ingest(settings, spark=spark).accepted == 1


def _to_all(pid: int) -> None:
    """SIGTERM to the process and all below it, as systemd sends it."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a script that starts Java has ended meanwhile
            process.terminate()


def _to_a_python_whose_java_is_stopped(pid: int) -> None:
    (java,) = psutil.Process(pid).children()
    java.suspend()
    os.kill(pid, signal.SIGTERM)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("send", "status"),
    [
        (_to_all, 0),
        (_to_a_python_whose_java_is_stopped, 0),
        (lambda pid: os.kill(pid, signal.SIGKILL), -signal.SIGKILL),
    ],
    ids=["all", "java-stopped", "kill"],
)
@pytest.mark.parametrize("moment", ["start", "batch"])
def test_a_signal_at_any_moment(
    spark: SparkSession, settings: Settings, send: Callable[[int], None], status: int, moment: str
) -> None:
    lake.land(settings, "events/eu/1.jsonl", [lake.event(f"m{i}", ad_id="ad") for i in range(40_000)])
    with Ingest(settings) as ingest:
        if moment == "start":
            ingest.wait_for("Java", lambda: bool(ingest.below()), pause_seconds=0.02)
        else:
            folder = settings.scratch_path / "workers" / "events"
            ingest.wait_for("worker", lambda: folder.is_dir() and bool(os.listdir(folder)), pause_seconds=0.002)
        assert ingest.end(send) == status, ingest.errors
        if status == 0:  # of a process that was killed, Java says what it cuts off
            assert "Traceback" not in ingest.errors and "error" not in ingest.errors
    run_ingest(settings, spark=spark)
    assert _counted(settings) == {"ad": 40_000}


@pytest.mark.parametrize(
    "name",
    ["loose.jsonl", "_incoming/1.jsonl", ".incoming/1.jsonl", "eu/1.jsonl.tmp", "eu/1.jsonl.gz.part", "eu/1.jsonlx"],
)
def test_a_file_outside_of_the_protocol_is_not_read(spark: SparkSession, settings: Settings, name: str) -> None:
    lake.land(settings, f"events/{name}", lake.lines([lake.event("e1")]))
    assert run_ingest(settings, spark=spark).offered == 0


def test_a_folder_below_a_region_does_not_stop_the_stream(spark: SparkSession, settings: Settings) -> None:
    lake.land(settings, "events/eu/1.jsonl", [lake.event("e1")])
    lake.land(settings, "events/us/day=1/1.jsonl", [lake.event("e2")])
    assert run_ingest(settings, spark=spark).accepted == 1
