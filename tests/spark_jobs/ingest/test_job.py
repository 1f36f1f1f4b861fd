"""Batches are no part of Spark: only `ingest/query.py` and what starts the queries import it."""

from __future__ import annotations

import subprocess
import sys


def test_the_jobs_load_without_spark() -> None:
    program = """
import sys
sys.modules["pyspark"] = sys.modules["py4j"] = None  # to import them is an error
import spark_jobs.ingest.events, spark_jobs.ingest.orders, spark_jobs.ingest.kafka.raw
try:
    import spark_jobs.ingest.query
except ModuleNotFoundError:
    print("only the query needs Spark")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "only the query needs Spark\n"), done.stderr
