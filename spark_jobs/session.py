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
import pyspark
from py4j.protocol import Py4JError  # type: ignore[import-untyped]
from pyspark import SparkConf, SparkContext
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from spark_jobs.class_archive import class_archive
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, MachineError
from spark_jobs.failure import failure_cause, one_line
from spark_jobs.jars import ensure_jars
from spark_jobs.java import require_java, require_utf8_names, utf8_for_java

_DELTA = "io.delta.sql.DeltaSparkSessionExtension"
_CHECKPOINTING = "org.apache.spark.sql.execution.streaming.checkpointing"
FOREIGN_VARIABLES = ("SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_PYTHON", "PYSPARK_SUBMIT_ARGS")
"""Variables that name another Spark, its settings or its Python. On one machine the session ignores them."""
JAVA_LOG = "java.log"
"""The output of Java and of Spark's Python workers, in the folder logs of the home."""
_LOG_BYTES = 10_000_000
_MASTER = re.compile(r"spark://([^:,/]+):(\d+)")


def build_session(settings: Settings, app_name: str = "adtally") -> SparkSession:
    """Build a session with Delta Lake, in UTC, without a UI.

    On one machine everything is on loopback. On a cluster Spark chooses the addresses and the executors' folders. If spark-submit
    started this process, its settings override ours.

    Raises MachineError if Java or a jar is missing or file names are not UTF-8, AdtallyError if Spark does not start.
    """
    require_java()
    require_utf8_names()
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    os.environ["PYTHONPATH"] = paths
    submitted = _submitted()
    master = master_of(settings)
    if is_one_machine(master) and not submitted:
        for name in FOREIGN_VARIABLES:
            os.environ.pop(name, None)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    scratch = settings.scratch_path
    scratch.mkdir(parents=True, exist_ok=True)
    options = {
        "spark.driver.memory": settings.driver_memory,
        # The serial collector leaves the cores to the tasks and keeps the heap small. Java only plans here, so the second compiler
        # would cost more than it ever saves: 6 s of a core at the start and 0.6 s a batch.
        "spark.driver.extraJavaOptions": (
            "-XX:+UseSerialGC -XX:TieredStopAtLevel=1 "
            f"-Dderby.system.home={_java_option(str(scratch))} "
            f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties').as_uri()}"
        ),
        "spark.executorEnv.PYTHONUTF8": "1",  # file names are UTF-8, whatever the locale of a worker
        "spark.executorEnv.PYTHONPATH": paths,  # for executors that see these folders; elsewhere the package is installed
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
        "spark.python.daemon.module": "spark_jobs.python_daemon",
        "spark.sql.streaming.metricsEnabled": "false",
        "spark.sql.streaming.minBatchesToRetain": "100",
        "spark.sql.streaming.stopTimeout": "3s",
        # Spark's default renames through Hadoop's FileContext, which starts the program readlink eight times for each file of a
        # checkpoint: a tenth of a second a batch. This one renames, too.
        "spark.sql.streaming.checkpointFileManagerClass": f"{_CHECKPOINTING}.FileSystemBasedCheckpointFileManager",
        # else a first batch that was killed while Spark planned it, or torn by a power cut, could never be planned again
        "spark.sql.streaming.verifyCheckpointDirectoryEmptyOnStart": "false",
        # the driver lists a batch's files itself: Spark's way, a task for each file, takes ten times as long
        "spark.sql.sources.parallelPartitionDiscovery.threshold": "1000000",
    }
    options |= _local_options(scratch) if is_one_machine(master) else _cluster_options(master)
    if submitted:
        _require_delta()
    else:
        options |= _classes(settings, options["spark.driver.extraJavaOptions"], one_machine=is_one_machine(master))
    options = {name: text for name, text in options.items() if name not in submitted}
    builder = SparkSession.builder.master(master).appName(app_name)
    for key, value in options.items():
        builder = builder.config(key, value)
    try:
        with utf8_for_java():
            if not submitted:
                conf = SparkConf().setMaster(master).setAppName(app_name).setAll(list(options.items()))
                _start_java(conf, settings.home_path / "logs" / JAVA_LOG)
            session = builder.getOrCreate()
    except Exception as error:  # Java and Spark raise many kinds
        cause = failure_cause(error)
        raise AdtallyError(f"Spark does not start on {master}: {cause}", hint=cause.hint or "is that master there?") from error
    _silence_cut_calls(session.sparkContext)
    return session


def _silence_cut_calls(context: SparkContext) -> None:
    """Print no trace of a call that fails because Java ends: its caller gets the error."""
    logging.getLogger().addFilter(_is_not_from_py4j)
    if context._accumulatorServer is not None:
        context._accumulatorServer.handle_error = lambda *_: None  # type: ignore[method-assign]


def _is_not_from_py4j(record: logging.LogRecord) -> bool:
    return record.module != "java_gateway"


def _start_java(conf: SparkConf, log: Path) -> None:
    """Start Java, if none runs, in its own process group, so that a signal to our group does not end it during a batch.

    Java ends with this process, because its standard input is a pipe that then closes. It prints to ``log``, which is emptied once
    it is long. If Java does not start, the error contains the end of ``log``.
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
    """Return the process id of Java, the parent of the Python workers on one machine."""
    return int(spark.sparkContext._jvm.java.lang.ProcessHandle.current().pid())  # type: ignore[union-attr]


def java_has_ended(patience_seconds: float = 0.0) -> bool:
    """Return whether the Java that this process started ends within ``patience_seconds``. False if this process started none."""
    process = getattr(SparkContext._gateway, "proc", None)
    if process is None:
        return False
    try:
        process.wait(patience_seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def end_java() -> None:
    """Kill the Java that this process started, and its Python workers. Calls that wait for it get an error."""
    process = getattr(SparkContext._gateway, "proc", None)
    if process is None:
        return
    with contextlib.suppress(psutil.Error):
        java = psutil.Process(process.pid)
        for each in [java, *java.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                each.kill()


def master_of(settings: Settings) -> str:
    """Return the master that `build_session` connects to: the one of the settings or, if they name none, spark-submit's."""
    chosen = settings.spark_master if "spark_master" in settings.model_fields_set else None
    return chosen or _submitted().get("spark.master") or settings.spark_master


def is_one_machine(master: str) -> bool:
    """Return whether tasks run in the driver's process, not in executors, which may be on other machines."""
    return master == "local" or master.startswith("local[")


def _local_options(scratch: Path) -> dict[str, str]:
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    os.environ.setdefault("SPARK_LAUNCHER_OPTS", _launcher_options())
    return {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.local.dir": str(_local_folder(scratch)),
    }


def _launcher_options() -> str:
    """Return options for the Java that works out Java's command line. It would open each of Spark's jars to find its own."""
    options = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    jars = Path(pyspark.__file__).parent / "jars"
    own = [jar for jar in map(str, jars.glob("spark-launcher_*.jar")) if not re.search(r"\s", jar)]  # the shell splits at blanks
    return " ".join([*options, *(f"-Xbootclasspath/a:{jar}" for jar in own)])


def _classes(settings: Settings, java_options: str, *, one_machine: bool) -> dict[str, str]:
    """Return the options that add the jars, and on one machine the archive of classes, which has classes of the class path only."""
    jars = [str(jar) for jar in ensure_jars(settings)]
    if not one_machine or any(os.pathsep in jar for jar in jars):
        return {"spark.jars": ",".join(jars)}
    options = {"spark.driver.extraClassPath": os.pathsep.join(jars)}
    archive = class_archive(settings)
    if archive is not None:
        options["spark.driver.extraJavaOptions"] = f"{java_options} -XX:SharedArchiveFile={_java_option(str(archive))}"
    return options


def _java_option(value: str) -> str:
    """Quote a value if it needs quotes: Spark cuts Java's options at blanks."""
    return value if re.fullmatch(r"[\w./:@%+=~-]*", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _local_folder(scratch: Path) -> Path:
    """Return Spark's working folder. Spark cuts the setting at commas, so the folder is elsewhere if the path has a comma."""
    if "," not in str(scratch):
        return scratch / "spark"
    folder = tempfile.mkdtemp(prefix="adtally-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _cluster_options(master: str) -> dict[str, str]:
    """Return the driver's address for executors: the one from which it reaches a standalone master; else Spark chooses."""
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
    """Return the settings of spark-submit if it started this process; empty if we start Java."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        return {}
    SparkContext._ensure_initialized()
    return dict(SparkConf().getAll())


def _require_delta() -> None:
    """Raise MachineError if spark-submit did not add the jars: Java already runs, so they cannot be added now."""
    try:
        SparkContext._jvm.Thread.currentThread().getContextClassLoader().loadClass(_DELTA)  # type: ignore[union-attr]
    except Py4JError:
        raise MachineError(
            "spark-submit was not given the jars of Delta Lake and Kafka",
            hint="spark-submit --jars $(python -m spark_jobs.jars | paste -sd,) ...",
        ) from None
