"""The one place that builds a SparkSession."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

from py4j.protocol import Py4JError  # type: ignore[import-untyped]
from pyspark import SparkConf, SparkContext
from pyspark.sql import SparkSession

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, MachineError
from spark_jobs.jars import ensure_jars
from spark_jobs.java import require_java

_DELTA = "io.delta.sql.DeltaSparkSessionExtension"
_MASTER = re.compile(r"spark://([^:,/]+):(\d+)")


def build_session(settings: Settings, app_name: str = "adtally", extra: dict[str, str] | None = None) -> SparkSession:
    """A session with Delta Lake, in UTC, quiet, without a UI; ``extra`` overrides single Spark settings.

    On one machine everything is on loopback. On a cluster the addresses and the executors' folders are Spark's own business, and
    what spark-submit was told, where it started this process, goes before our settings.

    Raises MachineError where Java or a jar is missing, AdtallyError where Spark does not start.
    """
    require_java()
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    os.environ["PYTHONPATH"] = paths
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    submitted = _submitted()
    chosen = settings.spark_master if "spark_master" in settings.model_fields_set else None
    master = chosen or submitted.get("spark.master") or settings.spark_master
    scratch = settings.scratch_path
    scratch.mkdir(parents=True, exist_ok=True)
    options = {
        "spark.driver.memory": settings.driver_memory,
        # serial collector: two cores are worth more to the tasks than to the collector, and it keeps the heap small
        "spark.driver.extraJavaOptions": (
            "-XX:+UseSerialGC "
            f"-Dderby.system.home={scratch} -Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties').as_uri()}"
        ),
        "spark.executorEnv.PYTHONPATH": paths,  # where the executors see these folders; elsewhere the package is installed
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.warehouse.dir": f"file://{scratch}/warehouse",
        "spark.sql.extensions": _DELTA,
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        "spark.databricks.delta.snapshotPartitions": "2",
        "spark.sql.adaptive.enabled": "false",
        "spark.python.worker.reuse": "true",
        "spark.sql.streaming.metricsEnabled": "false",
        "spark.sql.streaming.minBatchesToRetain": "100",
    }
    options |= _of_one_machine(scratch) if is_one_machine(master) else _of_a_cluster(master)
    if submitted:
        _require_delta()
    else:
        options["spark.jars"] = ",".join(str(jar) for jar in ensure_jars(settings))
    builder = SparkSession.builder.master(master).appName(app_name)
    for key, value in ({name: text for name, text in options.items() if name not in submitted} | (extra or {})).items():
        builder = builder.config(key, value)
    try:
        return builder.getOrCreate()
    except Exception as error:  # Java's and Spark's own, many kinds
        said = " ".join(str(error).split())[:300]
        raise AdtallyError(f"Spark does not start on {master}: {said}", hint="is that master there?") from error


def is_one_machine(master: str) -> bool:
    """Whether tasks run in the driver's own process, not in executors, which may be on other machines."""
    return master == "local" or master.startswith("local[")


def _of_one_machine(scratch: Path) -> dict[str, str]:
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    return {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.local.dir": str(scratch / "spark"),
    }


def _of_a_cluster(master: str) -> dict[str, str]:
    """The address at which executors find the driver: from which it reaches a standalone master; else Spark's own choice."""
    named = _MASTER.match(master)
    if named is None or "SPARK_LOCAL_IP" in os.environ:
        return {}
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((named[1], int(named[2])))
            return {"spark.driver.host": str(probe.getsockname()[0])}
    except OSError:
        return {}


def _submitted() -> dict[str, str]:
    """The settings of spark-submit, where it started this process; empty where we start Java ourselves."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        return {}
    SparkContext._ensure_initialized()
    return dict(SparkConf().getAll())


def _require_delta() -> None:
    """Java runs already, so jars can no longer be added: they have to be spark-submit's."""
    try:
        SparkContext._jvm.Thread.currentThread().getContextClassLoader().loadClass(_DELTA)  # type: ignore[union-attr]
    except Py4JError:
        raise MachineError(
            "spark-submit was not given the jars of Delta Lake and Kafka",
            hint="spark-submit --jars $(python -m spark_jobs.jars | paste -sd,) ...",
        ) from None
