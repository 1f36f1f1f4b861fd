"""The one place that builds a SparkSession."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pyspark.sql import SparkSession

from spark_jobs.config import Settings
from spark_jobs.jars import ensure_jars
from spark_jobs.java import require_java


def build_session(settings: Settings, app_name: str = "adtally", extra: dict[str, str] | None = None) -> SparkSession:
    """A session with Delta Lake, in UTC, quiet, without a UI; ``extra`` overrides single Spark settings.

    Raises MachineError where Java or a jar is missing.
    """
    require_java()
    jars = ensure_jars(settings)
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    scratch = settings.scratch_path
    scratch.mkdir(parents=True, exist_ok=True)
    options = {
        "spark.jars": ",".join(str(jar) for jar in jars),
        "spark.driver.memory": settings.driver_memory,
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        # serial collector: two cores are worth more to the tasks than to the collector, and it keeps the heap small
        "spark.driver.extraJavaOptions": (
            "-XX:+UseSerialGC -XX:TieredStopAtLevel=4 "
            f"-Dderby.system.home={scratch} -Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties').as_uri()}"
        ),
        "spark.local.dir": str(scratch / "spark"),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.warehouse.dir": str(scratch / "warehouse"),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        "spark.databricks.delta.snapshotPartitions": "2",
        "spark.sql.adaptive.enabled": "false",
        "spark.python.worker.reuse": "true",
        "spark.sql.streaming.metricsEnabled": "false",
        "spark.sql.streaming.minBatchesToRetain": "100",
    }
    options.update(extra or {})
    builder = SparkSession.builder.master(settings.spark_master).appName(app_name)
    for key, value in options.items():
        builder = builder.config(key, value)
    return builder.getOrCreate()
