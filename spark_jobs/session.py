"""The one place that builds a SparkSession."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from py4j.protocol import Py4JError  # type: ignore[import-untyped]
from pyspark import SparkConf, SparkContext
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, MachineError
from spark_jobs.failure import failure_cause, one_line
from spark_jobs.jars import ensure_jars
from spark_jobs.java import require_java, require_utf8_names, utf8_for_java

_DELTA = "io.delta.sql.DeltaSparkSessionExtension"
FOREIGN_VARIABLES = ("SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_PYTHON", "PYSPARK_SUBMIT_ARGS")
"""What names another Spark, its settings or its Python. On one machine the installed ones are used, whatever these say."""
JAVA_LOG = "java.log"
"""What Java and the Python workers of Spark print, in the folder logs of the home."""
_LOG_BYTES = 10_000_000
_MASTER = re.compile(r"spark://([^:,/]+):(\d+)")


def build_session(settings: Settings, app_name: str = "adtally", extra: dict[str, str] | None = None) -> SparkSession:
    """A session with Delta Lake, in UTC, quiet, without a UI; ``extra`` overrides single Spark settings.

    On one machine everything is on loopback. On a cluster the addresses and the executors' folders are Spark's own business, and
    what spark-submit was told, where it started this process, goes before our settings.

    Raises MachineError where Java or a jar is missing, or file names are not UTF-8; AdtallyError where Spark does not start.
    """
    require_java()
    require_utf8_names()
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    os.environ["PYTHONPATH"] = paths
    submitted = _submitted()
    chosen = settings.spark_master if "spark_master" in settings.model_fields_set else None
    master = chosen or submitted.get("spark.master") or settings.spark_master
    if is_one_machine(master) and not submitted:
        for name in FOREIGN_VARIABLES:  # of another Spark or Python on this machine
            os.environ.pop(name, None)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    scratch = settings.scratch_path
    scratch.mkdir(parents=True, exist_ok=True)
    options = {
        "spark.driver.memory": settings.driver_memory,
        # serial collector: two cores are worth more to the tasks than to the collector, and it keeps the heap small
        "spark.driver.extraJavaOptions": (
            "-XX:+UseSerialGC "
            f"-Dderby.system.home={_java_option(str(scratch))} "
            f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties').as_uri()}"
        ),
        "spark.executorEnv.PYTHONUTF8": "1",  # file names are UTF-8, whatever the locale of a worker
        "spark.executorEnv.PYTHONPATH": paths,  # where the executors see these folders; elsewhere the package is installed
        "spark.ui.enabled": "false",
        "spark.hadoop.fs.permissions.umask-mode": "077",  # Hadoop has a umask of its own for files of checkpoints
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
        "spark.sql.streaming.stopTimeout": "3s",
        # the driver looks at a batch's files itself: a task for each, which is Spark's way, takes ten times as long
        "spark.sql.sources.parallelPartitionDiscovery.threshold": "1000000",
    }
    options |= _of_one_machine(scratch) if is_one_machine(master) else _of_a_cluster(master)
    if submitted:
        _require_delta()
    else:
        options["spark.jars"] = ",".join(str(jar) for jar in ensure_jars(settings))
    options = {name: text for name, text in options.items() if name not in submitted} | (extra or {})
    builder = SparkSession.builder.master(master).appName(app_name)
    for key, value in options.items():
        builder = builder.config(key, value)
    try:
        with utf8_for_java():
            if not submitted:
                conf = SparkConf().setMaster(master).setAppName(app_name).setAll(list(options.items()))
                _start_java(conf, settings.home_path / "logs" / JAVA_LOG)
            session = builder.getOrCreate()
    except Exception as error:  # Java's and Spark's own, many kinds
        cause = failure_cause(error)
        raise AdtallyError(f"Spark does not start on {master}: {cause}", hint=cause.hint or "is that master there?") from error
    _print_no_cut_calls(session.sparkContext)
    return session


def _print_no_cut_calls(context: SparkContext) -> None:
    """Print no trace of a call that Java's end cuts off: whoever made it gets the error."""
    logging.getLogger().addFilter(_is_not_of_py4j)  # which logs such a call, and raises it
    if context._accumulatorServer is not None:
        context._accumulatorServer.handle_error = lambda *_: None  # type: ignore[method-assign]


def _is_not_of_py4j(record: logging.LogRecord) -> bool:
    return record.module != "java_gateway"


def _start_java(conf: SparkConf, log: Path) -> None:
    """Start Java, where none runs, in a process group of its own: a signal to ours does not end it in the middle of a batch.

    It ends when this process does, however that ends: its standard input is a pipe that then closes. What it prints, warnings on a
    good day, goes to ``log``, which begins anew once it is long; where it does not start, the end of ``log`` is in the error.
    """
    if SparkContext._gateway is not None:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    is_long = log.exists() and log.stat().st_size > _LOG_BYTES
    with log.open("wb" if is_long else "ab") as output:
        before = output.tell()
        try:
            popen = {"process_group": 0, "stdout": output, "stderr": output}
            gateway = launch_gateway(conf, popen_kwargs=popen)  # type: ignore[no-untyped-call]
        except Exception as error:
            with log.open("rb") as said:
                said.seek(before)
                printed = said.read().decode("utf-8", "replace").strip()
            raise AdtallyError(f"Java does not start: {one_line(printed[-400:]) or error}", hint=f"{log} has all of it") from error
    SparkContext._ensure_initialized(gateway=gateway)


def java_pid(spark: SparkSession) -> int:
    """The process of Java, below which the Python workers of one machine run."""
    return int(spark.sparkContext._jvm.java.lang.ProcessHandle.current().pid())  # type: ignore[union-attr]


def java_has_ended(patience_seconds: float = 0.0) -> bool:
    """Whether the Java that this process started has ended, or does within ``patience_seconds``. False: it is another's."""
    process = getattr(SparkContext._gateway, "proc", None)
    if process is None:
        return False
    try:
        process.wait(patience_seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def end_java() -> None:
    """Kill the Java that this process started, and the Python workers below it. Whoever waits for it gets an error."""
    process = getattr(SparkContext._gateway, "proc", None)
    if process is None:
        return
    with contextlib.suppress(psutil.Error):
        java = psutil.Process(process.pid)
        for each in [java, *java.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                each.kill()


def is_one_machine(master: str) -> bool:
    """Whether tasks run in the driver's own process, not in executors, which may be on other machines."""
    return master == "local" or master.startswith("local[")


def _of_one_machine(scratch: Path) -> dict[str, str]:
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    return {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.local.dir": str(_local_folder(scratch)),
    }


def _java_option(value: str) -> str:
    """A value among Java's options, which Spark cuts at blanks: in quotes, where it needs them."""
    return value if re.fullmatch(r"[\w./:@%+=~-]*", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _local_folder(scratch: Path) -> Path:
    """Spark's own working folder. Spark cuts a list of such at commas, so one whose path has a comma lies elsewhere."""
    if "," not in str(scratch):
        return scratch / "spark"
    folder = tempfile.mkdtemp(prefix="adtally-")  # of this user alone, under a name that nobody could have taken before
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


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
