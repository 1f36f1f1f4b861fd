"""The cause of a failure: first in the message, wherever Spark put it, with its input, its place in the code and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from spark_jobs.errors import KafkaError
from spark_jobs.failure import failure_cause, one_line, working_on
from spark_jobs.ingest.contract.spec import BatchLimits
from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA
from spark_jobs.ingest.files.landing import Split
from spark_jobs.ingest.stage import StageTask, stage_splits
from spark_jobs.traffic.rules import no_rules

ROOT = Path(__file__).resolve().parents[2]
_WORKER = f"""An exception was thrown from the Python worker:
Traceback (most recent call last):
  File "/x/pyspark.zip/pyspark/worker.py", line 3622, in main
    process()
  File "{ROOT}/spark_jobs/lake/data_files.py", line 161, in _edge
    moment += timedelta(milliseconds=1)
    ~~~~~~~^^^^^^^^^^^^^^^^^^^^^^^^^^^
KeyError: 'first'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/x/pyspark.zip/pyspark/worker.py", line 3622, in main
    process()
  File "{ROOT}/spark_jobs/ingest/write.py", line 91, in write_splits
    sums.append(increments(rows))
  File "/x/site-packages/pyarrow/table.py", line 5, in take
    pass
%s
"""
_JAVA = """An error occurred while calling z:org.apache.spark.api.python.PythonRDD.collectAndServe.
: org.apache.spark.SparkException: Job aborted due to stage failure: Task 1 in stage 1.0 failed 1 times
	at org.apache.spark.scheduler.Executor.run(Executor.scala:704)
Caused by: org.apache.spark.SparkException: %s
	at org.apache.spark.api.python.BasePythonRunner.apply(PythonRunner.scala:704)
Caused by: java.io.EOFException
	... 22 more
"""


def test_the_last_line_of_a_workers_traceback_is_the_cause() -> None:
    raised = "OverflowError: date value out of range\nadtally was working on events/us/a.jsonl bytes 0 to 4096"
    for text in (_WORKER % raised, _JAVA % (_WORKER % raised)):
        cause = failure_cause(RuntimeError(text))
        assert cause.text == "OverflowError: date value out of range"
        assert cause.work == "events/us/a.jsonl bytes 0 to 4096"
        assert cause.code == "spark_jobs/ingest/write.py:91"
        assert str(cause) == (
            "OverflowError: date value out of range while working on events/us/a.jsonl bytes 0 to 4096 "
            "at spark_jobs/ingest/write.py:91"
        )


@pytest.mark.parametrize(
    ("raised", "text", "hint"),
    [
        ("OSError: [Errno 28] No space left on device: '/x/y'", None, "disk-space.md"),
        ("pyarrow.lib.ArrowMemoryError: malloc of size 64 failed", "ArrowMemoryError: malloc of size 64 failed", "memory"),
        ("MemoryError", None, "memory"),
        ("PermissionError: [Errno 13] Permission denied: '/x'", None, "let this user"),
        ("spark_jobs.errors.KafkaError: nothing came for 30 s", "nothing came for 30 s", None),
        ("duckdb.duckdb.IOException: IO Error:\n  two lines", "IOException: IO Error:\n  two lines", None),
    ],
)
def test_kinds_of_causes_and_what_to_do(raised: str, text: str | None, hint: str | None) -> None:
    cause = failure_cause(RuntimeError(_WORKER % raised))
    assert cause.text == (text or raised)
    assert (hint is None) == (cause.hint is None)
    assert hint is None or hint in str(cause.hint)


def test_a_worker_that_was_killed_and_an_error_of_java() -> None:
    cause = failure_cause(RuntimeError(_JAVA % "Python worker exited unexpectedly (crashed)."))
    assert cause.text == "SparkException: Python worker exited unexpectedly (crashed)."
    assert "memory" in str(cause.hint)
    cause = failure_cause(RuntimeError(_JAVA.replace("java.io.EOFException", "java.io.IOException: No space left on device") % "x"))
    assert cause.text == "IOException: No space left on device"


def test_an_error_on_the_driver() -> None:
    with pytest.raises(OverflowError) as caught, working_on("events/us/a.jsonl"), working_on("outer is not inner"):
        datetime(9999, 12, 31) + timedelta(days=2)
    cause = failure_cause(caught.value)
    assert (cause.text, cause.work) == ("OverflowError: date value out of range", "outer is not inner")
    cause = failure_cause(KafkaError("no broker", hint="start it"))
    assert (cause.text, cause.hint) == ("no broker", "start it")


def test_a_task_names_the_split_that_it_failed_on(tmp_path: Path) -> None:
    landed = tmp_path / "a.jsonl"
    landed.write_bytes(b"{}\n")
    (tmp_path / "scratch").write_bytes(b"")  # a file where the batch's folder should be
    limits = BatchLimits(ingested_us=0, earliest_us=0, future_skew_us=0, hour_grace_us=0)
    tasks = [StageTask("events", Split(0, str(landed), "events/us/a.jsonl", "us", 0, None), limits, str(tmp_path / "scratch"))]
    with pytest.raises(OSError) as caught:
        list(stage_splits(tasks, CAMPAIGN_SCHEMA.empty_table(), no_rules()))
    cause = failure_cause(caught.value)
    assert cause.work == "events/us/a.jsonl"
    assert cause.code is not None and cause.code.startswith("spark_jobs/ingest/stage.py:")


def test_the_beginning_and_the_end_of_a_long_text_are_kept() -> None:
    text = one_line("first " + "middle " * 200 + "last", 100)
    assert text.startswith("first middle") and text.endswith("middle last") and " ... " in text and len(text) <= 100


def test_the_cluster_command_shows_a_line_and_no_stack_trace(tmp_path: Path) -> None:
    (tmp_path / "home").write_bytes(b"")
    command = [sys.executable, "-m", "spark_jobs", "ingest"]
    environment = {"ADTALLY_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("adtally: error: ") and len(done.stderr.splitlines()) == 1, json.dumps(done.stderr)
